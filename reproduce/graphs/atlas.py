"""The stage graph of the built-in world: everything from random weights, for every seed."""

from typing import Any

from dvpo.config import Dvpo, GvmSettings, ModelSize, PolicySettings
from reproduce.graphs.common import Graph, as_json, with_target
from reproduce.pipeline import Stage
from reproduce.recipe import STUDIED, AtlasRecipe

COSTED = ("dvpo-gae", "ppo", "remax", "grpo")
"""Table 7's four methods."""
Frozen = dict[str, Any]
"""The frozen models of a policy stage: value, or reward and reward_scale."""


def atlas_graph(recipe: AtlasRecipe) -> Graph:
    """All stages of the built-in world, for every seed."""
    graph = Graph()
    for seed in range(recipe.seeds):
        _Seed(graph, recipe, seed).build()
    return graph


class _Seed:
    """The stages of one seed."""

    def __init__(self, graph: Graph, recipe: AtlasRecipe, seed: int):
        self.graph, self.r, self.seed = graph, recipe, seed
        self.pairs = as_json(recipe.pairs)

    def build(self) -> None:
        r = self.r
        self.world = self.stage("atlas", "atlas", {"world_seed": self.seed, **as_json(r.atlas)})
        self.sft = self.sized(r.size, "")
        own = {"own": r.own_samples, "margin": r.atlas.margin, **as_json(r.sampling)}
        self.covered = self.stage("coverage", "coverage", own, atlas=self.world, sft=self.sft)
        self.value = self.gvm("gvm", self.covered)
        self.reward = self.rm("rm", self.covered)
        self.frozen: Frozen = {"value": self.value, "reward": self.reward, "reward_scale": self.scale("", self.reward)}
        policies = {name: self.online(name, r.method(name), self.frozen, "F4") for name in r.methods}
        self.gold("sft", self.sft, "T1 F2 F4 T10 coverage study")
        dpo = {"train": as_json(r.dpo), "pairs": self.pairs}
        self.gold("dpo", self.stage("dpo", "dpo", dpo, start=self.sft, data=self.covered), "T1 F2")
        for name, policy in policies.items():
            more = {"dvpo-gae": "T10 study", "dvpo-q": "study", "dvpo-official": "study"}.get(name, "")
            self.gold(name, policy, f"T1 F2 F4 {more} {'coverage' if name in r.scripted else ''}")
        self.accuracy("gvm", self.value, "T3 T4 T8 T9 coverage study")
        self.accuracy("rm", self.reward, "T3")
        self.credit("gvm", self.value, "credit study")
        self.credit("rm", self.reward, "credit")
        for name, policy in policies.items():
            if r.method(name).algorithm.name == "ppo":
                self.accuracy("critic", policy, "T4", subfolder="critic")
                self.credit("critic", policy, "credit", subfolder="critic")
        from_rm = self.gvm("gvm-from-rm", self.covered, with_target(r.gvm, "reward_model"), rm=self.reward)
        self.accuracy("gvm-from-rm", from_rm, "T9")
        self.sizes()
        self.kl_sweep()
        if r.scripted or r.study:
            self.scripted()
        if r.study:
            self.study()
        if self.seed == 0:
            self.once()

    def sizes(self) -> None:
        """Table 8's other sizes, each from its own base model."""
        for name, size in self.r.other_sizes.items():
            optional = size.optional and not self.r.study
            start = self.sized(size, f"-{name}", optional)
            value = self.gvm(f"gvm-{name}", self.covered, start=start, optional=optional)
            self.accuracy(f"gvm-{name}", value, "T8", optional=optional)

    def kl_sweep(self) -> None:
        """Table 10: DVPO under other strengths of KL; the recipe's own is the method itself."""
        optional = not self.r.study
        for beta in self.r.kl_sweep:
            settings = self.r.method("dvpo-gae")
            settings = settings.model_copy(update={"kl": settings.kl.model_copy(update={"beta": beta})})
            name = f"dvpo-gae-kl-{beta:g}"
            policy = self.online(name, settings, self.frozen, "T10", optional)
            self.gold(name, policy, "T10", optional)

    def scripted(self) -> None:
        """Value and reward models that never saw the SFT policy's own answers, and the policies on them."""
        r = self.r
        settings = {"own": 0, "margin": r.atlas.margin, **as_json(r.sampling)}
        bare = self.stage("coverage-scripted", "coverage", settings, atlas=self.world)
        frozen: Frozen = {"value": self.gvm("gvm-scripted", bare)}
        if any(r.method(name).algorithm.name != "dvpo" for name in r.scripted):
            reward = self.rm("rm-scripted", bare)
            frozen |= {"reward": reward, "reward_scale": self.scale("-scripted", reward, bare)}
        self.accuracy("gvm-scripted", frozen["value"], "coverage study")
        for name in r.scripted:
            policy = self.online(f"{name}-scripted", r.method(name), frozen, "coverage")
            self.gold(f"{name}-scripted", policy, "coverage")
        if r.study:
            self.credit("gvm-scripted", frozen["value"], "study")
            self.estimators("scripted", frozen["value"])

    def study(self) -> None:
        """Every estimator on value models of other TD lambdas, and of one that reads tau."""
        gvm = self.r.gvm
        # A prompt stands behind one more question and its answer.
        longer = 2 * gvm.max_prompt_tokens + gvm.max_response_tokens
        variants: dict[str, dict[str, Any]] = {
            "td0": {"td_lambda": 0.0},
            "td1": {"td_lambda": 1.0},
            "tau1": {"trajectory_k": 1, "max_prompt_tokens": longer},
        }
        for variant, update in variants.items():
            settings = gvm.model_copy(update=update)
            value = self.gvm(f"gvm-{variant}", self.covered, settings)
            self.accuracy(f"gvm-{variant}", value, "study", k=settings.trajectory_k)
            self.credit(f"gvm-{variant}", value, "study", k=settings.trajectory_k)
            self.estimators(variant, value, settings.trajectory_k)

    def estimators(self, variant: str, value: Stage, k: int = 0) -> None:
        """The policies of every estimator on one value model."""
        for estimator, method in STUDIED.items():
            settings = self.r.method(method)
            assert isinstance(settings.algorithm, Dvpo)  # the recipe's validator saw to it
            algorithm = settings.algorithm.model_copy(update={"trajectory_k": k})
            name = f"{estimator}@{variant}"
            settings = settings.model_copy(update={"algorithm": algorithm})
            self.gold(name, self.online(name, settings, {"value": value}, "study"), "study")

    def once(self) -> None:
        """What one seed is enough for."""
        r = self.r
        settings = {"split": "test"}
        inputs: dict[str, Any] = {"model": self.value, "data": self.covered, "atlas": self.world}
        self.stage("token-values", "token_values", settings, "F3", **inputs)
        shown = {name: as_json(r.method(name)) for name in r.methods if name in COSTED}
        cost = {"methods": shown, "split": "rl", "rounds": r.cost_rounds, "updates": r.cost_updates}
        self.stage("cost", "cost", cost, "T6 T7", start=self.sft, data=self.world, **self.frozen)
        self.graph.add(Stage("lemma", "lemma", {"seeds": 100}), "lemma")

    def stage(
        self, name: str, kind: str, settings: dict[str, Any], wanted: str = "", optional: bool = False, **inputs: Any
    ) -> Stage:
        made = Stage(f"seed{self.seed}/{name}", kind, settings, inputs, self.seed, exclusive=kind == "cost")
        readers = [name for name in wanted.split() if name != "study" or self.r.study]
        return self.graph.add(made, *readers, optional=optional)

    def sized(self, size: ModelSize, suffix: str, optional: bool = False) -> Stage:
        """The SFT model of a size."""
        pretrain = {"size": size.model_dump(exclude={"optional"}), "train": as_json(self.r.base)}
        base = self.stage(f"base{suffix}", "base", pretrain, optional=optional, atlas=self.world)
        train = {"split": "sft", "train": as_json(self.r.sft)}
        return self.stage(f"sft{suffix}", "sft", train, optional=optional, start=base, data=self.world)

    def gvm(
        self, name: str, data: Stage, settings: GvmSettings | None = None, *, start: Stage | None = None,
        optional: bool = False, **inputs: Any,
    ) -> Stage:  # fmt: skip
        chosen = {"train": as_json(settings or self.r.gvm), "pairs": as_json(self.r.gvm_pairs or self.r.pairs)}
        return self.stage(name, "gvm", chosen, optional=optional, start=start or self.sft, data=data, **inputs)

    def rm(self, name: str, data: Stage) -> Stage:
        return self.stage(name, "rm", {"train": as_json(self.r.rm), "pairs": self.pairs}, start=self.sft, data=data)

    def scale(self, suffix: str, reward: Stage, data: Stage | None = None) -> Stage:
        rm = self.r.rm
        limits = {"max_prompt_tokens": rm.max_prompt_tokens, "max_response_tokens": rm.max_response_tokens}
        settings = {"pairs": self.pairs, **limits}
        return self.stage(f"reward-scale{suffix}", "reward_scale", settings, start=reward, data=data or self.covered)

    def online(self, name: str, settings: PolicySettings, frozen: Frozen, wanted: str, optional: bool = False) -> Stage:
        reads = ("value",) if settings.algorithm.name == "dvpo" else ("reward", "reward_scale")
        inputs = {role: frozen[role] for role in reads} | {"start": self.sft, "data": self.world, "world": self.world}
        train = {"split": "rl", "train": as_json(settings)}
        return self.stage(f"policy/{name}", "policy", train, wanted, optional, **inputs)

    def gold(self, name: str, policy: Stage, wanted: str, optional: bool = False) -> None:
        settings = {"split": "test", **as_json(self.r.sampling)}
        self.stage(f"gold/{name}", "gold", settings, wanted, optional, policy=policy, atlas=self.world)

    def accuracy(
        self, name: str, model: Stage, wanted: str, *, subfolder: str = "", k: int = 0, optional: bool = False
    ) -> None:
        settings = {"format": "split", "split": "test", "subfolder": subfolder, **as_json(self.r.measure)}
        settings |= self._behind(k)
        self.stage(f"accuracy/{name}", "pairwise", settings, wanted, optional, model=model, data=self.covered)

    def credit(self, name: str, model: Stage, wanted: str, *, subfolder: str = "", k: int = 0) -> None:
        limits = {key: v for key, v in as_json(self.r.measure).items() if key.startswith("max")}
        settings = {"split": "test", "per_prompt": 2, "subfolder": subfolder, **limits, **self._behind(k)}
        self.stage(f"credit/{name}", "credit", settings, wanted, model=model, data=self.covered, atlas=self.world)

    def _behind(self, k: int) -> dict[str, int]:
        """tau's k pairs, and the room that a prompt needs behind them."""
        m = self.r.measure
        room = m.max_prompt_tokens + k * (m.max_prompt_tokens + m.max_response_tokens)
        return {"trajectory_k": k, "max_prompt_tokens": room}
