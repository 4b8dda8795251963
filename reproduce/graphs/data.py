"""The stage graph of language models on real preference data, for every seed."""

from pathlib import Path
from typing import Any

from dvpo.config import PolicySettings
from dvpo.data.splits import is_hub_id
from dvpo.errors import InputError
from reproduce.graphs.common import Graph, as_json, with_target
from reproduce.pipeline import Source, Stage
from reproduce.recipe import DataRecipe

TARGETS = {"gvm": "preference", "gvm-from-rm": "reward_model", "gvm-from-score": "score"}
IN_DOMAIN = {"gvm": "T3 T4 T8 T9", "rm": "T3", "critic": "T4"}
"""The tables that show each model's accuracy on held-out pairs; of other GVMs, Table 9."""
SCALED = 2000
"""Pairs whose scores give the reward model's mean and standard deviation; more would not change them visibly."""
TRAINS = ("sft", "rm", "gvm", "dpo", "policy")
"""Kinds of stages that may run in several processes."""


def data_graph(r: DataRecipe, data: str | None) -> Graph:
    """All stages of a recipe on real data. Raises InputError where data or a model must be named and is not."""
    if r.model is None and r.hub is None:
        raise InputError(f"recipe {r.name} needs a model: add --set model=FOLDER (a checkpoint folder)")
    if r.model is not None and not Path(r.model).is_dir():
        raise InputError(f"{r.model}: no such checkpoint folder; name one with --set model=FOLDER")
    data = data or r.data
    if data is None:
        raise InputError(f"recipe {r.name} needs preference data: add --data PATH (or HUB_ID@REVISION)")
    for field, name in {"": data, **{f"other_data.{k}: ": v for k, v in r.other_data.items()}}.items():
        _check(field, name)
    for name, given in r.benchmarks.sources.items():
        _check(f"benchmarks.{name}: ", given)
    for name, folder in r.trained.items():
        _require_role(name, folder)
    graph = Graph()
    for seed in range(r.seeds):
        _Seed(graph, r, seed, data).build()
    return graph


def _check(field: str, name: str) -> None:
    if not Path(name).exists() and not is_hub_id(name):
        raise InputError(f"{field}{name}: no such file or folder, and not a hub id with a revision (owner/name@REV)")


def _require_role(name: str, folder: str) -> None:
    """Raises InputError where a folder holds no model of the kind that `trained` says."""
    from dvpo.models import role_of

    wanted = "reward" if name == "rm" else "value"
    if (found := role_of(folder)) != wanted:
        raise InputError(f"trained.{name}: {folder} holds {found or 'no'} model, not a {wanted} model")


