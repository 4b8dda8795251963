"""Masked statistics. Padding never counts; with several processes the sums run over all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes (the identity on one)."""


def this_process(x: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return x


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = this_process) -> Tensor:
    """Mean of `x` where `mask` is true (a scalar). An empty mask gives 0."""
    total = reduce(torch.where(mask, x, 0).sum())
    count = reduce(mask.sum())
    return total / count.clamp(min=1)


def masked_whiten(x_B_T: Tensor, mask_B_T: Tensor, reduce: Reduce = this_process, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit (biased) variance over the masked entries of all processes; 0 elsewhere."""
    mean = masked_mean(x_B_T, mask_B_T, reduce)
    variance = masked_mean((x_B_T - mean) ** 2, mask_B_T, reduce)
    return torch.where(mask_B_T, (x_B_T - mean) * torch.rsqrt(variance + eps), 0)


def masked_percentile(x_B_T: Tensor, mask_B_T: Tensor, percent: float) -> Tensor:
    """The `percent`-th percentile of every row's masked entries, with linear interpolation. Returns [B].

    Raises ValueError if a row has no masked entry.
    """
    counts_B = mask_B_T.sum(1)
    if bool((counts_B == 0).any()):
        raise ValueError("a percentile of no tokens is undefined")
    ordered_B_T = torch.where(mask_B_T, x_B_T, torch.inf).sort(1).values
    position_B = (counts_B - 1).to(x_B_T.dtype) * (percent / 100)
    low_B = position_B.floor().long()
    high_B = torch.minimum(low_B + 1, counts_B - 1)
    low, high = (ordered_B_T.gather(1, i[:, None]).squeeze(1) for i in (low_B, high_B))
    return low + (high - low) * (position_B - low_B)


def last_masked(x_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """Every row's entry at its last masked position. Returns [B]; rows are masked from the left without gaps."""
    return x_B_T.gather(1, (mask_B_T.sum(1) - 1).clamp(min=0)[:, None]).squeeze(1)
