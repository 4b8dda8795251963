"""Recipes: one YAML each, validated; unknown keys are errors."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from dvpo.config import (
    DpoSettings,
    GvmSettings,
    ModelSize,
    PolicySettings,
    PretrainSettings,
    RewardSettings,
    Settings,
    SftSettings,
)
from dvpo.errors import InputError
from reproduce.launch import Strategy

FOLDER = Path(__file__).parent / "recipes"
STUDIED = {"q": "dvpo-q", "gae": "dvpo-gae", "official": "dvpo-official"}
"""The estimator study's names, and the method whose settings each one has."""
TO_PIN = "TO-BE-PINNED"
"""Stands for a revision that nobody has chosen yet; what has one cannot be fetched."""


class Compute(Settings):
    """How many stages run at a time, and the threads of each; a training stage's processes, and its strategy.

    cluster: what the plans are for, one of `reproduce.cost.hardware`: as many of its devices as there are processes.
    """

    workers: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    processes: int = Field(1, ge=1)
    strategy: Strategy = "ddp"
    cluster: str | None = None


class PairChoice(Settings):
    """Which preference pairs are trained on: at most so many per prompt, and in all."""

    split: str
    per_prompt: int | None = Field(None, ge=1)
    most: int | None = Field(None, ge=1)


class Measure(Settings):
    """How value models are measured: the length limits, and at most so many pairs per prompt and in all."""

    max_prompt_tokens: int = Field(ge=1)
    max_response_tokens: int = Field(ge=1)
    per_prompt: int | None = Field(None, ge=1)
    most: int | None = Field(None, ge=1)
    bf16: bool = False


class OtherSize(ModelSize):
    """A further size for Table 8; an optional one is trained only for the study or where that table is asked for."""

    optional: bool = False


class World(Settings):
    """The built-in world: places, lessons for the base model, prompts of every split.

    lessons: single statements, called right or wrong. omissions: answers with a remark on what they leave out.
    margin: answers whose gold scores differ by less are a tie. 0.2 is more than a repetition or a courtesy makes, and
    about what one of three asked facts, or one false extra, makes.
    """

    places: int = Field(ge=2)
    lessons: int = Field(ge=0)
    omissions: int = Field(ge=0)
    margin: float = Field(0.2, ge=0)
    prompts: dict[Literal["base", "sft", "reward", "rl", "validation", "test"], int]


