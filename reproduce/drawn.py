"""The figures of a run: learning curves, token values, Lemma 3.1."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce.recipe import AtlasRecipe

if TYPE_CHECKING:
    from reproduce.tables import Book

SMOOTH = 5


def figures(book: "Book", folder: Path) -> list[dict[str, Any]]:
    """Draws what the finished stages allow, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for maker in (token_values, learning_curves, gold_bars, policy_run, lemma):
        if figure := maker(book, folder):
            made.append(figure)
    return made


def token_values(book: "Book", folder: Path) -> dict[str, Any] | None:
    """Figure 3: the value of every token of two answers to one question."""
    found = book.results.get("seed0/token-values")
    if found is None:
        return None
    from reproduce import token_picture

    shown = [token_picture.Scored(**item) for item in json.loads((found.path / "tokens.json").read_text())]
    files = token_picture.draw(shown, folder / "figure_3")
    caption = "Q at every token of two answers to the same question; blue is above zero, orange below."
    return {"figure": 3, "title": "Token values", "caption": caption, "files": list(files)}


def learning_curves(book: "Book", folder: Path) -> dict[str, Any] | None:
    """Figure 4: the gold score of the rollouts over the updates, all methods."""
    from reproduce import figures as draw
    from reproduce.tables import LABELS

    if not isinstance(book.recipe, AtlasRecipe):
        return None
    curves = {}
    for name in book.recipe.methods:
        if logs := _logs(book, name):
            gold = np.array([[_smoothed([r["gold"] for r in log], i) for i in range(len(log))] for log in logs])
            curves[LABELS.get(name, name)] = {
                "updates": [r["update"] for r in logs[0]],
                "mean": gold.mean(0).tolist(),
                "low": gold.min(0).tolist(),
                "high": gold.max(0).tolist(),
            }
    if not curves:
        return None
    files = draw.learning_curves(curves, folder / "figure_4", "gold score of the rollouts", "Learning curves")
    caption = f"Mean over seeds, band from the lowest to the highest seed, means of the last {SMOOTH} updates. "
    caption += "The gold score is not seen in training."
    return {"figure": 4, "title": "Learning curves", "caption": caption, "files": list(files)}


def gold_bars(book: "Book", folder: Path) -> dict[str, Any] | None:
    """Table 1 as a picture."""
    from dvpo.evaluation.intervals import mean_over_seeds
    from reproduce import figures as draw
    from reproduce.tables import LABELS

    rows: list[draw.Bar] = []
    for name, label in LABELS.items():
        if book.seeds(f"gold/{name}"):
            mean, (low, high) = mean_over_seeds(book.gold(name))
            rows.append({"label": label, "value": mean, "low": low, "high": high})
    if len(rows) < 2:
        return None
    files = draw.bars(rows, folder / "policies", "gold score on unseen prompts", rows[0]["value"], "SFT")
    caption = "Mean gold score with 95 % intervals over seeds and prompts."
    return {"figure": "policies", "title": "Policies", "caption": caption, "files": list(files)}


def policy_run(book: "Book", folder: Path) -> dict[str, Any] | None:
    """Value, KL and length over one run of the policy on real prompts."""
    from reproduce import figures as draw

    logs = _logs(book, "dvpo")
    if not logs:
        return None
    updates = [r["update"] for r in logs[0]]
    panels = {
        label: {"updates": updates, "mean": [r[key] for r in logs[0]]}
        for label, key in (("GVM value", "value"), ("KL per token (nats)", "kl"), ("response tokens", "length"))
    }
    files = draw.small_curves(panels, folder / "policy_run")
    caption = "DVPO against the frozen GVM: mean Q of the rollouts, KL to the start, and length."
    return {"figure": 4, "title": "A DVPO run", "caption": caption, "files": list(files)}


def lemma(book: "Book", folder: Path) -> dict[str, Any] | None:
    """Lemma 3.1: the two policy gradients come together as the errors vanish."""
    found = book.results.get("lemma")
    if found is None:
        return None
    from reproduce import lemma_figure

    files = lemma_figure.draw(json.loads((found.path / "sweep.json").read_text()), folder / "lemma_3_1.svg")
    caption = (
        "Difference of the policy gradients from a reward-derived and a learned Q in random tabular MDPs, with the "
    )
    caption += "bound kappa; mean and 95 % band over MDPs."
    return {"figure": "lemma 3.1", "title": "Lemma 3.1", "caption": caption, "files": list(files)}


def _logs(book: "Book", name: str) -> list[list[dict[str, float]]]:
    return [json.loads((r.path / "curves.json").read_text()) for r in book.seeds(f"policy/{name}")]


def _smoothed(values: list[float], i: int) -> float:
    return float(np.mean(values[max(0, i - SMOOTH + 1) : i + 1]))
