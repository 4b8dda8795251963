"""The cost model beside what is measured here: methods of the online loop on a CPU, each in a process of its own.

Time is the process's own CPU time on one thread, so that other work on the machine counts little. Only ratios of times
are compared; memory also in absolute numbers.
"""

import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dvpo.config import PolicySettings
from reproduce import process_memory
from reproduce.cost import memory, shapes, timing
from reproduce.cost.hardware import GIB, Cluster, Device
from reproduce.cost.planner import Stage, Wish, job_of, setup_of

METHODS: dict[str, dict[str, Any]] = {
    "dvpo": {"name": "dvpo"},
    "ppo": {"name": "ppo", "critic_learning_rate": 1e-5},
    "remax": {"name": "remax"},
    "grpo": {"name": "grpo", "group_size": 3},
}
_SOURCES = ("measured", "predicted")
_WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


@dataclass(frozen=True)
class Speeds:
    """This machine's, in one process with one thread: operations a second of a matrix product, bytes a second read."""

    flops: float
    bandwidth: float


def settings(method: str, tokens: int = 24) -> PolicySettings:
    """A small update: 4 prompts, passes of 2, one epoch."""
    return PolicySettings.model_validate({
        "algorithm": METHODS[method], "learning_rate": 1e-6, "updates": 1, "prompts_per_update": 4, "minibatch_size": 4,
        "micro_batch_size": 2, "epochs": 1, "max_prompt_tokens": 128, "max_new_tokens": tokens,
    })  # fmt: skip


def measure(folders: dict[str, Path], method: str, updates: int = 3) -> dict[str, float]:
    """One method in a fresh process. folders: policy, value and reward checkpoints.

    Returns seconds and generate_seconds (CPU time per update, medians), memory_gib (the peak's growth from before the
    models were loaded), prompt_tokens and response_tokens (the longest of the last update).
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, folders, method, updates), daemon=True)
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    finally:
        process.join()
    return found


def speeds(shape: shapes.Shape) -> Speeds:
    """Medians of CPU time over products of the model's own size, and over sums of a block beyond the caches."""
    import torch

    torch.set_num_threads(1)
    rows = 128
    x, w = torch.randn(rows, shape.hidden), torch.randn(shape.hidden, shape.intermediate)
    block = torch.randn(2**26)
    matmul = _median(lambda: x @ w, 200)
    reading = _median(lambda: block.sum(), 9)
    return Speeds(2 * rows * shape.hidden * shape.intermediate / matmul, 4 * 2**26 / reading)


def predict(shape: shapes.Shape, method: str, measured: dict[str, float], speed: Speeds) -> dict[str, float]:
    """The same numbers by the cost model, for texts of the measured lengths."""
    device = Device("one thread", 64 * GIB, speed.flops, speed.bandwidth, ahead=False)
    cluster = Cluster("here", device, 1, 1e9)
    stage = Stage(method, method, shape, settings(method, int(measured["response_tokens"])))
    setup = setup_of(stage, cluster, 0, False, Wish())
    job = replace(job_of(stage, cluster), prompt_tokens=measured["prompt_tokens"])
    seconds = timing.seconds(job, shape, setup, cluster, 1.0)
    peak = memory.peak(memory.phases(job, shape, setup, cluster))[1]
    return {
        "seconds": sum(seconds.values()),
        "generate_seconds": seconds["generate"],
        "memory_gib": peak / GIB,
    }


def report(rows: list[dict[str, Any]], machine: str) -> dict[str, Any]:
    """The comparison as it is kept: every row with its time and memory against DVPO's of the same model."""
    dvpo = {row["model"]: row for row in rows if row["method"] == "dvpo"}
    for row in rows:
        row["ratios"] = {
            what: {source: round(row[source][what] / dvpo[row["model"]][source][what], 3) for source in _SOURCES}
            for what in ("seconds", "memory_gib")
        }
    return {
        "command": "DVPO_SMOLLM2=FOLDER DVPO_PLAN_CHECK=FILE.json pytest -m slow tests/reproduce/test_cost_measured.py",
        "machine": machine,
        "note": "seconds are a process's own CPU time per update, one thread; memory is the growth of its peak",
        "rows": rows,
    }


def _measure(parent: Connection, folders: dict[str, Path], method: str, updates: int) -> None:
    import gc

    import torch

    torch.set_num_threads(1)
    from dvpo import models
    from dvpo.training.policy import Frozen, OnlineTrainer

    words = _WORDS.split() * 3
    prompts = [({"role": "user", "content": " ".join(words[i : i + 24])},) for i in range(8)]
    models.load(folders["policy"], "policy")  # dropped: the library loads an architecture's code at its first use
    gc.collect()
    process_memory.reset_peak()
    before = process_memory.resident_bytes()
    frozen = Frozen(folders["value"], folders["reward"])
    trainer: Any = OnlineTrainer(folders["policy"], frozen, prompts, settings(method), 0)
    generating, lengths = [0.0], [0, 0]

    def timed(method: Any) -> Any:
        def run(prompts: Any, *arguments: Any) -> Any:
            start = time.process_time()
            answers = method(prompts, *arguments)
            generating[0] += time.process_time() - start
            lengths[:] = [max(map(len, prompts)), max(len(getattr(a, "token_ids", a)) for a in answers)]
            return answers

        return run

    trainer.engine.sample, trainer.engine.greedy = timed(trainer.engine.sample), timed(trainer.engine.greedy)
    totals, parts = [], []
    for _ in range(updates + 1):  # the first one warms up
        generating[0], start = 0.0, time.process_time()
        trainer.step()
        totals.append(time.process_time() - start)
        parts.append(generating[0])
    parent.send({
        "seconds": statistics.median(totals[1:]),
        "generate_seconds": statistics.median(parts[1:]),
        "memory_gib": (process_memory.peak_bytes() - before) / GIB,
        "prompt_tokens": lengths[0],
        "response_tokens": lengths[1],
    })  # fmt: skip


def _median(run: Any, times: int) -> float:
    run()
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)
