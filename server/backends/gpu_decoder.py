"""A GPU's decoder: what stands between the attention of two layers is one launch, of operations recorded before.

It stands for the layers of Llama, Mistral, Qwen2 and their like. A small model's operations take longer to start than
to compute, and the thread that starts them keeps others from reading requests. Attention is started for each row: it
depends on where the texts begin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvpo.packed_attention import attend_packed
from dvpo.packed_row import Packing, Segment
from server.backends.known_layers import eps_of, is_decoder_layer

SIZES = (*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 512))
"""Rows of so many tokens are recorded; a row is computed as the next larger. What is longer is worth its launches."""


Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of a function one that does the same, with the same tensors, in one launch."""


class CudaRecorder:
    """A Recorder of CUDA graphs, which share their memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`: for every one of some hundreds it would empty the allocator's cache.
        with torch.cuda.stream(self._stream):
            function()  # what is done once only, as choosing kernels, cannot be recorded
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            function()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay


@dataclass(frozen=True)
class _Buffers:
    """Where recorded operations read and write: R tokens with hidden states of D numbers.

    E: the queries, keys and values of a token. A: what all its heads found. d: the width of a head.
    """

    hidden_R_D: Tensor
    qkv_R_E: Tensor
    attended_R_A: Tensor
    cos_R_d: Tensor
    sin_R_d: Tensor

    @classmethod
    def of(cls, layer: "GpuLayer", rows: int) -> "_Buffers":
        """For a model of such layers."""
        like, width = layer.output.weight, layer.width

        def zeros(columns: int) -> Tensor:
            return like.new_zeros(rows, columns)

        return cls(*map(zeros, (like.shape[0], layer.qkv.weight.shape[0], like.shape[1], width, width)))

    def first(self, count: int) -> "_Buffers":
        """Of so many tokens."""
        return _Buffers(*(getattr(self, field.name)[:count] for field in fields(self)))


@dataclass(frozen=True)
class _Linear:
    """weight [out, in] and bias [out] of one product."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def together(cls, *layers: Any) -> "_Linear":
        """One product for several layers, whose own weights become parts of its weight."""
        biases = [layer.bias for layer in layers]
        if any(bias is None for bias in biases) != all(bias is None for bias in biases):
            raise ValueError("some of the projections have a bias, and some have none")
        weight = torch.cat([layer.weight.data for layer in layers])
        for layer, part in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part
        return cls(weight, None if biases[0] is None else torch.cat([bias.data for bias in biases]))

    def into(self, out: Tensor, x: Tensor) -> None:
        """out = x W' + b."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def onto(self, total: Tensor, x: Tensor) -> None:
        """total += x W' + b."""
        total.addmm_(x, self.weight.t())
        if self.bias is not None:
            total.add_(self.bias)


