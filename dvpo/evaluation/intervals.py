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


def mean_over_seeds(
    values: Sequence[Sequence[float]],
    groups: Sequence[Sequence[int]] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, Interval]:
    """The mean over seeds of each seed's mean, with a 95 % interval that draws seeds first and prompts within them.

    Args:
        values: per seed, its values. groups: per seed, the prompt of every value.
    """
    rng = np.random.default_rng(seed)
    means = np.empty((len(values), resamples))
    for i, x in enumerate(values):
        index = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups[i]), return_inverse=True)[1]
        sums, counts = (
            np.bincount(index, weights=np.asarray(x, dtype=np.float64)),
            np.bincount(index).astype(np.float64),
        )
        for start in range(0, resamples, 200):
            draw = rng.integers(0, sums.size, (min(200, resamples - start), sums.size))
            means[i, start : start + len(draw)] = sums[draw].sum(1) / counts[draw].sum(1)
    drawn = rng.integers(0, len(values), (len(values), resamples))
    low, high = np.percentile(means[drawn, np.arange(resamples)].mean(0), [2.5, 97.5])
    return float(np.mean([np.mean(x) for x in values])), (float(low), float(high))
