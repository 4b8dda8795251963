"""bfloat16 autocast for a forward pass that learns, without the copies of the weights that it would leave behind.

Under autocast a layer computes with a bfloat16 copy of its float32 weights, and autograd keeps every copy until the
backward pass: half as much again as the weights take. A copy is cheap to make a second time, and has the same bits.
Copies of weights that do not learn, those under an adapter, are kept: autograd does not say what they were made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Copied(NamedTuple):
    """Stands for a weight's copy in another type; `version` counts the changes made to the weight in place."""

    weight: Tensor
    version: int
    dtype: torch.dtype
    transposed: bool


@contextmanager
def learning_autocast(device_type: str, enabled: bool) -> Iterator[None]:
    """bfloat16 autocast if `enabled`. Only for weights that stay where they are until the backward pass.

    The backward pass raises RuntimeError where a weight has changed since.
    """
    if not enabled:
        yield
        return
    # The cache would hold the copies until the end of the forward pass.
    with torch.autocast(device_type, torch.bfloat16, cache_enabled=False), saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(saved: Tensor) -> Tensor | _Copied:
    if saved.dim() != 2:  # most of what is saved: not asked what made it, which takes longer
        return saved
    made_by: Any = saved.grad_fn
    transposed = made_by is not None and made_by.name() == "TBackward0"
    if transposed:
        made_by = made_by.next_functions[0][0]
    if made_by is None or made_by.name() != "ToCopyBackward0":
        return saved
    weight = getattr(made_by.next_functions[0][0], "variable", None)  # of a leaf only
    if weight is None:
        return saved
    return _Copied(weight.detach(), weight._version, saved.dtype, transposed)


def _unpack(kept: Tensor | _Copied) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.weight._version != kept.version:
        raise RuntimeError("a weight was changed between a forward pass and its backward pass")
    copy = kept.weight.to(kept.dtype)
    return copy.t() if kept.transposed else copy
