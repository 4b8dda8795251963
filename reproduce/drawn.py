"""The figures of a run: what each is drawn from. How they look is in figures.py."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce import verdicts
from reproduce.recipe import AtlasRecipe
from reproduce.tables import pictures
from reproduce.tables.book import LABELS

if TYPE_CHECKING:
    from reproduce.tables.book import Book

Figure = dict[str, Any]


def figures(book: "Book", folder: Path, wanted: set[str] | None) -> list[Figure]:
    """Draws into `folder` what is wanted (None: everything). Figures 2 to 4 are always there where they are wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    papers = {"F2": win_rates, "F3": token_values, "F4": learning_curves}
    made: list[Figure | None] = [
        maker(book, folder) for name, maker in papers.items() if wanted is None or name in wanted
    ]
    if wanted is None or "F4" in wanted:
        made.append(policy_run(book, folder))
    if wanted is None or "T1" in wanted:
        made.append(gold_bars(book, folder))
    if wanted is None or "lemma" in wanted:
        made.append(lemma(book, folder))
    return [figure for figure in made if figure is not None]


def win_rates(book: "Book", folder: Path) -> Figure:
    """Figure 2: how often DVPO's answer to a test prompt is the better one."""
    from reproduce import figures as draw

    shares = []
    for left, right, outcomes in pictures.win_rates(book):
        flat = np.array([value for seed in outcomes for value in seed])
        won, tied, lost = (float((flat == value).mean()) for value in (1.0, 0.5, 0.0))
        shares.append((f"{LABELS[left]} : {LABELS[right]}", (won, tied, lost)))
    files = draw.shares(shares, folder / "figure_2") if shares else ()
    caption = "Answers to the test prompts, compared by the judge of the built-in world. The paper has GPT-4o as judge."
    if not shares:
        caption = "Not run: this recipe has no judge of held-out answers. The paper has GPT-4o as judge."
    return {
        "figure": 2, "title": "Win rate on held-out prompts", "caption": caption, "files": list(files),
        "rows": pictures.win_rows(book), "bounds": verdicts.in_words("F2"),
    }  # fmt: skip


def token_values(book: "Book", folder: Path) -> Figure:
    """Figure 3: the value of every token of two answers to one question."""
    found = book.results.get("seed0/token-values")
    files: tuple[Path, ...] = ()
    caption = "Not run: the stage token-values is missing."
    if found is not None:
        from reproduce import token_picture

        shown = [token_picture.Scored(**item) for item in json.loads((found.path / "tokens.json").read_text())]
        files = token_picture.draw(shown, folder / "figure_3")
        caption = "Q at every token of two answers to the same question; blue is above zero, orange below."
    return {
        "figure": 3, "title": "Token values", "caption": caption, "files": list(files),
        "rows": pictures.token_rows(book),
    }  # fmt: skip


def learning_curves(book: "Book", folder: Path) -> Figure:
    """Figure 4: the gold score of the rollouts over the updates, all methods."""
    from reproduce import figures as draw

    curves: dict[str, draw.Curve] = {}
    for name, (updates, seeds) in pictures.gold_curves(book).items():
        gold = np.array(seeds)
        curves[LABELS.get(name, name)] = {
            "updates": updates,
            "mean": gold.mean(0).tolist(),
            "low": gold.min(0).tolist(),
            "high": gold.max(0).tolist(),
        }
    title, axis = "Learning curves", "gold score of the rollouts"
    files = draw.learning_curves(curves, folder / "figure_4", axis, title) if curves else ()
    caption = (
        f"Mean over seeds, band from the lowest to the highest seed, means of the last {pictures.SMOOTH} updates. "
    )
    caption += "The gold score is not seen in training."
    if not curves:
        caption = "Not run: this recipe does not train the methods side by side."
    return {
        "figure": 4, "title": title, "caption": caption, "files": list(files),
        "rows": pictures.curve_rows(book), "bounds": verdicts.in_words("F4"),
    }  # fmt: skip


def gold_bars(book: "Book", folder: Path) -> Figure | None:
    """Table 1 as a picture."""
    from dvpo.evaluation.intervals import mean_over_seeds
    from reproduce import figures as draw

    rows: list[draw.Bar] = []
    for name in book.methods():
        mean, (low, high) = mean_over_seeds(book.gold(name))
        rows.append({"label": LABELS[name], "value": mean, "low": low, "high": high})
    if len(rows) < 2:
        return None
    files = draw.bars(rows, folder / "policies", "gold score on unseen prompts", rows[0]["value"], "SFT")
    caption = "Mean gold score with 95 % intervals over seeds and prompts."
    return {"figure": "policies", "title": "Policies", "caption": caption, "files": list(files)}


def policy_run(book: "Book", folder: Path) -> Figure | None:
    """Value, KL and length over one run of the policy on real prompts."""
    from reproduce import figures as draw

    logs = next((logs for name in pictures.DVPO if (logs := book.curves(name))), [])
    if not logs or isinstance(book.recipe, AtlasRecipe):
        return None
    updates = [r["update"] for r in logs[0]]
    panels: dict[str, draw.Curve] = {
        label: {"updates": updates, "mean": [r[key] for r in logs[0]]}
        for label, key in (("GVM value", "value"), ("KL per token (nats)", "kl"), ("response tokens", "length"))
    }
    files = draw.small_curves(panels, folder / "policy_run")
    caption = "DVPO against the frozen GVM: mean Q of the rollouts, KL to the start, and length."
    return {"figure": "4, one run", "title": "A DVPO run", "caption": caption, "files": list(files)}


def lemma(book: "Book", folder: Path) -> Figure | None:
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


def study_figures(book: "Book", folder: Path) -> list[Figure]:
    """The study's two pictures: every policy's gold score, and gold score against GVM value over training."""
    from dvpo.evaluation.intervals import mean_over_seeds
    from reproduce import figures as draw
    from reproduce.tables import study

    rows: list[draw.Bar] = []
    panels: dict[str, dict[str, draw.Curve]] = {}
    for name, label in study.policies(book).items():
        mean, (low, high) = mean_over_seeds(book.gold(name))
        rows.append({"label": label, "value": mean, "low": low, "high": high})
    for name, label in study.trained_on_values(book).items():
        if study.has_gold(logs := book.curves(name)):
            updates = [r["update"] for r in logs[0]]
            panels[label] = {
                text: {"updates": updates, "mean": _mean_curve(logs, key)}
                for text, key in (("GVM value", "value"), ("gold score", "gold"))
            }  # fmt: skip
    sft = mean_over_seeds(book.gold("sft"))[0] if book.seeds("gold/sft") else None
    bars = draw.bars(rows, folder / "study", "gold score on unseen prompts", sft, "SFT")
    made = [{
        "figure": "study", "title": "Estimators and value models",
        "caption": "Mean gold score with 95 % intervals over seeds and prompts.", "files": list(bars),
    }]  # fmt: skip
    if panels:
        files = draw.panels(panels, folder / "overoptimisation")
        caption = (
            "The GVM's mean value of the rollouts, which training raises, and their gold score, which it does not see; "
        )
        caption += f"means over seeds and the last {pictures.SMOOTH} updates."
        made.append({"figure": "over-optimisation", "title": "Value and gold score over training",
                     "caption": caption, "files": list(files)})  # fmt: skip
    return made


def _mean_curve(logs: list[list[dict[str, float]]], key: str) -> list[float]:
    return pictures.smoothed(np.mean([[row[key] for row in log] for log in logs], axis=0).tolist())
