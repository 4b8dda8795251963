"""The report's page on the estimator study."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvpo.evaluation.intervals import Interval
from reproduce.report import Section, Sheet
from reproduce.tables import study
from reproduce.tables.book import Book

HOW = (
    "Differences are taken prompt by prompt between policies of the same seed. Intervals and the first p-value come "
    "from a bootstrap over seeds and prompts (the intervals widened to Student's t over the seeds), the second from "
    "flipping the sign of every prompt's difference; both p-values are corrected by Holm's method over all comparisons "
    f"of the table. Two policies count as told apart where both are below {study.LEVEL:g} and the interval, which is "
    "not corrected, does not contain zero. The last p-value flips whole seeds, exactly and uncorrected."
)


def study_section(book: Book, folder: Path) -> Section | None:
    """The estimator study, or None where it was not run."""
    from reproduce import drawn

    compared = study.comparisons(book)
    if not any("@" in name for name in study.policies(book)):
        return None
    return Section(
        "The estimator study",
        _sentences(book, compared),
        [_comparisons(compared, book), _drifts(study.drifts(book)), _stability(study.stability(book))],
        drawn.study_figures(book, folder),
    )


def study_document(book: Book) -> dict[str, Any]:
    """The study's numbers as JSON."""
    return {
        "comparisons": [asdict(c) | {"told_apart": c.told} for c in study.comparisons(book)],
        "over_optimisation": {"definition": study.OVER, "policies": [asdict(d) for d in study.drifts(book)]},
        "stability": {"definition": study.COLLAPSE, "policies": [asdict(s) for s in study.stability(book)]},
    }


def _sentences(book: Book, compared: Sequence[study.Comparison]) -> list[str]:
    """What the study says, in words."""
    told = [c for c in compared if c.told]
    said = [f"{len(told)} of {len(compared)} comparisons are told apart. " + " ".join(c.sentence() for c in told)]
    drifted = study.drifts(book)
    for reading in dict.fromkeys(d.reading for d in drifted):
        names = "; ".join(d.name for d in drifted if d.reading == reading)
        said.append(f"Over-optimisation: {reading} for {names}.")
    stable = study.stability(book)
    fallen = [s for s in stable if s.collapsed]
    runs = sum(s.runs for s in stable)
    said.append(
        f"{sum(len(s.collapsed) for s in stable)} of {runs} runs collapsed"
        + (": " + "; ".join(f"{s.name} ({len(s.collapsed)} of {s.runs})" for s in fallen) if fallen else "")
        + "."
    )
    return said


def _comparisons(compared: Sequence[study.Comparison], book: Book) -> Sheet:
    rows = [
        (c.left, c.right, f"{c.test.mean:+.3f}", _interval(c.test.ci95), f"{c.bootstrap:.2g}", f"{c.flip:.2g}",
         f"{c.test.p_seeds:.2g}", "told apart" if c.told else "cannot be told")
        for c in compared
    ]  # fmt: skip
    head = ("policy", "against", "difference", "95% interval", "p bootstrap", "p flip", "p seeds", "reading")
    floor = f" With {book.recipe.seeds} seeds it cannot be below {2 / 2**book.recipe.seeds:g}."
    return Sheet("Paired comparisons of gold score", head, rows, HOW + floor, range(2, 7))


def _drifts(drifted: Sequence[study.Drift]) -> Sheet:
    rows = [
        (d.name, str(d.seeds), _thirds(d.gold), _interval(d.gold_change), _thirds(d.value), _interval(d.value_change),
         d.reading)
        for d in drifted
    ]  # fmt: skip
    head = (
        "policy",
        "seeds",
        "gold by thirds",
        "change, last third",
        "value by thirds",
        "change, last third",
        "reading",
    )
    return Sheet("Over-optimisation", head, rows, study.OVER, range(1, 6))


def _stability(stable: Sequence[study.Stability]) -> Sheet:
    rows = [
        (s.name, str(s.runs), str(len(s.collapsed)), "; ".join(s.collapsed) or "none",
         "—" if s.spread is None else f"{s.spread:.3f}", f"{s.largest_kl:.2f}")
        for s in stable
    ]  # fmt: skip
    head = ("policy", "runs", "collapsed", "which", "spread of the ends", "largest KL")
    note = study.COLLAPSE + " The spread is the standard deviation over seeds of the gold score of the last updates."
    return Sheet("Stability", head, rows, note, range(1, 3))


def _thirds(values: Sequence[float]) -> str:
    return ", ".join(f"{v:+.2f}" for v in values)


def _interval(interval: Interval) -> str:
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"
