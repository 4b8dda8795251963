"""A CPU's faster form of a model's layers: weights laid out once for oneDNN, and little done between the products.

In a trial on a core with AVX-512, a layer of 576 x 1536 in float32 computed 109 instead of 95 GFLOP a second. Gated
feed-forward layers (gate, up, down) also get their activation done while a result is still in the cache. Sums and
products with another tensor are not given to oneDNN: it takes longer for them than a pass of their own.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from dvpo.packed_attention import Packing, Segment, attend_packed

_ROWS = 2048
"""Tokens of a usual batch: oneDNN chooses the layout for it, and takes any number."""
_KEPT_KERNELS = "32"
"""oneDNN makes a kernel for every number of tokens, in milliseconds, and keeps 1,024 of up to a megabyte by default."""


class PackedLinear(nn.Module):
    """`nn.Linear`, then `activation` (`none` or `swish`). x [..., in], result [..., out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
        self.bias = None if bias is None else bias.detach()
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self._activation, [], "")


class PackedGatedMlp(nn.Module):
    """down(swish(gate(scale * x)) * up(scale * x)); `scale` [in] is a norm's weight, if one stands before it."""

    def __init__(self, mlp: Any, scale: Tensor | None = None) -> None:
        super().__init__()
        self.gate, self.up = (
            PackedLinear(_scaled(linear.weight, scale), linear.bias, activation)
            for linear, activation in ((mlp.gate_proj, "swish"), (mlp.up_proj, "none"))
        )
        self.down = PackedLinear(mlp.down_proj.weight, mlp.down_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.down(self.up(x).mul_(self.gate(x)))


class PackedDecoderLayer(nn.Module):
    """A decoder layer of Llama, Mistral, Qwen2 and their like over a packed row. hidden_1_N_D -> hidden_1_N_D.

    Queries, keys and values come from one product, the norms' weights are part of the weights behind them, and the
    two halves of a head that are rotated against each other stand as pairs, which makes rotation a complex product.
    Attention is in float32 always: torch's kernel is no faster in bfloat16 for texts of 300 tokens and more.
    """

    is_causal = True

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.layer_idx: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._width: int = attention.head_dim
        self._keys = attention.k_proj.out_features // self._width
        self._queries = attention.q_proj.out_features // self._width
        self._eps = [_eps_of(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        half = self._width // 2
        pairs = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten()
        rows = torch.arange((self._queries + self._keys) * self._width).unflatten(0, (-1, self._width))[:, pairs]
        rows = torch.cat([rows.flatten(), torch.arange(attention.v_proj.out_features) + rows.numel()])
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])[rows]
        weight = torch.cat([part.weight for part in parts])[rows]
        self.qkv = PackedLinear(_scaled(weight, layer.input_layernorm.weight), bias)
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self.mlp = PackedGatedMlp(layer.mlp, layer.post_attention_layernorm.weight)

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        cos, sin = (t[:, :, None, : self._width // 2].float() for t in position_embeddings)
        qkv = self.qkv(_unit(hidden_1_N_D, self._eps[0])).float().unflatten(-1, (-1, self._width))
        rotated = qkv[:, :, : self._queries + self._keys].unflatten(-1, (-1, 2))
        torch.view_as_complex(rotated).mul_(torch.complex(cos, sin))
        query, key, value = qkv.transpose(1, 2).split([self._queries, self._keys, self._keys], 1)
        attended, _ = attend_packed(self, query, key, value, None, self._scaling, packing=packing)
        hidden_1_N_D = self.output(attended.flatten(2).to(hidden_1_N_D.dtype)).add_(hidden_1_N_D)
        return self.mlp(_unit(hidden_1_N_D, self._eps[1])).add_(hidden_1_N_D)


def bound_kernels() -> None:
    """Bounds how many kernels oneDNN keeps. To be called before anything is computed: it asks once."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KEPT_KERNELS)


@torch.no_grad()
def pack_decoder(body: nn.Module) -> None:
    """Changes the decoder layers of a model that reads packed rows in place, where they are of the form known here."""
    layers: Any = getattr(body, "layers", None)
    if not torch.backends.mkldnn.is_available() or not isinstance(layers, nn.ModuleList):
        return
    for index, layer in enumerate(layers):
        packed = _packed_decoder_layer(layer, body)
        if packed is None:
            return
        layers[index] = packed


@torch.no_grad()
def pack_layers(body: nn.Module) -> None:
    """Changes the linear layers inside `body` in place, where this machine has oneDNN. Only for inference on a CPU."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if _is_gated_mlp(child):
                setattr(module, name, PackedGatedMlp(child))
            elif type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias))


def _unit(x: Tensor, eps: float) -> Tensor:
    """Rows [..., D] divided by the roots of their mean squares (plus eps)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return (x * squares.div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else (weight.float() * scale.float()).to(weight.dtype)


def _eps_of(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _is_decoder_layer(layer: nn.Module) -> bool:
    """Whether it has the parts of such a layer and no others; what they compute is tried afterwards."""
    parts = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    projections = dict(parts["self_attn"].named_children())
    is_plain = all(type(projections.get(f"{name}_proj")) is nn.Linear for name in "qkvo") and len(projections) == 4
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    has_eps = all(hasattr(norm, "variance_epsilon") or hasattr(norm, "eps") for norm in norms)
    return is_plain and has_eps and _is_gated_mlp(parts["mlp"])


def _packed_decoder_layer(layer: Any, body: Any) -> PackedDecoderLayer | None:
    """The layer's packed form, if it is such a layer and the two compute the same on a few random rows."""
    if not _is_decoder_layer(layer):
        return None
    try:
        packed = PackedDecoderLayer(layer)
        like: Tensor = layer.mlp.down_proj.weight
        x = torch.randn(1, 7, like.shape[0], generator=torch.Generator().manual_seed(0)).to(like.dtype)
        places = torch.arange(7)[None]
        said = {"position_ids": places, "position_embeddings": body.rotary_emb(x, position_ids=places)}
        expected, found = (
            each(x, attention_mask=None, use_cache=False, packing=Packing([Segment(0, 7)]), **said)
            for each in (layer, packed)
        )
        change = (expected - x).float()
        allowed = 1e-4 if like.dtype == torch.float32 else 0.05
        return packed if bool((found - expected).float().norm() <= allowed * change.norm()) else None
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return None


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether it is the feed-forward layer of Llama, Mistral, Qwen and their like."""
    parts = dict(module.named_children())
    named = {"gate_proj", "up_proj", "down_proj"}
    is_plain = all(type(parts.get(name)) is nn.Linear for name in named)
    return is_plain and set(parts) == named | {"act_fn"} and _is_swish(parts["act_fn"])


def _is_swish(activation: nn.Module) -> bool:
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    return bool(torch.allclose(activation(x), nn.functional.silu(x)))