class Sampling(Settings):
    """How a policy is sampled when it is measured."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0)


def _require_valid_methods(recipe: Any) -> None:
    for name in recipe.methods:
        try:
            recipe.method(name)
        except ValidationError as error:
            place, what = _first(error)
            where = f"methods.{name}.{place}" if place.split(".")[0] in recipe.methods[name] else f"policy.{place}"
            raise ValueError(f"{where}: {what}") from error


def _first(error: ValidationError) -> tuple[str, str]:
    """The first thing wrong: the path of its key, and what it is."""
    found = error.errors()[0]
    unknown = found["type"] == "extra_forbidden"
    what = "unknown key; remove it or mend its name" if unknown else found["msg"].removeprefix("Value error, ")
    return ".".join(str(part) for part in found["loc"]), what


class AtlasRecipe(Settings):
    """Everything on the built-in world, from random weights: base, SFT, reward and value models, every policy.

    methods: PolicySettings of every online method, on top of the shared `policy`. `scripted` names those that are
    also run on value and reward models that never saw the SFT policy's own answers.
    gvm_pairs: the GVM's, where they are not `pairs`: a response is one text to it, in however many pairs it is.
    kl_sweep: other strengths of KL for dvpo-gae, run only for the study or where Table 10 is asked for.
    study: the estimator study is part of the run.
    """

    world: Literal["atlas"]
    name: str
    seeds: int = Field(1, ge=1)
    compute: Compute = Compute()
    atlas: World
    size: ModelSize
    other_sizes: dict[str, OtherSize] = Field(default_factory=dict)
    base: PretrainSettings
    sft: SftSettings
    own_samples: int = Field(ge=1)
    pairs: PairChoice
    gvm_pairs: PairChoice | None = None
    rm: RewardSettings
    gvm: GvmSettings
    dpo: DpoSettings
    sampling: Sampling
    measure: Measure
    policy: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    scripted: list[str] = Field(default_factory=list)
    kl_sweep: list[float] = Field(default_factory=list)
    study: bool = False
    cost_updates: int = Field(4, ge=1)
    cost_rounds: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _coherent(self) -> "AtlasRecipe":
        _require_valid_methods(self)
        if self.compute.processes > 1:
            raise ValueError("compute.processes: the built-in world's models are trained in one process; leave it at 1")
        if unknown := set(self.scripted) - set(self.methods):
            raise ValueError(f"scripted names unknown methods: {', '.join(sorted(unknown))}")
        needed = set(STUDIED.values()) if self.study else {"dvpo-gae"} if self.kl_sweep else set()
        if missing := needed - set(self.methods):
            raise ValueError(f"{'study' if self.study else 'kl_sweep'} needs the methods {', '.join(sorted(missing))}")
        for name in needed:
            if self.method(name).algorithm.name != "dvpo":
                raise ValueError(f"methods.{name} must be of the algorithm dvpo")
        return self

    def method(self, name: str) -> PolicySettings:
        """The whole settings of an online method."""
        return PolicySettings(**(self.policy | self.methods[name]))


class HubModel(Settings):
    """A checkpoint on the hub. `revision`: a commit of 40 hex digits, or TO_PIN where nobody has chosen one.

    config: what its config.json says, so that nothing needs a download to be planned.
    chat_template: given to a tokenizer that has none.
    """

    id: str
    revision: str
    gated: bool = False
    config: dict[str, Any]
    chat_template: str | None = None


class Expected(Settings):
    """What the data is known to hold, for the plan of a dry run; pairs: untied ones of a prompt."""

    prompts: int = Field(ge=1)
    responses: float = Field(gt=0)
    pairs: float = Field(gt=0)


class Judge(Settings):
    """Who judges answers: a model behind an OpenAI-compatible endpoint (None: the one of the `openai` package).

    The key comes from the environment.
    """

    model: str
    url: str | None = None
    requests_per_minute: float | None = Field(None, gt=0)
    concurrency: int = Field(4, ge=1)


class Benchmarks(Settings):
    """Where the questions of each benchmark are: a folder, a file, or owner/name@REV; None leaves it out.

    A baseline is a .jsonl file of the answers to beat; gamed is AlpacaEval's df_gamed.csv, without which there is no
    length-controlled win rate. most: at most so many questions of each. max_new_tokens: of an answer; None: as
    many as the benchmark's own protocol allows.
    """

    mt_bench: str | None = None
    arena_hard: str | None = None
    arena_hard_baseline: str | None = None
    alpaca_eval: str | None = None
    alpaca_eval_baseline: str | None = None
    alpaca_eval_gamed: str | None = None
    rewardbench: str | None = None
    most: int | None = Field(None, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)

    @property
    def sources(self) -> dict[str, str]:
        """What is named, by key."""
        return self.model_dump(exclude={"most", "max_new_tokens"}, exclude_none=True)

    @model_validator(mode="after")
    def _with_baselines(self) -> "Benchmarks":
        for name in ("arena_hard", "alpaca_eval"):
            if (getattr(self, name) is None) != (getattr(self, f"{name}_baseline") is None):
                raise ValueError(f"{name} and {name}_baseline go together: questions and the answers to beat")
        return self


ValueModel = Literal["gvm", "gvm-from-rm", "gvm-from-score"]
"""GVMs by where their rewards come from: preferences, our ScalarRM, or the data's own scores."""


