"""Rows of the tables: measured ones, the paper's cells, and directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reproduce import paper, verdicts
from reproduce.paper import Cell
from reproduce.tables.book import Book, Nested, differences

BASELINE = "baseline"
BEYOND = "not in the paper"
Row = dict[str, Any]
Wins = tuple[Nested, list[list[int]]]


def row(book: Book, model: str, method: str, metric: str, published: float | None, values: Nested,
        groups: list[list[int]] | None = None, scale: float = 1.0,
        verdict: str = verdicts.OTHER_SCALE) -> Row:  # fmt: skip
    """A measured row: the mean over seeds with its interval."""
    from dvpo.evaluation.intervals import mean_over_seeds

    mean, (low, high) = mean_over_seeds(values, groups, book.shares_prompts)
    return {
        "model": model,
        "method": method,
        "metric": metric,
        "paper": published,
        "measured": round(scale * mean, 6),
        "ci95": [round(scale * low, 6), round(scale * high, 6)],
        "n": sum(map(len, values)),
        "seeds": len(values),
        "verdict": verdict,
    }


def not_run(model: str, method: str, metric: str, published: float | str | None) -> Row:
    """A row for what this recipe does not measure."""
    return {
        "model": model, "method": method, "metric": metric, "paper": published,
        "measured": None, "ci95": None, "n": None, "seeds": None, "verdict": verdicts.NOT_RUN,
    }  # fmt: skip


def paper_rows(table: int) -> list[Row]:
    """Every cell of the paper's table as a row that says not run."""
    return [not_run(c.model, c.method, c.metric, c.value) for c in paper.cells(table)]


def filled(table: int, measured: Sequence[Row]) -> list[Row]:
    """The measured rows that are no cell of the paper, then every cell of the paper: measured, or not run."""
    rows = {_place(r): r for r in measured}
    cells = {_place(r): r for r in paper_rows(table)}
    return [*(r for place, r in rows.items() if place not in cells), *(rows.get(p, r) for p, r in cells.items())]


def _place(row: Row) -> tuple[str, str, str]:
    return row["model"], row["method"], row["metric"]


def accuracy_row(
    book: Book, stage: str, model: str, method: str, metric: str, aggregate: str, published: float | None,
    verdict: str = verdicts.OTHER_SCALE,
) -> Row:  # fmt: skip
    """A row of pairwise accuracy in percent."""
    values, groups = book.wins(stage, aggregate)
    return row(book, model, method, metric, published, values, groups, 100.0, verdict)


def baselines(book: Book, stage: str, suffix: str = "") -> list[Row]:
    """Longer wins, and chance, on the pairs of a stage."""
    if not book.seeds(stage):
        return []
    longer = accuracy_row(book, stage, "baseline", "longer wins", f"accuracy{suffix}", "tokens", None, BASELINE)
    return [longer, {**longer, "method": "chance", "measured": 50.0, "ci95": [50.0, 50.0]}]


@dataclass(frozen=True)
class Direction:
    """Which of two is better, measured in pairs: left minus right, which is positive in the paper.

    source: the table or figure whose bound judges it ("T4"). paper: the paper's difference, in the unit that its
    metric has, or None where it prints no number. claim: the key of the claim that it bears on.
    """

    claim: str
    source: str
    left: str
    right: str
    metric: str
    paper: float | None
    values: Nested
    groups: list[list[int]] | None = None
    scale: float = 1.0
    kind: Literal["gain", "match", "tie"] = "gain"
    """What the paper says of them: left is better, left is as good or better, the two are comparable."""

    def row(self, book: Book) -> Row:
        """Its row: the verdict is by the interval."""
        method, metric = f"{self.left} − {self.right}", f"{self.kind}: {self.metric}"
        made = row(book, book.size, method, metric, self.paper, self.values, self.groups, self.scale)
        judge = {"gain": verdicts.gain, "match": verdicts.match, "tie": verdicts.tie}[self.kind]
        return {**made, "verdict": judge(self.source, made["ci95"], made["seeds"])}


def paper_difference(left: Sequence[Cell], right: Sequence[Cell]) -> float | None:
    """The first of the differences between two methods' cells of the paper, or None where not all are positive."""
    other = {(c.model, c.metric): c.value for c in right}
    found = [float(c.value) - float(other[c.model, c.metric]) for c in left if (c.model, c.metric) in other]
    return round(found[0], 4) if found and min(found) > 0 else None


def paired_wins(book: Book, left: str, right: str, aggregate: str, other: str = "") -> Wins | None:
    """Left's wins minus right's on the same pairs, and the pairs' prompts; None where the two saw different pairs.

    other: the aggregate of the right one, by default the same.
    """
    (x, prompts), (y, same) = book.wins(left, aggregate), book.wins(right, other or aggregate)
    return (differences(x, y), prompts) if x and prompts == same else None
