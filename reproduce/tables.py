"""From finished stages to tables, figures and findings. Every number is read from a stage's manifest or files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dvpo.evaluation.intervals import mean_over_seeds
from reproduce import paper
from reproduce.pipeline import Result
from reproduce.recipe import AtlasRecipe, DataRecipe

SCALE = "not comparable (scale)"
LABELS = {
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "remax": "ReMax",
    "grpo": "GRPO",
    "dvpo-q": "DVPO (A = Q)",
    "dvpo-q-whitened": "DVPO (A = Q, whitened)",
    "dvpo-gae": "DVPO (GAE)",
    "dvpo-official": "DVPO (official)",
}
PAPER_METHOD = {"sft": "SFT", "ppo": "PPO", "remax": "ReMax", "grpo": "GRPO"}
AGGREGATE_NAMES = {"mean": "Mean Value", **{f"p{k}": f"P{k} Value" for k in (1, 5, 10, 90, 95, 99)}}


@dataclass
class Made:
    """What a run shows."""

    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


def make(recipe: AtlasRecipe | DataRecipe, results: dict[str, Result], wanted: set[str] | None, out: Path) -> Made:
    """Tables, figures and findings of the stages that there are."""
    from reproduce import drawn

    book = Book(recipe, results)
    made = Made()
    makers = {"T1": table_1, "T3": accuracy, "T4": table_4, "T5": table_5, "T7": table_7, "T8": table_8, "T9": table_9}
    for name, maker in (makers | {"credit": credit, "coverage": coverage}).items():
        table = maker(book) if wanted is None or name in wanted else None
        if table and table["rows"]:
            made.tables.append({"recipe": recipe.name, **table})
    shown = drawn.figures(book, out / "figures")
    made.figures = [f for f in shown if wanted is None or f"F{f['figure']}" in wanted]
    made.findings = findings(book)
    made.not_run = [
        "Tables 1 and 2 on MT-Bench, Arena-Hard and AlpacaEval 2, Table 3 on RewardBench, Table 10, Figure 2: not run.",
        "The paper's models (3B to 13B) on 8xA100: not run; every row says what it stands on.",
    ]
    return made


@dataclass
class Book:
    """The results, looked up by name over all seeds."""

    recipe: AtlasRecipe | DataRecipe
    results: dict[str, Result]

    def seeds(self, name: str) -> list[Result]:
        """The results of one stage name, a result per seed; empty where it was not run."""
        found = (self.results.get(f"seed{s}/{name}") for s in range(self.recipe.seeds))
        return [r for r in found if r is not None]

    def names(self, prefix: str) -> list[str]:
        """The names below a prefix, in the order of the graph."""
        start = f"seed0/{prefix}/"
        return [i.removeprefix(start) for i in self.results if i.startswith(start)]

    def rows(self, name: str, file: str) -> list[list[dict[str, Any]]]:
        """The lines of a stage's JSON-lines file, per seed."""
        return [[json.loads(line) for line in (r.path / file).read_text().splitlines()] for r in self.seeds(name)]

    def gold(self, name: str) -> list[list[float]]:
        """Gold scores per seed and test prompt."""
        return [[row["gold"] for row in seed] for seed in self.rows(f"gold/{name}", "gold.jsonl")]

    def wins(self, name: str, aggregate: str) -> tuple[list[list[float]], list[list[int]]]:
        """Per seed: 1, 0.5 or 0 for every pair, and the pair's prompt."""
        from dvpo.evaluation.pairwise import wins

        seeds = self.rows(name, "pairs.jsonl")
        return [wins(rows, aggregate) for rows in seeds], [[r["prompt"] for r in rows] for rows in seeds]


def row(book: Book, model: str, method: str, metric: str, published: float | None, values: list[list[float]],
        groups: list[list[int]] | None = None, scale: float = 1.0, verdict: str = SCALE) -> dict[str, Any]:  # fmt: skip
    """A table row: the mean over seeds with its interval."""
    mean, (low, high) = mean_over_seeds(values, groups)
    return {
        "model": model,
        "method": method,
        "metric": metric,
        "paper": published,
        "measured": round(scale * mean, 4),
        "ci95": [round(scale * low, 4), round(scale * high, 4)],
        "n": sum(map(len, values)),
        "seeds": len(values),
        "verdict": verdict,
    }


def accuracy_row(
    book: Book, stage: str, model: str, method: str, metric: str, aggregate: str, published: float | None
) -> dict[str, Any]:
    """A row of pairwise accuracy in percent."""
    values, groups = book.wins(stage, aggregate)
    return row(book, model, method, metric, published, values, groups, scale=100.0)


def size_name(book: Book) -> str:
    """What model the measured rows are about."""
    if isinstance(book.recipe, DataRecipe):
        return Path(book.recipe.model or "").name
    return "tiny Llama"


