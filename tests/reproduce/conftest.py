"""A finished run that was never trained: every stage of a graph with made-up results whose answers are known."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reproduce import graph, recipe
from reproduce.pipeline import Result, Stage
from reproduce.tables import Book

GAINS = {"dvpo-gae": 0.3, "dvpo-q": 0.15, "ppo": 0.1, "dpo": 0.05, "grpo": -0.1, "gae@td0": -0.2}
"""Over SFT, of those policies whose gold score differs from it."""
ACCURACY = {"gvm": 0.85, "critic": 0.6, "rm": 0.85, "gvm-small": 0.7, "gvm-medium": 0.8, "gvm-from-rm": 0.7}
PROMPTS, UPDATES = 120, 30
Files = dict[str, Any]


def _gold(name: str, rng: random.Random) -> Files:
    rows = []
    for _ in range(PROMPTS):
        rows.append({"prompt": "q", "response": "a", "gold": GAINS.get(name, 0.0) + rng.gauss(0, 0.1), "words": 5})
    return {"gold.jsonl": rows}


def _pairs(name: str, rng: random.Random) -> Files:
    rows = []
    for i in range(PROMPTS):
        right = rng.random() < ACCURACY.get(name, 0.8)
        keys = ["last"] if name == "rm" else ["mean", "last", "bellman", "p1", "p5", "p10", "p90", "p95", "p99"]
        better, worse = (dict.fromkeys(keys, float(wins)) for wins in (right, not right))
        rows.append({"prompt": i // 3, "better": {**better, "tokens": 7 + i % 2}, "worse": {**worse, "tokens": 7}})
    return {"pairs.jsonl": rows}


def _curves(name: str, rng: random.Random) -> Files:
    """The value rises throughout; the gold score of td0 falls in the last third, that of official@td1 collapses."""
    rows = []
    for i in range(UPDATES):
        late = max(0, i - 20) / 10
        fall = {"gae@td0": 0.4, "official@td1": 2.0}.get(name, 0.0) * late
        gold = 0.3 * i / UPDATES - fall + rng.gauss(0, 0.005)
        rows.append({"update": i + 1, "gold": gold, "value": 0.02 * i, "kl": 0.01 * i, "length": 12.0})
    return {"curves.json": rows}


def _metrics(stage: Stage, name: str) -> dict[str, Any]:
    if stage.kind == "credit":
        auroc = 0.8 if name.startswith("gvm") else 0.55
        ends = {"auroc_ci95": [auroc - 0.03, auroc + 0.03], "lowest_hit_ci95": [0.5, 0.6]}
        return {"auroc": auroc, "lowest_hit": 0.55, "lowest_chance": 0.1, "n_responses": 100, **ends}
    if stage.kind == "cost":
        seconds = {"dvpo-gae": 1.0, "ppo": 2.0, "remax": 1.5, "grpo": 4.0}
        return {"methods": {
            n: {"seconds": s, "seconds_range": [0.9 * s, 1.1 * s], "memory_mb": 100 * s} for n, s in seconds.items()
        }}  # fmt: skip
    return {}


def _files(stage: Stage, name: str, rng: random.Random) -> Files:
    if stage.kind == "token_values":
        shown = {"prompt": "q", "tokens": ["a", "b"], "v": [0.0, 0.1]}
        labels = (("right answer", [0.1, 0.3]), ("one wrong word", [-0.1, -0.3]))
        return {"tokens.json": [{**shown, "label": label, "q": q} for label, q in labels]}
    if stage.kind == "lemma":
        row = {"gap": 0.1, "low": 0.05, "high": 0.2, "bound": 1.0}
        return {"sweep.json": [{**row, "error": 0.1}, {**row, "error": 1.0}]}
    makers: dict[str, Callable[[str, random.Random], Files]] = {"gold": _gold, "pairwise": _pairs, "policy": _curves}
    return makers[stage.kind](name, rng) if stage.kind in makers else {}


def finish(stage: Stage, root: Path) -> Result:
    """The stage's made-up result, with its files below the root."""
    name = stage.id.rpartition("/")[2]
    folder = root / stage.id.replace("/", "-")
    folder.mkdir(parents=True)
    for file, content in _files(stage, name, random.Random(stage.id)).items():
        lines = [json.dumps(row) + "\n" for row in content]
        (folder / file).write_text("".join(lines) if file.endswith(".jsonl") else json.dumps(content))
    manifest = {
        "id": stage.id, "key": f"{stage.id!s:0<16}", "seconds": 1.0, "settings": stage.settings, "seeds": [stage.seed],
        "metrics": _metrics(stage, name), "git_commit": "c0ffee", "device": {"cpu": "none"}, "versions": {},
        "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Result(folder, manifest, "digest")


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Book]:
    """Makes a book of the tiny recipe: made_up(seeds=3, study=True, without=("T10",))."""

    def make(seeds: int = 3, study: bool = True, leave: Callable[[str], bool] = lambda _: False) -> Book:
        chosen = recipe.load("tiny", (f"seeds={seeds}", f"study={str(study).lower()}"))
        stages = graph.build(chosen, None).stages.values()
        root = tmp_path_factory.mktemp("made-up")
        return Book(chosen, {s.id: finish(s, root) for s in stages if not leave(s.id)})

    return make


@pytest.fixture(scope="session")
def book(made_up: Callable[..., Book]) -> Book:
    """Five seeds with the study. Read only."""
    return made_up(5)
