"""Tables 3, 4, 5, 8 and 9: value models by pairwise accuracy."""

import itertools
from typing import Any

from reproduce import paper, verdicts
from reproduce.recipe import AtlasRecipe, DataRecipe
from reproduce.tables.benchmarks import published_model, published_other, section_rows
from reproduce.tables.book import Book
from reproduce.tables.rows import (
    Direction,
    Row,
    Wins,
    accuracy_row,
    baselines,
    filled,
    paired_wins,
    paper_difference,
)

AGGREGATES = {"mean": "Mean Value", **{f"p{k}": f"P{k} Value" for k in (1, 5, 10, 90, 95, 99)}}
HELD_OUT = "accuracy on held-out pairs"
BESIDE = "Llama3-8B"
"""The paper's model whose numbers stand beside those of a model that the paper does not have."""
BESIDE_NOTE = (
    f"Beside a model that the paper does not have stand the numbers of its {BESIDE}. Accuracies are in percent."
)


def _accuracies(
    book: Book, table: int, stages: dict[str, tuple[str, str]], metric: str, of_paper: bool = True
) -> list[Row]:
    """A row for every stage that was run, {stage: (the paper's method or another label, aggregate)}.

    of_paper: whether it was measured on the paper's data.
    """
    model = published_model(book, table) if of_paper else None
    found = []
    for stage, (method, aggregate) in stages.items():
        if book.seeds(stage):
            published = paper.value(table, model or BESIDE, method, metric)
            made = accuracy_row(book, stage, model or book.size, method, metric, aggregate, published)
            if model and published is not None:
                made["verdict"] = verdicts.cell(f"T{table}", metric, published, made["measured"], made["ci95"])
            found.append(made)
    return found


def table_3(book: Book) -> dict[str, Any]:
    """GVM beside the ScalarRM: RewardBench where it was run, and the same held-out pairs for both."""
    readings = (("gvm", "GVM, mean", "mean"), ("gvm", "GVM, last", "last"), ("gvm", "GVM, Bellman", "bellman"))
    held_out: list[Row] = []
    for stage, label, how in (*readings, ("rm", "ScalarRM", "last")):
        if book.seeds(f"{book.in_domain}/{stage}"):
            name = f"{book.in_domain}/{stage}"
            held_out.append(accuracy_row(book, name, book.size, label, HELD_OUT, how, None))
    rows = [*held_out, *(d.row(book) for d in scalar_tie(book))]
    sections = section_rows(book, {"gvm": ("GVM", "bellman"), "rm": ("ScalarRM", "last")})
    note = "RewardBench's sections are read with the Bellman-style backup, as in the paper. "
    note += "Held-out pairs stand beside them and are no part of RewardBench. Accuracies are in percent."
    below = baselines(book, f"{book.in_domain}/gvm")
    return {"table": 3, "title": "GVM and ScalarRM", "note": note, "rows": [*rows, *below, *filled(3, sections)]}


def scalar_tie(book: Book) -> list[Direction]:
    """GVM beside the ScalarRM on held-out pairs: the paper calls the two comparable."""
    found = _paired(book, "gvm", "rm", "mean", "last")
    if found is None:
        return []
    return [Direction("scalar", "T3", "GVM", "ScalarRM", HELD_OUT, None, *found, scale=100.0, kind="tie")]


def table_4(book: Book) -> dict[str, Any]:
    """GVM beside the PPO critic at the end of its training."""
    stages = {f"{book.in_domain}/{s}": (label, "mean") for s, label in (("gvm", "GVM"), ("critic", "A/C"))}
    rows = _accuracies(book, 4, stages, "accuracy on UltraFeedback")
    if isinstance(book.recipe, AtlasRecipe):
        rows = [{**r, "metric": f"{HELD_OUT} (paper: UltraFeedback)"} for r in rows]
    rows = [*rows, *(d.row(book) for d in critic_direction(book)), *baselines(book, f"{book.in_domain}/gvm")]
    return {"table": 4, "title": "GVM and the PPO critic", "note": BESIDE_NOTE, "rows": filled(4, rows)}


def critic_direction(book: Book) -> list[Direction]:
    """GVM against the critic, on held-out pairs."""
    found = _paired(book, "gvm", "critic", "mean")
    published = paper_difference(*([c for c in paper.cells(4) if c.method == m] for m in ("GVM", "A/C")))
    metric = f"{HELD_OUT} (paper: {BESIDE})"
    return [Direction("critic", "T4", "GVM", "A/C", metric, published, *found, scale=100.0)] if found else []


