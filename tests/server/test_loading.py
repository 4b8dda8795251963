"""Which checkpoints are served, and what is said of the others."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from dvpo.values import score_all
from server.backends.transformers import TransformersBackend
from server.loading import identity, load, weight_files

ITEM = Encoded([5, 6, 7], [8, 9, 10])


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def value_head_checkpoint(source: Path, target: Path, prefix: str = "", suffix: str = "safetensors") -> torch.Tensor:
    """Writes TRL's former form around a causal model; returns h_0..h_T of ITEM as TRL computed it."""
    copy(source, target)
    policy = AutoModelForCausalLM.from_pretrained(source).eval()
    torch.manual_seed(5)
    summary = torch.nn.Linear(policy.config.hidden_size, 1)
    torch.nn.init.normal_(summary.bias)
    weights = {f"{prefix}{name}": tensor.clone() for name, tensor in policy.state_dict().items()}
    weights |= {f"v_head.summary.{name}": tensor.clone() for name, tensor in summary.state_dict().items()}
    for file in weight_files(target):
        file.unlink()
    if suffix == "bin":
        torch.save(weights, target / "pytorch_model.bin")
    else:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        ids = torch.tensor([ITEM.prompt_ids + ITEM.response_ids])
        hidden = policy(ids, output_hidden_states=True).hidden_states[-1]
        return summary(hidden)[0, len(ITEM.prompt_ids) - 1 :, 0]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(("prefix", "suffix"), [("", "safetensors"), ("pretrained_model.", "bin")])
def test_a_value_head_checkpoint(checkpoints, tmp_path, arch: str, prefix: str, suffix: str) -> None:
    expected = value_head_checkpoint(checkpoints[arch, "policy"], tmp_path / "v", prefix, suffix)
    ours = TransformersBackend(tmp_path / "v")
    assert ours.info.form == "causal language model with a value head (v_head.summary)"
    assert torch.allclose(torch.from_numpy(ours.score([ITEM])[0].values_S), expected, atol=1e-5)


def test_a_lora_adapter(checkpoints, tmp_path, tokenizer) -> None:
    torch.manual_seed(1)
    base = AutoModelForTokenClassification.from_pretrained(checkpoints["llama", "policy"], num_labels=1)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"], task_type="TOKEN_CLS", lora_dropout=0.0
    )
    adapted = get_peft_model(base, lora).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    models.save(adapted, tokenizer, tmp_path / "a")
    ours = TransformersBackend(tmp_path / "a")
    assert ours.info.form == "token classifier LlamaForTokenClassification; a LoRA adapter, merged into its base"
    expected = next(score_all(adapted, [ITEM], 0))[1]
    assert torch.allclose(torch.from_numpy(ours.score([ITEM])[0].values_S), expected, atol=1e-5)


def test_digests_tell_weights_apart(checkpoints, tmp_path) -> None:
    folder = copy(checkpoints["llama", "value"], tmp_path / "c")
    tokenizer = models.load_tokenizer(folder)
    before = identity(folder, tokenizer)
    assert before.weights_sha256 == sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert before.tokenizer_sha256 == models.tokenizer_fingerprint(tokenizer)
    assert before.max_tokens == 256
    weights = load_file(folder / "model.safetensors")
    weights["score.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity(folder, tokenizer).weights_sha256 != before.weights_sha256


def test_a_checkpoint_in_several_files(checkpoints, tmp_path, tokenizer) -> None:
    model = AutoModelForTokenClassification.from_pretrained(checkpoints["llama", "value"])
    model.save_pretrained(tmp_path / "s", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "s")
    assert len(weight_files(tmp_path / "s")) > 1
    whole, sharded = (TransformersBackend(f) for f in (checkpoints["llama", "value"], tmp_path / "s"))
    assert whole.score([ITEM])[0].values_S.tobytes() == sharded.score([ITEM])[0].values_S.tobytes()
    assert whole.info.weights_sha256 != sharded.info.weights_sha256


def damaged(kind: str, checkpoints: dict, target: Path) -> Path:
    if kind == "missing":
        return target
    if kind == "empty":
        target.mkdir()
        return target
    role = "policy" if kind in ("policy", "wide head", "lacking layer") else "value"
    folder = copy(checkpoints["llama", role], target)
    file = folder / "model.safetensors"
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no weights":
        file.unlink()
    elif kind == "two labels":
        edit_config(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    elif kind == "not finite":
        weights = load_file(file)
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
    elif kind in ("wide head", "lacking layer"):
        weights = load_file(file) | {"v_head.summary.weight": torch.zeros(3 if kind == "wide head" else 1, 32)}
        if kind == "lacking layer":
            del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "no such folder"),
        ("empty", "no model is there"),
        ("no config", "no model is there"),
        ("no tokenizer", "no tokenizer"),
        ("no weights", "cannot be loaded"),
        ("cut off", "cannot be loaded"),
        ("two labels", "2 labels; a value model has exactly one"),
        ("not finite", "model.norm.weight hold numbers that are not finite"),
        ("policy", "a causal language model without a value head"),
        ("wide head", "the head must be linear"),
        ("lacking layer", "model.layers.1.mlp.up_proj.weight are missing"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(checkpoints, tmp_path, kind: str, said: str) -> None:
    folder = damaged(kind, checkpoints, tmp_path / "bad")
    with pytest.raises(InputError) as raised:
        TransformersBackend(folder)
    message = str(raised.value)
    assert said in message and str(folder) in message and "\n" not in message


def test_dropout_is_off(checkpoints, tmp_path) -> None:
    folder = copy(checkpoints["gpt2", "value"], tmp_path / "d")
    edit_config(folder, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, classifier_dropout=0.5)
    assert not load(folder, torch.float32).model.training
    noisy, clean = (TransformersBackend(f) for f in (folder, checkpoints["gpt2", "value"]))
    assert noisy.score([ITEM])[0].values_S.tobytes() == clean.score([ITEM])[0].values_S.tobytes()
