"""A CPU's decoder: little is done between the products, and cores that are idle join in.

It stands for the layers of Llama, Mistral, Qwen2 and their like.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvpo.packed_attention import attend_packed
from dvpo.packed_parts import LEAST_PART, Cores, bounds_of, cut_packing, run_together
from dvpo.packed_row import Packing, Segment
from server.backends.cpu_layers import PackedGatedMlp, PackedLinear, has_tiles, rows_for_tiles, scaled
from server.backends.known_layers import eps_of, is_decoder_layer


class PackedDecoderLayer(nn.Module):
    """A decoder layer of Llama, Mistral, Qwen2 and their like over a packed row, which it changes in place.

    hidden_1_R_D -> hidden_1_R_D, float32 whatever the weights are: N tokens and, for tiles, rows that stand for none up
    to R. From the last layer come only the W rows that are wanted, hidden_1_W_D.

    Queries, keys and values come from one product, the norms' weights are part of the weights behind them, and the
    two halves of a head that are rotated against each other stand as pairs, which makes rotation a complex product.
    Attention is in bfloat16 where the CPU has tiles for it, which take half the time. Elsewhere it is in float32:
    torch's kernel is then no faster in bfloat16 for texts of 300 tokens and more.
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
        self._dtype = weight.dtype
        self._tiles = has_tiles(weight.dtype)
        self.qkv = PackedLinear(scaled(weight, layer.input_layernorm.weight), bias)
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self.mlp = PackedGatedMlp(layer.mlp, layer.post_attention_layernorm.weight)

    def forward(
        self, hidden_1_R_D: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        if packing.rotation is None:
            cos, sin = (t[:, :, None, : self._width // 2].float() for t in position_embeddings)
            packing.rotation = torch.complex(cos, sin)
        tokens = packing.rotation.shape[1]
        query, key, value = self._projected(hidden_1_R_D, packing.rotation)
        attended, _ = attend_packed(self, query, key, value, None, self._scaling, packing=packing)
        attended_1_R_D = attended.flatten(2)
        attended_1_R_D[:, tokens:] = 0
        if not self.is_last:
            return self._rest(attended_1_R_D, hidden_1_R_D)
        wanted = list(range(tokens)) if packing.wanted is None else packing.wanted
        rows = wanted + wanted[-1:] * (self.rows(len(wanted)) - len(wanted))
        return self._rest(attended_1_R_D[:, rows], hidden_1_R_D[:, rows])[:, : len(wanted)]

    def rows(self, count: int) -> int:
        """So many rows are computed for so many that are needed."""
        return rows_for_tiles(count) if self._tiles else count

    def _projected(self, hidden_1_R_D: Tensor, rotation_1_N_1_P: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, [1, heads, R, width]."""
        qkv = self.qkv(self._unit(hidden_1_R_D, 0)).unflatten(-1, (-1, self._width))
        if not self._tiles:
            qkv = qkv.float()
        turning = qkv[:, : rotation_1_N_1_P.shape[1], : self._queries + self._keys]
        turned = turning.float()
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(rotation_1_N_1_P)
        if self._tiles:
            turning.copy_(turned)
        return qkv.transpose(1, 2).split([self._queries, self._keys, self._keys], 1)

    def _rest(self, attended_1_R_D: Tensor, hidden_1_R_D: Tensor) -> Tensor:
        """What comes after attention; all is added in place."""
        hidden_1_R_D.add_(self.output(attended_1_R_D.to(self._dtype)).float())
        return hidden_1_R_D.add_(self.mlp(self._unit(hidden_1_R_D, 1)).float())

    def _unit(self, x: Tensor, norm: int) -> Tensor:
        """Rows [..., D] divided by the roots of their mean squares (plus eps), of the weights' type."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scales = squares.div_(x.shape[-1]).add_(self._eps[norm]).rsqrt_()
        return torch.mul(x, scales, out=torch.empty(x.shape, dtype=self._dtype))


class PackedDecoder(nn.Module):
    """A model's decoder layers, one after the other, over a packed row. hidden_1_N_D -> hidden_1_W_D.

    Cores that have nothing else to do join in on the way: between two layers the row is cut into parts.
    """

    def __init__(self, layers: Sequence[PackedDecoderLayer], cores: Cores) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        layers[-1].is_last = True
        self._rows = layers[0].rows
        self._cores = cores

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        most = hidden_1_N_D.shape[1] // LEAST_PART - 1 if packing.handover is None else 0
        hidden_1_R_D = self._whole(hidden_1_N_D)
        for index in range(len(self.layers)):
            if index and most > 0 and (helpers := self._cores.claim(most)):
                try:
                    hidden_1_R_D = hidden_1_R_D[:, : hidden_1_N_D.shape[1]]
                    parts = self._in_parts(index, helpers + 1, hidden_1_R_D, position_embeddings, packing)
                    return torch.cat(parts, 1).to(hidden_1_N_D.dtype)
                finally:
                    self._cores.release(helpers)
            hidden_1_R_D = self._from(index, index + 1, hidden_1_R_D, position_embeddings, packing)
        return hidden_1_R_D.to(hidden_1_N_D.dtype)

    def _in_parts(
        self, first: int, parts: int, hidden_1_N_D: Tensor, position_embeddings: tuple[Tensor, Tensor], packing: Packing
    ) -> list[Tensor]:
        """The layers from `first` on, in threads."""
        bounds = bounds_of(packing, hidden_1_N_D.shape[1], parts, hidden_1_N_D.shape[2])
        packings = cut_packing(packing, bounds, first)

        @torch.inference_mode()
        def run(part: int) -> Tensor:
            start, stop = bounds[part], bounds[part + 1]
            cos, sin = (t[:, start:stop] for t in position_embeddings)
            hidden_1_R_D = self._whole(hidden_1_N_D[:, start:stop])
            return self._from(first, len(self.layers), hidden_1_R_D, (cos, sin), packings[part])

        return run_together(run, packings, torch.get_num_threads())

    def _whole(self, hidden_1_N_D: Tensor) -> Tensor:
        """A copy in float32, with rows of zeros up to a number of rows that oneDNN has kernels for. [1, R, D]."""
        count = hidden_1_N_D.shape[1]
        more = self._rows(count) - count
        return functional.pad(hidden_1_N_D.to(torch.float32, copy=True), (0, 0, 0, more))

    def _from(
        self, first: int, stop: int, hidden_1_R_D: Tensor, position_embeddings: tuple[Tensor, Tensor], packing: Packing
    ) -> Tensor:
        for index in range(first, stop):
            hidden_1_R_D = self.layers[index](hidden_1_R_D, position_embeddings=position_embeddings, packing=packing)
        return hidden_1_R_D


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


def _packed_decoder_layer(layer: Any, body: Any) -> PackedDecoderLayer | None:
    """The layer's packed form, if it is such a layer and the two compute the same on a few random rows."""
    if not is_decoder_layer(layer):
        return None
    try:
        packed = PackedDecoderLayer(layer)
        weight: Tensor = layer.mlp.down_proj.weight
        in_float32 = layer if weight.dtype == torch.float32 else copy.deepcopy(layer).float()
        x = torch.randn(1, 7, weight.shape[0], generator=torch.Generator().manual_seed(0))
        places = torch.arange(7)[None]
        said = {"position_ids": places, "position_embeddings": body.rotary_emb(x, position_ids=places)}
        expected, found = (
            each(x.clone(), attention_mask=None, use_cache=False, packing=Packing([Segment(0, 7)]), **said)
            for each in (in_float32, packed)
        )
        allowed = 1e-4 if weight.dtype == torch.float32 else 0.05
        return packed if bool((found - expected).norm() <= allowed * (expected - x).norm()) else None
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return None
