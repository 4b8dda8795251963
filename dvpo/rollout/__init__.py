"""Answers of the current policy. One protocol; the engine behind it may be any library that samples tokens."""

from typing import Protocol


class Engine(Protocol):
    """Samples responses from the policy as it is now."""

    def generate(self, prompts: list[list[int]], *, seed: int, greedy: bool = False) -> list[list[int]]:
        """One response per prompt, as token ids. It ends with EOS unless it met the length limit.

        The same prompts, weights and seed give the same responses.
        """
        ...