def table_1(book: Book) -> dict[str, Any] | None:
    """Policies by gold score, and each one's paired gain over SFT."""
    names = [n for n in LABELS if book.seeds(f"gold/{n}")]
    if not names:
        return None
    rows, sft = [], book.gold("sft")
    for name in names:
        method = PAPER_METHOD.get(name, "DVPO" if name == "dvpo-q" else "")
        published = paper.value(1, "Llama3.2-3B-Base", method, "MT-Bench") if method else None
        rows.append(
            row(book, size_name(book), LABELS[name], "gold score (paper: MT-Bench, 3B)", published, book.gold(name))
        )
    for name in names[1:]:
        gains = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(book.gold(name), sft, strict=True)]
        rows.append(row(book, size_name(book), LABELS[name], "gain over SFT, paired", None, gains))
    return {
        "table": 1,
        "title": "Policies on unseen prompts",
        "note": "Gold score in [-1, 1] of sampled answers to test prompts. GRPO samples 5 answers a prompt, others 1"
        " (ReMax one more, greedy). The paper's column is on another scale and another model.",
        "rows": rows,
    }


def table_4(book: Book) -> dict[str, Any] | None:
    """GVM beside the PPO critic at the end of its training."""
    where = "accuracy" if isinstance(book.recipe, AtlasRecipe) else "in-domain"
    rows = [
        accuracy_row(book, f"{where}/{stage}", size_name(book), label, "accuracy on held-out pairs", "mean",
                     paper.value(4, "Llama3-8B", label, "accuracy on UltraFeedback"))
        for stage, label in (("gvm", "GVM"), ("critic", "A/C")) if book.seeds(f"{where}/{stage}")
    ]  # fmt: skip
    return {"table": 4, "title": "GVM and the PPO critic", "rows": [*rows, *_baselines(book, f"{where}/gvm")]}


def table_5(book: Book) -> dict[str, Any] | None:
    """The value models on data of another source."""
    if not isinstance(book.recipe, DataRecipe):
        return None
    rows = []
    for other in book.recipe.other_data:
        published = paper.value(5, "Llama3-8B", "GVM", "accuracy on HH-RLHF") if "hh" in other else None
        for name, label, how in (
            ("gvm", "GVM", "mean"),
            ("gvm-from-score", "GVM from scores", "mean"),
            ("rm", "ScalarRM", "last"),
        ):
            if book.seeds(f"{other}/{name}"):
                rows.append(accuracy_row(book, f"{other}/{name}", size_name(book), label, f"accuracy on {other}", how,
                                         published if name == "gvm" else None))  # fmt: skip
        rows += _baselines(book, f"{other}/gvm", f" on {other}")
    return {"table": 5, "title": "Out of distribution", "rows": rows}


def table_7(book: Book) -> dict[str, Any] | None:
    """Seconds per update and peak memory."""
    found = book.results.get("seed0/cost")
    if found is None or not isinstance(book.recipe, AtlasRecipe):
        return None
    rows = []
    for name, cost in found.manifest["metrics"]["methods"].items():
        label = {"dvpo-gae": "DVPO", "ppo": "PPO", "remax": "ReMax", "grpo": "GRPO"}[name]
        for metric, key, spread in (("time (s)", "seconds", cost["seconds_range"]), ("memory (GB)", "memory_mb", None)):
            scale = 1.0 if key == "seconds" else 1 / 1024
            rows.append({
                "model": size_name(book), "method": label, "metric": metric,
                "paper": paper.value(7, "Llama3.2-3B-Base", label, metric),
                "measured": round(cost[key] * scale, 4), "ci95": spread, "n": book.recipe.cost_rounds,
                "seeds": 1, "verdict": SCALE,
            })  # fmt: skip
    note = (
        "Medians over rounds in one run; the range of the rounds stands in the interval's place. Memory is the growth "
    )
    note += "of the process's peak over its imports; at this size it is mostly the allocator's."
    return {"table": 7, "title": "Cost of an update", "note": note, "rows": rows}


def table_8(book: Book) -> dict[str, Any] | None:
    """GVMs of several sizes under every aggregate."""
    if isinstance(book.recipe, DataRecipe):
        stages = {size_name(book): "in-domain/gvm"}
    else:
        stages = {"main": "accuracy/gvm", **{n: f"accuracy/gvm-{n}" for n in book.recipe.other_sizes}}
    rows = [
        accuracy_row(book, stage, name, "GVM", metric, how, paper.value(8, "Llama3-8B", "GVM", metric))
        for name, stage in stages.items() if book.seeds(stage) for how, metric in AGGREGATE_NAMES.items()
    ]  # fmt: skip
    return {"table": 8, "title": "Aggregates and sizes", "note": "The paper's column is Llama3-8B.", "rows": rows}


def table_9(book: Book) -> dict[str, Any] | None:
    """What the GVM's rewards come from."""
    where = "accuracy" if isinstance(book.recipe, AtlasRecipe) else "in-domain"
    rows = []
    for stage, label, method in (
        ("gvm-from-rm", "from reward model", "From Reward"), ("gvm", "from preference", "From Preference"),
        ("gvm-from-score", "from scores", ""),
    ):  # fmt: skip
        if book.seeds(f"{where}/{stage}"):
            for how, metric in AGGREGATE_NAMES.items():
                published = paper.value(9, "not named", method, metric) if method else None
                rows.append(accuracy_row(book, f"{where}/{stage}", size_name(book), label, metric, how, published))
    return {"table": 9, "title": "Where the rewards come from", "rows": rows}


