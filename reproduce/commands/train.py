"""`dvpo train`: one stage by hand, the same stage functions as in a whole run.

The result is built in `.NAME.part/` beside the folder NAME asked for: `data/` (the examples used), `state/` (the
trainer's checkpoints, from which an interrupted training goes on) and `out/`, which becomes NAME at the end.
"""

import contextlib
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dvpo.config import DpoSettings, GvmSettings, PolicySettings, RewardSettings, Settings, SftSettings
from dvpo.data.formats import read
from dvpo.data.records import Example, dump_examples
from dvpo.errors import InputError, StageError
from dvpo.files import require_folder, sha256_json, sha256_tree, write_json
from reproduce.commands.common import require_checkpoint, say
from reproduce.launch import STRATEGIES, Devices, run_stage
from reproduce.pipeline import Context, locked
from reproduce.provenance import code_commit, device, versions
from reproduce.reasons import not_written, reason
from reproduce.stages import KINDS

S = TypeVar("S", bound=Settings)
_SPLIT = "train"


class Choice(Settings):
    """How many pairs are used (demonstrations for sft): at most so many of each prompt, and in all."""

    per_prompt: int | None = Field(default=None, ge=1)
    most: int | None = Field(default=None, ge=1)


class TrainFile(Settings, Generic[S]):
    """The configuration file. `start` is a checkpoint folder or hub id; `data` a file, a folder or owner/name@REV.

    value_model: a folder, or the address of a scoring server.
    """

    start: str
    data: str
    split: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    pairs: Choice = Choice()
    reward_model: str | None = None
    value_model: str | None = None
    settings: S

    @model_validator(mode="after")
    def _frozen_models_where_used(self) -> "TrainFile[S]":
        algorithm = getattr(self.settings, "algorithm", None)
        online = algorithm.name if algorithm else None
        by_score = getattr(self.settings, "target", None) == "reward_model" or online in ("ppo", "remax", "grpo")
        for name, needed in (("reward_model", by_score), ("value_model", online == "dvpo")):
            if needed != (getattr(self, name) is not None):
                raise ValueError(
                    f"these settings need {name}: DIR" if needed else f"{name}: is not read here; remove it"
                )
        return self


TRAINING = "training.json"
"""In the checkpoint's folder: what it was trained on and how, by which code, where."""


@dataclass(frozen=True)
class Trainer:
    """A kind of training: its configuration, and what it uses of the data."""

    file: type[TrainFile[Any]]
    choose: Callable[[Sequence[Example], Choice, int], list[Example]]
    stage_settings: Callable[[Choice], dict[str, Any]]


def demonstrations(examples: Sequence[Example], choice: Choice, seed: int) -> list[Example]:
    """The examples with only the responses that no preference calls worse than another: the best ones of each prompt.

    Data without preferences is kept whole; an example whose every response is worse than another goes.
    """
    rng = random.Random(seed)
    kept = []
    for example in examples:
        worse = {j for _, j in example.preferences}
        best = [r for j, r in enumerate(example.responses) if j not in worse]
        if choice.per_prompt is not None and len(best) > choice.per_prompt:
            best = rng.sample(best, choice.per_prompt)
        kept += [replace(example, responses=(response,), preferences=()) for response in best]
    if choice.most is not None and len(kept) > choice.most:
        kept = rng.sample(kept, choice.most)
    if not kept:
        raise InputError("the data has no responses to imitate; give preference data or demonstrations")
    return kept


def compared(examples: Sequence[Example], choice: Choice, seed: int) -> list[Example]:
    """The examples, all of them: the stage itself draws the pairs."""
    if not any(example.preferences for example in examples):
        raise InputError("the data has no response that is preferred to another; give preference data")
    return list(examples)


def prompts(examples: Sequence[Example], choice: Choice, seed: int) -> list[Example]:
    """The examples' prompts; their responses are not used."""
    return [replace(example, responses=(), preferences=()) for example in examples]


def _pairs(choice: Choice) -> dict[str, Any]:
    return {"pairs": {"split": _SPLIT, **choice.model_dump()}}


TRAINERS: dict[str, Trainer] = {
    "sft": Trainer(TrainFile[SftSettings], demonstrations, lambda choice: {"split": _SPLIT}),
    "rm": Trainer(TrainFile[RewardSettings], compared, _pairs),
    "gvm": Trainer(TrainFile[GvmSettings], compared, _pairs),
    "dpo": Trainer(TrainFile[DpoSettings], compared, _pairs),
    "policy": Trainer(TrainFile[PolicySettings], prompts, lambda choice: {"split": _SPLIT}),
}
"""By the name of the stage kind that does the work (`reproduce.stages.KINDS`)."""


