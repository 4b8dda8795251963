"""Whether a bundle's tensors are those that its config asks for: names, shapes, finite numbers."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from dvpo import models
from dvpo.data.splits import brief
from dvpo.errors import InputError
from reproduce.bundles.adapters import ADAPTER
from reproduce.bundles.manifest import Difference, Manifest

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LAYERS = re.compile(r"(n|num|num_hidden|(num_)?(en|de)coder)_layers?")
_AUTO = {
    "policy": transformers.AutoModelForCausalLM,
    "value": transformers.AutoModelForTokenClassification,
    "reward": transformers.AutoModelForSequenceClassification,
}


def check_tensors(folder: Path, manifest: Manifest) -> list[Difference]:
    """Differences between the weights that load and the config, and every tensor with a number that is not finite."""
    documents, differences = _documents(folder)
    differences = differences or _elsewhere(documents, manifest) or _files(folder, documents)
    if differences:
        return differences
    config = ADAPTER if ADAPTER in documents else "config.json"
    try:
        found, differences = _shapes(folder)
        # Before the library reads the config: it would build any number of layers, at any cost.
        if deep := _too_deep(documents.get(config, {}), len(found)):
            return [Difference(config, deep)]
        role = models.role_of(folder)
        if role != manifest.role:
            return [Difference(config, f"a {role} model, the manifest says {manifest.role}")]
        wrong = _adapter(documents[ADAPTER], found) if config == ADAPTER else _whole(folder, role, found)
    except Exception as error:  # a config may be wrong in any way, and the libraries then raise anything
        return [Difference(config, f"the model cannot be read ({brief(error)})")]
    return differences + wrong


def _documents(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Difference]]:
    """{file: its object} of the JSON files that loading may read, and those files that hold no object."""
    documents, differences = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict):
            documents[path.name] = document
        else:
            differences.append(Difference(path.name, "no JSON object"))
    return documents, differences


def _elsewhere(documents: dict[str, dict[str, Any]], manifest: Manifest) -> list[Difference]:
    """Where a file leads to code or weights that the manifest does not name."""
    differences = []
    for name, document in documents.items():
        if "auto_map" in document:
            differences.append(Difference(name, "it names code to be loaded (auto_map); a bundle carries no code"))
        if "transformers_weights" in document:
            differences.append(Difference(name, "it names other weights to be loaded (transformers_weights)"))
    if ADAPTER in documents:
        named = [documents[ADAPTER].get(key) for key in ("base_model_name_or_path", "revision")]
        base = manifest.base and [manifest.base.id, manifest.base.revision]
        if named != base:
            differences.append(Difference(ADAPTER, f"its base model is {named}, the manifest says {base}"))
    return differences


def _files(folder: Path, documents: dict[str, dict[str, Any]]) -> list[Difference]:
    """Weights that loading would pass over, and those that it would miss."""
    there = {path.name for path in folder.glob("*.safetensors")}
    if ADAPTER in documents:
        read = {ADAPTER_WEIGHTS}
    elif INDEX in documents:
        shards = documents[INDEX].get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            return [Difference(INDEX, "it has no weight_map from tensors to files")]
        if WEIGHTS in there:
            return [Difference(INDEX, f"beside {WEIGHTS}, of which programs read one or the other")]
        read = set(shards.values())
        if absent := sorted(read - there):
            return [Difference(INDEX, f"it names {absent[0]!r}, and no such weights are beside it")]
    else:
        read = {WEIGHTS}
    kinds = f"{WEIGHTS}, the files of its index, or {ADAPTER_WEIGHTS} of an adapter"
    passed = [Difference(name, f"loading passes it over; weights are {kinds}") for name in sorted(there - read)]
    return passed + [Difference(name, "missing") for name in sorted(read - there)]


def _too_deep(config: dict[str, Any], most: int) -> str | None:
    """What is wrong with a config, or one inside it, that asks for more layers than there are tensors."""
    for key, value in config.items():
        if isinstance(value, dict) and (deep := _too_deep(value, most)):
            return deep
        if _LAYERS.fullmatch(key) and isinstance(value, int | float) and value > most:
            return f"{key} is {value}, and the bundle has {most} tensors in all"
    return None


def _shapes(folder: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], list[Difference]]:
    """{tensor: (file, shape)} of all weights, and the tensors that stand twice or hold no finite numbers."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    differences = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (no mapping)
                tensor = f.get_tensor(name)
                if name in found:
                    differences.append(Difference(f"{path.name}:{name}", f"it stands in {found[name][0]} too"))
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    differences.append(Difference(f"{path.name}:{name}", "it has numbers that are not finite"))
                found[name] = (path.name, tuple(tensor.shape))
    if not found:
        raise InputError("no weights in safetensors")
    return found, differences


def _whole(folder: Path, role: str, found: dict[str, Any]) -> list[Difference]:
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = _AUTO[role].from_config(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return _compare(found, expected, tied)


def _compare(found: dict[str, Any], expected: dict[str, tuple[int, ...]], tied: set[str]) -> list[Difference]:
    differences = [
        Difference(name, "a tensor that the config asks for is missing")
        for name in expected
        if name not in found and name not in tied
    ]
    for name, (file, shape) in found.items():
        if name not in expected:
            differences.append(Difference(f"{file}:{name}", "the config has no such tensor"))
        elif shape != expected[name]:
            differences.append(
                Difference(f"{file}:{name}", f"its shape is {list(shape)}, the config says {list(expected[name])}")
            )
    return differences


def _adapter(config: dict[str, Any], found: dict[str, Any]) -> list[Difference]:
    """An adapter's matrices come in pairs of the config's rank; its other tensors are those of the saved head."""
    rank, heads = config["r"], set(config["modules_to_save"] or ())
    differences = []
    if heads and not any(name.endswith(f".{head}.weight") for name in found for head in heads):
        differences.append(Difference(ADAPTER_WEIGHTS, f"it has no weight of the head ({', '.join(sorted(heads))})"))
    for name, (file, shape) in found.items():
        where = f"{file}:{name}"
        if ".lora_A." in name or ".lora_B." in name:
            a = ".lora_A." in name
            other = name.replace(".lora_A.", ".lora_B.") if a else name.replace(".lora_B.", ".lora_A.")
            if other not in found:
                differences.append(Difference(where, f"its other half {other} is missing"))
            if len(shape) != 2 or shape[0 if a else 1] != rank:
                differences.append(Difference(where, f"its shape is {list(shape)}, the config's rank is {rank}"))
        elif not heads.intersection(name.split(".")):
            differences.append(Difference(where, "the config has no such tensor"))
    return differences
