"""Which of the waiting texts make the next batch.

The one that has waited longest is always in it, so nobody starves; beside it come the texts with its prompt, then those
nearest to it in length, up to a budget of tokens.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from dvpo.data.templates import Encoded
from server.backends import Scored


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


def choose(waiting: list[Waiting], budget: int) -> list[Waiting]:
    """The next batch; `waiting` is in the order of arrival, and the first of it is in the batch."""
    oldest = waiting[0]
    if oldest.suspect:
        return [oldest]
    # Nearest in length first, but the texts with the same prompt before all; a stable sort keeps the order of arrival.
    rest = [e for e in waiting[1:] if not e.suspect]
    rest.sort(key=lambda e: (e.prompt != oldest.prompt, abs(e.tokens - oldest.tokens)))
    batch, prompts, cost = [oldest], {oldest.prompt}, oldest.tokens
    for entry in rest:
        more = len(entry.item.response_ids) if entry.prompt in prompts else entry.tokens
        if cost + more > budget:
            break
        batch.append(entry)
        prompts.add(entry.prompt)
        cost += more
    # The backend sees the texts of one prompt beside one another.
    first = {prompt: place for place, prompt in reversed(list(enumerate(e.prompt for e in batch)))}
    return sorted(batch, key=lambda e: first[e.prompt])


def cost_of(batch: Sequence[Waiting]) -> int:
    """Tokens to compute when nothing is cached, every prompt once."""
    prompts = {entry.prompt: len(entry.item.prompt_ids) for entry in batch}
    return sum(prompts.values()) + sum(len(entry.item.response_ids) for entry in batch)


def length_of(item: Encoded) -> int:
    return len(item.prompt_ids) + len(item.response_ids)
