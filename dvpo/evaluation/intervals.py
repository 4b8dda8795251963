"""Bootstrap intervals over prompts: answers to one prompt are not independent, so whole prompts are resampled."""

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def mean_with_interval(
    values: Sequence[float], groups: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, Interval]:
    """The mean of `values` and its 95 % percentile interval.

    Args:
        groups: the prompt of every value; values of one prompt are drawn together. None: each stands alone.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("the mean of no values is undefined")
    index = np.arange(x.size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(index, weights=x), np.bincount(index).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 200):  # 200 at a time keeps the draw below some tens of MB
        draw = rng.integers(0, sums.size, (min(200, resamples - start), sums.size))
        means[start : start + len(draw)] = sums[draw].sum(1) / counts[draw].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(x.mean()), (float(low), float(high))
