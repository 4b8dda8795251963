"""A CPU's layers against the layers that they stand for."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification
from transformers.models.llama.modeling_llama import LlamaMLP

from dvpo.packed_values import Group, can_pack, packed_values
from server.backends.cpu_layers import PackedDecoderLayer, PackedGatedMlp, PackedLinear, pack_decoder, pack_layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this machine has no oneDNN")


class Block(nn.Module):
    """Layers of all kinds, one in another."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.q_proj, self.biased = nn.Linear(24, 16, bias=False), nn.Linear(16, 24)
        config: Any = SimpleNamespace(hidden_size=24, intermediate_size=40, mlp_bias=False, hidden_act=activation)
        self.mlp = LlamaMLP(config)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(self.biased(self.q_proj(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "gated"), [("silu", PackedGatedMlp), ("gelu", LlamaMLP)])
@pytest.mark.parametrize("shape", [(1, 24), (1, 300, 24), (3, 5, 24)])
@torch.inference_mode()
def test_values_are_those_of_the_plain_layers(shape, activation: str, gated: type, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Block(activation).to(dtype)
    packed = copy.deepcopy(plain)
    pack_layers(packed)
    assert type(packed.q_proj) is type(packed.biased) is PackedLinear and type(packed.mlp) is gated
    assert type(packed.norm) is nn.LayerNorm
    x = torch.randn(shape, dtype=dtype)
    expected = plain(x)
    allowed = 2e-6 if dtype == torch.float32 else 0.02
    assert (packed(x) - expected).norm() <= allowed * expected.norm()


def test_weights_are_no_parameters_any_more() -> None:
    """They are laid out for one kernel: nothing may copy, save or train them."""
    block = Block("silu")
    pack_layers(block)
    assert {name for name, _ in block.named_parameters()} == {"norm.weight", "norm.bias"}


def classifier(kind: str, dtype: torch.dtype, **more: Any) -> Any:
    """A random value model of an architecture, with norms whose weights are not 1."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, **sizes, num_key_value_heads=2, vocab_size=64, head_dim=8, num_labels=1, pad_token_id=0, **more
    )
    model = AutoModelForTokenClassification.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_decoder_layers_compute_what_they_stand_for(kind: str, dtype: torch.dtype, allowed: float) -> None:
    more = {"sliding_window": None} if kind == "mistral" else {}
    model = classifier(kind, dtype, **more)
    groups = [Group([5, 6, 7, 8], [[9, 10], [11, 12, 13]], keep=True), Group([14], [[15] * 80])]
    assert can_pack(model)
    expected, kept = packed_values(model, groups)
    pack_decoder(model.model)
    assert all(type(layer) is PackedDecoderLayer for layer in model.model.layers)
    found, kept_here = packed_values(model, groups)
    warm, _ = packed_values(model, [Group(g.prompt_ids, g.responses, kept_here.get(i)) for i, g in enumerate(groups)])
    for values in (found, warm):
        a, b = (torch.cat([v for group in each for v in group]) for each in (values, expected))
        assert (a - b).norm() <= allowed * b.norm()
    assert kept.keys() == kept_here.keys()


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_layers_of_another_form_are_left_as_they_are(kind: str) -> None:
    """Qwen3's heads are normed, and Gemma's norms count from 1."""
    model = classifier(kind, torch.float32)
    assert can_pack(model)
    before = list(model.model.layers)
    pack_decoder(model.model)
    assert list(model.model.layers) == before


def test_biases_that_only_some_projections_have_are_no_error() -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    for name in ("q_proj", "k_proj"):
        attention = model.model.layers[0].self_attn
        linear = getattr(attention, name)
        biased = nn.Linear(linear.in_features, linear.out_features, bias=name == "q_proj")
        setattr(attention, name, biased)
    before = list(model.model.layers)
    pack_decoder(model.model)
    assert list(model.model.layers) == before


def test_a_model_without_layers_of_its_own_is_left_alone() -> None:
    block = Block("silu")
    pack_decoder(block)
    assert type(block.mlp) is LlamaMLP
