"""Tables that the paper does not have: credit against known truth, and coverage."""

from typing import Any

import numpy as np

from reproduce.tables.benchmarks import summed
from reproduce.tables.book import LABELS, Book
from reproduce.tables.policies import GOLD
from reproduce.tables.rows import BEYOND, Row, accuracy_row, row

CREDIT = {
    "gvm": "GVM, Q - V",
    "gvm-td0": "GVM of TD lambda 0, Q - V",
    "gvm-td1": "GVM of TD lambda 1, Q - V",
    "gvm-tau1": "GVM with tau, Q - V",
    "gvm-scripted": "GVM without own samples, Q - V",
    "critic": "PPO critic, Q - V",
    "rm": "ScalarRM, spread evenly",
}


def credit(book: Book) -> dict[str, Any] | None:
    """How well values locate the wrong token."""
    rows: list[Row] = []
    for name, label in CREDIT.items():
        found = book.metrics(f"credit/{name}")
        for key, metric in (("auroc", "AUROC of wrong tokens"), ("lowest_hit", "lowest step is a wrong token")):
            if found:
                scores = [(m[key], m[f"{key}_ci95"], m["n_responses"]) for m in found]
                made = summed(book.size, label, metric, scores)
                low, high = made["ci95"]
                rows.append({**made, "ci95": [max(0.0, low), min(1.0, high)], "verdict": BEYOND})  # both are shares
    if not rows:
        return None
    chance = float(np.mean([m["lowest_chance"] for name in CREDIT for m in book.metrics(f"credit/{name}")]))
    note = f"Chance: AUROC 0.5; lowest step {chance:.3f}."
    return {"table": "credit", "title": "Credit against known truth", "note": note, "rows": rows}


def coverage(book: Book) -> dict[str, Any] | None:
    """With and without the SFT policy's own answers among the preference data."""
    rows: list[Row] = []
    for name in book.names("gold"):
        method = name.removesuffix("-scripted")
        if method != name and book.seeds(f"gold/{method}"):
            for stage, metric in ((method, "own answers covered"), (name, "scripted policies only")):
                rows.append(row(book, book.size, LABELS[method], f"{GOLD}, {metric}", None, book.gold(stage),
                                verdict=BEYOND))  # fmt: skip
    for stage, metric in (("gvm", "own answers covered"), ("gvm-scripted", "scripted policies only")):
        if rows and book.seeds(f"accuracy/{stage}"):
            rows.append(accuracy_row(book, f"accuracy/{stage}", book.size, "GVM", f"GVM accuracy, {metric}", "mean",
                                     None, BEYOND))  # fmt: skip
    if not rows:
        return None
    return {"table": "coverage", "title": "Coverage of the policy's own behaviour", "note": "", "rows": rows}
