"""Loads what is to be served, and says which form of checkpoint it found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedTokenizerBase

from dvpo import models
from dvpo.errors import InputError
from dvpo.files import sha256_file, sha256_json

VALUE_HEAD = "v_head.summary."
"""What TRL's former `AutoModelForCausalLMWithValueHead` called its head's weights."""
# Where a configuration names no limit (positions by rotation or slope have none).
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Loaded:
    """A model with one linear head, in eval mode; `form` is one phrase on what was found in the folder."""

    model: Any
    form: str


@dataclass(frozen=True)
class Identity:
    """What tells a checkpoint from every other, and how many tokens it reads."""

    weights_sha256: str
    tokenizer_sha256: str
    max_tokens: int


def load(folder: Path, dtype: torch.dtype) -> Loaded:
    """Loads a value model, a reward model or a causal model with a value head from a checkpoint folder.

    Raises InputError: nothing usable is there, weights are damaged or not finite, or there is not exactly one label.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a value model")
    role = models.role_of(folder)
    if (folder / "adapter_config.json").is_file():
        if role not in ("value", "reward"):
            raise InputError(f"{folder}: the adapter is not of a value model; train it for token classification")
        model = models.load(folder, role, dtype=dtype)
        loaded = Loaded(model, f"{_described(role, model)}; a LoRA adapter, merged into its base")
    elif role in ("value", "reward"):
        config = AutoConfig.from_pretrained(str(folder))
        if config.num_labels != 1:
            raise InputError(f"{folder}: the model has {config.num_labels} labels; a value model has exactly one")
        model = models.load(folder, role, dtype=dtype)
        loaded = Loaded(model, _described(role, model))
    elif any(VALUE_HEAD in name for name in _weight_names(folder)):
        model = _with_value_head(folder, dtype)
        loaded = Loaded(model, "causal language model with a value head (v_head.summary)")
    else:
        what = "a causal language model without a value head" if role == "policy" else "a model of an unknown kind"
        raise InputError(
            f"{folder} holds {what}; give a token or sequence classifier of one label, or a model with v_head weights"
        )
    _require_sound(folder, loaded.model)
    loaded.model.eval()
    return loaded


def identity(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Identity:
    """Digests of the weights and the tokenizer, and the most tokens of a prompt and response together.

    The weights' digest is that of the file where there is one, else of the files' names and digests. Weights of an
    adapter's base model count where they lie in a folder.
    """
    config = _adapter(folder)
    base = Path(config["base_model_name_or_path"]) if config else None
    files = weight_files(folder) + (weight_files(base) if base and base.is_dir() else [])
    if not files:
        raise InputError(f"{folder}: there are no weights; give the folder of a value model")
    digests = [sha256_file(file) for file in files]
    names = [file.name for file in files]
    weights = digests[0] if len(files) == 1 else sha256_json([names, digests])
    config_folder = base if base is not None else folder
    settings = AutoConfig.from_pretrained(str(config_folder)).get_text_config()
    limit = getattr(settings, "max_position_embeddings", None) or min(tokenizer.model_max_length, _NO_LIMIT)
    return Identity(weights, models.tokenizer_fingerprint(tokenizer), limit)


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that hold its weights, sorted by name; safetensors where there are any."""
    for pattern in ("*.safetensors", "*.bin"):
        found = [f for f in sorted(folder.glob(pattern)) if f.name.startswith(("model", "pytorch_model", "adapter"))]
        if found:
            return found
    return []


def _described(role: models.Role, model: Any) -> str:
    name = type(model).__name__
    return (
        f"token classifier {name}" if role == "value" else f"sequence classifier {name}, its head read at every token"
    )


def _adapter(folder: Path) -> dict[str, Any] | None:
    path = folder / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _weight_names(folder: Path) -> set[str]:
    return {name for file in weight_files(folder) for name in _tensors(file, names_only=True)}


def _tensors(file: Path, names_only: bool = False) -> dict[str, Any]:
    """The tensors of a weight file by name. Raises InputError where it cannot be read."""
    from safetensors import safe_open

    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with safe_open(file, framework="pt") as opened:
            return {name: None if names_only else opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{file}: the weights cannot be read ({str(error).splitlines()[0][:200]})") from error


def _with_value_head(folder: Path, dtype: torch.dtype) -> Any:
    """A token classifier with the backbone and the value head of TRL's former form."""
    config = AutoConfig.from_pretrained(str(folder), num_labels=1)
    try:
        model = AutoModelForTokenClassification.from_config(config, dtype=dtype)
    except ValueError as error:
        raise InputError(f"{folder}: {config.model_type} has no token classifier in transformers") from error
    named = {}
    for file in weight_files(folder):
        for name, tensor in _tensors(file).items():
            name = name.removeprefix("pretrained_model.")
            name = name.replace(VALUE_HEAD, f"{models.head_name(model)}.")
            named[name] = tensor
    missing = [name for name in model.state_dict() if name not in named]
    if models.head_name(model) + ".bias" in missing and models.head(model).bias is not None:
        nn.init.zeros_(models.head(model).bias)
        missing.remove(models.head_name(model) + ".bias")
    if missing:
        raise InputError(f"{folder}: the weights {', '.join(missing[:3])} are missing; the checkpoint is damaged")
    try:
        model.load_state_dict(named, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder}: the weights do not fit the model ({reason}); the head must be linear") from error
    models.disable_dropout(model)
    models.head(model).__class__ = models.Float32Head
    model.config.use_cache = False
    return model


def _require_sound(folder: Path, model: Any) -> None:
    head = models.head(model)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(f"{folder}: the model's head is not one linear layer to one value; use one that is")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{folder}: the weights {name} hold numbers that are not finite; the file is damaged")
