"""Three forms of a decoder layer of Llama, Mistral, Qwen2 and their like, over a packed row on a CPU.

`PackedDecoderLayer` has nothing but torch. With kernels compiled for this machine, `KernelDecoderLayer` has everything
from them; `VectorDecoderLayer` all but its products, for a CPU or sizes that those are not for. All have queries, keys
and values from one product and the norms' weights as part of the weights behind them; the two halves of a head that are
rotated against each other stand as pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dvpo.packed_attention import attend_packed, hand_on
from dvpo.packed_row import Packing
from server.backends.cpu_kernels import BLOCK, PANELS, Heads, Kernels, Panels, gate_and_up, turning
from server.backends.cpu_layers import PackedGatedMlp, PackedLinear, has_tiles, rows_for_tiles, scaled
from server.backends.known_layers import eps_of

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, [1, N, width of a head]: its first half's, twice."""


@dataclass(frozen=True)
class Parts:
    """What the forms share of a layer: its place, heads, both norms' eps, and queries, keys and values as one layer."""

    index: int
    heads: Heads
    eps: tuple[float, float]
    qkv: Tensor
    qkv_bias: Tensor | None

    @staticmethod
    def of(layer: Any) -> "Parts":
        """Reads a layer for which `known_layers.is_decoder_layer` is true."""
        attention = layer.self_attn
        width = attention.head_dim
        queries, keys = (linear.out_features // width for linear in (attention.q_proj, attention.k_proj))
        half = width // 2
        pairs = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten()
        rows = torch.arange((queries + keys) * width).unflatten(0, (-1, width))[:, pairs]
        rows = torch.cat([rows.flatten(), torch.arange(attention.v_proj.out_features) + rows.numel()])
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])[rows]
        weight = scaled(torch.cat([linear.weight for linear in linears])[rows], layer.input_layernorm.weight)
        eps = (eps_of(layer.input_layernorm), eps_of(layer.post_attention_layernorm))
        return Parts(attention.layer_idx, Heads(queries, keys, width, attention.scaling), eps, weight, bias)


