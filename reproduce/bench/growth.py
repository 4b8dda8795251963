"""How the cost of an update grows with the model, the response's length and the batch, beside what the cost model says.

Small Llamas of random weights, in float32. One thing is varied at a time and a power of it is fitted to the medians of
time and memory. A GVM update is one step on pairs; one of DVPO or PPO is as in `policy`.
"""

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvpo.config import ModelSize
from dvpo.data.pairs import EncodedPair
from dvpo.data.records import Message
from dvpo.data.templates import Encoded
from reproduce.bench import gvm, policy
from reproduce.bench.common import Job, Row, column, in_turns, peak, spread

KINDS = ("gvm", "dvpo", "ppo")
VOCABULARY = 8192
"""Wide enough that a random model hardly ever ends an answer by itself."""
SIZES = (
    ModelSize(hidden=128, intermediate=384, layers=4, heads=4, positions=1024),
    ModelSize(hidden=256, intermediate=768, layers=6, heads=4, positions=1024),
    ModelSize(hidden=512, intermediate=1536, layers=8, heads=8, positions=1024),
)


@dataclass(frozen=True)
class Point:
    """What is measured: a model's size, response tokens, and prompts (or pairs) of an update."""

    size: ModelSize
    response: int
    batch: int


BASE = Point(SIZES[1], 64, 4)
AXES: dict[str, list[Point]] = {
    "parameters": [replace(BASE, size=size) for size in SIZES],
    "response tokens": [replace(BASE, response=count) for count in (32, 64, 128)],
    "batch": [replace(BASE, batch=count) for count in (2, 4, 8)],
}


def measure(rounds: int) -> dict[str, Any]:
    """Time and memory of an update at every point, and the fitted exponents. Raises StageError where a process dies."""
    with tempfile.TemporaryDirectory() as root:
        folders = {size: Models.make(Path(root) / str(size.hidden), size) for size in SIZES}
        points = []
        for axis, places in AXES.items():
            jobs = {
                f"{kind} {number}": _job(kind, folders[point.size], point)
                for kind in KINDS
                for number, point in enumerate(places)
            }
            rows = in_turns(jobs, rounds)
            for kind in KINDS:
                points += [
                    _point(kind, axis, point, folders[point.size], rows[f"{kind} {number}"])
                    for number, point in enumerate(places)
                ]
    fits = [_fit(kind, axis, what, points) for kind in KINDS for axis in AXES for what in ("seconds", "memory_mb")]
    return {"precision": "float32", "rounds": rounds, "points": points, "fits": fits}


@dataclass(frozen=True)
class Models:
    """Folders of a policy, a value model and a reward model of one size."""

    start: Path
    gvm: Path
    reward: Path
    parameters: int

    @classmethod
    def make(cls, root: Path, size: ModelSize) -> "Models":
        """Saves models of random weights under `root`."""
        from dvpo import models
        from dvpo.data.atlas import Atlas, build_tokenizer

        tokenizer = build_tokenizer(Atlas.build(0))
        policy_model = models.new_policy(tokenizer, size, seed=0)
        policy_model.resize_token_embeddings(VOCABULARY)
        models.save(policy_model, tokenizer, root / "policy")
        for role in ("value", "reward"):
            models.save(models.load(root / "policy", role, fresh_head=True), tokenizer, root / role)
        return cls(root / "policy", root / "value", root / "reward", policy_model.num_parameters())


def power(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The exponent k of the least-squares fit log y = k log x + c, and the largest relative error of the fit."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    k = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)
    return k, max(abs(math.exp(mean_v + k * (a - mean_u) - b) - 1) for a, b in zip(u, v, strict=True))


def _job(kind: str, models: Models, point: Point) -> Job:
    if kind == "gvm":
        pairs = _pairs(point)
        return Job(gvm.train_ours, (gvm.Work(models.start, pairs, False, point.batch, point.batch, steps=1),))
    work = policy.Work(models.start, models.gvm, models.reward, _questions(point.batch), False, point.response)
    return Job(policy.update_ours, (work, kind))


def _pairs(point: Point) -> list[EncodedPair]:
    """Pairs of random tokens, with prompts as long as the questions are on average."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return rng.choices(range(100, VOCABULARY), k=count)

    made = []
    for i in range(point.batch):
        prompt = tokens(16)
        made.append(EncodedPair(Encoded(prompt, tokens(point.response)), Encoded(prompt, tokens(point.response)), i))
    return made


def _questions(count: int) -> list[tuple[Message, ...]]:
    from dvpo.data.atlas import Atlas

    return [({"role": "user", "content": question.text},) for question in Atlas.build(0).questions(0, count)]


def _point(kind: str, axis: str, point: Point, models: Models, rows: Sequence[Row]) -> dict[str, Any]:
    x = {"parameters": models.parameters, "response tokens": point.response, "batch": point.batch}[axis]
    seconds, memory = _predicted(kind, point)
    return {
        "kind": kind,
        "axis": axis,
        "x": x,
        "seconds": spread(column(rows, "seconds")),
        "memory_mb": peak(rows),
        "predicted_seconds": seconds,
        "predicted_memory_mb": memory,
    }


def _predicted(kind: str, point: Point) -> tuple[float, float]:
    """What the cost model says of this point on one CPU core."""
    from reproduce.cost import hardware, memory, shapes, timing, work

    shape = shapes.from_size(point.size, VOCABULARY, "growth")
    if kind == "gvm":
        job = work.Job(work.METHODS[kind], 16, point.response, 2 * point.batch, 2 * point.batch)
    else:
        step = point.batch // policy.STEPS
        job = work.Job(work.METHODS[kind], 16, point.response, point.batch, step, step=step, epochs=policy.EPOCHS)
    cluster, setup = hardware.find("2-core-cpu", gpus=1), work.Setup(precision="float32")
    seconds = timing.seconds(job, shape, setup, cluster, 1.0)
    return sum(seconds.values()), memory.peak(memory.phases(job, shape, setup, cluster))[1] / 2**20


def _fit(kind: str, axis: str, what: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chosen = [p for p in points if (p["kind"], p["axis"]) == (kind, axis)]
    xs = [p["x"] for p in chosen]
    exponent, error = power(xs, [p[what]["median"] if what == "seconds" else p[what] for p in chosen])
    predicted, _ = power(xs, [p[f"predicted_{what}"] for p in chosen])
    return {
        "kind": kind,
        "axis": axis,
        "what": what,
        "exponent": exponent,
        "largest_error": error,
        "predicted_exponent": predicted,
    }
