"""What a backend is: something that turns token ids into values, in one blocking call.

The engine decides what is scored, and when.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dvpo.data.templates import Encoded


@dataclass(frozen=True)
class ModelInfo:
    """What is served.

    `form` says in words which kind of checkpoint was found; `max_tokens` bounds prompt and response together.
    """

    name: str
    form: str
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    backend: str
    max_tokens: int


@dataclass(frozen=True)
class Scored:
    """Values of one text. `values_S` is h_0..h_T in float32: v is values[:-1], q is values[1:].

    `cached_tokens` counts the prompt tokens whose computation was not needed.
    """

    values_S: NDArray[np.float32]
    cached_tokens: int


class Backend(Protocol):
    """Scores texts. Called from at most `workers` threads at a time.

    keeps_prompts: what is computed of a prompt is kept for the texts that follow with it.
    """

    info: ModelInfo
    workers: int
    keeps_prompts: bool

    def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
        """Values of every text, in order. Any company gives the same values (the bound is the backend's to state).

        alone: no other call begins before this one ends, so it may use all of the machine.
        """
        ...

    def close(self) -> None:
        """Frees what the backend holds (memory, processes)."""
        ...
