"""The stage that measures what an update of each method costs in time and memory (Table 7's tiny form)."""

import gc
import json
import multiprocessing
import statistics
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dvpo.config import PolicySettings
from dvpo.data.records import load_examples
from dvpo.files import write_json
from reproduce import process_memory
from reproduce.pipeline import Context


def cost(ctx: Context) -> dict[str, Any]:
    """Seconds per update and peak memory of several methods. Inputs: start, data, value, reward, reward_scale.

    Settings: methods {name: PolicySettings}, split (the prompts), rounds, updates (of one round).

    Each method has a fresh process of its own; all are started together and then wait. First each does a warm-up
    update, then in every round each does its `updates`, one process at a time, so that a slow spell of the machine
    meets all methods alike. `seconds` and `phases` are medians over rounds of the mean per update. `memory_mb` is the
    process's highest resident memory from before its models were built, less what it then held: weights, optimiser
    state, gradients, activations and the libraries' own buffers, in main memory (not a GPU's).
    """
    s = ctx.settings
    context = multiprocessing.get_context("spawn")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in s["methods"]}
    with ExitStack() as stack:
        workers: dict[str, Connection] = {}
        for name, method in s["methods"].items():
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, ctx.inputs, s["split"], method, ctx.seed), daemon=True
            )
            process.start()
            theirs.close()  # the worker's death is then the end of the pipe
            stack.callback(process.join)
            stack.enter_context(ours)  # closed before the join: the worker ends at the end of the pipe
            workers[name] = ours
        for worker in workers.values():
            _answer(worker)  # it has its libraries
        for worker in workers.values():
            _ask(worker, 1)
        for _ in range(s["rounds"]):
            for name, worker in workers.items():
                rounds[name].append(_ask(worker, s["updates"]))
    table = {"methods": {name: _summary(rows) for name, rows in rounds.items()}}
    write_json(ctx.out / "cost.json", table)
    return table


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over a method's rounds; memory only grows, so the last round has its peak."""
    seconds = [row["seconds"] for row in rows]
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "phases": {phase: statistics.median(r[phase] for r in rows) for phase in ("generate", "judge", "learn")},
        "memory_mb": rows[-1]["memory_mb"],
    }


def _ask(worker: Connection, updates: int) -> dict[str, float]:
    worker.send(updates)
    return _answer(worker)


def _answer(worker: Connection) -> Any:
    """What the worker sends. Raises what the worker raised, or RuntimeError where it died."""
    try:
        answer = worker.recv()
    except EOFError as error:
        raise RuntimeError("a measured process was killed (out of memory?)") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(parent: Connection, inputs: dict[str, Path], split: str, method: dict[str, Any], seed: int) -> None:
    """A method's process: says when it is ready, then runs as many updates as it is asked for, again and again."""
    try:
        _measure(parent, inputs, split, PolicySettings(**method), seed)
    except (EOFError, BrokenPipeError):
        pass  # the stage is over
    except Exception as error:  # whatever it is, the stage raises it
        parent.send(error)


def _measure(parent: Connection, inputs: dict[str, Path], split: str, settings: PolicySettings, seed: int) -> None:
    from dvpo import models
    from dvpo.training.policy import Frozen, OnlineTrainer

    prompts = [e.prompt for e in load_examples(inputs["data"] / f"{split}.jsonl")]
    scale = json.loads((inputs["reward_scale"] / "scale.json").read_text(encoding="utf-8"))
    frozen = Frozen(inputs["value"], inputs["reward"], (scale["mean"], scale["std"]))
    models.load(inputs["start"], "policy")  # dropped at once: the library loads an architecture's code at its first use
    gc.collect()
    parent.send("ready")
    updates = parent.recv()
    process_memory.reset_peak()
    before = process_memory.resident_bytes()
    trainer = OnlineTrainer(inputs["start"], frozen, prompts, settings, seed)
    while True:
        spent, started = dict(trainer.seconds), time.perf_counter()
        for _ in range(updates):
            trainer.step()
        row = {"seconds": (time.perf_counter() - started) / updates}
        row |= {phase: (trainer.seconds[phase] - spent[phase]) / updates for phase in spent}
        parent.send({**row, "memory_mb": (process_memory.peak_bytes() - before) / 2**20})
        updates = parent.recv()
