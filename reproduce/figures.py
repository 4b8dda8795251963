"""The curves and bars of the report, drawn from plain data.

Every function writes an SVG and a PNG and returns their paths. The same data give the same bytes. Colours are those of
Okabe and Ito, which colour-blind readers can tell apart; lines differ in their dashes too, for print without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dvpo.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Mapping[str, Sequence[float | None]]
"""`updates`, `mean`, and, where there is a band, `low` and `high`: lists of one length. None is a gap."""

# Yellow, the eighth of the set, is left out: it is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (1.5, 1.5)), (0, (9, 3)), (0, (4, 1, 1, 1, 1, 1)))
GREY = "#555555"


class Bar(TypedDict):
    """One line of `bars`: a name, a value with its interval. Without a value the line says so."""

    label: str
    value: float | None
    low: float | None
    high: float | None


def style() -> AbstractContextManager[None]:
    """The settings every picture is made and saved under."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.hashsalt": "dvpo",  # without it the ids in an SVG are random
            "text.parse_math": False,  # a "$" in a name or a token is a "$"
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Writes `path`.svg and `path`.png, each atomically, and returns the two. Call it inside `style()`.

    An ending .svg or .png of `path` is dropped first; any other dot belongs to the name ("llama3.2").
    """
    stem = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    save_one(figure, svg)
    save_one(figure, png)
    return svg, png


def save_one(figure: Figure, path: Path) -> None:
    """Writes one file; its suffix, .svg or .png, is the format. Call it inside `style()`."""
    # A date or a program version would make the bytes differ from one run or machine to the next.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def learning_curves(curves: Mapping[str, Curve], path: Path, ylabel: str, title: str) -> tuple[Path, Path]:
    """One line with its band for each method, over the policy updates; the legend is below.

    Raises ValueError if there is no curve, or the lists of one differ in length.
    """
    _check(curves)
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, curve) in enumerate(curves.items()):
            _line(axes, curve, number, name)
        axes.set_xlabel("updates")
        axes.set_ylabel(ylabel)
        axes.set_title(title)
        axes.grid(True, linewidth=0.4, alpha=0.6)
        # The long handle lets the reader see the dashes.
        figure.legend(loc="outside lower center", ncols=min(len(curves), 4), frameon=False, handlelength=3.2)
        return save(figure, path)


def bars(
    rows: Sequence[Bar], path: Path, xlabel: str, reference: float | None = None, reference_label: str = ""
) -> tuple[Path, Path]:
    """One horizontal line for each row: a dot, its interval, the number at the right; a dashed line at `reference`.

    Dots and not bars: an accuracy axis need not begin at zero. The first row is on top.
    Raises ValueError if there is no row, or an interval does not go from low to high.
    """
    if not rows:
        raise ValueError("there are no rows to draw")
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.2, 1.3 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            _dot(axes, row, place)
        if reference is not None:
            axes.axvline(reference, color=GREY, linestyle="--", linewidth=1.2, label=reference_label or None, zorder=1)
            if reference_label:
                figure.legend(loc="outside lower center", frameon=False, handlelength=3.2)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        axes.margins(x=0.08)
        axes.grid(True, axis="x", linewidth=0.4, alpha=0.6)
        return save(figure, path)


def small_curves(panels: Mapping[str, Curve], path: Path) -> tuple[Path, Path]:
    """One small panel for each quantity of a run, three in a row.

    Raises ValueError if there is no panel, or the lists of one differ in length.
    """
    _check(panels)
    from matplotlib.figure import Figure

    with style():
        columns = min(len(panels), 3)
        lines = math.ceil(len(panels) / 3)
        figure = Figure(figsize=(max(2.7 * columns, 4.0), 2.4 * lines), layout="constrained")
        for number, (name, curve) in enumerate(panels.items()):
            axes = figure.add_subplot(lines, columns, number + 1)
            _line(axes, curve, 0, None)
            axes.set_title(name)
            axes.set_xlabel("updates")
            axes.locator_params(nbins=4)
            axes.grid(True, linewidth=0.4, alpha=0.6)
        return save(figure, path)


def _check(curves: Mapping[str, Curve]) -> None:
    if not curves:
        raise ValueError("there are no curves to draw")
    for name, curve in curves.items():
        if ("low" in curve) != ("high" in curve):
            raise ValueError(f"the curve of {name} has one edge of its band and not the other")
        lengths = {key: len(curve[key]) for key in ("updates", "mean", "low", "high") if key in curve}
        if len(set(lengths.values())) != 1 or not {"updates", "mean"} <= set(lengths):
            raise ValueError(f"the curve of {name} needs updates and mean, and lists of one length: it has {lengths}")


def _line(axes: Axes, curve: Curve, number: int, label: str | None) -> None:
    x, mean = _floats(curve["updates"]), _floats(curve["mean"])
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    if "low" in curve:
        axes.fill_between(x, _floats(curve["low"]), _floats(curve["high"]), color=colour, alpha=0.15, linewidth=0)
    # A line through one point cannot be seen, so few points get markers.
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(x) <= 12 else {}
    axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.8, label=label, **marker)


def _dot(axes: Axes, row: Bar, place: int) -> None:
    # The numbers stand in a column right of the axes: x in parts of the axes, y in rows.
    right: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
    value, low, high = row["value"], row["low"], row["high"]
    if value is None:
        axes.text(1.01, place, "no value", color=GREY, **right)
        return
    if low is not None and high is not None:
        if low > high:
            raise ValueError(f"the interval of {row['label']} goes from {low} to {high}")
        # Not errorbar: a bootstrap interval need not hold its own point estimate.
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2.2, alpha=0.55, zorder=2)
    axes.plot([value], [place], color=COLOURS[0], marker="o", markersize=6, linestyle="none", zorder=3)
    axes.text(1.01, place, f"{value:.3f}", **right)


def _floats(values: Sequence[float | None]) -> list[float]:
    """The values, with a gap as NaN: matplotlib breaks the line there."""
    return [math.nan if value is None else float(value) for value in values]
