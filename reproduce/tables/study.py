"""The estimator study: which estimator on which value model, over-optimisation, and runs that collapse.

Gold scores come from the policies after training; over-optimisation and collapse from the log of their updates. The
paper has no such study.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dvpo.evaluation.intervals import Interval
from reproduce import verdicts
from reproduce.recipe import AtlasRecipe
from reproduce.tables.book import LABELS, Book
from reproduce.tables.paired import Paired, holm, paired
from reproduce.tables.policies import GOLD, KL
from reproduce.tables.rows import BEYOND, Row, accuracy_row, row

ESTIMATORS = {"q": "A = Q", "gae": "GAE", "official": "official"}
VARIANTS = {
    "": "the recipe's GVM",
    "td0": "GVM of TD lambda 0",
    "td1": "GVM of TD lambda 1",
    "tau1": "GVM with tau",
    "scripted": "GVM without own samples",
}
LEVEL = 0.05
ENDS = 5
"""Updates at each end of a run that are averaged."""
FALL = 0.2
"""Of gold score: the smallest difference that makes a preference in the built-in world."""
LENGTHS = (0.25, 4.0)
COLLAPSE = (
    f"A run has collapsed if, from its first {ENDS} updates to its last {ENDS}, the mean gold score of its rollouts "
    f"fell by more than {FALL} (the smallest difference that makes a preference in the built-in world), or the mean "
    f"length of its answers fell below {LENGTHS[0]:g} or rose above {LENGTHS[1]:g} times what it was."
)
OVER = (
    "Over-optimisation is visible where, from the middle third of the updates to the last, the GVM's value rises and "
    "the gold score falls, both 95 % intervals over seeds clear of zero; else it is absent where a fall of the gold "
    "score above the margin of Table 1 is ruled out; else it cannot be told. Thirds, not peaks: the peak of a noisy "
    "curve is always above its end."
)


def policy_name(estimator: str, variant: str) -> str:
    """The name of a policy of the study."""
    return f"{estimator}@{variant}" if variant else f"dvpo-{estimator}"


def label(estimator: str, variant: str) -> str:
    """What the report calls it."""
    return f"{ESTIMATORS[estimator]}, {VARIANTS[variant]}"


def policies(book: Book) -> dict[str, str]:
    """The policies of the study that were run, by name, with their labels."""
    named = {policy_name(e, v): label(e, v) for v in VARIANTS for e in ESTIMATORS}
    return {name: text for name, text in named.items() if book.seeds(f"gold/{name}")}


def trained_on_values(book: Book) -> dict[str, str]:
    """The policies whose over-optimisation is looked at: the study's, and those under other strengths of KL."""
    sweep = {name: f"GAE, KL {beta}" for name, beta in KL.items() if "-kl-" in name}
    return policies(book) | {name: text for name, text in sweep.items() if book.seeds(f"gold/{name}")}


def table(book: Book) -> dict[str, Any] | None:
    """Gold score of every policy of the study, and the accuracy of the GVMs behind them."""
    found = policies(book)
    if not any("@" in name for name in found):
        return None
    rows: list[Row] = [row(book, book.size, text, GOLD, None, book.gold(name), verdict=BEYOND)
                       for name, text in found.items()]  # fmt: skip
    for variant, text in VARIANTS.items():
        stage = "accuracy/gvm" + (f"-{variant}" if variant else "")
        if book.seeds(stage):
            rows.append(accuracy_row(book, stage, book.size, text, "accuracy on held-out pairs", "mean", None, BEYOND))
    assert isinstance(book.recipe, AtlasRecipe)
    note = f"The recipe's own GVM: TD lambda {book.recipe.gvm.td_lambda:g}, without tau, with the SFT policy's samples."
    return {"table": "study", "title": "Estimators and value models", "note": note, "rows": rows}


@dataclass(frozen=True)
class Comparison:
    """Two policies of the study, their paired differences tested, and the p-values after Holm's correction."""

    left: str
    right: str
    test: Paired
    bootstrap: float
    flip: float

    @property
    def told(self) -> bool:
        """Whether the two are told apart. Fewer than three seeds tell nothing."""
        if self.test.seeds < verdicts.LEAST_SEEDS:
            return False
        low, high = self.test.ci95
        return max(self.bootstrap, self.flip) < LEVEL and not low <= 0 <= high

    def sentence(self) -> str:
        """What the comparison says."""
        word = "cannot be told from" if not self.told else "is above" if self.test.mean > 0 else "is below"
        low, high = self.test.ci95
        return f"{self.left} {word} {self.right}: {self.test.mean:+.3f} [{low:+.3f}, {high:+.3f}]."


