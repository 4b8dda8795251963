"""The numbers of Figures 2 to 4: win rates, token values, learning curves."""

import json
from typing import Any

import numpy as np

from reproduce import paper, verdicts
from reproduce.recipe import AtlasRecipe
from reproduce.tables.book import LABELS, Book, Nested
from reproduce.tables.rows import Direction, Row, not_run, row

DVPO = ("dvpo-q", "dvpo-gae", "dvpo")
OTHERS = ("sft", "dpo", "ppo", "remax", "grpo")
SMOOTH = 5
WIN = "win rate, ties half, percent"
PEAK = "update of the peak"
CRITICAL = {"not": 0, "is": 1, "an": 1}
"""The tokens that Figure 3 names, and the response each is in."""


def outcomes(book: Book, left: str, right: str) -> Nested:
    """Per seed and prompt: 1 where left's gold score is higher, 0 where lower, 0.5 where equal."""
    return [[(d > 0) + 0.5 * (d == 0) for d in seed] for seed in book.gains(left, right)]


def win_rates(book: Book) -> list[tuple[str, str, Nested]]:
    """DVPO against every other policy that was run: (left, right, outcomes)."""
    ran = book.methods()
    return [(a, b, outcomes(book, a, b)) for a in DVPO if a in ran for b in OTHERS if b in ran]


def win_rows(book: Book) -> list[Row]:
    """Figure 2. The paper's text has no numbers for it; of DVPO against SFT it says that DVPO's is the higher one."""
    rows = []
    for left, right, values in win_rates(book):
        made = row(book, book.size, f"{LABELS[left]} against {LABELS[right]}", WIN, None, values, scale=100.0)
        if right == "sft":
            made["verdict"] = verdicts.gain("F2", [end - 50.0 for end in made["ci95"]], made["seeds"])
        rows.append(made)
    return rows or [not_run(book.size, "DVPO against the others", WIN, None)]


def token_rows(book: Book) -> list[Row]:
    """Figure 3: the values of the tokens that the paper names, where its question was asked."""
    found = book.results.get("seed0/token-values")
    shown: list[dict[str, Any]] = json.loads((found.path / "tokens.json").read_text()) if found else []
    built_in = isinstance(book.recipe, AtlasRecipe)
    rows = []
    for fact in paper.facts("Figure 3"):
        word = fact.metric.split("'")[1]
        values = [] if built_in or not shown else _values(shown[CRITICAL[word]], word)
        made = not_run(book.size, "GVM", fact.metric, fact.value)
        if values:
            made |= {"measured": round(values[0], 4), "n": 1, "seeds": 1, "verdict": verdicts.OTHER_SCALE}
        rows.append(made)
    if built_in and shown:
        for answer in shown:
            mean = round(float(np.mean(answer["q"])), 4)
            rows.append(not_run(book.size, "GVM", f"mean value of the {answer['label']}", None) | {
                "measured": mean, "n": 1, "seeds": 1, "verdict": verdicts.OTHER_SCALE})  # fmt: skip
    return rows


def _values(answer: dict[str, Any], word: str) -> list[float]:
    return [q for token, q in zip(answer["tokens"], answer["q"], strict=True) if token.strip() == word]


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those before it, SMOOTH in all."""
    return [float(np.mean(values[max(0, i - SMOOTH + 1) : i + 1])) for i in range(len(values))]


def gold_curves(book: Book) -> dict[str, tuple[list[float], list[list[float]]]]:
    """The updates and, per seed, the smoothed gold score of the rollouts, for every method of the recipe."""
    found = {}
    for name in book.recipe.methods if isinstance(book.recipe, AtlasRecipe) else ():
        if logs := book.curves(name):
            found[name] = ([r["update"] for r in logs[0]], [smoothed([r["gold"] for r in log]) for log in logs])
    return found


def peaks(book: Book) -> dict[str, list[float]]:
    """The share of its updates after which each method's smoothed gold score is highest, per seed."""
    return {
        name: [updates[int(np.argmax(seed))] / updates[-1] for seed in seeds]
        for name, (updates, seeds) in gold_curves(book).items()
    }


def peak_direction(book: Book) -> list[Direction]:
    """By how much of the run DVPO's peak comes before PPO's."""
    found = peaks(book)
    if "ppo" not in found:
        return []
    return [
        Direction("speed", "F4", "PPO", LABELS[name], "share of the run at the peak", None,
                  [[p - d] for p, d in zip(found["ppo"], found[name], strict=True)])
        for name in DVPO if name in found
    ]  # fmt: skip


def curve_rows(book: Book) -> list[Row]:
    """Figure 4: where the curves peak. The paper counts steps; a run's length is its own, so shares stand here."""
    rows = [
        row(book, book.size, LABELS.get(name, name), f"{PEAK}, share of the run", None, [[p] for p in shares])
        for name, shares in peaks(book).items()
    ]
    rows += [d.row(book) for d in peak_direction(book)]
    return [*rows, *(not_run(f.model, f.method, f.metric, f.value) for f in paper.facts("Figure 4"))]
