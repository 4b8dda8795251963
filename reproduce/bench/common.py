"""Measured processes: each has one thing to run, all are started together, and then they run in turns, round by round.

So a slow spell of the machine meets all of them alike. The first turn of each is a warm-up and is not counted.
"""

import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dvpo.errors import StageError
from dvpo.memory import give_back
from reproduce import process_memory, provenance
from reproduce.commands.common import quiet

Row = dict[str, float]
"""What one turn measured: `seconds`, `memory_mb`, and what the job adds."""


class Turns:
    """A measured process's side of the turns.

    `memory_mb` is the process's highest memory so far, less what it held before the job built its models: weights,
    gradients, optimiser state and activations. On a GPU it is what torch allocated there; without one it is resident
    memory, the libraries' own buffers included.
    """

    def __init__(self, parent: Connection) -> None:
        self._parent = parent
        self._before = self._began = 0.0

    def begin(self) -> None:
        """Waits for the first turn. The libraries are loaded, the models are not: memory counts from here."""
        give_back(after_loading=True)
        self._parent.send("ready")
        self._parent.recv()
        _reset_peak()
        self._before = _held_mb()
        self.start_clock()

    def start_clock(self) -> None:
        """What was done since the last call belongs to no turn."""
        self._began = time.perf_counter()

    def end(self, **facts: float) -> None:
        """Reports a turn and waits for the next one. Raises EOFError where there is none."""
        finish()
        seconds = time.perf_counter() - self._began
        self._parent.send({"seconds": seconds, "memory_mb": _peak_mb() - self._before, **facts})
        self._parent.recv()
        self.start_clock()


@dataclass(frozen=True)
class Job:
    """What a measured process runs: `run(turns, *given)`, which takes turns until it is ended."""

    run: Callable[..., None]
    given: tuple[Any, ...] = ()


def in_turns(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[Row]]:
    """The counted turns of every job; who begins changes from round to round.

    Raises what a job raised, or StageError where its process died.
    """
    context = multiprocessing.get_context("spawn")
    rows: dict[str, list[Row]] = {name: [] for name in jobs}
    with ExitStack() as stack:
        workers: dict[str, Connection] = {}
        for name, job in jobs.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()  # the worker's death is then the end of the pipe
            stack.callback(process.join)
            stack.enter_context(ours)  # closed before the join: the worker ends at the end of the pipe
            workers[name] = ours
        for name, worker in workers.items():
            _answer(name, worker)  # it has its libraries
        for number in range(rounds + 1):
            order = list(workers.items())
            for name, worker in order if number % 2 else order[::-1]:
                worker.send("go")
                row = _answer(name, worker)
                if number:
                    rows[name].append(row)
    return rows


def load_libraries(start: Path) -> None:
    """Imports what any of the measured trainers needs, so that all processes hold the same before they begin."""
    from dvpo import models

    for name in ("gvm", "reward", "policy"):
        importlib.import_module(f"dvpo.training.{name}")
    importlib.import_module("trl.trainer.grpo_trainer")
    models.load(start, "policy")  # dropped at once: the library loads an architecture's code at its first use


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def column(rows: Sequence[Row], name: str) -> list[float]:
    """One field of every turn."""
    return [row[name] for row in rows]


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and range of the rounds' ratios."""
    return spread([a / b for a, b in zip(mine, theirs, strict=True)])


def peak(rows: Sequence[Row]) -> float:
    """Highest memory in megabytes; it only grows, so the last turn has it."""
    return rows[-1]["memory_mb"]


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {"device": provenance.device(), "versions": provenance.versions(), "git_commit": provenance.code_commit()}


def _serve(parent: Connection, job: Job) -> None:
    quiet()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the trainers print their losses
    try:
        job.run(Turns(parent), *job.given)
    except (EOFError, ConnectionError):
        pass  # the measuring is over
    except Exception as error:  # whatever it is, the parent raises it
        parent.send(error)


def _answer(name: str, worker: Connection) -> Any:
    try:
        answer = worker.recv()
    except EOFError as error:
        raise StageError(f"the measured process of {name} was killed (out of memory?)") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def finish() -> None:
    """Waits until a GPU has done what it was given: only then does a clock on this side say anything."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    """The peak starts again from here."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        process_memory.reset_peak()


def _held_mb() -> float:
    import torch

    return (
        torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else process_memory.resident_bytes() / 2**20
    )


def _peak_mb() -> float:
    import torch

    return (
        torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else process_memory.peak_bytes() / 2**20
    )
