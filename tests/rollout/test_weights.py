"""Weights for another engine: plain names, merged adapters, untouched base weights."""

import pytest
import torch

from dvpo import models
from dvpo.config import LoraSettings
from dvpo.rollout.weights import named_weights


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_plain_model_s_weights_are_its_own(checkpoints, arch: str) -> None:
    model = models.load(checkpoints[arch, "policy"], "policy")
    found = dict(named_weights(model))
    assert found.keys() == model.state_dict().keys()  # GPT2's tied head is there under its own name too
    assert all(torch.equal(weight, found[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_adapter_is_merged_into_a_copy(checkpoints, arch: str) -> None:
    torch.manual_seed(0)
    model = models.load(checkpoints[arch, "policy"], "policy", lora=LoraSettings(r=4, alpha=8))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {name: weight.clone() for name, weight in named_weights(model)}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = model.merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    base = models.load(checkpoints[arch, "policy"], "policy").state_dict()
    assert sum(not torch.equal(found[name], base[name]) for name in base) >= 8
    for name, weight in merged.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
