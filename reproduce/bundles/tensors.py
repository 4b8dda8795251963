"""Whether a bundle's tensors are those that its config asks for: names, shapes, finite numbers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from dvpo import models
from dvpo.errors import InputError
from reproduce.bundles.manifest import MANIFEST, Difference, Manifest

ADAPTER = "adapter_model.safetensors"
_AUTO = {
    "policy": transformers.AutoModelForCausalLM,
    "value": transformers.AutoModelForTokenClassification,
    "reward": transformers.AutoModelForSequenceClassification,
}


def check_tensors(folder: Path, manifest: Manifest) -> list[Difference]:
    """Differences between the weights and the config, and every tensor with a number that is not finite."""
    config = folder / ("adapter_config.json" if manifest.base and (folder / ADAPTER).exists() else "config.json")
    try:
        for path in sorted(folder.glob("*.json")):
            if path.name != MANIFEST and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
                return [Difference(path.name, "it names code to be loaded (auto_map); a bundle carries no code")]
        role = models.role_of(folder)
        if role != manifest.role:
            return [Difference(config.name, f"a {role} model, the manifest says {manifest.role}")]
        found, differences = _shapes(folder)
        wrong = _adapter(folder, found) if config.name != "config.json" else _whole(folder, manifest.role, found)
    except (OSError, ValueError, KeyError, InputError, SafetensorError) as error:
        return [Difference(config.name, f"the model cannot be read ({' '.join(str(error).split())[:200]})")]
    return differences + wrong


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


def _adapter(folder: Path, found: dict[str, Any]) -> list[Difference]:
    """An adapter's matrices come in pairs of the config's rank; its other tensors are those of the saved head."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank, heads = config["r"], set(config["modules_to_save"] or ())
    differences = []
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
