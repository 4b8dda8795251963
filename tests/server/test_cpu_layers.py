"""A CPU's layers against the layers that they stand for."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from server.backends.cpu_layers import PackedGatedMlp, PackedLinear, pack_layers

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
