"""Which of the waiting texts make the next batch.

The one that has waited longest is always in it, so nobody starves; beside it come the texts with its prompt, then those
nearest to it in length, up to a budget of tokens. Another prompt is begun only where all that wait with it fit: the
others would have to wait until it is computed.

`known` are the prompts whose computation was kept, so that only the responses to them cost anything.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from dvpo.data.templates import Encoded
from server.backends import Scored

_MOST_OVER = 1.125
"""Of a share: a prompt's texts are not parted for less."""


@dataclass(eq=False)
class Request:
    """Results of one submit as they come in; `done` is set when all are there or one failed."""

    results: list[Scored | None]
    done: asyncio.Future[None]
    inference_seconds: float = 0.0
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.results)


@dataclass(eq=False)
class Waiting:
    """One text in the queue. `suspect` after its batch failed: it must not fail with the others again."""

    item: Encoded
    request: Request
    position: int
    tokens: int
    prompt: bytes
    suspect: bool = False


def choose(waiting: list[Waiting], share: int, budget: int, known: AbstractSet[bytes] = frozenset()) -> list[Waiting]:
    """The next batch, of `share` tokens, and at most `budget` so that a prompt's texts stay together.

    `waiting` is in the order of arrival, and the first of it is in the batch.
    """
    oldest = waiting[0]
    if oldest.suspect:
        return [oldest]
    groups: defaultdict[bytes, list[Waiting]] = defaultdict(list)
    for entry in waiting:
        if not entry.suspect:
            groups[entry.prompt].append(entry)
    own = groups.pop(oldest.prompt)
    together = cost_of(own, known)
    share = min(max(share, together) if together <= _MOST_OVER * share else share, budget)
    batch = [oldest]
    cost = cost_of(batch, known)
    for entry in _nearest(own[1:], oldest):
        cost += len(entry.item.response_ids)
        if cost > share:
            return batch
        batch.append(entry)
    firsts = _nearest([group[0] for group in groups.values()], oldest)
    for group in (groups[first.prompt] for first in firsts):
        cost += cost_of(group, known)
        if cost > share:
            break
        batch += group
    return batch


def cost_of(batch: Sequence[Waiting], known: AbstractSet[bytes] = frozenset()) -> int:
    """Tokens to compute, every prompt once."""
    prompts = {entry.prompt: len(entry.item.prompt_ids) for entry in batch if entry.prompt not in known}
    return sum(prompts.values()) + sum(len(entry.item.response_ids) for entry in batch)


def length_of(item: Encoded) -> int:
    return len(item.prompt_ids) + len(item.response_ids)


def _nearest(entries: list[Waiting], to: Waiting) -> list[Waiting]:
    """Nearest in length first, and of those in the order of arrival."""
    return sorted(entries, key=lambda entry: abs(entry.tokens - to.tokens))
