"""From a recipe, or from a model and the paper's settings, to the stages that the planner looks at."""

from dataclasses import replace

from dvpo.config import DpoSettings, GvmSettings, PolicySettings, RewardSettings, SftSettings, TrainSettings
from dvpo.errors import InputError
from reproduce.cost import shapes
from reproduce.cost.hardware import Cluster
from reproduce.cost.planner import Stage
from reproduce.cost.shapes import Shape
from reproduce.recipe import AtlasRecipe, DataRecipe

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
    """The training stages of a recipe, one seed of each; `shape` in place of its own model."""
    if isinstance(recipe, AtlasRecipe):
        return _of_atlas(recipe, shape or _atlas_shape(recipe))
    return _of_data(recipe, shape or _data_shape(recipe))


def cluster_of(recipe: AtlasRecipe | DataRecipe) -> str:
    """The machine that a recipe is for."""
    return recipe.compute.cluster or ("2-core-cpu" if recipe.compute.processes == 1 else "8xa100-80gb")


def _of_atlas(r: AtlasRecipe, shape: Shape) -> list[Stage]:
    pairs = r.atlas.prompts["reward"] * (r.pairs.per_prompt or 1)
    pairs = min(pairs, r.pairs.most or pairs)
    stages = [
        _offline("sft", shape, r.sft, r.atlas.prompts["sft"]),
        _offline("rm", shape, r.rm, pairs),
        _offline("gvm", shape, r.gvm, 2 * pairs),
        _offline("dpo", shape, r.dpo, pairs),
    ]
    return [*stages, *(_online(name, shape, r.method(name)) for name in r.methods)]


def _of_data(r: DataRecipe, shape: Shape) -> list[Stage]:
    prompts, pairs = None, r.pairs.most
    texts = 2 * pairs if pairs else None
    if (e := r.expected) is not None:
        prompts = e.prompts
        valued, each = prompts * r.shares.get("value", 0), min(e.pairs, r.pairs.per_prompt or e.pairs)
        pairs = min(int(valued * each), pairs or prompts**2)
        texts = min(int(valued * min(e.responses, 2 * each)), texts or prompts**2)
    stages = [_offline("rm", shape, r.rm, pairs)]
    stages += [replace(_offline("gvm", shape, r.gvm, texts), name=name) for name in r.value_models]
    if r.sft is not None:
        stages.insert(0, _offline("sft", shape, r.sft, prompts and int(prompts * r.shares.get("sft", 0))))
    if r.dpo is not None:
        stages.append(_offline("dpo", shape, r.dpo, pairs))
    methods = [_online(name, shape, r.method(name)) for name in r.methods]
    return [*stages, *(replace(m, optional=m.name in r.optional_methods) for m in methods)]


def _offline(method: str, shape: Shape, settings: TrainSettings, items: int | None) -> Stage:
    updates = settings.max_steps or (items and -(-int(items * settings.epochs) // settings.batch_size))
    return Stage(method, method, shape, settings, updates)


def _online(name: str, shape: Shape, settings: PolicySettings) -> Stage:
    return Stage(name, settings.algorithm.name, shape, settings, settings.updates)


def _atlas_shape(recipe: AtlasRecipe) -> Shape:
    from dvpo.data.atlas import Atlas, build_tokenizer

    return shapes.from_size(recipe.size, len(build_tokenizer(Atlas.build(0, recipe.atlas.places))), "tiny Llama")


def _data_shape(recipe: DataRecipe) -> Shape:
    if recipe.model is not None:
        return shapes.find(recipe.model)
    if recipe.hub is not None:
        return shapes.from_config(recipe.hub.config, recipe.hub.id, f"recipe {recipe.name}: hub.config")
    if recipe.name in ("small", "small-gpu"):
        return shapes.SHAPES["smollm2-135m"]
    raise InputError(f"recipe {recipe.name} names no model; say which with --model")
