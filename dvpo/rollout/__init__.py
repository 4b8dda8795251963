"""Answers of the current policy. One protocol; the engine behind it may be any library that samples tokens."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """A sampled response: T token ids, and the log-probability with which the engine drew each of them.

    It ends with EOS unless it met the length limit. The log-probabilities are of the distribution that was sampled,
    temperature included.
    """

    token_ids: list[int]
    logprobs: list[float]


class Engine(Protocol):
    """Answers prompts (token ids) by the policy as it is now. Each method returns one response per prompt, in order."""

    def awake(self) -> AbstractContextManager[None]:
        """The phase in which answers are asked for: takes over the policy's weights, and frees its memory at the end.

        Every process of a distributed run enters it at the same time.
        """
        ...

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """Responses at the engine's temperature.

        A prompt's response depends on the weights, the prompt and its own seed alone: neither on its neighbours nor on
        the number of processes (up to what rounding does to the logits).
        """
        ...

    def greedy(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The most probable token at every step."""
        ...


def prompt_seed(*place: int) -> int:
    """The seed of one response by its place in the run: the run's seed, the update, its number in the update."""
    return random.Random(" ".join(map(str, place))).getrandbits(63)
