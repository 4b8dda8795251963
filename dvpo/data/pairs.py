"""From examples to training texts: preference pairs, rewarded responses, and trajectories of the same policy."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dvpo.data.records import Example
from dvpo.data.splits import prompt_key
from dvpo.data.templates import Encoded, LengthNotes, encode_prompt, encode_response, limit
from dvpo.errors import InputError, in_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A better and a worse response to one prompt. `prompt` numbers the prompts, for intervals over prompts."""

    better: Encoded
    worse: Encoded
    prompt: int


@dataclass(frozen=True, slots=True)
class Pick:
    """One response of one example, by index."""

    example: int
    response: int


def prompt_numbers(examples: Sequence[Example]) -> list[int]:
    """The prompt of every example as a number, that of its first example: a prompt may stand in many rows."""
    first: dict[str, int] = {}
    return [first.setdefault(prompt_key(example.prompt), i) for i, example in enumerate(examples)]


def preference_picks(
    examples: Sequence[Example], max_pairs_per_prompt: int | None, seed: int
) -> list[tuple[Pick, Pick]]:
    """(better, worse) of every preference, at most so many per prompt (a seeded sample), in the examples' order."""
    by_prompt: dict[int, list[tuple[Pick, Pick]]] = defaultdict(list)
    for i, number in enumerate(prompt_numbers(examples)):
        by_prompt[number] += [(Pick(i, better), Pick(i, worse)) for better, worse in examples[i].preferences]
    rng = random.Random(seed)
    chosen = []
    for pairs in by_prompt.values():
        if max_pairs_per_prompt is not None and len(pairs) > max_pairs_per_prompt:
            pairs = rng.sample(pairs, max_pairs_per_prompt)
        chosen += pairs
    return sorted(chosen, key=lambda pair: pair[0].example)


@dataclass
class Encoder:
    """Encodes picked responses under the length limits, each with its trajectory, and counts what the limits did.

    A response that is picked again is encoded and counted once.
    """

    tokenizer: "PreTrainedTokenizerBase"
    examples: Sequence[Example]
    max_prompt_tokens: int
    max_response_tokens: int
    trajectory_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self.notes = LengthNotes()
        self._texts: dict[Pick, Encoded | None] = {}
        self._prompts: dict[int, list[int]] = {}
        self.prompt_numbers = prompt_numbers(self.examples)
        self._by_policy: dict[str, list[Pick]] = defaultdict(list)
        for i, example in enumerate(self.examples):
            for j, response in enumerate(example.responses):
                if response.policy is not None:
                    self._by_policy[response.policy].append(Pick(i, j))

    def text(self, pick: Pick) -> Encoded | None:
        """[x, y] of one response, or None where the prompt is over its limit (counted)."""
        if pick not in self._texts:
            response = encode_response(self.tokenizer, self.examples[pick.example].responses[pick.response].text)
            encoded = Encoded(self._prompt(pick), response)
            self._texts[pick] = limit(encoded, self.max_prompt_tokens, self.max_response_tokens, self.notes)
        return self._texts[pick]

    def _prompt(self, pick: Pick) -> list[int]:
        example = self.examples[pick.example]
        with in_row(example.origin):
            if self.trajectory_k:
                trajectory = self.trajectory(pick)
                self.notes.short_trajectories += len(trajectory) < self.trajectory_k
                self.notes.without_trajectory += not trajectory
                return encode_prompt(self.tokenizer, example.prompt, trajectory)
            if pick.example not in self._prompts:
                self._prompts[pick.example] = encode_prompt(self.tokenizer, example.prompt)
        return self._prompts[pick.example]

    def trajectory(self, pick: Pick) -> list[tuple[tuple[dict[str, str], ...], str]]:
        """tau: up to k question-answer pairs of the same policy, to other prompts, drawn by the pick itself.

        Empty for a response whose policy is unknown or has answered no other prompt.
        """
        policy = self.examples[pick.example].responses[pick.response].policy
        if not self.trajectory_k or policy is None:
            return []
        own = self.prompt_numbers[pick.example]
        others = [p for p in self._by_policy[policy] if self.prompt_numbers[p.example] != own]
        rng = random.Random(f"{self.seed} {pick.example} {pick.response}")
        chosen = rng.sample(others, min(self.trajectory_k, len(others)))
        return [(self.examples[p.example].prompt, self.examples[p.example].responses[p.response].text) for p in chosen]

    def pairs(self, picks: Sequence[tuple[Pick, Pick]]) -> Iterator[EncodedPair]:
        """The encodable pairs among `picks`."""
        for better, worse in picks:
            encoded = self.text(better), self.text(worse)
            if encoded[0] is not None and encoded[1] is not None:
                yield EncodedPair(encoded[0], encoded[1], self.prompt_numbers[better.example])

    def require_trajectories(self) -> None:
        """Raises InputError where trajectories were asked for, and not one text has any."""
        if self.trajectory_k and self.notes.without_trajectory == self.notes.texts > 0:
            raise InputError(
                f"trajectory_k={self.trajectory_k}: no policy has answered two prompts; give data that names who wrote "
                "each response (a model for each), or leave trajectory_k out"
            )
