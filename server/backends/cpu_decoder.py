"""A CPU's decoder: its layers are of the fastest form that the machine has, and cores that are idle join in.

It stands for the layers of Llama, Mistral, Qwen2 and their like; `cpu_decoder_layers` has the forms.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dvpo.packed_parts import LEAST_PART, Cores, bounds_of, cut_packing, run_together
from dvpo.packed_row import Packing, Segment
from server.backends.cpu_decoder_layers import (
    KernelDecoderLayer,
    PackedDecoderLayer,
    Parts,
    Rotation,
    VectorDecoderLayer,
)
from server.backends.cpu_kernels import BLOCK, Kernels
from server.backends.known_layers import is_decoder_layer

DecoderLayer = KernelDecoderLayer | PackedDecoderLayer


class PackedDecoder(nn.Module):
    """A model's decoder layers, one after the other, over a packed row. hidden_1_N_D -> hidden_1_W_D.

    Cores that have nothing else to do join in on the way, between two layers: the row is cut into parts, unless the
    layers share their work between threads.
    """

    def __init__(self, layers: Sequence[DecoderLayer], cores: Cores) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        layers[-1].is_last = True
        self._rows = layers[0].rows
        self._cores = cores
        self.shares_work = layers[0].shares_work

    def forward(
        self, hidden_1_N_D: Tensor, *, position_embeddings: Rotation, packing: Packing, **others: Any
    ) -> Tensor:
        """See the class. position_embeddings: cosines and sines, [1, N, width of a head]."""
        if self.shares_work:
            return self._shared(hidden_1_N_D, position_embeddings, packing)
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

    def _shared(self, hidden_1_N_D: Tensor, position_embeddings: Rotation, packing: Packing) -> Tensor:
        """With as many threads for every layer as there are at that time."""
        hidden_1_R_D = self._whole(hidden_1_N_D)
        threads, helpers = torch.get_num_threads(), 0
        try:
            for index in range(len(self.layers)):
                if not helpers:
                    helpers = self._cores.claim(hidden_1_N_D.shape[1] // BLOCK)
                found = threads + (helpers - self._cores.missing) * self._cores.threads
                torch.set_num_threads(max(found, min(threads, self._cores.threads)))
                hidden_1_R_D = self._from(index, index + 1, hidden_1_R_D, position_embeddings, packing)
        finally:
            self._cores.release(helpers)
            torch.set_num_threads(threads)
        return hidden_1_R_D.to(hidden_1_N_D.dtype)

    def _in_parts(
        self, first: int, parts: int, hidden_1_N_D: Tensor, position_embeddings: Rotation, packing: Packing
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
        self, first: int, stop: int, hidden_1_R_D: Tensor, position_embeddings: Rotation, packing: Packing
    ) -> Tensor:
        for index in range(first, stop):
            hidden_1_R_D = self.layers[index](hidden_1_R_D, position_embeddings=position_embeddings, packing=packing)
        return hidden_1_R_D


@torch.no_grad()
def pack_decoder(body: nn.Module, cores: Cores, find_kernels: Callable[[], Kernels | None]) -> bool:
    """Changes the decoder layers of a model that reads packed rows in place, where they are of the form known here.

    All of them take the fastest form that there is of each, or none does: they share what is kept of prompts. Only one
    layer at a time is held twice. Returns whether a row need not be cut for several threads.
    """
    layers: Any = getattr(body, "layers", None)
    if not torch.backends.mkldnn.is_available() or not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    if not all(is_decoder_layer(layer) for layer in layers):
        return False
    kernels = find_kernels()
    for form in (KernelDecoderLayer, VectorDecoderLayer, PackedDecoderLayer):
        if all(_is_the_same(layer, form, kernels, body) for layer in layers):
            done: list[DecoderLayer] = []
            for index, layer in enumerate(layers):
                layers[index] = packed = form(layer, Parts.of(layer), kernels)
                done.append(packed)
            decoder = PackedDecoder(done, cores)
            body.layers = nn.ModuleList([decoder])
            return decoder.shares_work
    return False


def _is_the_same(layer: Any, form: type[DecoderLayer], kernels: Kernels | None, body: Any) -> bool:
    """Whether there is this form of the layer, and the two compute the same on a few random rows."""
    try:
        parts = Parts.of(layer)
        if not form.takes(layer, parts, kernels):
            return False
        packed = form(layer, parts, kernels)
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
        return bool((found - expected).norm() <= allowed * (expected - x).norm())
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
