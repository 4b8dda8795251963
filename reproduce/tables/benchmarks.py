"""Rows of benchmarks that were run: a score of the whole, or RewardBench's sections.

A row is compared with the paper's only where the model is the paper's (`published_model`), the benchmark is whole and
the judge is the one that the paper names.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dvpo.data.splits import is_hub_id
from reproduce import paper, verdicts
from reproduce.recipe import DataRecipe, load
from reproduce.tables.book import Book
from reproduce.tables.rows import Row

MODELS = {
    "llama3.2-3b-base": {1: "Llama3.2-3B-Base", 8: "Llama3-3B"},
    "llama3-8b-base": {1: "Llama3-8B-Base", 3: "Llama3-8B", 4: "Llama3-8B", 5: "Llama3-8B", 8: "Llama3-8B"},
    "mistral-7b-instruct": {
        2: "Mistral-7B-Instruct-v0.2", 3: "Mistral-7B", 4: "Mistral-7B", 5: "Mistral-7B", 8: "Mistral-7B",
    },
    "llama3-8b-instruct": {2: "Llama3-8B-Instruct", 10: "not named"},
}  # fmt: skip
"""Which model of each table a recipe trains. Tables 3 to 8 do not say base or instruct; Table 10's row of KL 0.05 is
Table 2's Llama."""
OWN: Any = {
    **dict.fromkeys(("seeds", "compute", "model", "data", "other_data", "other_most", "judge", "benchmarks"), True),
    "hub": {"revision"},
}
"""What a user may choose without leaving the paper's settings; the judge is looked at by itself."""


def published_model(book: Book, table: int) -> str | None:
    """The paper's name for this run's model in a table, if recipe, model and data are the paper's."""
    name = MODELS.get(book.recipe.name, {}).get(table)
    if name is None or not isinstance(book.recipe, DataRecipe):
        return None
    shipped = _shipped(book.recipe.name)
    same = book.recipe.model_dump(exclude=OWN) == shipped.model_dump(exclude=OWN)
    return name if same and _same_model(book.recipe) and _same_data(book, shipped) else None


@cache
def _shipped(name: str) -> DataRecipe:
    found = load(name)
    assert isinstance(found, DataRecipe)  # only such recipes are in MODELS
    return found


def _same_model(recipe: DataRecipe) -> bool:
    """Whether a folder that is named in the hub model's place has all of its config.json."""
    if recipe.model is None or recipe.hub is None:
        return recipe.hub is not None
    path = Path(recipe.model) / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {**(found.get("rope_parameters") or {}), **found}  # where newer libraries write it
    return all(found.get(key) == value for key, value in recipe.hub.config.items())


def _same_data(book: Book, shipped: DataRecipe) -> bool:
    """Whether what was read is the recipe's own data set of the hub; of a folder nobody can tell."""
    read = [r.manifest.get("settings", {}).get("hub") for r in book.seeds("data")]
    return all(_same_set(given, shipped.data) for given in read)


def published_other(book: Book, name: str) -> bool:
    """Whether the other data of this name are those that the paper's recipe reads from the hub."""
    if book.recipe.name not in MODELS or not isinstance(book.recipe, DataRecipe):
        return False
    return _same_set(book.recipe.other_data[name], _shipped(book.recipe.name).other_data.get(name))


def _same_set(given: str | None, own: str | None) -> bool:
    """Whether two names are of the same set of the hub, at whatever revision."""
    if given is None or own is None or not is_hub_id(given):
        return False
    return given.partition("@")[0] == own.partition("@")[0]


def benchmark_rows(book: Book, table: int, benchmarks: Mapping[str, str], methods: Mapping[str, str]) -> list[Row]:
    """A row for every benchmark {prefix of its stages: the paper's metric} and policy {name: the paper's method}.

    Reads a stage's metrics: score, ci95, judge, n, and part, the share of the benchmark that was run where not all.
    """
    if not isinstance(book.recipe, DataRecipe):
        return []
    model = published_model(book, table)
    found = []
    for prefix, metric in benchmarks.items():
        for name, method in methods.items():
            if seeds := book.metrics(f"{prefix}/{name}"):
                scores = [(m["score"], m["ci95"], m["n"]) for m in seeds]
                made = summed(model or book.size, method, metric, scores)
                if any(m.get("length_controlled") is False for m in seeds):  # the paper's number is
                    found.append({**made, "metric": f"{metric}, raw win rate"})
                    continue
                published = paper.value(table, model, method, metric) if model else None
                found.append(judged(f"T{table}", {**made, "paper": published}, seeds))
    return found


def section_rows(book: Book, models: Mapping[str, tuple[str, str]]) -> list[Row]:
    """RewardBench's sections for {stage name: (the paper's method, aggregate)}."""
    model = published_model(book, 3)
    found = []
    for name, (method, aggregate) in models.items():
        seeds = book.metrics(f"rewardbench/{name}")
        for section in seeds[0].get("sections", {}) if seeds else ():
            parts = [m["sections"][section] for m in seeds]
            scores = [
                (100 * a["accuracy"], [100 * end for end in a["ci95"]], p["pairs"])
                for p in parts for a in [p["accuracy"][aggregate]]
            ]  # fmt: skip
            metric = section.replace(" ", "-")
            made = summed(model or book.size, method, metric, scores)
            published = paper.value(3, model, method, metric) if model else None
            whole = all(p["pairs"] == p["of"] for p in parts)
            found.append(judged("T3", {**made, "paper": published}, [{"part": None if whole else "part"}]))
    return found


def summed(model: str, method: str, metric: str, scores: list[tuple[float, list[float], int]]) -> Row:
    """A row from each seed's (score, interval, n): the mean over seeds, and the seeds' mean interval or a wider one."""
    from dvpo.evaluation.intervals import between_seeds

    within = [float(np.mean([ci95[i] for _, ci95, _ in scores])) for i in (0, 1)]
    mean, (low, high) = between_seeds([score for score, _, _ in scores], (within[0], within[1]))
    return {
        "model": model, "method": method, "metric": metric, "paper": None,
        "measured": round(mean, 4),
        "ci95": [round(low, 4), round(high, 4)], "n": sum(n for _, _, n in scores), "seeds": len(scores),
        "verdict": verdicts.OTHER_SCALE,
    }  # fmt: skip


def judged(source: str, made: Row, metrics: list[dict[str, Any]]) -> Row:
    """The row with its verdict; what is only a part of a benchmark says so in its metric."""
    if any(m.get("part") for m in metrics):
        return {**made, "metric": f"{made['metric']} (part of it)"}
    if made["paper"] is None:
        return made
    if any(m.get("judge") not in (None, verdicts.PAPER_JUDGE) for m in metrics):
        return {**made, "verdict": verdicts.OTHER_JUDGE}
    verdict = verdicts.cell(source, made["metric"], made["paper"], made["measured"], made["ci95"])
    return {**made, "verdict": verdict}
