"""From a recipe to its stages. `Graph.leaves` names what each table and figure reads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvpo.config import GvmSettings, Settings
from dvpo.data.splits import is_hub_id
from dvpo.errors import InputError
from reproduce.pipeline import Source, Stage, in_order
from reproduce.recipe import AtlasRecipe, DataRecipe


@dataclass
class Graph:
    """The stages by name, and for every table or figure ("T1", "F4", "credit") the names that it reads."""

    stages: dict[str, Stage] = field(default_factory=dict)
    leaves: dict[str, set[str]] = field(default_factory=dict)

    def add(self, stage: Stage, *wanted_by: str) -> Stage:
        """Adds a stage; a name is used once."""
        self.stages[stage.id] = stage
        for name in wanted_by:
            self.leaves.setdefault(name, set()).add(stage.id)
        return stage

    def order(self, wanted: set[str] | None) -> list[Stage]:
        """All stages, or those that the wanted tables and figures need, each after its inputs."""
        ids = self.stages if wanted is None else {i for w in wanted for i in self.leaves.get(w, ())}
        return in_order([stage for name, stage in self.stages.items() if name in ids])


def build(recipe: AtlasRecipe | DataRecipe, data: str | None) -> Graph:
    """The graph of a recipe. Raises InputError where data or a model must be named and is not."""
    if isinstance(recipe, AtlasRecipe):
        if data is not None:
            raise InputError(f"recipe {recipe.name} makes its own data; leave --data out, or choose --recipe small")
        return atlas_graph(recipe)
    return data_graph(recipe, data)


def _json(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def atlas_graph(recipe: AtlasRecipe) -> Graph:
    """All stages of the built-in world, for every seed."""
    graph = Graph()
    for seed in range(recipe.seeds):
        _atlas_seed(graph, recipe, seed)
    return graph


def _atlas_seed(graph: Graph, r: AtlasRecipe, seed: int) -> None:
    def stage(name: str, kind: str, settings: dict[str, Any], wanted: str = "", **inputs: Any) -> Stage:
        made = Stage(f"seed{seed}/{name}", kind, settings, inputs, seed, exclusive=kind == "cost")
        return graph.add(made, *wanted.split())

    def sized(size: Any, suffix: str) -> Stage:
        base = stage(f"base{suffix}", "base", {"size": _json(size), "train": _json(r.base)}, atlas=world)
        return stage(f"sft{suffix}", "sft", {"split": "sft", "train": _json(r.sft)}, start=base, data=world)

    def gvm(name: str, start: Stage, data: Stage, settings: GvmSettings = r.gvm, **inputs: Any) -> Stage:
        return stage(name, "gvm", {"train": _json(settings), "pairs": pairs}, start=start, data=data, **inputs)

    def accuracy(name: str, model: Stage, wanted: str, subfolder: str = "") -> None:
        settings = {"format": "split", "split": "test", "trajectory_k": 0, "subfolder": subfolder, **_json(r.measure)}
        stage(f"accuracy/{name}", "pairwise", settings, wanted, model=model, data=covered)

    def credit(name: str, model: Stage, subfolder: str = "") -> None:
        limits = {k: v for k, v in _json(r.measure).items() if k.startswith("max")}
        settings = {"split": "test", "per_prompt": 2, "subfolder": subfolder, **limits}
        stage(f"credit/{name}", "credit", settings, "credit", model=model, data=covered, atlas=world)

    def gold(name: str, policy: Stage, wanted: str) -> None:
        stage(f"gold/{name}", "gold", {"split": "test", **_json(r.sampling)}, wanted, policy=policy, atlas=world)

    pairs = _json(r.pairs)
    world = stage("atlas", "atlas", {"world_seed": seed, **_json(r.atlas)})
    sft = sized(r.size, "")
    covered = stage("coverage", "coverage", {"own": r.own_samples, **_json(r.sampling)}, atlas=world, sft=sft)
    value = gvm("gvm", sft, covered)
    reward = stage("rm", "rm", {"train": _json(r.rm), "pairs": pairs}, start=sft, data=covered)
    scale = _scale(stage, r, "", reward, covered, pairs)
    frozen: dict[str, dict[str, Any]] = {"dvpo": {"value": value}, "other": {"reward": reward, "reward_scale": scale}}

    def online(name: str, method: str, models: dict[str, dict[str, Any]]) -> Stage:
        settings = r.method(method)
        chosen = models["dvpo" if settings.algorithm.name == "dvpo" else "other"]
        train = {"split": "rl", "train": _json(settings)}
        return stage(f"policy/{name}", "policy", train, "F4", start=sft, data=world, world=world, **chosen)

    policies = {name: online(name, name, frozen) for name in r.methods}
    gold("sft", sft, "T1 coverage F4")
    dpo = stage("dpo", "dpo", {"train": _json(r.dpo), "pairs": pairs}, start=sft, data=covered)
    gold("dpo", dpo, "T1")
    for name, policy in policies.items():
        gold(name, policy, "T1 F4 coverage" if name in r.scripted else "T1 F4")
    accuracy("gvm", value, "T3 T4 T8 T9 coverage")
    accuracy("rm", reward, "T3")
    credit("gvm", value)
    credit("rm", reward)
    for name, policy in policies.items():
        if r.method(name).algorithm.name == "ppo":
            accuracy("critic", policy, "T4", "critic")
            credit("critic", policy, "critic")
    accuracy("gvm-from-rm", gvm("gvm-from-rm", sft, covered, _target(r.gvm, "reward_model"), rm=reward), "T9")
    for name, size in r.other_sizes.items():
        accuracy(f"gvm-{name}", gvm(f"gvm-{name}", sized(size, f"-{name}"), covered), "T8")
    if r.scripted:
        bare = stage("coverage-scripted", "coverage", {"own": 0, **_json(r.sampling)}, atlas=world)
        models: dict[str, dict[str, Any]] = {"dvpo": {"value": gvm("gvm-scripted", sft, bare)}}
        if any(r.method(name).algorithm.name != "dvpo" for name in r.scripted):
            rm = stage("rm-scripted", "rm", {"train": _json(r.rm), "pairs": pairs}, start=sft, data=bare)
            models["other"] = {"reward": rm, "reward_scale": _scale(stage, r, "-scripted", rm, bare, pairs)}
        accuracy("gvm-scripted", models["dvpo"]["value"], "coverage")
        for name in r.scripted:
            gold(f"{name}-scripted", online(f"{name}-scripted", name, models), "coverage")
    if seed == 0:
        stage("token-values", "token_values", {"split": "test"}, "F3", model=value, data=covered, atlas=world)
        shown = {name: _json(r.method(name)) for name in r.methods if name in ("dvpo-gae", "ppo", "remax", "grpo")}
        cost = {"methods": shown, "split": "rl", "rounds": r.cost_rounds, "updates": r.cost_updates}
        stage("cost", "cost", cost, "T7", start=sft, data=world, **frozen["dvpo"], **frozen["other"])
        graph.add(Stage("lemma", "lemma", {"seeds": 100}), "lemma")


def _scale(stage: Any, r: AtlasRecipe, suffix: str, reward: Stage, data: Stage, pairs: dict[str, Any]) -> Stage:
    limits = {"max_prompt_tokens": r.rm.max_prompt_tokens, "max_response_tokens": r.rm.max_response_tokens}
    return stage(f"reward-scale{suffix}", "reward_scale", {"pairs": pairs, **limits}, start=reward, data=data)


def _target(settings: GvmSettings, target: Any) -> GvmSettings:
    return settings.model_copy(update={"target": target})


def data_graph(r: DataRecipe, data: str | None) -> Graph:
    """Value models and a policy of a real language model."""
    if r.model is None:
        raise InputError(f"recipe {r.name} needs a model: add --set model=FOLDER (a checkpoint folder)")
    if not Path(r.model).is_dir():
        raise InputError(f"{r.model}: no such checkpoint folder; name one with --set model=FOLDER")
    if data is None:
        raise InputError(f"recipe {r.name} needs preference data: add --data PATH (or HUB_ID@REVISION)")
    if not Path(data).exists() and not is_hub_id(data):
        raise InputError(f"{data}: no such file or folder, and not a hub id with a revision (owner/name@REV)")
    for name, path in r.other_data.items():
        if not Path(path).exists():
            raise InputError(f"other_data.{name}: {path}: no such file or folder")
    graph = Graph()
    hub = None if Path(data).exists() else data
    start, source = Source(Path(r.model)), {} if hub else {"data": Source(Path(data))}
    for seed in range(r.seeds):
        _data_seed(graph, r, seed, start, hub, source)
    return graph


def _data_seed(graph: Graph, r: DataRecipe, seed: int, start: Source, hub: str | None, source: dict[str, Any]) -> None:
    def stage(name: str, kind: str, settings: dict[str, Any], wanted: str = "", **inputs: Any) -> Stage:
        return graph.add(Stage(f"seed{seed}/{name}", kind, settings, inputs, seed), *wanted.split())

    one_file = not hub and source["data"].path.is_file()
    split = None if one_file else r.train_split
    data = stage("data", "preferences", {"hub": hub, "split": split, "shares": r.shares}, **source)
    pairs = _json(r.pairs)
    trained = {
        "gvm": stage("gvm", "gvm", {"train": _json(r.gvm), "pairs": pairs}, start=start, data=data),
        "rm": stage("rm", "rm", {"train": _json(r.rm), "pairs": pairs}, start=start, data=data),
        "gvm-from-score": stage(
            "gvm-from-score", "gvm", {"train": _json(_target(r.gvm, "score")), "pairs": pairs}, start=start, data=data
        ),
    }
    measure = {"format": "raw", "trajectory_k": 0, **_json(r.measure)}
    for name, model in trained.items():
        wanted = {"gvm": "T3 T4 T8 T9", "rm": "T3"}.get(name, "T9")
        if not hub and not one_file:
            stage(f"in-domain/{name}", "pairwise", {**measure, "split": r.eval_split}, wanted, model=model, **source)
        for other, path in r.other_data.items():
            settings = {**measure, "split": None, "most": r.other_most}
            stage(f"{other}/{name}", "pairwise", settings, "T5", model=model, data=Source(Path(path)))
    stage("token-values", "token_values", {"split": None}, "F3", model=trained["gvm"])
    stage(
        "policy/dvpo",
        "policy",
        {"split": "rl", "train": _json(r.policy)},
        "F4",
        start=start,
        data=data,
        value=trained["gvm"],
    )
