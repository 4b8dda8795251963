"""Loading and saving: the wrong or damaged folder is refused, heads start as said, adapters come back the same."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaConfig

from dvpo import models
from dvpo.config import LoraSettings
from dvpo.data.atlas import Atlas, build_tokenizer
from dvpo.errors import InputError
from dvpo.values import collate, token_values

ARCHS = ("llama", "gpt2")
ROLES = ("policy", "value", "reward")
LORA = LoraSettings(r=4, alpha=8)


@torch.no_grad()
def values(model, texts) -> torch.Tensor:
    return token_values(model.eval(), collate(texts, 0))


def disturb(model) -> None:
    """Moves every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("held", ROLES)
@pytest.mark.parametrize("wanted", ROLES)
def test_a_folder_loads_in_its_own_role_only(checkpoints, arch: str, held: str, wanted: str) -> None:
    folder = checkpoints[arch, held]
    assert models.role_of(folder) == held
    if held == wanted:
        models.load(folder, wanted)
    else:
        with pytest.raises(InputError, match=str(folder)):
            models.load(folder, wanted)


def test_a_missing_folder_is_said(tmp_path) -> None:
    for attempt in (lambda f: models.load(f, "policy"), models.load_tokenizer, models.role_of):
        with pytest.raises(InputError, match="nothing-here"):
            attempt(tmp_path / "nothing-here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        models.load(tmp_path / "empty", "policy")


def test_truncated_weights_are_refused(checkpoints, tmp_path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(checkpoints["llama", "value"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(InputError, match="cut"):
        models.load(folder, "value")


@pytest.mark.parametrize("lost", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_weights_are_refused(checkpoints, tmp_path, lost: str) -> None:
    folder = tmp_path / "holes"
    shutil.copytree(checkpoints["llama", "value"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks the weights"):
        models.load(folder, "value")


def test_a_backbone_weight_may_not_be_missing_under_a_fresh_head_either(checkpoints, tmp_path) -> None:
    folder = tmp_path / "holes"
    shutil.copytree(checkpoints["llama", "policy"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks the weights"):
        models.load(folder, "value", fresh_head=True)


def test_a_classifier_of_two_labels_is_refused(checkpoints, tmp_path) -> None:
    config = LlamaConfig.from_pretrained(checkpoints["llama", "value"])
    config.num_labels = 2
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        models.load(tmp_path, "value")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("start", ROLES)
def test_a_fresh_value_head_gives_exactly_0_on_the_same_backbone(checkpoints, texts, arch: str, start: str) -> None:
    model = models.load(checkpoints[arch, start], "value", fresh_head=True)
    assert torch.equal(values(model, texts), torch.zeros(len(texts), max(len(t.response_ids) for t in texts) + 1))
    source = models.load(checkpoints[arch, start], start).base_model.state_dict()
    assert all(torch.equal(weight, source[name]) for name, weight in model.base_model.state_dict().items())


def test_a_fresh_reward_head_is_not_the_one_of_the_start(checkpoints) -> None:
    """`load` says that the head is replaced by the library's own initial one, whatever role the folder has."""
    for start in ("value", "reward"):
        old = models.head(models.load(checkpoints["llama", start], start)).weight
        new = models.head(models.load(checkpoints["llama", start], "reward", fresh_head=True)).weight
        assert not torch.equal(old, new), start


@pytest.mark.parametrize("arch", ARCHS)
def test_a_saved_value_model_loads_in_plain_transformers(checkpoints, texts, tokenizer, tmp_path, arch: str) -> None:
    model = models.load(checkpoints[arch, "policy"], "value", fresh_head=True)
    disturb(model)
    models.save(model, tokenizer, tmp_path)
    assert models.role_of(tmp_path) == "value"
    expected = values(model, texts)
    assert torch.equal(values(models.load(tmp_path, "value"), texts), expected)
    assert torch.equal(values(AutoModelForTokenClassification.from_pretrained(tmp_path), texts), expected)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0].endswith("ForTokenClassification")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("role", ["value", "reward"])
def test_an_adapter_of_a_value_or_reward_model_comes_back_merged(
    checkpoints, texts, tokenizer, tmp_path, arch: str, role: str
) -> None:
    model = models.load(checkpoints[arch, "policy"], role, lora=LORA, fresh_head=True)
    disturb(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)
    expected = values(model, texts)
    assert float(expected.std()) > 1e-2
    models.save(model, tokenizer, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert models.role_of(tmp_path) == role
    back = models.load(tmp_path, role)
    assert not any("lora" in name for name, _ in back.named_parameters())
    assert float((values(back, texts) - expected).abs().max()) <= 1e-5
    with pytest.raises(InputError):
        models.load(tmp_path, "policy")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_value_model_starts_from_an_adapter_policy(checkpoints, texts, tokenizer, tmp_path, arch: str) -> None:
    policy = models.load(checkpoints[arch, "policy"], "policy", lora=LORA)
    disturb(policy)
    models.save(policy, tokenizer, tmp_path)
    merged = models.load(tmp_path, "policy")
    ids = torch.tensor([texts[0].prompt_ids + texts[0].response_ids])
    with torch.no_grad():
        assert torch.allclose(merged.eval()(ids).logits, policy.eval()(ids).logits, atol=1e-4, rtol=0)
        base = AutoModelForCausalLM.from_pretrained(checkpoints[arch, "policy"]).eval()
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-2)
    model = models.load(tmp_path, "value", fresh_head=True)
    assert type(model).__name__.endswith("ForTokenClassification")
    source = merged.base_model.state_dict()
    assert all(torch.equal(weight, source[name]) for name, weight in model.base_model.state_dict().items())
    assert not values(model, texts).any()
    second = models.load(tmp_path, "value", fresh_head=True, lora=LORA)
    assert not values(second, texts).any()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_critic_starts_as_the_reward_model(checkpoints, texts, arch: str) -> None:
    """Same backbone and head, so its value at every token is what the reward model says there."""
    folder = checkpoints[arch, "reward"]
    critic = models.critic_from_reward(folder)
    assert type(critic).__name__.endswith("ForTokenClassification")
    assert torch.allclose(values(critic, texts), values(models.load(folder, "reward"), texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_dropout_is_off_in_training_too(checkpoints, tokenizer, texts, tmp_path, arch: str) -> None:
    """GPT2 drops in modules; Llama's attention takes its rate from a plain number."""
    folder = tmp_path / "drops"
    shutil.copytree(checkpoints[arch, "value"], folder)
    config = json.loads((folder / "config.json").read_text())
    names = ["attention_dropout"] if arch == "llama" else ["attn_pdrop", "resid_pdrop", "embd_pdrop"]
    config.update(dict.fromkeys([*names, "classifier_dropout"], 0.5))
    (folder / "config.json").write_text(json.dumps(config))
    model = models.load(folder, "value").train()
    batch = collate(texts[:3], 0)
    with torch.no_grad():
        first, second = token_values(model, batch), token_values(model, batch)
    assert torch.equal(first, second)


def test_the_tokenizer_fingerprint_follows_the_ids(tokenizer, tmp_path) -> None:
    base = models.tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = models.load_tokenizer(tmp_path)
    assert models.tokenizer_fingerprint(again) == base
    again.padding_side = "left"
    again(["one text", "another text that is longer"], padding=True, truncation=True, max_length=3)
    assert models.tokenizer_fingerprint(again) == base
    again.chat_template = "{{ messages }}"
    assert models.tokenizer_fingerprint(again) == base
    again.add_tokens(["anewword"])
    assert models.tokenizer_fingerprint(again) != base
    ends_elsewhere = models.load_tokenizer(tmp_path)
    ends_elsewhere.eos_token = "<user>"
    assert models.tokenizer_fingerprint(ends_elsewhere) != base
    assert models.tokenizer_fingerprint(build_tokenizer(Atlas.build(1))) != base


def test_require_same_tokenizer(checkpoints, tokenizer, tmp_path) -> None:
    policy = checkpoints["llama", "policy"]
    models.require_same_tokenizer(policy, checkpoints["gpt2", "value"], "value")
    other = build_tokenizer(Atlas.build(0))
    other.add_tokens(["anewword"])
    other.save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        models.require_same_tokenizer(policy, tmp_path, "value")
    for part in ("value model", str(tmp_path), str(policy), models.tokenizer_fingerprint(other)[:12]):
        assert part in str(caught.value)


def changed_tokenizer(tokenizer, folder: Path, **changes: object) -> Path:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_padding_is_never_the_end_token(tokenizer, tmp_path, pad: str | None) -> None:
    loaded = models.load_tokenizer(changed_tokenizer(tokenizer, tmp_path, pad_token=pad, padding_side="left"))
    assert loaded.pad_token_id is not None
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.padding_side == "right"
    assert len(loaded) == len(tokenizer)  # no token was added: the embedding has no row for it


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match="EOS"):
        models.load_tokenizer(changed_tokenizer(tokenizer, tmp_path, eos_token=None))


@pytest.mark.parametrize(("ends", "warned"), [(None, False), (17, True), ([17, "own"], False), ([17, 18], True)])
def test_a_tokenizer_that_ends_texts_otherwise_than_the_model_is_told(
    checkpoints, tokenizer, tmp_path, monkeypatch, ends, warned: bool
) -> None:
    shutil.copytree(checkpoints["llama", "policy"], tmp_path / "policy")
    if isinstance(ends, list):
        ends = [tokenizer.eos_token_id if end == "own" else end for end in ends]
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "policy" / name
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("dvpo"), "warning", said.append)
    models.load_tokenizer(tmp_path / "policy")
    assert len(said) == warned
    assert not warned or ("end tokens are [17" in said[0] and str(tmp_path / "policy") in said[0])