def credit(book: Book) -> dict[str, Any] | None:
    """How well values locate the wrong token (not in the paper)."""
    rows = []
    labels = {"gvm": "GVM, Q - V", "critic": "PPO critic, Q - V", "rm": "ScalarRM, spread evenly"}
    for name, label in labels.items():
        found = [r.manifest["metrics"] for r in book.seeds(f"credit/{name}")]
        for key, metric in (("auroc", "AUROC of wrong tokens"), ("lowest_hit", "lowest step is a wrong token")):
            if found:
                values = [m[key] for m in found]
                low, high = (float(np.mean([m[f"{key}_ci95"][i] for m in found])) for i in (0, 1))
                rows.append({
                    "model": size_name(book), "method": label, "metric": metric, "paper": None,
                    "measured": round(float(np.mean(values)), 4), "ci95": [round(low, 4), round(high, 4)],
                    "n": sum(m["n_responses"] for m in found), "seeds": len(found), "verdict": "not in the paper",
                })  # fmt: skip
    if rows:
        chance = float(np.mean([r.manifest["metrics"]["lowest_chance"] for r in book.seeds("credit/gvm")]))
        note = f"Chance: AUROC 0.5; lowest step {chance:.3f}. Intervals: the mean over seeds of each seed's."
        return {"table": "credit", "title": "Credit against known truth", "note": note, "rows": rows}
    return None


def coverage(book: Book) -> dict[str, Any] | None:
    """With and without the SFT policy's own answers among the preference data."""
    rows = []
    for name in book.names("gold"):
        if name.endswith("-scripted"):
            method = name.removesuffix("-scripted")
            for stage, metric in (
                (method, "gold score, own answers covered"),
                (name, "gold score, scripted policies only"),
            ):
                rows.append(
                    row(
                        book,
                        size_name(book),
                        LABELS[method],
                        metric,
                        None,
                        book.gold(stage),
                        verdict="not in the paper",
                    )
                )
    for stage, metric in (
        ("gvm", "GVM accuracy, own answers covered"),
        ("gvm-scripted", "GVM accuracy, scripted policies only"),
    ):
        if rows and book.seeds(f"accuracy/{stage}"):
            made = accuracy_row(book, f"accuracy/{stage}", size_name(book), "GVM", metric, "mean", None)
            rows.append({**made, "verdict": "not in the paper"})
    return {"table": "coverage", "title": "Coverage of the policy's own behaviour", "rows": rows}


def accuracy(book: Book) -> dict[str, Any] | None:
    """GVM beside the ScalarRM on the same held-out pairs, with both baselines."""
    where = "accuracy" if isinstance(book.recipe, AtlasRecipe) else "in-domain"
    rows = []
    readings = (("gvm", "GVM, mean", "mean"), ("gvm", "GVM, last", "last"), ("gvm", "GVM, Bellman", "bellman"))
    for stage, label, how in (*readings, ("rm", "ScalarRM", "last")):
        if book.seeds(f"{where}/{stage}"):
            rows.append(
                accuracy_row(book, f"{where}/{stage}", size_name(book), label, "accuracy on held-out pairs", how, None)
            )
    return {"table": "accuracy", "title": "GVM and ScalarRM", "rows": [*rows, *_baselines(book, f"{where}/gvm")]}


def _baselines(book: Book, stage: str, suffix: str = "") -> list[dict[str, Any]]:
    if not book.seeds(stage):
        return []
    longer = accuracy_row(book, stage, "baseline", "longer wins", f"accuracy{suffix}", "tokens", None)
    chance = {**longer, "method": "chance", "measured": 50.0, "ci95": [50.0, 50.0]}
    return [{**longer, "verdict": "baseline"}, {**chance, "verdict": "baseline"}]


def findings(book: Book) -> list[str]:
    """Sentences that follow from the numbers, whichever way they fall."""
    said = []
    sft = book.gold("sft")
    for name in [n for n in LABELS if n != "sft" and book.seeds(f"gold/{n}")] if sft else []:
        gains = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(book.gold(name), sft, strict=True)]
        mean, (low, high) = mean_over_seeds(gains)
        verdict = "is above SFT" if low > 0 else "is below SFT" if high < 0 else "cannot be told from SFT"
        said.append(f"{LABELS[name]} {verdict} in gold score: {mean:+.3f} [{low:+.3f}, {high:+.3f}].")
    if book.seeds("gold/dvpo-gae"):
        for name in ("ppo", "grpo", "remax", "dpo"):
            if book.seeds(f"gold/{name}"):
                pairs = zip(book.gold("dvpo-gae"), book.gold(name), strict=True)
                mean, (low, high) = mean_over_seeds([[a - b for a, b in zip(x, y, strict=True)] for x, y in pairs])
                word = "beats" if low > 0 else "loses to" if high < 0 else "cannot be told from"
                said.append(f"DVPO (GAE) {word} {LABELS[name]}: {mean:+.3f} [{low:+.3f}, {high:+.3f}].")
    return said
