"""A CPU's decoder: little is done between the products, and cores that are idle join in.

It stands for the layers of Llama, Mistral, Qwen2 and their like.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvpo.packed_attention import attend_packed
from dvpo.packed_parts import LEAST_PART, Cores, bounds_of, cut_packing, run_together
from dvpo.packed_row import Packing, Segment
from server.backends.cpu_layers import PackedGatedMlp, PackedLinear, scaled
from server.backends.known_layers import eps_of, is_decoder_layer


class PackedDecoderLayer(nn.Module):
    """A decoder layer of Llama, Mistral, Qwen2 and their like over a packed row. hidden_1_N_D -> hidden_1_N_D.

    From the last one come only the W rows that are wanted, hidden_1_W_D.

    Queries, keys and values come from one product, the norms' weights are part of the weights behind them, and the
    two halves of a head that are rotated against each other stand as pairs, which makes rotation a complex product.
    Attention is in float32 always: torch's kernel is no faster in bfloat16 for texts of 300 tokens and more.
    """

    is_causal = True
    is_last = False
    """Then only the rows that are wanted get through it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.layer_idx: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._width: int = attention.head_dim
        self._keys = attention.k_proj.out_features // self._width
        self._queries = attention.q_proj.out_features // self._width
        self._eps = [eps_of(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        half = self._width // 2
        pairs = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten()
        rows = torch.arange((self._queries + self._keys) * self._width).unflatten(0, (-1, self._width))[:, pairs]
        rows = torch.cat([rows.flatten(), torch.arange(attention.v_proj.out_features) + rows.numel()])
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])[rows]
        weight = torch.cat([part.weight for part in parts])[rows]
        self.qkv = PackedLinear(scaled(weight, layer.input_layernorm.weight), bias)
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self.mlp = PackedGatedMlp(layer.mlp, layer.post_attention_layernorm.weight)

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        if packing.rotation is None:
            cos, sin = (t[:, :, None, : self._width // 2].float() for t in position_embeddings)
            packing.rotation = torch.complex(cos, sin)
        qkv = self.qkv(_unit(hidden_1_N_D, self._eps[0])).float().unflatten(-1, (-1, self._width))
        rotated = qkv[:, :, : self._queries + self._keys].unflatten(-1, (-1, 2))
        torch.view_as_complex(rotated).mul_(packing.rotation)
        query, key, value = qkv.transpose(1, 2).split([self._queries, self._keys, self._keys], 1)
        attended, _ = attend_packed(self, query, key, value, None, self._scaling, packing=packing)
        attended = attended.flatten(2)
        if self.is_last and packing.wanted is not None:
            attended, hidden_1_N_D = attended[:, packing.wanted], hidden_1_N_D[:, packing.wanted]
            if not packing.wanted:
                return hidden_1_N_D
        hidden_1_N_D = self.output(attended.to(hidden_1_N_D.dtype)).add_(hidden_1_N_D)
        return self.mlp(_unit(hidden_1_N_D, self._eps[1])).add_(hidden_1_N_D)


class PackedDecoder(nn.Module):
    """A model's decoder layers, one after the other, over a packed row. hidden_1_N_D -> hidden_1_W_D.

    Cores that have nothing else to do join in on the way: between two layers the row is cut into parts.
    """

    def __init__(self, layers: Sequence[PackedDecoderLayer], cores: Cores) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        layers[-1].is_last = True
        self._cores = cores

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        most = hidden_1_N_D.shape[1] // LEAST_PART - 1 if packing.handover is None else 0
        for index in range(len(self.layers)):
            if index and most > 0 and (helpers := self._cores.claim(most)):
                try:
                    return self._in_parts(index, helpers + 1, hidden_1_N_D, position_embeddings, packing)
                finally:
                    self._cores.release(helpers)
            hidden_1_N_D = self._from(index, index + 1, hidden_1_N_D, position_embeddings, packing)
        return hidden_1_N_D

    def _in_parts(
        self, first: int, parts: int, hidden_1_N_D: Tensor, position_embeddings: tuple[Tensor, Tensor], packing: Packing
    ) -> Tensor:
        """The layers from `first` on, in threads."""
        bounds = bounds_of(packing, hidden_1_N_D.shape[1], parts, hidden_1_N_D.shape[2])
        packings = cut_packing(packing, bounds, first)

        @torch.inference_mode()
        def run(part: int) -> Tensor:
            start, stop = bounds[part], bounds[part + 1]
            cos, sin = (t[:, start:stop] for t in position_embeddings)
            return self._from(first, len(self.layers), hidden_1_N_D[:, start:stop], (cos, sin), packings[part])

        return torch.cat(run_together(run, packings, torch.get_num_threads()), 1)

    def _from(
        self, first: int, stop: int, hidden_1_N_D: Tensor, position_embeddings: tuple[Tensor, Tensor], packing: Packing
    ) -> Tensor:
        for index in range(first, stop):
            hidden_1_N_D = self.layers[index](hidden_1_N_D, position_embeddings=position_embeddings, packing=packing)
        return hidden_1_N_D


@torch.no_grad()
def pack_decoder(body: nn.Module, cores: Cores) -> None:
    """Changes the decoder layers of a model that reads packed rows in place, where they are of the form known here."""
    layers: Any = getattr(body, "layers", None)
    if not torch.backends.mkldnn.is_available() or not isinstance(layers, nn.ModuleList) or not len(layers):
        return
    done: list[PackedDecoderLayer] = []
    for index, layer in enumerate(layers):
        packed = _packed_decoder_layer(layer, body)
        if packed is None:
            return
        layers[index] = packed  # at once, so that no more than one layer is held twice
        done.append(packed)
    body.layers = nn.ModuleList([PackedDecoder(done, cores)])


def _unit(x: Tensor, eps: float) -> Tensor:
    """Rows [..., D] divided by the roots of their mean squares (plus eps)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return (x * squares.div_(x.shape[-1]).add_(eps).rsqrt_()).to(x.dtype)


def _packed_decoder_layer(layer: Any, body: Any) -> PackedDecoderLayer | None:
    """The layer's packed form, if it is such a layer and the two compute the same on a few random rows."""
    if not is_decoder_layer(layer):
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
