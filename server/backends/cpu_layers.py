"""A CPU's faster form of a model's linear layers, and what their process is to be set to. `cpu_decoder` has the rest.

Weights are laid out once for oneDNN: in a trial on a core with AVX-512, a layer of 576 x 1536 in float32 computed 109
instead of 95 GFLOP a second. Gated feed-forward layers (gate, up, down) also get their activation done while a result
is still in the cache. Sums and products with another tensor are given to oneDNN where it has tiles; elsewhere it takes
longer for them than a pass of their own.
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor, nn

from server.backends.known_layers import is_gated_mlp

_ROWS = 2048
"""Tokens of a usual batch: oneDNN chooses the layout for it, and takes any number."""
_KEPT_KERNELS, _KEPT_KERNELS_FOR_TILES = "32", "128"
"""oneDNN makes a kernel for every number of rows, and keeps 1,024 of up to 3 MB by default. See `rows_for_tiles`."""

_MALLOC = {
    -8: 1,  # M_ARENA_MAX: threads share one heap, a thread's own never takes more than 64 MB and gives them back
    -3: 32 << 20,  # M_MMAP_THRESHOLD: the highest that there is
    -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD
    -2: 64 << 20,  # M_TOP_PAD: what the heap grows by
}
"""glibc's options by the numbers that its `malloc.h` gives them."""


def has_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the type in tiles (AMX)."""
    return dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def rows_for_tiles(count: int) -> int:
    """A number of rows, `count` or up to a sixteenth (at least up to 31) more, of which there are few.

    A kernel for tiles takes 1 to 30 ms to make, as long as the product itself takes in several layers: for a row of
    1,200 tokens, added up from trials, a tenth of its time. Numbers of rows that were not seen before must be rare.
    """
    step = max(32, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


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

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The layer without its activation, times another tensor, [..., out]."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


class PackedGatedMlp(nn.Module):
    """down(swish(gate(scale * x)) * up(scale * x)); `scale` [in] is a norm's weight, if one stands before it."""

    def __init__(self, mlp: Any, scale: Tensor | None = None) -> None:
        super().__init__()
        self.gate, self.up = (
            PackedLinear(scaled(linear.weight, scale), linear.bias, activation)
            for linear, activation in ((mlp.gate_proj, "swish"), (mlp.up_proj, "none"))
        )
        self.down = PackedLinear(mlp.down_proj.weight, mlp.down_proj.bias)
        self._tiles = has_tiles(mlp.up_proj.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.down(self.up.times(x, self.gate(x)) if self._tiles else self.up(x).mul_(self.gate(x)))


def prepare_process(dtype: torch.dtype) -> None:
    """Bounds the kernels that oneDNN keeps, and has freed memory used again. To be called before anything is computed.

    Every layer allocates and frees megabytes. glibc would hand them back to the system each time, and every page that
    comes anew costs microseconds on a virtual machine; in a trial that was 2 % of the time.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KEPT_KERNELS_FOR_TILES if has_tiles(dtype) else _KEPT_KERNELS)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, number in _MALLOC.items():
            set_option(option, number)


@torch.no_grad()
def pack_layers(body: nn.Module) -> None:
    """Changes the linear layers inside `body` in place, where this machine has oneDNN. Only for inference on a CPU."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if is_gated_mlp(child):
                setattr(module, name, PackedGatedMlp(child))
            elif type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias))


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight [out, in] with a norm's weight [in], if any, as part of it."""
    return weight if scale is None else (weight.float() * scale.float()).to(weight.dtype)