class _Seed:
    """The stages of one seed."""

    def __init__(self, graph: Graph, recipe: DataRecipe, seed: int, data: str):
        self.graph, self.r, self.seed, self.source = graph, recipe, seed, data
        self.pairs = as_json(recipe.pairs)

    def build(self) -> None:
        r = self.r
        self.start: Stage | Source = self.checkpoint()
        self.data = self.preferences("data", self.source, r.train_split, dict(r.shares))
        if r.sft:
            demonstrations = {"split": "sft", "best": True, "train": as_json(r.sft)}
            self.start = self.stage("sft", "sft", demonstrations, start=self.start, data=self.data)
        reward = self.trained("rm") or self.stage(
            "rm", "rm", {"train": as_json(r.rm), "pairs": self.pairs}, start=self.start, data=self.data
        )
        values = {name: self.gvm(name, reward) for name in r.value_models}
        self.frozen: dict[str, Any] = {"value": values[r.policy_value], "reward": reward}
        others = {k: self.other(k, v) for k, v in r.other_data.items()}
        for name, model in (values | {"rm": reward}).items():
            self.accuracy(name, model, IN_DOMAIN.get(name, "T9"), others)
        if r.benchmarks.rewardbench:
            for name, model in (("gvm", values["gvm"]), ("rm", reward)):
                settings = {"bf16": r.measure.bf16}
                self.asked(
                    f"rewardbench/{name}",
                    "rewardbench",
                    settings,
                    "T3",
                    {"data": r.benchmarks.rewardbench},
                    model=model,
                )
        self.stage("token-values", "token_values", {"split": None}, "F3", model=values["gvm"])
        self.policies(others)

    def policies(self, others: dict[str, dict[str, Any]]) -> None:
        """The start, DPO and every online method, and what is measured of each."""
        r, table = self.r, "T1" if self.r.sft else "T2"
        self.judged("sft", self.start, table)
        if r.dpo:
            dpo = {"train": as_json(r.dpo), "pairs": self.pairs}
            self.judged("dpo", self.stage("dpo", "dpo", dpo, start=self.start, data=self.data), table)
        for name in r.methods:
            optional = name in r.optional_methods
            policy = self.online(name, r.method(name), "" if optional else "F4", optional)
            self.judged(name, policy, f"{table} T10" if name == "dvpo-gae" else table, optional)
            if r.method(name).algorithm.name == "ppo":
                self.accuracy("critic", policy, IN_DOMAIN["critic"], others, "critic", optional)
        for beta in r.kl_sweep if r.judge else ():
            own = r.method("dvpo-gae")
            settings = own.model_copy(update={"kl": own.kl.model_copy(update={"beta": beta})})
            name = f"dvpo-gae-kl-{beta:g}"
            self.judged(name, self.online(name, settings, "", optional=True), "T10", optional=True)

    def stage(
        self, name: str, kind: str, settings: dict[str, Any], wanted: str = "", optional: bool = False, **inputs: Any
    ) -> Stage:
        c = self.r.compute
        if kind in TRAINS and c.processes > 1:
            settings = settings | {"compute": {"processes": c.processes, "strategy": c.strategy}}
        made = Stage(f"seed{self.seed}/{name}", kind, settings, inputs, self.seed)
        return self.graph.add(made, *wanted.split(), optional=optional)

    def asked(
        self, name: str, kind: str, settings: dict[str, Any], wanted: str, sources: dict[str, str], **more: Any
    ) -> Stage:
        """A stage that reads files, or rows of the hub: files are its inputs, ids with revisions its settings."""
        files: dict[str, Any] = {key: Source(Path(given)) for key, given in sources.items() if Path(given).exists()}
        hub = {key: given for key, given in sources.items() if key not in files}
        return self.stage(name, kind, settings | {"hub": hub}, wanted, **files, **more)

    def checkpoint(self) -> Stage | Source:
        """The model that everything starts from."""
        if self.r.model is not None:
            return Source(Path(self.r.model))
        assert self.r.hub is not None  # data_graph saw to it
        named = {"id": self.r.hub.id, "revision": self.r.hub.revision, "chat_template": self.r.hub.chat_template}
        return self.stage("model", "checkpoint", named)

    def preferences(self, name: str, given: str, split: str | None, shares: dict[Any, float]) -> Stage:
        path = Path(given)
        inputs: dict[str, Any] = {"data": Source(path)} if path.exists() else {}
        settings = {"hub": None if inputs else given, "split": None if path.is_file() else split, "shares": shares}
        return self.stage(name, "preferences", settings, **inputs)

    def trained(self, name: str) -> Source | None:
        """A model that was trained elsewhere."""
        folder = self.r.trained.get(name)  # type: ignore[call-overload]
        return Source(Path(folder)) if folder else None

    def gvm(self, name: str, reward: Stage | Source) -> Stage | Source:
        """A value model of the run, or one that was trained elsewhere."""
        if found := self.trained(name):
            return found
        settings = {"train": as_json(with_target(self.r.gvm, TARGETS[name])), "pairs": self.pairs}
        inputs: dict[str, Any] = {"rm": reward} if TARGETS[name] == "reward_model" else {}
        return self.stage(name, "gvm", settings, start=self.start, data=self.data, **inputs)

    def online(self, name: str, settings: PolicySettings, wanted: str, optional: bool) -> Stage:
        train: dict[str, Any] = {"split": "rl", "train": as_json(settings)}
        if self.r.rl_prompts is not None:
            train["most"] = self.r.rl_prompts
        inputs: dict[str, Any] = {"value": self.frozen["value"]}
        if settings.algorithm.name != "dvpo":
            inputs = {"reward": self.frozen["reward"], "reward_scale": self.scale()}
        return self.stage(
            f"policy/{name}", "policy", train, wanted, optional, start=self.start, data=self.data, **inputs
        )

    def scale(self) -> Stage:
        """The reward model's scale; one stage for all methods that need it."""
        rm, reward = self.r.rm, self.frozen["reward"]
        limits = {"max_prompt_tokens": rm.max_prompt_tokens, "max_response_tokens": rm.max_response_tokens}
        most = min(self.r.pairs.most or SCALED, SCALED)
        settings = {"pairs": self.pairs | {"most": most}, **limits}
        known = self.graph.stages.get(f"seed{self.seed}/reward-scale")
        # Optional: it runs where a policy that reads it does.
        return known or self.stage(
            "reward-scale", "reward_scale", settings, optional=True, start=reward, data=self.data
        )

    def other(self, name: str, given: str) -> dict[str, Any]:
        """Settings and data of an accuracy on pairs from elsewhere."""
        most = {"most": self.r.other_most}
        if Path(given).exists():
            return {"settings": {"format": "raw", "split": None, **most}, "data": Source(Path(given))}
        data = self.preferences(f"data-{name}", given, self.r.other_split, {"test": 1.0})
        return {"settings": {"format": "split", "split": "test", **most}, "data": data}

    def accuracy(
        self, name: str, model: Stage | Source, wanted: str, others: dict[str, dict[str, Any]], subfolder: str = "",
        optional: bool = False,
    ) -> None:  # fmt: skip
        """Pairwise accuracy on held-out pairs of the training data's own source, and of the others."""
        measure = {"trajectory_k": 0, **as_json(self.r.measure), **({"subfolder": subfolder} if subfolder else {})}
        path = Path(self.source)
        held_out: dict[str, Any] | None = None
        if self.r.shares.get("test"):
            held_out = {"settings": {"format": "split", "split": "test"}, "data": self.data}
        elif path.is_dir():
            held_out = {"settings": {"format": "raw", "split": self.r.eval_split}, "data": Source(path)}
        if held_out:
            settings = measure | held_out["settings"]
            self.stage(f"in-domain/{name}", "pairwise", settings, wanted, optional, model=model, data=held_out["data"])
        for other, given in others.items():
            settings = measure | given["settings"]
            self.stage(f"{other}/{name}", "pairwise", settings, "T5", optional, model=model, data=given["data"])

    def judged(self, name: str, policy: Stage | Source, wanted: str, optional: bool = False) -> None:
        """The benchmarks that a judge decides, where there is a judge."""
        r = self.r
        if r.judge is None:
            return
        limits = {"most": r.benchmarks.most, "max_new_tokens": r.benchmarks.max_new_tokens}
        settings = {"judge": as_json(r.judge), **limits, "bf16": r.measure.bf16}
        for benchmark in ("mt_bench", "arena_hard", "alpaca_eval"):
            if questions := getattr(r.benchmarks, benchmark):
                sources = {"questions": questions}
                more = {name: getattr(r.benchmarks, f"{benchmark}_{name}", None) for name in ("baseline", "gamed")}
                sources |= {name: given for name, given in more.items() if given}
                stage = f"{benchmark.replace('_', '-')}/{name}"
                self.asked(stage, benchmark, settings, wanted, sources, optional=optional, policy=policy)