def table_5(book: Book) -> dict[str, Any]:
    """The value models on data of another source."""
    rows: list[Row] = []
    for other in book.recipe.other_data if isinstance(book.recipe, DataRecipe) else ():
        metric = "accuracy on HH-RLHF" if other == "hh-rlhf" else f"accuracy on {other}"
        labels = {"gvm": ("GVM", "mean"), "critic": ("A/C", "mean"), "gvm-from-score": ("GVM from scores", "mean")}
        stages = {f"{other}/{s}": label for s, label in (labels | {"rm": ("ScalarRM", "last")}).items()}
        rows += _accuracies(book, 5, stages, metric, published_other(book, other))
        rows += baselines(book, f"{other}/gvm", f" on {other}")
    return {"table": 5, "title": "Out of distribution", "note": BESIDE_NOTE, "rows": filled(5, rows)}


def sizes(book: Book) -> dict[str, str]:
    """The stages of the GVMs of every size that was measured, smallest first, by the names that the table shows."""
    recipe = book.recipe
    if isinstance(recipe, DataRecipe):
        found = {published_model(book, 8) or book.size: f"{book.in_domain}/gvm"}
    else:
        named = {"main": recipe.size, **recipe.other_sizes}
        order = sorted(named.items(), key=lambda item: item[1].layers * item[1].hidden ** 2)
        found = {
            f"tiny Llama, {name} ({size.layers} layers of {size.hidden})":
            "accuracy/gvm" if name == "main" else f"accuracy/gvm-{name}" for name, size in order
        }  # fmt: skip
    return {label: stage for label, stage in found.items() if book.seeds(stage)}


def table_8(book: Book) -> dict[str, Any]:
    """GVMs of several sizes under every aggregate."""
    rows: list[Row] = []
    model = published_model(book, 8)
    for label, stage in sizes(book).items():
        for how, metric in AGGREGATES.items():
            published = paper.value(8, model or BESIDE, "GVM", metric)
            made = accuracy_row(book, stage, label, "GVM", metric, how, published)
            if model and published is not None:
                made["verdict"] = verdicts.cell("T8", metric, published, made["measured"], made["ci95"])
            rows.append(made)
    rows += [d.row(book) for d in size_directions(book)]
    return {"table": 8, "title": "Aggregates and sizes", "note": BESIDE_NOTE, "rows": filled(8, rows)}


def size_directions(book: Book) -> list[Direction]:
    """Every size against the next smaller one, by Mean Value."""
    metric = "Mean Value (paper: Llama3-8B less Llama3-3B)"
    published = _gap(8, ("Llama3-8B", "GVM"), ("Llama3-3B", "GVM"))
    found = []
    for (small, first), (large, second) in itertools.pairwise(sizes(book).items()):
        if pair := paired_wins(book, second, first, "mean"):
            left, right = (name.removeprefix("tiny Llama, ").split(" (")[0] for name in (large, small))
            found.append(Direction("size", "T8", left, right, metric, published, *pair, scale=100.0))
    return found


def table_9(book: Book) -> dict[str, Any]:
    """What the GVM's rewards come from."""
    rows: list[Row] = []
    for stage, label, method in (
        ("gvm-from-rm", "From Reward", "From Reward"), ("gvm", "From Preference", "From Preference"),
        ("gvm-from-score", "from scores", ""),
    ):  # fmt: skip
        if book.seeds(f"{book.in_domain}/{stage}"):
            for how, metric in AGGREGATES.items():
                published = paper.value(9, "not named", method, metric) if method else None
                rows.append(accuracy_row(book, f"{book.in_domain}/{stage}", book.size, label, metric, how, published))
    rows += [d.row(book) for d in source_direction(book)]
    note = "The paper names no model for this table. Accuracies are in percent."
    return {"table": 9, "title": "Where the rewards come from", "note": note, "rows": filled(9, rows)}


def source_direction(book: Book) -> list[Direction]:
    """Rewards from preferences against rewards from the reward model, by Mean Value."""
    names = "From Preference", "From Reward"
    published = _gap(9, ("not named", names[0]), ("not named", names[1]))
    found = _paired(book, "gvm", "gvm-from-rm", "mean")
    if found is None:
        return []
    return [Direction("source", "T9", *names, "Mean Value", published, *found, scale=100.0, kind="match")]


def _gap(table: int, left: tuple[str, str], right: tuple[str, str]) -> float | None:
    """The paper's Mean Value of one model and method less another's."""
    a, b = (paper.value(table, model, method, "Mean Value") for model, method in (left, right))
    return None if a is None or b is None else round(a - b, 4)


def _paired(book: Book, left: str, right: str, how: str, other: str = "") -> Wins | None:
    first, second = (f"{book.in_domain}/{name}" for name in (left, right))
    return paired_wins(book, first, second, how, other) if book.seeds(first) and book.seeds(second) else None
