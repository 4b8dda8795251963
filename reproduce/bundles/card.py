"""The model card of a bundle: what it is, what it was measured on, what it is not for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_USE = {
    "value": "Scoring the tokens of a response: the value after each token and before it, and aggregates of them for a"
    " whole response; the frozen value model of DVPO training with a policy that has the same tokenizer.",
    "reward": "Scoring whole responses with one number; the baseline that PPO, ReMax and GRPO are trained against.",
    "policy": "Answering prompts of the kind that it was trained on; a point of comparison for training methods.",
}
_WORLD_LIMITS = [
    "It knows nothing but the vocabulary and the facts of the built-in world; it is no language model for real text.",
    "Its numbers say how the methods compare in this world, not how they do at the paper's size.",
]
_REAL_LIMITS = [
    "It repeats the preferences of its data, with their mistakes and biases. It is not a judge of safety or of truth.",
    "It was measured on the data named below and nowhere else.",
]
_READ_LIMITS = {
    "value": "Values are not calibrated probabilities, and values of different models cannot be compared.",
    "reward": "It is read at the last token only; its scores have no unit.",
    "policy": "What it writes was not filtered.",
}


def intended_use(role: str, built_in: bool) -> str:
    """What a model of this role is for; `built_in` where its data is the built-in world."""
    return ("Tests, demonstrations and the study of the method in the built-in world. " if built_in else "") + _USE[
        role
    ]


def limits(role: str, built_in: bool, metrics: int) -> list[str]:
    """What it is not for, and what is not known of it."""
    unmeasured = [] if metrics else ["Nothing of it was measured."]
    return [*(_WORLD_LIMITS if built_in else _REAL_LIMITS), _READ_LIMITS[role], *unmeasured]


def card(content: Mapping[str, Any]) -> str:
    """The card (Markdown with the hub's header) of a manifest's content."""
    import jinja2

    folder = Path(__file__).parents[1] / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    rows = [(m["name"], *row) for m in content["metrics"] for row in _rows(m)]
    return environment.get_template("card.md.j2").render(**content, rows=rows)


def _rows(metric: Mapping[str, Any]) -> list[tuple[str, str, str, int]]:
    """(what, value, 95 % interval, n) of a metric."""
    values = metric["values"]
    if metric["kind"] == "pairwise":
        cells = values["accuracy"].items()
        return [(f"accuracy, {name}", *_cell(c["accuracy"], c["ci95"]), c["n"]) for name, c in cells]
    if metric["kind"] == "gold":
        return [("gold score in [-1, 1]", *_cell(values["gold"], values["ci95"]), values["n"])]
    count = values["n_responses"]
    return [
        (f"AUROC of wrong tokens ({values['reading']})", *_cell(values["auroc"], values["auroc_ci95"]), count),
        ("lowest step is on a wrong token", *_cell(values["lowest_hit"], values["lowest_hit_ci95"]), count),
        ("the same by chance", f"{values['lowest_chance']:.3f}", "", count),
    ]


def _cell(value: float, interval: list[float]) -> tuple[str, str]:
    return f"{value:.3f}", f"[{interval[0]:.3f}, {interval[1]:.3f}]"
