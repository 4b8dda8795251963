"""The numbers the paper prints, as data, each with its place.

`paper_numbers.json` holds every cell of Tables 1-10, the numbers stated in the text and in Figures 3 and 4, and notes
on where the paper's numbers disagree with each other. Names are the same in every table ("MT-Bench" where Table 1
prints "Mtbench"; the models of Table 2 by the names in its caption). A model is "not named" where the table names none
and "any" where the entry holds for all. A change row has the method "change".
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One cell of a table; `value` is text in the symbolic Table 6 only, "-" where that is empty.

    `starred` marks a number the paper itself took from elsewhere.
    """

    table: int
    model: str
    method: str
    metric: str
    value: float | str
    starred: bool = False


@dataclass(frozen=True)
class Fact:
    """One number stated outside the tables. With a `baseline`, it is that table's `method` minus `baseline`."""

    source: str
    model: str
    method: str
    metric: str
    value: float
    table: int | None = None
    baseline: str | None = None


def cells(table: int) -> list[Cell]:
    """Every cell of a table, row by row. Raises KeyError for a table without numbers."""
    found = [Cell(**entry) for entry in _numbers()["cells"] if entry["table"] == table]
    if not found:
        raise KeyError(f"the paper has no numbers in Table {table}; they are in Tables 1 to 10")
    return found


def value(table: int, model: str, method: str, metric: str) -> float | None:
    """The number in one cell, or None if the table has no number there."""
    for cell in cells(table):
        if (cell.model, cell.method, cell.metric) == (model, method, metric) and not isinstance(cell.value, str):
            return cell.value
    return None


def facts(source: str | None = None) -> list[Fact]:
    """The numbers stated outside the tables: all, or those of one place ("Figure 4", "Appendix G")."""
    return [Fact(**entry) for entry in _numbers()["facts"] if source in (None, entry["source"])]


def notes(table: int) -> list[str]:
    """How to read a table, and where it disagrees with its own change row, with the text, or with another table."""
    return [entry["text"] for entry in _numbers()["notes"] if entry["table"] == table]


@functools.cache
def _numbers() -> dict[str, list[dict[str, Any]]]:
    """The file, read once."""
    text = Path(__file__).with_name("paper_numbers.json").read_text(encoding="utf-8")
    document: dict[str, list[dict[str, Any]]] = json.loads(text)
    return document