class DataRecipe(Settings):
    """A language model on real preference data: value and reward models, and every method from one start.

    model: a checkpoint folder, in place of the `hub` model. data: owner/name@REV, where the command names none.
    shares: of the prompts; a share of `test` is held out, else the data's `eval_split` is. With `sft` settings the
    start is trained first, on the best answers of the share of that name. policy_value: the GVM that DVPO is run
    against. trained: folders of models (`rm`, `gvm`, ...) that were trained elsewhere and are not trained here; a model
    is of one seed, so the run is too. optional_methods: run only where a table that shows them is asked for.
    rl_prompts: at most so many.
    judge: None leaves judged benchmarks out.
    """

    world: Literal["data"]
    name: str
    seeds: int = Field(1, ge=1)
    compute: Compute = Compute()
    model: str | None = None
    hub: HubModel | None = None
    data: str | None = None
    expected: Expected | None = None
    train_split: str | None = "train"
    eval_split: str = "eval"
    shares: dict[Literal["sft", "value", "rl", "validation", "test"], float]
    rl_prompts: int | None = Field(None, ge=1)
    sft: SftSettings | None = None
    pairs: PairChoice
    rm: RewardSettings
    gvm: GvmSettings
    value_models: tuple[ValueModel, ...] = ("gvm", "gvm-from-score")
    policy_value: ValueModel = "gvm"
    trained: dict[Literal["rm"] | ValueModel, str] = Field(default_factory=dict)
    dpo: DpoSettings | None = None
    policy: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    optional_methods: list[str] = Field(default_factory=list)
    kl_sweep: list[float] = Field(default_factory=list)
    measure: Measure
    other_data: dict[str, str] = Field(default_factory=dict)
    other_split: str = "test"
    other_most: int = Field(400, ge=1)
    judge: Judge | None = None
    benchmarks: Benchmarks = Benchmarks()

    @model_validator(mode="after")
    def _coherent(self) -> "DataRecipe":
        _require_valid_methods(self)
        if unknown := set(self.optional_methods) - set(self.methods):
            raise ValueError(f"optional_methods names unknown methods: {', '.join(sorted(unknown))}")
        if self.policy_value not in self.value_models:
            raise ValueError(f"policy_value {self.policy_value} is none of the value_models")
        if self.kl_sweep and "dvpo-gae" not in self.methods:
            raise ValueError("kl_sweep needs the method dvpo-gae")
        if self.trained and self.seeds > 1:
            raise ValueError("trained names models of one seed; set seeds to 1")
        if self.sft is not None and not self.shares.get("sft"):
            raise ValueError("sft needs a share of the data: shares.sft")
        return self

    def method(self, name: str) -> PolicySettings:
        """The whole settings of an online method."""
        return PolicySettings(**(self.policy | self.methods[name]))


Recipe = Annotated[AtlasRecipe | DataRecipe, Field(discriminator="world")]


def require_pinned(recipe: AtlasRecipe | DataRecipe, data: str | None) -> None:
    """Raises InputError where something of the hub has no revision yet; `data` is what the command names instead."""
    if isinstance(recipe, AtlasRecipe):
        return
    given: dict[str, str] = {}
    if recipe.hub is not None and recipe.model is None:
        given["hub.revision"] = f"{recipe.hub.id}@{recipe.hub.revision}"
    if data is None and recipe.data is not None:
        given["data"] = recipe.data
    given |= {f"other_data.{name}": source for name, source in recipe.other_data.items()}
    given |= {f"benchmarks.{k}": v for k, v in recipe.benchmarks.sources.items()}
    if missing := [key for key, source in given.items() if source.endswith(f"@{TO_PIN}")]:
        first = missing[0]
        hub_id = given[first].removesuffix(f"@{TO_PIN}")
        value = "COMMIT" if first == "hub.revision" else f"{hub_id}@COMMIT"
        others = f" (and the same for {', '.join(missing[1:])})" if missing[1:] else ""
        raise InputError(
            f"recipe {recipe.name} names {hub_id} without a revision; choose one from its history on the hub (40 hex "
            f"digits) and add --set {first}={value}{others}"
        )


def names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_file: str, overrides: tuple[str, ...] = ()) -> AtlasRecipe | DataRecipe:
    """A built-in recipe or a YAML file, with `key.path=value` overrides. Raises InputError naming the key or line."""
    values = _values(name_or_file)
    for override in overrides:
        _override(values, override)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        place, what = _first(error)
        place = place.partition(".")[2]  # without the kind of recipe
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        where = f"{place}: " if place else ""
        raise InputError(f"recipe {name_or_file}: {where}{what}{more}") from error


def _values(name_or_file: str) -> dict[str, Any]:
    """The keys of a recipe, on top of those of the one that it `extends`."""
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"{path}: no such recipe file")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif name_or_file in names():
        text = (FOLDER / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        raise InputError(
            f"there is no recipe {name_or_file!r}; choose one of {', '.join(names())} or name a .yaml file"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{name_or_file}{where}: not valid YAML") from error
    if not isinstance(values, dict):
        raise InputError(f"{name_or_file}: a recipe is a mapping of keys to values")
    if (base := values.pop("extends", None)) is None:
        return values
    if base not in names():  # a file that extends a file could go round in a circle
        raise InputError(f"{name_or_file}: extends: {base} is no built-in recipe; choose one of {', '.join(names())}")
    return _merged(_values(base), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the changes; a group of keys is changed key by key."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write it as key=value, for example gvm.td_lambda=1.0")
    *folders, last = key.split(".")
    for folder in folders:
        values = values.setdefault(folder, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {folder} is a value, not a group of keys")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML") from error
