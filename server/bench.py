"""How fast the server is beside a bare forward pass of the same model, and beside vLLM's server.

Both run on this machine in one run, in turns, on the same token ids, with the same number of threads. Tokens are those
of prompt and response of every text, computed or not. Every round has new texts, so no round finds its prompts kept.
"""

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    """Tokens per second of both on one workload, by round, and the seconds that each request waited."""

    workload: str
    tokens: int
    ours: list[float]
    other: list[float]
    ours_waits: list[float]
    other_waits: list[float]

    def document(self) -> dict[str, Any]:
        """Medians and ranges, of both and of the rounds' ratios, and percentiles of all rounds' waits."""
        return {
            "workload": self.workload,
            "tokens_per_round": self.tokens,
            "ours_tokens_per_second": _spread(self.ours),
            "other_tokens_per_second": _spread(self.other),
            "ratio": _spread([mine / theirs for mine, theirs in zip(self.ours, self.other, strict=True)]),
            "ours_seconds": _percentiles(self.ours_waits),
            "other_seconds": _percentiles(self.other_waits),
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


def distinct_texts(source: Source, count: int = 64, clients: int = 16) -> Workload:
    """Distinct texts of about 300 tokens, one a request."""
    requests = [[Encoded(source.take(source.near(100)), source.take(source.near(200)))] for _ in range(count)]
    return Workload(f"{count} distinct texts of about 300 tokens, {_clients(clients)}", clients, requests)


def shared_prompts(source: Source, clients: int = 4) -> Workload:
    """4 to 8 groups of 8 responses of about 100 tokens to a prompt of 512 tokens.

    A request is a group, or a part of one where there are more clients than groups.
    """
    count = min(8, max(4, clients))
    size = max(1, min(8, 8 * count // clients))
    requests = []
    for _ in range(count):
        prompt = source.take(512)
        group = [Encoded(prompt, source.take(source.near(100))) for _ in range(8)]
        requests += [group[start : start + size] for start in range(0, 8, size)]
    what = f"{count} groups of 8 responses of about 100 tokens to a prompt of 512"
    if size < 8:
        what += f", {size} a request"
    return Workload(f"{what}, {_clients(clients)}", clients, requests)


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"


def against_bare(
    serve: Sequence[str], folder: Path, dtype: Dtype, file: Path | None, rounds: int, clients: Sequence[int] = ()
) -> dict[str, Any]:
    """Our server, started by the command `serve`, beside a bare padded forward pass; see `document`.

    clients: how many send at once, one measurement each; by default 16 send single texts.

    Raises:
        InputError: no usable model or text.
        StageError: the server does not start or fails.
    """
    source = _source(folder, file)
    bare = Bare(folder, dtype)
    with ours(serve, folder, dtype) as server:
        return _document("bare", dtype, server, bare, _single(clients), source, rounds)


def against_vllm(
    serve: Sequence[str], folder: Path, dtype: Dtype, file: Path | None, rounds: int, clients: Sequence[int] = ()
) -> dict[str, Any]:
    """Our server beside `vllm serve`, from the Python that DVPO_VLLM_PYTHON names. By default 4 clients send groups.

    Raises as `against_bare` does.
    """
    python = os.environ.get(VLLM_PYTHON)
    if not python:
        raise InputError(f"{VLLM_PYTHON} is not set; set it to the path of a Python that has vLLM")
    source = _source(folder, file)
    with ours(serve, folder, dtype) as server, vllm(python, folder, dtype) as other:
        groups = [partial(shared_prompts, clients=n) for n in clients or (4,)]
        return _document("vllm", dtype, server, other, [*_single(clients), *groups], source, rounds)


def _single(clients: Sequence[int]) -> list[Callable[[Source], Workload]]:
    """Workloads of single texts: 4 for each client, and no fewer than 16 nor more than 128."""
    return [partial(distinct_texts, count=min(128, max(16, 4 * n)), clients=n) for n in clients or (16,)]


def compare(
    make: Callable[[Source], Workload], source: Source, mine: Target, theirs: Target, rounds: int
) -> Comparison:
    """Runs both in turns; who begins changes from round to round. One round more comes first and is not counted."""
    rates: dict[Target, list[float]] = {mine: [], theirs: []}
    waits: dict[Target, list[float]] = {mine: [], theirs: []}
    for number in range(rounds + 1):
        workload = make(source)
        for target in (mine, theirs) if number % 2 else (theirs, mine):
            outcome = target.run(workload)
            if number:
                rates[target].append(workload.tokens / outcome.seconds)
                waits[target] += outcome.waits
    return Comparison(workload.name, workload.tokens, rates[mine], rates[theirs], waits[mine], waits[theirs])


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
    pairs = zip(mine.run(small).values, theirs.run(small).values, strict=True)
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


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """What half and 99 of 100 requests wait at most; None where there were none."""
    if not seconds:
        return None
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 99)}


def _spread(numbers: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
