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

FOLDER = Path(__file__).parent / "recipes"


class Compute(Settings):
    """How many stages run at a time, and the threads of each."""

    workers: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)


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


class World(Settings):
    """The built-in world: places, one-line lessons for the base model, prompts of every split."""

    places: int = Field(ge=2)
    lessons: int = Field(ge=0)
    prompts: dict[Literal["base", "sft", "reward", "rl", "validation", "test"], int]


class Sampling(Settings):
    """How a policy is sampled when it is measured."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0)


class AtlasRecipe(Settings):
    """Everything on the built-in world, from random weights: base, SFT, reward and value models, every policy.

    methods: PolicySettings of every online method, on top of the shared `policy`. `scripted` names those that are
    also run on value and reward models that never saw the SFT policy's own answers.
    """

    world: Literal["atlas"]
    name: str
    seeds: int = Field(1, ge=1)
    compute: Compute = Compute()
    atlas: World
    size: ModelSize
    other_sizes: dict[str, ModelSize] = Field(default_factory=dict)
    base: PretrainSettings
    sft: SftSettings
    own_samples: int = Field(ge=1)
    pairs: PairChoice
    rm: RewardSettings
    gvm: GvmSettings
    dpo: DpoSettings
    sampling: Sampling
    measure: Measure
    policy: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    scripted: list[str] = Field(default_factory=list)
    cost_updates: int = Field(4, ge=1)
    cost_rounds: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _valid_methods(self) -> "AtlasRecipe":
        for name in self.methods:
            self.method(name)
        if unknown := set(self.scripted) - set(self.methods):
            raise ValueError(f"scripted names unknown methods: {', '.join(sorted(unknown))}")
        return self

    def method(self, name: str) -> PolicySettings:
        """The whole settings of an online method."""
        return PolicySettings(**(self.policy | self.methods[name]))


class DataRecipe(Settings):
    """Value models of a real language model on real preference data, and a policy against one of them.

    model: a checkpoint folder. test: {name: data path}; `in-domain` is read from the training data's `eval` split.
    """

    world: Literal["data"]
    name: str
    seeds: int = Field(1, ge=1)
    compute: Compute = Compute()
    model: str | None = None
    train_split: str | None = "train"
    eval_split: str = "eval"
    shares: dict[Literal["value", "rl", "validation"], float]
    pairs: PairChoice
    rm: RewardSettings
    gvm: GvmSettings
    policy: PolicySettings
    measure: Measure
    other_data: dict[str, str] = Field(default_factory=dict)
    other_most: int = Field(400, ge=1)


Recipe = Annotated[AtlasRecipe | DataRecipe, Field(discriminator="world")]


def names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_file: str, overrides: tuple[str, ...] = ()) -> AtlasRecipe | DataRecipe:
    """A built-in recipe or a YAML file, with `key.path=value` overrides. Raises InputError naming the key or line."""
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
    for override in overrides:
        _override(values, override)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"][1:]) or "world"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        what = "unknown key; remove it or mend its name" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"recipe {name_or_file}: {place}: {what}{more}") from error


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
