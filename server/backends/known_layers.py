"""Which layers have the form of Llama's, Mistral's and Qwen2's, so that another form can stand for them."""

from typing import Any

import torch
from torch import nn


def is_decoder_layer(layer: nn.Module) -> bool:
    """Whether it has the parts of such a layer and no others; what they compute is to be tried afterwards."""
    parts = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    projections = dict(parts["self_attn"].named_children())
    is_plain = all(type(projections.get(f"{name}_proj")) is nn.Linear for name in "qkvo") and len(projections) == 4
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    rotates = getattr(parts["self_attn"], "use_rope", True)
    has_eps = all(hasattr(norm, "variance_epsilon") or hasattr(norm, "eps") for norm in norms)
    return bool(is_plain and rotates and has_eps) and is_gated_mlp(parts["mlp"])


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether it is the feed-forward layer of Llama, Mistral, Qwen and their like."""
    parts = dict(module.named_children())
    named = {"gate_proj", "up_proj", "down_proj"}
    is_plain = all(type(parts.get(name)) is nn.Linear for name in named)
    return is_plain and set(parts) == named | {"act_fn"} and _is_swish(parts["act_fn"])


def eps_of(norm: Any) -> float:
    """What a norm adds to the mean of squares."""
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _is_swish(activation: nn.Module) -> bool:
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    return bool(torch.allclose(activation(x), nn.functional.silu(x)))
