"""How fast the server is beside a bare forward pass of the same model, and beside vLLM's server.

Both run on this machine in one run, in turns, on the same token ids, with the same number of threads. Tokens are those
of prompt and response of every text, computed or not. Every round has new texts, so no round finds its prompts kept.
"""

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from server.bench_targets import Bare, Dtype, Target, Workload, ours, vllm

VLLM_PYTHON = "DVPO_VLLM_PYTHON"
"""The environment variable with the path of a Python that has vLLM."""
_LEAST_TOKENS = 1000


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of both on one workload, by round."""

    workload: str
    tokens: int
    ours: list[float]
    other: list[float]

    def document(self) -> dict[str, Any]:
        """Medians and ranges, of both and of the rounds' ratios."""
        return {
            "workload": self.workload,
            "tokens_per_round": self.tokens,
            "ours_tokens_per_second": _spread(self.ours),
            "other_tokens_per_second": _spread(self.other),
            "ratio": _spread([mine / theirs for mine, theirs in zip(self.ours, self.other, strict=True)]),
        }


class Source:
    """Token ids to make texts of: passages of a text file, or random ordinary tokens of the vocabulary."""

    def __init__(self, tokenizer: Any, file: Path | None = None, seed: int = 0) -> None:
        """Raises InputError for a file that is not text, or too short."""
        self._random = random.Random(seed)
        if file is None:
            special = set(tokenizer.all_special_ids)
            self._ordinary = [i for i in range(len(tokenizer)) if i not in special]
            self._ids: list[int] = []
            return
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as text ({error}); name a text file") from error
        self._ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(self._ids) < _LEAST_TOKENS:
            raise InputError(f"{file}: only {len(self._ids)} tokens; name a text of at least {_LEAST_TOKENS}")

    def take(self, count: int) -> list[int]:
        """`count` ids, from a random place of the file (which goes on from its beginning)."""
        if not self._ids:
            return self._random.choices(self._ordinary, k=count)
        start = self._random.randrange(len(self._ids))
        return [self._ids[(start + i) % len(self._ids)] for i in range(count)]

    def near(self, count: int) -> int:
        """A length within a third of `count`."""
        return self._random.randint(count - count // 3, count + count // 3)


def distinct_texts(source: Source, count: int = 64) -> Workload:
    """Distinct texts of about 300 tokens, one a request, from 16 clients."""
    requests = [[Encoded(source.take(source.near(100)), source.take(source.near(200)))] for _ in range(count)]
    return Workload(f"{count} distinct texts of about 300 tokens, 16 clients", 16, requests)


def shared_prompts(source: Source, count: int = 4) -> Workload:
    """Groups of 8 responses of about 100 tokens to a prompt of 512 tokens, one group a request, from 4 clients."""
    requests = []
    for _ in range(count):
        prompt = source.take(512)
        requests.append([Encoded(prompt, source.take(source.near(100))) for _ in range(8)])
    return Workload(f"{count} groups of 8 responses of about 100 tokens to a prompt of 512, 4 clients", 4, requests)


def against_bare(serve: Sequence[str], folder: Path, dtype: Dtype, file: Path | None, rounds: int) -> dict[str, Any]:
    """Our server, started by the command `serve`, beside a bare padded forward pass; see `document`.

    Raises:
        InputError: no usable model or text.
        StageError: the server does not start or fails.
    """
    source = _source(folder, file)
    bare = Bare(folder, dtype)
    with ours(serve, folder, dtype) as server:
        return _document("bare", dtype, server, bare, [distinct_texts], source, rounds)


def against_vllm(serve: Sequence[str], folder: Path, dtype: Dtype, file: Path | None, rounds: int) -> dict[str, Any]:
    """Our server beside `vllm serve`, from the Python that DVPO_VLLM_PYTHON names. Raises as `against_bare` does."""
    python = os.environ.get(VLLM_PYTHON)
    if not python:
        raise InputError(f"{VLLM_PYTHON} is not set; set it to the path of a Python that has vLLM")
    source = _source(folder, file)
    with ours(serve, folder, dtype) as server, vllm(python, folder, dtype) as other:
        return _document("vllm", dtype, server, other, [distinct_texts, shared_prompts], source, rounds)


def compare(
    make: Callable[[Source], Workload], source: Source, mine: Target, theirs: Target, rounds: int
) -> Comparison:
    """Runs both in turns; who begins changes from round to round. One round more comes first and is not counted."""
    rates: dict[Target, list[float]] = {mine: [], theirs: []}
    for number in range(rounds + 1):
        workload = make(source)
        for target in (mine, theirs) if number % 2 else (theirs, mine):
            seconds, _ = target.run(workload)
            if number:
                rates[target].append(workload.tokens / seconds)
    return Comparison(workload.name, workload.tokens, rates[mine], rates[theirs])


def _document(
    against: str,
    dtype: Dtype,
    mine: Target,
    theirs: Target,
    makers: Sequence[Callable[[Source], Workload]],
    source: Source,
    rounds: int,
) -> dict[str, Any]:
    small = distinct_texts(source, 4)
    pairs = zip(mine.run(small)[1], theirs.run(small)[1], strict=True)
    return {
        "against": against,
        "dtype": dtype,
        "rounds": rounds,
        "cores": os.cpu_count(),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "workloads": [compare(make, source, mine, theirs, rounds).document() for make in makers],
    }


def _source(folder: Path, file: Path | None) -> Source:
    from dvpo.models import load_tokenizer

    return Source(load_tokenizer(folder), file)


def _spread(numbers: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