def run(
    kind: str,
    config: Path,
    out: Path,
    debug: bool = False,
    processes: int | None = None,
    strategy: str | None = None,
    offload: bool = False,
) -> None:
    """Trains one model as `config` says and puts it in the new folder `out`.

    processes, strategy, offload: as in `launch.Devices`. Under a launcher (`accelerate launch`, torchrun) every process
    calls this, and they are left out.
    """
    if kind not in TRAINERS:
        raise InputError(f"unknown kind of training {kind!r}; choose from {', '.join(TRAINERS)}")
    if strategy not in (None, *STRATEGIES):
        raise InputError(f"unknown --strategy {strategy!r}; choose from {', '.join(STRATEGIES)}")
    devices = Devices(processes, strategy or "ddp", offload)
    trainer = TRAINERS[kind]
    file = read_config(config, trainer.file)
    out = out.absolute()
    require_new(out)
    require_checkpoint(file.start)
    remote = {"value_url": file.value_model} if (file.value_model or "").startswith(("http://", "https://")) else {}
    frozen = {"rm" if kind == "gvm" else "reward": file.reward_model, "value": None if remote else file.value_model}
    folders = {name: Path(require_checkpoint(folder)) for name, folder in frozen.items() if folder is not None}

    from dvpo import distributed, stopping

    stopping.listen()
    together = distributed.start()  # alone, unless a launcher has started several
    if distributed.launched() and (processes, strategy, offload) != (None, None, False):
        raise InputError("a launcher has started this process and says all that --processes and --strategy could")
    part = out.parent / f".{out.name}.part"
    settings = {"train": _with_algorithm(file.settings.model_dump(), remote), **trainer.stage_settings(file.pairs)}
    context = Context(
        settings,
        file.seed,
        {"start": Path(file.start), "data": part / "data", **folders},
        part / ("out" if together.main else f"rank{together.rank}"),
        part / "state",
    )
    if not together.main:
        together.wait()  # until the main process has laid out the folder
        KINDS[kind].function()(context)
        together.wait()
        return
    require_new(out)
    dataset = read(file.data, split=file.split)
    examples = trainer.choose(dataset.examples, file.pairs, file.seed)
    for note in dataset.notes.lines():
        say(note)
    with locked(part / "lock"):
        require_new(out)  # another run may have finished it while this one waited
        record = {"kind": kind, "config": file.model_dump(), "data_sha256": dataset.digest}
        models = {"start": Path(file.start), **folders}
        record["models_sha256"] = {name: sha256_tree(path) for name, path in models.items() if path.is_dir()}
        _begin(part, sha256_json(record))
        dump_examples(examples, part / "data" / f"{_SPLIT}.jsonl")
        clock = time.perf_counter()
        with open(part / "log.txt", "a") as log, contextlib.redirect_stdout(sys.stderr if debug else log):
            together.wait()
            try:
                if together.count > 1:
                    metrics = KINDS[kind].function()(context)
                else:
                    metrics = run_stage(kind, context, devices, None if debug else part / "log.txt")
            except InputError:
                if not any((part / "state").iterdir()):
                    shutil.rmtree(part)  # nothing was trained: mended, the same command begins anew
                raise
            except RuntimeError as error:
                if not not_written(error):
                    raise
                raise StageError(f"{reason(error, part)}; make room, and run the same command to go on") from error
            together.wait()
        seconds = time.perf_counter() - clock
        for note in metrics["said"]:
            say(note)
        losses = metrics["policy_losses"] if kind == "policy" else [loss for _, loss in metrics["losses"]]
        if not all(map(math.isfinite, losses)):
            raise StageError(
                f"{kind}: the loss is not finite; lower learning_rate, or max_grad_norm, and remove {part}"
            )
        origin = {"git_commit": code_commit(), "versions": versions(), "device": device()}
        write_json(context.out / TRAINING, {**record, **origin, "metrics": metrics, "seconds": round(seconds, 2)})
        context.out.rename(out)
        shutil.rmtree(part)
    print(f"{out}: {kind} trained in {seconds:.0f} s, loss {losses[0]:.4f} at first and {losses[-1]:.4f} at last")


def require_new(out: Path) -> None:
    """Raises InputError where `out` exists, or cannot be made."""
    if os.path.lexists(out):
        raise InputError(f"{out} exists already; remove it or name another --out")
    require_folder(out.parent)


def read_config(path: Path, model: type[TrainFile[Any]]) -> TrainFile[Any]:
    """The validated configuration. Raises InputError that names the line or the key at fault."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file is not UTF-8 text; name a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(
            f"{place}: not YAML ({getattr(error, 'problem', None) or 'unreadable'}); mend the line"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a mapping of names to values; write start:, data: and settings:")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{path}: {complaint(error, model)}") from error


def complaint(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong with a configuration, by the path of its key, and how many more there are."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = {"extra_forbidden": "unknown key; remove it or mend its name", "missing": "is missing; add it"}.get(
        first["type"], first["msg"].removeprefix("Value error, ")
    )
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _begin(part: Path, key: str) -> None:
    """Makes the scratch folder, or takes up one that was left by the same training, or by one that had not begun."""
    mark, state = part / "key", part / "state"
    if mark.exists() and mark.read_text() != key and state.is_dir() and any(state.iterdir()):
        raise InputError(
            f"{part} holds an interrupted training with other settings, models or data; remove it or name another --out"
        )
    shutil.rmtree(part / "out", ignore_errors=True)  # half-written results; the checkpoints in state/ are kept
    for folder in ("out", "state"):
        (part / folder).mkdir(parents=True, exist_ok=True)
    mark.write_text(key)


def _with_algorithm(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The settings with more fields of the online algorithm."""
    return {**settings, "algorithm": {**settings["algorithm"], **more}} if more else settings
