"""The figure of Lemma 3.1: the gap between the two policy gradients against the size of the errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def draw(rows: Sequence[Mapping[str, float]], path: Path) -> tuple[Path, Path]:
    """Draw the rows of `dvpo.objectives.lemma.sweep` on log-log axes; the same rows give the same bytes.

    Returns the files written: `path` with the suffixes .svg and .png.
    Raises ValueError if there are no rows or one has no place on a logarithmic axis.
    """
    if not rows or any(min(row["error"], row["low"], row["bound"]) <= 0 for row in rows):
        raise ValueError("the figure of Lemma 3.1 needs rows whose errors, gaps and bounds are above 0")
    rows = sorted(rows, key=lambda row: row["error"])
    errors, gaps, lows, highs, bounds = ([row[key] for row in rows] for key in ("error", "gap", "low", "high", "bound"))
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    # Without a salt and with a date, matplotlib writes a different SVG every time.
    with matplotlib.rc_context({"svg.hashsalt": "dvpo"}):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(errors, bounds, color="#555555", linestyle="--", label="bound κ (mean over problems)")
        axes.fill_between(errors, lows, highs, color="#1f77b4", alpha=0.25, linewidth=0, label="95% of the draws")
        axes.plot(errors, gaps, color="#1f77b4", marker="o", markersize=4, label="mean gap")
        axes.set_xlabel("size of the errors, ε_R = ε_Q")
        axes.set_ylabel("norm of the gradient difference")
        axes.set_title("Lemma 3.1: reward-derived against learned values", fontsize=10)
        axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=150, metadata={"Software": None})
    return svg, png
