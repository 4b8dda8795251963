"""From a recipe, or from a model and the paper's settings, to the stages that the planner looks at."""

from dataclasses import replace

from dvpo.config import DpoSettings, GvmSettings, PolicySettings, RewardSettings, SftSettings, TrainSettings
from dvpo.errors import InputError
from reproduce.cost import hardware, shapes
from reproduce.cost.hardware import Cluster
from reproduce.cost.planner import Stage
from reproduce.cost.shapes import Shape
from reproduce.recipe import AtlasRecipe, Compute, DataRecipe

ALGORITHMS = {
    "dvpo": {"name": "dvpo"},
    "ppo": {"name": "ppo", "critic_learning_rate": 2e-6},
    "remax": {"name": "remax"},
    "grpo": {"name": "grpo", "group_size": 5},
}


def of_model(shape: Shape, cluster: Cluster) -> list[Stage]:
    """Every stage and method with the paper's settings (Appendix C): its batches for the offline stages, 8 prompts on
    each device for the online ones, 10,000 prompts in all. Texts of 512 + 512 tokens where it names no length."""
    common = {"bf16": True, "learning_rate": 2e-5}
    rl = {
        "learning_rate": 2e-6,
        "prompts_per_update": 8 * cluster.devices,
        "minibatch_size": 4 * cluster.devices,  # 2 accumulation steps of 2
        "micro_batch_size": 2,
        "bf16": True,
        "frozen_dtype": "bfloat16",
    }
    updates = -(-10_000 // (8 * cluster.devices))
    stages = [
        Stage("sft", "sft", shape, SftSettings(batch_size=16, **common)),
        Stage("rm", "rm", shape, RewardSettings(batch_size=4, **common)),
        Stage("gvm", "gvm", shape, GvmSettings(batch_size=32, **common)),
        Stage("dpo", "dpo", shape, DpoSettings(batch_size=16, **common)),
    ]
    for name, algorithm in ALGORITHMS.items():
        settings = PolicySettings.model_validate({**rl, "algorithm": algorithm, "updates": updates})
        stages.append(Stage(name, name, shape, settings, updates))
    return stages


def of_recipe(recipe: AtlasRecipe | DataRecipe, shape: Shape | None) -> list[Stage]:
    """The training stages of a recipe, one seed of each; `shape` in place of its own model.

    Models that were trained elsewhere have none.
    """
    if isinstance(recipe, AtlasRecipe):
        return _of_atlas(recipe, shape or _atlas_shape(recipe))
    return _of_data(recipe, shape or shape_of(recipe))


def cluster_of(compute: Compute, gpus: int | None = None, memory_gb: float | None = None) -> Cluster:
    """The machine that a recipe is for: a device of its cluster for each of its processes, or `gpus` of them.

    Raises InputError for an unknown cluster, or numbers that it cannot have.
    """
    name = compute.cluster or ("2-core-cpu" if compute.processes == 1 else "8xa100-80gb")
    return hardware.find(name, gpus or compute.processes, memory_gb)


def zero_of(compute: Compute) -> int | None:
    """The stage of ZeRO that spreads as the recipe's strategy does; None for one process, which has none."""
    return None if compute.processes == 1 else {"ddp": 0, "zero1": 1, "zero2": 2}.get(compute.strategy, 3)


def shape_of(recipe: DataRecipe) -> Shape:
    """The shape of a recipe's own model. Raises InputError where there is none, or none that the planner knows."""
    if recipe.model is not None:
        return shapes.find(recipe.model)
    if recipe.hub is not None:
        return shapes.from_config(recipe.hub.config, recipe.hub.id, f"recipe {recipe.name}: hub.config")
    if recipe.name in ("small", "small-gpu"):
        return shapes.SHAPES["smollm2-135m"]
    raise InputError(f"recipe {recipe.name} names no model; say which with --model")


def items_of(r: DataRecipe, method: str) -> int | None:
    """What an offline stage sees in an epoch, texts of `sft` and `gvm`, pairs of others; None where nothing says it.

    A response is one text to the GVM, in however many pairs it is.
    """
    expected, most = r.expected, r.pairs.most
    if method == "sft":
        return None if expected is None else int(expected.prompts * r.shares.get("sft", 0))
    most = 2 * most if most and method == "gvm" else most
    if expected is None:
        return most
    pairs = min(expected.pairs, r.pairs.per_prompt or expected.pairs)
    each = min(expected.responses, 2 * pairs) if method == "gvm" else pairs
    there = int(expected.prompts * r.shares.get("value", 0) * each)
    return min(there, most or there)


def _of_atlas(r: AtlasRecipe, shape: Shape) -> list[Stage]:
    pairs = r.atlas.prompts["reward"] * (r.pairs.per_prompt or 1)
    pairs = min(pairs, r.pairs.most or pairs)
    stages = [
        offline("sft", shape, r.sft, r.atlas.prompts["sft"]),
        offline("rm", shape, r.rm, pairs),
        offline("gvm", shape, r.gvm, 2 * pairs),
        offline("dpo", shape, r.dpo, pairs),
    ]
    return [*stages, *(online(name, shape, r.method(name)) for name in r.methods)]


def _of_data(r: DataRecipe, shape: Shape) -> list[Stage]:
    stages = [offline("rm", shape, r.rm, items_of(r, "rm"))] if "rm" not in r.trained else []
    values = [name for name in r.value_models if name not in r.trained]
    stages += [replace(offline("gvm", shape, r.gvm, items_of(r, "gvm")), name=name) for name in values]
    if r.sft is not None:
        stages.insert(0, offline("sft", shape, r.sft, items_of(r, "sft")))
    if r.dpo is not None:
        stages.append(offline("dpo", shape, r.dpo, items_of(r, "dpo")))
    methods = [online(name, shape, r.method(name)) for name in r.methods]
    return [*stages, *(replace(m, optional=m.name in r.optional_methods) for m in methods)]


def offline(method: str, shape: Shape, settings: TrainSettings, items: int | None) -> Stage:
    """A stage that learns from `items` texts or pairs, for as many optimiser steps as they make; None: not known."""
    updates = settings.max_steps or (items and -(-int(items * settings.epochs) // settings.batch_size))
    return Stage(method, method, shape, settings, updates)


def online(name: str, shape: Shape, settings: PolicySettings) -> Stage:
    """A policy's stage, by its rollouts."""
    return Stage(name, settings.algorithm.name, shape, settings, settings.updates)


def _atlas_shape(recipe: AtlasRecipe) -> Shape:
    from dvpo.data.atlas import Atlas, build_tokenizer

    return shapes.from_size(recipe.size, len(build_tokenizer(Atlas.build(0, recipe.atlas.places))), "tiny Llama")
