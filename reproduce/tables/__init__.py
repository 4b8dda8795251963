"""From finished stages to tables, figures and findings. Every number is read from a stage's manifest or files."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reproduce import paper, verdicts
from reproduce.pipeline import Result
from reproduce.recipe import AtlasRecipe, DataRecipe
from reproduce.report import Section
from reproduce.tables import cost, extra, page, policies, study, values
from reproduce.tables.book import LABELS, Book
from reproduce.tables.claims import claims, findings
from reproduce.tables.rows import row

__all__ = ["FIGURES", "LABELS", "TABLES", "Book", "Made", "claims", "findings", "make", "row"]

Maker = Callable[[Book], dict[str, Any] | None]
TABLES: dict[int, Maker] = {
    1: policies.table_1,
    2: policies.table_2,
    3: values.table_3,
    4: values.table_4,
    5: values.table_5,
    6: cost.table_6,
    7: cost.table_7,
    8: values.table_8,
    9: values.table_9,
    10: policies.table_10,
}
"""The paper's tables with results."""
EXTRA: dict[str, Maker] = {"study": study.table, "credit": extra.credit, "coverage": extra.coverage}
FIGURES = (2, 3, 4)
"""The paper's figures with results."""


@dataclass
class Made:
    """What a run shows."""

    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    study: dict[str, Any] | None = None


def make(recipe: AtlasRecipe | DataRecipe, results: dict[str, Result], wanted: set[str] | None, out: Path) -> Made:
    """Tables, figures and findings of the stages that there are; `wanted` None is all of them.

    A table or figure that is asked for is always there: what was not measured is a row that says so.
    """
    from reproduce import drawn

    book = Book(recipe, results)
    made = Made(tables=tables(book, wanted))
    made.figures = drawn.figures(book, out / "figures", wanted)
    made.findings = findings(book)
    made.claims = [asdict(claim) for claim in claims(book)]
    if (wanted is None or "study" in wanted) and (found := page.study_section(book, out / "figures")) is not None:
        made.sections = [found]
        made.study = page.study_document(book)
    made.not_run = _not_run(book, made)
    return made


def tables(book: Book, wanted: set[str] | None) -> list[dict[str, Any]]:
    """The tables that are wanted, each with the paper's own disagreements and what counts as reproduced."""
    found = []
    for number, maker in TABLES.items():
        if wanted is None or f"T{number}" in wanted:
            table = maker(book)
            assert table is not None
            more = {"paper_notes": paper.notes(number), "bounds": verdicts.in_words(f"T{number}")}
            found.append({"recipe": book.recipe.name, **table, **more})
    for name, maker in EXTRA.items():
        if (wanted is None or name in wanted) and (table := maker(book)) is not None:
            found.append({"recipe": book.recipe.name, **table})
    return found


def _not_run(book: Book, made: Made) -> list[str]:
    """What has no number here, table by table, and why."""
    if isinstance(book.recipe, AtlasRecipe):
        why = "This recipe trains models of well under a million parameters on a built-in world, from nothing: the "
        why += "paper's models (3B to 13B, on 8 A100) were not trained, and its benchmarks ask for far larger ones."
    else:
        why = (
            f"This recipe trains {book.size}; other models of the paper, and benchmarks without a judge, were not run."
        )
    said = [why]
    shown = [(f"Table {t['table']}", t["rows"]) for t in made.tables]
    shown += [(f"Figure {f['figure']}", f.get("rows", [])) for f in made.figures]
    for name, rows in shown:
        missing = [r for r in rows if r["verdict"] == verdicts.NOT_RUN]
        if missing:
            models, metrics = (", ".join(dict.fromkeys(r[key] for r in missing)) for key in ("model", "metric"))
            said.append(f"{name}: {len(missing)} of {len(rows)} rows ({models}): {metrics}.")
    return said
