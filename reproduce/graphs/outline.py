"""What a run of a recipe would take, from its settings alone: the command of each stage, memory, hours and disk.

Memory and time are predictions of the planner (`reproduce.cost`); nothing here reads data, models or the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dvpo.config import DpoSettings, GvmSettings, PolicySettings, RewardSettings, SftSettings, TrainSettings
from reproduce.pipeline import Stage
from reproduce.recipe import AtlasRecipe, DataRecipe
from reproduce.stages import KINDS

SETTINGS: dict[str, type[TrainSettings | PolicySettings]] = {
    "sft": SftSettings, "rm": RewardSettings, "gvm": GvmSettings, "dpo": DpoSettings, "policy": PolicySettings,
}  # fmt: skip
WEIGHTS, FETCHED, STATE = 4, 2, 12
"""Bytes of a parameter in a checkpoint that we write (float32), in one of the hub (bfloat16), and in a trainer's state
(weights and two moments), of which there are two while one takes the other's place."""


@dataclass(frozen=True)
class Line:
    """One stage. memory: GiB of a device, predicted and usable. hours: [least, most]. disk: GB of its results."""

    id: str
    kind: str
    command: str
    settings: dict[str, Any]
    memory: tuple[float, float] | None = None
    fits: bool | None = None
    hours: tuple[float, float] | None = None
    disk: float | None = None


@dataclass(frozen=True)
class Outline:
    """All stages in the order of the run. disk: GB of all results, and of the largest trainer's state beside them."""

    lines: list[Line]
    hours: tuple[float, float] | None
    disk: tuple[float, float] | None


def outline(recipe: AtlasRecipe | DataRecipe, stages: Sequence[Stage]) -> Outline:
    """The outline of these stages."""
    planned = _plans(recipe, stages)
    lines = [_line(recipe, stage, planned.get(stage.id)) for stage in stages]
    known = [line.hours for line in lines if line.hours is not None]
    hours = (sum(h[0] for h in known), sum(h[1] for h in known)) if known else None
    sizes = [line.disk for line in lines if line.disk is not None]
    state = 2 * STATE * _parameters(recipe) / 1e9
    return Outline(lines, hours, (round(sum(sizes), 1), round(state, 1)) if sizes else None)


def _line(recipe: AtlasRecipe | DataRecipe, stage: Stage, plan: dict[str, Any] | None) -> Line:
    made = Line(stage.id, stage.kind, _command(stage), stage.settings, disk=_disk(recipe, stage))
    if plan is None:
        return made
    memory = (plan["peak"]["gib"], plan["limit_gib"])
    hours = None if plan["hours"] is None else (plan["hours"][0], plan["hours"][1])
    return Line(made.id, made.kind, made.command, made.settings, memory, plan["fits"], hours, made.disk)


def _command(stage: Stage) -> str:
    """What runs the stage."""
    compute, target = stage.settings.get("compute"), KINDS[stage.kind].target
    if compute is None:
        return f"{target} in the run's own process"
    return f"{target} in {compute['processes']} processes of `python -m reproduce.launch`, {compute['strategy']}"


def _plans(recipe: AtlasRecipe | DataRecipe, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """The planner's answer for every stage that trains, where the recipe says which model on which machine."""
    if isinstance(recipe, AtlasRecipe) or recipe.hub is None or recipe.compute.cluster is None:
        return {}
    from reproduce.cost import hardware, shapes
    from reproduce.cost.planner import Stage as Planned
    from reproduce.cost.planner import Wish, plan

    shape = shapes.from_config(recipe.hub.config, recipe.hub.id, f"recipe {recipe.name}: hub.config")
    cluster = hardware.find(recipe.compute.cluster, recipe.compute.processes)
    strategy = recipe.compute.strategy
    wish = Wish(zero=int(strategy[-1]) if strategy.startswith("zero") else None)
    found = {}
    for stage in stages:
        if stage.kind in SETTINGS:
            settings = SETTINGS[stage.kind](**stage.settings["train"])
            method = settings.algorithm.name if isinstance(settings, PolicySettings) else stage.kind
            found[stage.id] = plan(Planned(stage.id, method, shape, settings, updates(recipe, stage)), cluster, wish)
    return found


def updates(recipe: DataRecipe, stage: Stage) -> float | None:
    """How many optimiser steps (of a policy: rollouts) the stage takes; None where the data is not known."""
    train = stage.settings["train"]
    if stage.kind == "policy":
        return train["updates"]
    if train["max_steps"] or recipe.expected is None:
        return train["max_steps"]
    e, share = recipe.expected, recipe.shares.get("sft" if stage.kind == "sft" else "value", 0.0)
    pairs = min(e.pairs, recipe.pairs.per_prompt or e.pairs)
    per_prompt = {"sft": 1, "gvm": min(e.responses, 2 * pairs)}.get(stage.kind, pairs)
    items = min(e.prompts * share * per_prompt, recipe.pairs.most or float("inf"))
    return -(-items * train["epochs"] // train["batch_size"])


def _disk(recipe: AtlasRecipe | DataRecipe, stage: Stage) -> float | None:
    """GB of a stage's results, where they are a model's weights."""
    if isinstance(recipe, AtlasRecipe) or recipe.hub is None:
        return None
    size = recipe.hub.parameters / 1e9
    if stage.kind == "checkpoint":
        return round(FETCHED * size, 1)
    if stage.kind not in SETTINGS or stage.settings["train"]["lora"]:
        return None
    critic = stage.kind == "policy" and stage.settings["train"]["algorithm"]["name"] == "ppo"
    return round(WEIGHTS * size * (2 if critic else 1), 1)


def _parameters(recipe: AtlasRecipe | DataRecipe) -> int:
    return recipe.hub.parameters if isinstance(recipe, DataRecipe) and recipe.hub else 0
