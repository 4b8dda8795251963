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
SHARE_COLOURS = ("#56B4E9", "#DDDDDD", "#E69F00")  # black is readable on all three


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


def panels(curves: Mapping[str, Mapping[str, Curve]], path: Path) -> tuple[Path, Path]:
    """One panel for each name, three in a row, all on one scale; each has the same curves, named in one legend.

    Raises ValueError if there is no panel or no curve, or the lists of one differ in length.
    """
    if not curves:
        raise ValueError("there are no curves to draw")
    for panel in curves.values():
        _check(panel)
    from matplotlib.figure import Figure

    with style():
        columns, lines = min(len(curves), 3), math.ceil(len(curves) / 3)
        figure = Figure(figsize=(2.7 * columns + 0.6, 2.1 * lines + 0.6), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
        for axes, (name, panel) in zip(grid, curves.items(), strict=False):
            for number, (label, curve) in enumerate(panel.items()):
                _line(axes, curve, number, label)
            axes.set_title(name, fontsize=8.5)
            axes.locator_params(nbins=4)
            axes.grid(True, linewidth=0.4, alpha=0.6)
        for axes in list(figure.axes)[len(curves) :]:
            axes.remove()
        for axes in figure.axes[-columns:]:
            axes.set_xlabel("updates")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, handlelength=3.2)
        return save(figure, path)


def shares(
    rows: Sequence[tuple[str, tuple[float, ...]]], path: Path, names: Sequence[str] = ("left wins", "tie", "right wins")
) -> tuple[Path, Path]:
    """One bar for each row (label, three shares that sum to 1), its parts named in the legend; the first row on top.

    Raises ValueError if there is no row, or the shares of one do not sum to 1.
    """
    if not rows:
        raise ValueError("there are no rows to draw")
    for label, parts in rows:
        if abs(sum(parts) - 1) > 1e-6 or min(parts) < 0:
            raise ValueError(f"the shares of {label} do not sum to 1: {parts}")
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.2, 1.2 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for part, (name, colour, hatch) in enumerate(zip(names, SHARE_COLOURS, ("", "", "//"), strict=True)):
            starts, widths = [sum(parts[:part]) for _, parts in rows], [parts[part] for _, parts in rows]
            axes.barh(range(len(rows)), widths, left=starts, color=colour, edgecolor="white", hatch=hatch, label=name)
            for place, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width >= 0.06:  # a number does not fit a narrower part
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
                    middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "bbox": box}
                    axes.text(start + width / 2, place, f"{100 * width:.0f}", **middle)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.tick_params(axis="y", length=0)
        axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1.0)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return save(figure, path)


def stage_graph(nodes: Mapping[str, tuple[str, Sequence[str]]], path: Path) -> tuple[Path, Path]:
    """Stages as boxes in a tree: each hangs from the input that ends the longest chain, so no line crosses another.

    nodes: {id: (second line of the box, ids of the inputs)}, every input before what needs it.
    Raises ValueError if there is no stage, or an input is unknown.
    """
    if not nodes:
        raise ValueError("there are no stages to draw")
    column, parent = _tree(nodes)
    rows = _tree_rows(parent)
    from matplotlib.figure import Figure

    with style():
        columns, lines = 1 + max(column.values()), 1 + max(rows.values())
        figure = Figure(figsize=(1.55 * columns, 0.3 * lines + 0.2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set_xlim(-0.03, columns)
        axes.set_ylim(lines - 0.45, -0.55)
        for name, (second, _) in nodes.items():
            x, y = column[name], rows[name]
            if (above := parent[name]) is not None:
                start = column[above] + 0.06
                axes.plot([start, start, x], [rows[above], y, y], color=GREY, linewidth=0.6, zorder=1)
            box = {"facecolor": "white", "edgecolor": "#999999", "linewidth": 0.5, "pad": 1.4}
            text: dict[str, Any] = {"fontsize": 6, "va": "center", "linespacing": 1.1, "bbox": box, "zorder": 2}
            axes.text(x + 0.02, y, f"{name}\n{second}", **text)
        return save(figure, path)


def _tree(nodes: Mapping[str, tuple[str, Sequence[str]]]) -> tuple[dict[str, int], dict[str, str | None]]:
    """Each stage's column, right of all its inputs, and the input that it hangs from."""
    column: dict[str, int] = {}
    parent: dict[str, str | None] = {}
    for name, (_, inputs) in nodes.items():
        if unknown := [i for i in inputs if i not in column]:
            raise ValueError(f"stage {name} needs {unknown[0]}, which does not come before it")
        parent[name] = max(inputs, key=column.__getitem__, default=None)
        column[name] = 1 + max((column[i] for i in inputs), default=-1)
    return column, parent


def _tree_rows(parent: Mapping[str, str | None]) -> dict[str, int]:
    """A row for every stage: a stage shares its first child's row, and every other child begins a new one."""
    children: dict[str | None, list[str]] = {}
    for name, above in parent.items():
        children.setdefault(above, []).append(name)
    rows: dict[str, int] = {}

    def place(name: str, row: int) -> int:
        """Places a stage and all below it from this row on; returns the first row that is free."""
        rows[name] = row
        for child in children.get(name, ()):
            row = place(child, row)
        return max(row, rows[name] + 1)

    free = 0
    for root in children.get(None, ()):
        free = place(root, free)
    return rows


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
