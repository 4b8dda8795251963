"""What a run of a recipe would take, from its settings alone: the command of each stage, memory, hours and disk.

Memory and time are predictions of the planner (`reproduce.cost`) for the run as the recipe has it; of data, models and
the network nothing is read here but the config.json of a model that the recipe names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dvpo.config import DpoSettings, GvmSettings, PolicySettings, RewardSettings, SftSettings, TrainSettings
from dvpo.errors import InputError
from reproduce.pipeline import Stage
from reproduce.recipe import AtlasRecipe, DataRecipe
from reproduce.stages import KINDS

if TYPE_CHECKING:
    from reproduce.cost import planner
    from reproduce.cost.hardware import Cluster
    from reproduce.cost.shapes import Shape

OFFLINE: dict[str, type[TrainSettings]] = {
    "sft": SftSettings, "rm": RewardSettings, "gvm": GvmSettings, "dpo": DpoSettings,
}  # fmt: skip
WEIGHTS, FETCHED, STATE = 4, 2, 12
"""Bytes of a parameter in a checkpoint that we write (float32), in one of the hub (bfloat16), and in a trainer's state
(weights and two moments), of which there are two while one takes the other's place."""


@dataclass(frozen=True)
class Line:
    """One stage. memory: GiB of a device, predicted and usable. hours: [least, most]. disk: GB of its results.

    wrong: why it would not run as it is, and what to change.
    """

    id: str
    kind: str
    command: str
    settings: dict[str, Any]
    memory: tuple[float, float] | None = None
    fits: bool | None = None
    hours: tuple[float, float] | None = None
    disk: float | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outline:
    """All stages in the order of the run. disk: GB of all results, and of the largest trainer's state beside them.

    machine: what memory and hours are of. unknown: why the planner does not know the recipe's model.
    """

    lines: list[Line]
    hours: tuple[float, float] | None = None
    disk: tuple[float, float] | None = None
    machine: str | None = None
    unknown: str | None = None


def outline(recipe: AtlasRecipe | DataRecipe, stages: Sequence[Stage]) -> Outline:
    """The outline of these stages: with numbers for a recipe that names its machine, else their commands."""
    plain = [Line(stage.id, stage.kind, _command(stage), stage.settings) for stage in stages]
    if isinstance(recipe, AtlasRecipe) or recipe.compute.cluster is None:
        return Outline(plain)
    from reproduce.cost.stages import cluster_of, shape_of

    try:
        shape = shape_of(recipe)
    except InputError as error:
        return Outline(plain, unknown=str(error))
    cluster = cluster_of(recipe.compute)
    planned = {stage.id: _planned(recipe, stage, shape) for stage in stages if stage.kind in (*OFFLINE, "policy")}
    lines = [_line(line, recipe, planned.get(line.id), shape, cluster) for line in plain]
    known = [line.hours for line in lines if line.hours is not None]
    hours = (sum(h[0] for h in known), sum(h[1] for h in known)) if known else None
    state = max((2 * STATE * _trained(stage) / 1e9 for stage in planned.values()), default=0.0)
    disk = (round(sum(line.disk or 0 for line in lines), 2), round(state, 2))
    return Outline(lines, hours, disk, cluster.name)


def _command(stage: Stage) -> str:
    """What runs the stage."""
    compute, target = stage.settings.get("compute"), KINDS[stage.kind].target
    if compute is None:
        return f"{target} in the run's own process"
    return f"{target} in {compute['processes']} processes of `python -m reproduce.launch`, {compute['strategy']}"


def _planned(recipe: DataRecipe, stage: Stage, shape: "Shape") -> "planner.Stage":
    """A stage that trains, as the planner takes it."""
    from reproduce.cost.stages import items_of, offline, online

    if stage.kind == "policy":
        return online(stage.id, shape, PolicySettings(**stage.settings["train"]))
    settings = OFFLINE[stage.kind](**stage.settings["train"])
    return replace(offline(stage.kind, shape, settings, items_of(recipe, stage.kind)), name=stage.id)


def _line(
    line: Line, recipe: DataRecipe, stage: "planner.Stage | None", shape: "Shape", cluster: "Cluster"
) -> Line:  # fmt: skip
    """The line with its numbers."""
    from reproduce.cost.planner import Wish, plan
    from reproduce.cost.stages import zero_of

    if stage is None:
        fetched = FETCHED * shape.parameters("policy") / 1e9
        return replace(line, disk=round(fetched, 2)) if line.kind == "checkpoint" else line
    found = plan(stage, cluster, Wish(zero_of(recipe.compute), own=True))
    wrong = (
        []
        if found["fits"]
        else [f"too large by its {found['breaks_first']['part']}; {_way_out(stage, cluster, found)}"]
    )
    wrong += [found["uneven"]] if found["uneven"] else []
    return replace(
        line,
        memory=(found["peak"]["gib"], found["limit_gib"]),
        fits=found["fits"],
        hours=found["hours"] and (found["hours"][0], found["hours"][1]),
        disk=round(WEIGHTS * _trained(stage) / 1e9, 2),
        wrong=tuple(wrong),
    )


def _way_out(stage: "planner.Stage", cluster: "Cluster", own: dict[str, Any]) -> str:
    """The settings with which a stage would fit that does not fit as it is, under its own strategy if any do."""
    from reproduce.cost.planner import Wish, plan

    for wish in (Wish(own["zero"]), Wish()):
        found = plan(stage, cluster, wish)
        if found["fits"]:
            return f"it would fit with {', '.join(_changes(own, found))}"
    needed = found["devices_needed"]
    return f"it would fit on {needed} of such devices" if needed else "it fits on no number of such devices"


def _changes(own: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The settings in which two plans of a stage differ."""
    named = {
        "zero": f"compute.strategy: zero{found['zero']}",
        "checkpointing": "gradient_checkpointing: true",
        "frozen": "frozen: sharded",
        "micro_batch": f"micro_batch_size: {found['micro_batch']}",
        "offload": "the optimiser's state in main memory (dvpo train --offload)",
    }
    return [text for key, text in named.items() if found[key] != own[key]]


def _trained(stage: "planner.Stage") -> int:
    """Parameters that the stage trains and keeps, of all its models together; with an adapter those of it."""
    from reproduce.cost.memory import trainable
    from reproduce.cost.work import METHODS, Setup

    setup = Setup(lora_rank=stage.settings.lora.r if stage.settings.lora else None)
    return sum(trainable(stage.shape, role, setup) for role in METHODS[stage.method].trained)