class GpuLayer:
    """A decoder layer as what comes before its attention, and what comes after it, on buffers."""

    is_causal = True

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self.width: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._keys = attention.k_proj.out_features // self.width
        self._queries = attention.q_proj.out_features // self.width
        self.qkv = _Linear.together(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _Linear.together(attention.o_proj)
        self._gate_up = _Linear.together(mlp.gate_proj, mlp.up_proj)
        self._down = _Linear.together(mlp.down_proj)
        self._norms = [(n.weight.data, eps_of(n)) for n in (layer.input_layernorm, layer.post_attention_layernorm)]

    def before(self, at: _Buffers) -> None:
        """Queries and keys, rotated, and values."""
        self.qkv.into(at.qkv_R_E, self._normed(at.hidden_R_D, 0))
        rotated = at.qkv_R_E.unflatten(1, (-1, self.width))[:, : self._queries + self._keys]
        first, second = rotated.chunk(2, 2)
        crossed = torch.cat([-second, first], 2)
        rotated.mul_(at.cos_R_d[:, None]).addcmul_(crossed, at.sin_R_d[:, None])

    def attend(self, at: _Buffers, packing: Packing) -> None:
        """Attention over the row."""
        qkv_1_H_N_d = at.qkv_R_E.unflatten(1, (-1, self.width)).transpose(0, 1)[None]
        query, key, value = qkv_1_H_N_d.split([self._queries, self._keys, self._keys], 1)
        attended_1_N_H_d, _ = attend_packed(self, query, key, value, None, self._scaling, packing=packing)
        at.attended_R_A.copy_(attended_1_N_H_d[0].flatten(1))

    def after(self, at: _Buffers) -> None:
        """What attention found goes to the hidden states, and through the feed-forward layer."""
        self.output.onto(at.hidden_R_D, at.attended_R_A)
        normed = self._normed(at.hidden_R_D, 1)
        both = normed.new_empty(len(normed), len(self._gate_up.weight))
        self._gate_up.into(both, normed)
        gate, up = both.chunk(2, 1)
        self._down.onto(at.hidden_R_D, functional.silu(gate).mul_(up))

    def _normed(self, hidden_R_D: Tensor, which: int) -> Tensor:
        weight, eps = self._norms[which]
        return functional.rms_norm(hidden_R_D, weight.shape, weight, eps)


class GpuDecoder(nn.Module):
    """A model's decoder layers, one after the other, over a packed row. hidden_1_N_D -> hidden_1_N_D.

    The rows of `SIZES` are recorded when it is made. A longer one goes through the layers themselves.
    """

    def __init__(self, layers: Sequence[nn.Module], fast: Sequence[GpuLayer], record: Recorder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._fast = fast
        self._space = _Buffers.of(fast[0], SIZES[-1])
        # The largest first: the smaller find their memory there.
        self._recorded = {size: self._record(size, record) for size in reversed(SIZES)}

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: tuple[Tensor, Tensor], packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        count = hidden_1_N_D.shape[1]
        size = next((size for size in SIZES if size >= count), None)
        if size is None:
            for layer in self.layers:
                hidden_1_N_D = layer(hidden_1_N_D, position_embeddings=position_embeddings, packing=packing, **others)
            return hidden_1_N_D
        here = self._space.first(count)
        here.hidden_R_D.copy_(hidden_1_N_D[0])
        here.cos_R_d.copy_(position_embeddings[0][0])
        here.sin_R_d.copy_(position_embeddings[1][0])
        between = self._recorded[size]
        for run, fast in zip(between[:-1], self._fast, strict=True):
            run()
            fast.attend(here, packing)
        between[-1]()
        return here.hidden_R_D[None].clone()

    def _record(self, size: int, record: Recorder) -> list[Callable[[], None]]:
        """What comes before the first attention, between any two, and after the last, for rows of `size` tokens."""
        at = self._space.first(size)

        def between(before: GpuLayer | None, behind: GpuLayer | None) -> Callable[[], None]:
            def run() -> None:
                if before is not None:
                    before.after(at)
                if behind is not None:
                    behind.before(at)

            return record(run)

        return [between(*pair) for pair in zip([None, *self._fast], [*self._fast, None], strict=True)]


@torch.inference_mode()
def record_decoder(body: nn.Module, record: Recorder) -> None:
    """Changes the decoder layers of a model that reads packed rows in place, where they are of the form known here."""
    layers: Any = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not all(map(is_decoder_layer, layers)):
        return
    try:
        fast = [GpuLayer(layer) for layer in layers]
    except (ValueError, AttributeError):
        return
    if all(_alike(*pair, body) for pair in zip(layers, fast, strict=True)):
        body.layers = nn.ModuleList([GpuDecoder(list(layers), fast, record)])


def _alike(layer: Any, fast: GpuLayer, body: Any) -> bool:
    """Whether the two compute the same on a few random rows."""
    like = fast.output.weight
    x = torch.randn(7, like.shape[0], generator=torch.Generator().manual_seed(0)).to(like)
    places = torch.arange(7, device=like.device)[None]
    try:
        cos, sin = body.rotary_emb(x[None], position_ids=places)
        packing = Packing([Segment(0, 7)])
        said = {"position_ids": places, "position_embeddings": (cos, sin), "packing": packing}
        expected = layer(x[None], attention_mask=None, use_cache=False, **said)[0]
        at = _Buffers.of(fast, 7)
        at.hidden_R_D.copy_(x)
        at.cos_R_d.copy_(cos[0])
        at.sin_R_d.copy_(sin[0])
        fast.before(at)
        fast.attend(at, packing)
        fast.after(at)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    allowed = 1e-4 if like.dtype == torch.float32 else 0.05
    return bool((at.hidden_R_D - expected).float().norm() <= allowed * (expected - x).float().norm())
