"""Verdicts from `tolerances.yaml`: what counts as reproduced, table by table, and why.

A cell is compared with the paper's number only where model, data and judge are the paper's own. A direction (which of
two is better) has no unit, so it is judged at any scale, by the sign that the paper's own cells have.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from dvpo.config import Settings

REPRODUCED = "reproduced"
WITHIN = "within tolerance"
DIFFERS = "differs"
OTHER_JUDGE = "not comparable (judge)"
OTHER_SCALE = "not comparable (scale)"
NOT_RUN = "not run (tier)"
VERDICTS = (REPRODUCED, WITHIN, DIFFERS, OTHER_JUDGE, OTHER_SCALE, NOT_RUN)
ROUNDING = 1e-9
LEAST_SEEDS = 3
"""With fewer, the spread between training runs cannot be seen."""
PAPER_JUDGE = "gpt-4o-2024-08-06"
"""The one judge that the paper names (Appendix I)."""


class CellBound(Settings):
    """How far a cell may lie from the paper's, in the cell's unit or, where `relative`, as a share of it."""

    reproduced: float = Field(ge=0)
    within: float = Field(ge=0)
    relative: bool = False
    reason: str


class DirectionBound(Settings):
    """How an interval of differences (signed so that the paper's is positive) is read.

    margin: in the difference's unit, what is too small to matter. least_seeds: with fewer, one run's luck is all there
    is to see, and nothing is judged.
    """

    margin: float = Field(ge=0)
    unit: str
    least_seeds: int = Field(1, ge=1)
    reason: str


class Tolerance(Settings):
    """The bounds of one table or figure; `cells` by metric, or by "any". `tie`: of what the paper calls comparable."""

    cells: dict[str, CellBound] = Field(default_factory=dict)
    direction: DirectionBound | None = None
    tie: DirectionBound | None = None


@functools.cache
def tolerances() -> dict[str, Tolerance]:
    """The file, by table ("T1") or figure ("F2")."""
    text = Path(__file__).with_name("tolerances.yaml").read_text(encoding="utf-8")
    return {name: Tolerance.model_validate(value) for name, value in yaml.safe_load(text).items()}


def cell(name: str, metric: str, paper: float | str, measured: float | str, ci95: Sequence[float] | None) -> str:
    """The verdict on a measured cell of the paper's own model, data and judge. `name`: "T7"; KeyError if unknown.

    reproduced: equal for symbols; for numbers, within the first bound, or within the second with the paper's number in
    the interval. With it in the interval and further off, the run is too small to tell: not comparable (scale).
    """
    if isinstance(paper, str) or isinstance(measured, str):
        return REPRODUCED if paper == measured else DIFFERS
    bounds = tolerances()[name].cells
    bound = bounds[metric] if metric in bounds else bounds["any"]
    off = abs(measured - paper) / (abs(paper) if bound.relative else 1.0)
    inside = ci95 is not None and ci95[0] <= paper <= ci95[1]
    if off <= bound.within + ROUNDING:
        return REPRODUCED if inside or off <= bound.reproduced + ROUNDING else WITHIN
    return OTHER_SCALE if inside else DIFFERS


def gain(name: str, ci95: Sequence[float], seeds: int) -> str:
    """The verdict on a gain that the paper claims, signed so that the paper's is positive, by its 95 % interval.

    reproduced: all of it is above zero. differs: a gain as large as the margin is ruled out. Else, or with too few
    seeds, the run is too small to tell: not comparable (scale).
    """
    bound = _direction(name)
    if seeds < bound.least_seeds:
        return OTHER_SCALE
    return REPRODUCED if ci95[0] > 0 else DIFFERS if ci95[1] < bound.margin else OTHER_SCALE


def match(name: str, ci95: Sequence[float], seeds: int) -> str:
    """The verdict where the paper claims to match or surpass, signed so that surpassing is positive.

    reproduced: all of the interval is above zero. within tolerance: a loss larger than the margin is ruled out.
    differs: all of it is below zero, and not within. Else, or with too few seeds: not comparable (scale).
    """
    bound = _direction(name)
    low, high = ci95
    if seeds < bound.least_seeds:
        return OTHER_SCALE
    if low >= -bound.margin:
        return REPRODUCED if low > 0 else WITHIN
    return DIFFERS if high < 0 else OTHER_SCALE


def margin(name: str) -> float:
    """What is too small to matter in a direction of a table or figure, in its unit."""
    return _direction(name).margin


def _direction(name: str) -> DirectionBound:
    bound = tolerances()[name].direction
    if bound is None:
        raise KeyError(f"tolerances.yaml has no direction for {name}")
    return bound


def tie(name: str, ci95: Sequence[float], seeds: int) -> str:
    """The verdict on a difference that the paper calls none.

    within tolerance: the interval is inside the margin on both sides; differs: it is all outside on one. Else, or with
    too few seeds, the run is too small to tell: not comparable (scale).
    """
    bound = tolerances()[name].tie
    if bound is None:
        raise KeyError(f"tolerances.yaml has no tie for {name}")
    low, high = ci95
    if seeds < bound.least_seeds:
        return OTHER_SCALE
    if max(low, -high) > bound.margin:
        return DIFFERS
    return WITHIN if max(-low, high) <= bound.margin else OTHER_SCALE


def in_words(name: str) -> list[str]:
    """A table's bounds as sentences, each with its reason."""
    found = tolerances().get(name)
    if found is None:
        return []
    said = [_cell_words(metric, bound) for metric, bound in found.cells.items()]
    if (d := found.direction) is not None:
        said.append(
            "Gains and matches: reproduced where the 95 % interval lies on the paper's side of zero. A gain differs "
            f"where one as large as {d.margin:g} {d.unit} is ruled out. A match is within tolerance where a larger "
            f"loss than that is ruled out, and differs where the interval lies on the other side.{_few(d)} {d.reason}"
        )
    if (t := found.tie) is not None:
        said.append(
            f"Ties: within tolerance where the 95 % interval lies inside {t.margin:g} {t.unit} on both sides, differs "
            f"where it lies outside on one.{_few(t)} {t.reason}"
        )
    return said


def _few(bound: DirectionBound) -> str:
    return f" Fewer than {bound.least_seeds} seeds are not judged." if bound.least_seeds > 1 else ""


def _cell_words(metric: str, bound: CellBound) -> str:
    def amount(value: float) -> str:
        return f"{100 * value:g} % of the paper's number" if bound.relative else f"{value:g}"

    which = "Cells" if metric == "any" else metric
    return (
        f"{which}: reproduced up to {amount(bound.reproduced)} off, within tolerance up to {amount(bound.within)}, and "
        "there reproduced too with the paper's number in the interval; further off with it in the interval, the run is "
        f"too small to tell. {bound.reason}"
    )


def as_document() -> dict[str, Any]:
    """All bounds as JSON."""
    return {name: bound.model_dump(exclude_none=True) for name, bound in tolerances().items()}