@lru_cache(maxsize=1)
def comparisons(book: Book) -> list[Comparison]:
    """Estimators on the recipe's GVM against each other, and every other GVM against it: one family for Holm."""
    order = list(ESTIMATORS)
    pairs = [((a, ""), (b, "")) for i, a in enumerate(order) for b in order[i + 1 :]]
    pairs += [((e, v), (e, "")) for v in VARIANTS if v for e in ESTIMATORS]
    ran = policies(book)
    pairs = [(a, b) for a, b in pairs if policy_name(*a) in ran and policy_name(*b) in ran]
    tests = [paired(book.gains(policy_name(*a), policy_name(*b))) for a, b in pairs]
    adjusted = zip(holm([t.p_bootstrap for t in tests]), holm([t.p_flip for t in tests]), strict=True)
    return [
        Comparison(label(*a), label(*b), test, bootstrap, flip)
        for (a, b), test, (bootstrap, flip) in zip(pairs, tests, adjusted, strict=True)
    ]


@dataclass(frozen=True)
class Drift:
    """Gold score and GVM value over the thirds of a policy's training, the mean over seeds."""

    name: str
    seeds: int
    gold: list[float]
    value: list[float]
    gold_change: Interval
    value_change: Interval
    reading: str


def drift(name: str, curves: Sequence[Sequence[dict[str, float]]], margin: float) -> Drift:
    """Whether a policy's gold score falls while its value still rises; see OVER."""
    from dvpo.evaluation.intervals import mean_over_seeds

    gold, value = (np.array([_thirds([r[key] for r in log]) for log in curves]) for key in ("gold", "value"))
    changes = [mean_over_seeds([[float(x)] for x in (part[:, 2] - part[:, 1])])[1] for part in (gold, value)]
    (gold_low, gold_high), (value_low, _) = changes
    if len(curves) < 3:
        reading = "cannot be told (fewer than 3 seeds)"
    elif gold_high < 0 < value_low:
        reading = "visible"
    else:
        reading = "absent" if gold_low >= -margin else "cannot be told"
    return Drift(name, len(curves), gold.mean(0).tolist(), value.mean(0).tolist(), changes[0], changes[1], reading)


def drifts(book: Book) -> list[Drift]:
    """The drift of every policy that was trained on a GVM's values and whose log has a gold score."""
    bound = verdicts.tolerances()["T1"].direction
    assert bound is not None
    logs = {text: book.curves(name) for name, text in trained_on_values(book).items()}
    return [drift(text, curves, bound.margin) for text, curves in logs.items() if has_gold(curves)]


def has_gold(curves: Sequence[Sequence[dict[str, float]]]) -> bool:
    """Whether the logs have a gold score and updates enough for thirds."""
    return bool(curves) and all("gold" in log[0] and len(log) >= 3 for log in curves)


def _thirds(values: Sequence[float]) -> list[float]:
    return [float(np.mean(part)) for part in np.array_split(np.asarray(values, dtype=np.float64), 3)]


@dataclass(frozen=True)
class Stability:
    """How many of a policy's runs collapsed, what happened to them, and how far the seeds end apart."""

    name: str
    runs: int
    collapsed: list[str]
    spread: float | None
    largest_kl: float


def collapse(log: Sequence[dict[str, float]]) -> str | None:
    """Why a run counts as collapsed, or None; see COLLAPSE."""

    def change(key: str) -> tuple[float, float]:
        first, last = ([r[key] for r in part] for part in (log[:ENDS], log[-ENDS:]))
        return float(np.mean(first)), float(np.mean(last))

    (gold, gold_end), (length, length_end) = change("gold"), change("length")
    if gold - gold_end > FALL:
        return f"gold {gold:+.2f} to {gold_end:+.2f}"
    if not LENGTHS[0] * length <= length_end <= LENGTHS[1] * length:
        return f"length {length:.1f} to {length_end:.1f}"
    return None


@lru_cache(maxsize=1)
def stability(book: Book) -> list[Stability]:
    """Every online policy: the methods, then the study's and those under other strengths of KL."""
    others = {n: t for n, t in trained_on_values(book).items() if n not in LABELS}
    named = {n: LABELS[n] for n in book.methods()} | others
    found = []
    for name, text in named.items():
        curves = book.curves(name)
        if has_gold(curves):
            whys = [(seed, collapse(log)) for seed, log in enumerate(curves)]
            ends = [float(np.mean([r["gold"] for r in log[-ENDS:]])) for log in curves]
            found.append(Stability(
                text, len(curves), [f"seed {seed}: {why}" for seed, why in whys if why],
                float(np.std(ends, ddof=1)) if len(ends) > 1 else None,
                max(r["kl"] for log in curves for r in log),
            ))  # fmt: skip
    return found


def fisher(a: int, runs_a: int, b: int, runs_b: int) -> float:
    """Fisher's exact two-sided p-value of a of runs_a against b of runs_b."""
    total, events = runs_a + runs_b, a + b

    def chance(x: int) -> float:
        return math.comb(runs_a, x) * math.comb(runs_b, events - x) / math.comb(total, events)

    observed = chance(a)
    possible = range(max(0, events - runs_b), min(events, runs_a) + 1)
    return min(1.0, sum(p for x in possible if (p := chance(x)) <= observed * (1 + 1e-9)))