class PackedDecoderLayer(nn.Module):
    """A decoder layer over a packed row, which it changes in place.

    hidden_1_R_D -> hidden_1_R_D, float32 whatever the weights are: N tokens and, for tiles, rows that stand for none up
    to R. From the last layer come only the W rows that are wanted, hidden_1_W_D.

    Attention is in bfloat16 where the CPU has tiles for it, which take half the time. Elsewhere it is in float32:
    torch's kernel is then no faster in bfloat16 for texts of 300 tokens and more.
    """

    is_causal = True
    is_last = False
    """Then only the rows that are wanted get through it."""
    shares_work = False
    """Whether threads share every step of it as fast as each can: then a row need not be cut for them."""

    def __init__(self, layer: Any, parts: Parts, kernels: Kernels | None) -> None:
        super().__init__()
        self._kernels: Any = kernels
        self.layer_idx = parts.index
        self._heads, self._eps, self._dtype = parts.heads, parts.eps, parts.qkv.dtype
        self._tiles = has_tiles(self._dtype)
        self.qkv = PackedLinear(parts.qkv, parts.qkv_bias)
        self.output = PackedLinear(layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias)
        self.mlp = PackedGatedMlp(layer.mlp, layer.post_attention_layernorm.weight)

    def forward(
        self, hidden_1_R_D: Tensor, *, position_embeddings: Rotation, packing: Packing, **others: Any
    ) -> Tensor:
        """See the class."""
        tokens = position_embeddings[0].shape[1]
        attended_1_R_C = self._attended(hidden_1_R_D, position_embeddings, packing)
        attended_1_R_C[:, tokens:] = 0
        if not self.is_last:
            return self._rest(attended_1_R_C, hidden_1_R_D)
        wanted = list(range(tokens)) if packing.wanted is None else packing.wanted
        rows = wanted + wanted[-1:] * (self.rows(len(wanted)) - len(wanted))
        return self._rest(attended_1_R_C[:, rows], hidden_1_R_D[:, rows])[:, : len(wanted)]

    @staticmethod
    def takes(layer: Any, parts: Parts, kernels: Kernels | None) -> bool:
        """Whether there is this form of a layer."""
        return True

    def rows(self, count: int) -> int:
        """So many rows are computed for so many that are needed."""
        return rows_for_tiles(count) if self._tiles else count

    def _attended(self, hidden_1_R_D: Tensor, rotation: Rotation, packing: Packing) -> Tensor:
        """What attention finds, before the product that follows it. Rows that stand for no token may be anything."""
        if packing.rotation is None:
            cos, sin = (t[:, :, None, : self._heads.width // 2].float() for t in rotation)
            packing.rotation = torch.complex(cos, sin)
        qkv = self.qkv(self._unit(hidden_1_R_D, 0)).unflatten(-1, (-1, self._heads.width))
        if not self._tiles:
            qkv = qkv.float()
        turning = qkv[:, : packing.rotation.shape[1], : self._heads.queries + self._heads.keys]
        turned = turning.float()
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(packing.rotation)
        if self._tiles:
            turning.copy_(turned)
        heads = [self._heads.queries, self._heads.keys, self._heads.keys]
        query, key, value = qkv.transpose(1, 2).split(heads, 1)
        attended, _ = attend_packed(self, query, key, value, None, self._heads.scaling, packing=packing)
        return attended.flatten(2)

    def _rest(self, attended_1_R_C: Tensor, hidden_1_R_D: Tensor) -> Tensor:
        """What comes after attention; all is added in place."""
        hidden_1_R_D.add_(self.output(attended_1_R_C.to(self._dtype)).float())
        return hidden_1_R_D.add_(self.mlp(self._unit(hidden_1_R_D, 1)).float())

    def _unit(self, x: Tensor, norm: int) -> Tensor:
        """Rows [..., D] divided by the roots of their mean squares (plus eps), of the weights' type."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scales = squares.div_(x.shape[-1]).add_(self._eps[norm]).rsqrt_()
        return torch.mul(x, scales, out=torch.empty(x.shape, dtype=self._dtype))


class VectorDecoderLayer(PackedDecoderLayer):
    """Norms, rotation and attention are our kernels, in float32; the products are torch's."""

    @staticmethod
    def takes(layer: Any, parts: Parts, kernels: Kernels | None) -> bool:
        """Whether the kernels can read it. With tiles torch's attention in bfloat16 is the faster one."""
        return (
            kernels is not None
            and parts.qkv.shape[1] % 16 == 0
            and parts.heads.width % 16 == 0
            and not has_tiles(parts.qkv.dtype)
        )

    def rows(self, count: int) -> int:
        """See the class above."""
        return count

    def _attended(self, hidden_1_R_D: Tensor, rotation: Rotation, packing: Packing) -> Tensor:
        packing.rotation = turning(*(of[0] for of in rotation)) if packing.rotation is None else packing.rotation
        qkv_N_C = self.qkv(self._unit(hidden_1_R_D, 0))[0].float()
        self._kernels.rotate(qkv_N_C, self._heads, packing.rotation)
        hand_on(*self._heads.keys_and_values(qkv_N_C), packing, self.layer_idx)
        attended_R_S = self._kernels.attend(qkv_N_C, self._heads, packing, self.layer_idx)
        return attended_R_S[None, : len(qkv_N_C), : self._heads.queries * self._heads.width]

    def _unit(self, x: Tensor, norm: int) -> Tensor:
        return self._kernels.unit(x[0], self._eps[norm])[None].to(self._dtype)


class KernelDecoderLayer(nn.Module):
    """All in our kernels: what stands between two products is done where they end. In bfloat16 only for tiles.

    With tiles float32 is split into three of bfloat16: as exact, mostly faster, and 6 bytes a weight.

    As `PackedDecoderLayer`, and R is N. Every token is computed in one way whatever else is in the row.
    """

    is_last = False
    shares_work = True

    def __init__(self, layer: Any, parts: Parts, kernels: Any) -> None:
        super().__init__()
        self._kernels = kernels
        self._index, self._heads, self._eps = parts.index, parts.heads, parts.eps
        output, mlp = layer.self_attn.o_proj, layer.mlp
        gate, up = (scaled(of.weight, layer.post_attention_layernorm.weight) for of in (mlp.gate_proj, mlp.up_proj))
        bias = None if mlp.gate_proj.bias is None else gate_and_up(mlp.gate_proj.bias, mlp.up_proj.bias)
        kind = kernels.kind(parts.qkv.dtype)
        self._qkv = Panels(parts.qkv, parts.qkv_bias, kind)
        self._output = Panels(output.weight, output.bias, kind)
        self._gated = Panels(gate_and_up(gate, up), bias, kind)
        self._down = Panels(mlp.down_proj.weight, mlp.down_proj.bias, kind)

    @staticmethod
    def takes(layer: Any, parts: Parts, kernels: Kernels | None) -> bool:
        """Whether the kernels can read it."""
        columns = (*parts.qkv.shape, 2 * layer.mlp.down_proj.in_features)
        depths = (parts.heads.queries * parts.heads.width, layer.mlp.down_proj.in_features)
        kind = None if kernels is None else kernels.kind(parts.qkv.dtype)
        return (
            kind is not None
            and all(size % PANELS[kind] == 0 for size in columns)
            and all(size % BLOCK == 0 for size in depths)
            and parts.heads.width % 16 == 0
        )

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: Rotation, packing: Packing, **others: Any
    ) -> Tensor:
        """See the class."""
        if packing.rotation is None:
            packing.rotation = turning(*(of[0] for of in position_embeddings))
        hidden_N_D = hidden_1_N_D[0]
        qkv_N_C = self._kernels.project(hidden_N_D, self._eps[0], self._qkv, self._heads, packing.rotation)
        hand_on(*self._heads.keys_and_values(qkv_N_C), packing, self._index)
        attended_R_S = self._kernels.attend(qkv_N_C, self._heads, packing, self._index)
        if self.is_last and packing.wanted is not None:
            rows = packing.wanted + packing.wanted[-1:] * (-len(packing.wanted) % BLOCK)
            attended_R_S, hidden_N_D = attended_R_S[rows], hidden_N_D[packing.wanted]
        self._kernels.finish(attended_R_S, hidden_N_D, self._eps[1], self._output, self._gated, self._down)
        return hidden_N_D[None]

    def rows(self, count: int) -> int:
        """So many rows are computed for so many that are needed: the kernels fill up what they need themselves."""
        return count
