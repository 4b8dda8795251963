"""Bootstrap intervals over prompts: answers to one prompt are not independent, so whole prompts are resampled."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t of a two-sided 95 % interval for 1 to 9 degrees of freedom. With more the last one serves, a bit wide."""
_AT_ONCE = 200
"""Resamples that are drawn together: keeps a draw over tens of thousands of prompts below some hundred MB."""


def mean_with_interval(
    values: Sequence[float], groups: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, Interval]:
    """The mean of `values` and its 95 % percentile interval.

    Args:
        groups: the prompt of every value; values of one prompt are drawn together. None: each stands alone.

    Raises:
        ValueError: no values.
    """
    return means_with_intervals([values], groups, resamples, seed)[0]


def means_with_intervals(
    measures: Sequence[Sequence[float]], groups: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0
) -> list[tuple[float, Interval]]:
    """`mean_with_interval` of several measures of the same things, all read off the same resamples.

    Raises:
        ValueError: no values.
    """
    x_K_N = np.asarray(measures, dtype=np.float64)
    if x_K_N.size == 0:
        raise ValueError("the mean of no values is undefined")
    means_K_R = _resampled_means(x_K_N, groups, resamples, np.random.default_rng(seed))
    bounds_2_K = np.percentile(means_K_R, [2.5, 97.5], axis=1)
    return [
        (float(x.mean()), (float(low), float(high)))
        for x, low, high in zip(x_K_N, bounds_2_K[0], bounds_2_K[1], strict=True)
    ]


def mean_over_seeds(
    values: Sequence[Sequence[float]],
    groups: Sequence[Sequence[int]] | None = None,
    shared: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, Interval]:
    """The mean over seeds of each seed's mean, with a 95 % interval that draws seeds first and prompts within them.

    It is widened to `between_seeds`, and where all seeds answer the same prompts to the mean of their own intervals:
    more seeds then do not make the prompts more.

    Args:
        values: per seed, its values. groups: per seed, the prompt of every value. shared: whether the prompts of all
            seeds are the same, if only in part.
    """
    rng = np.random.default_rng(seed)
    means_S_R = np.stack([
        _resampled_means(np.asarray([x], dtype=np.float64), groups[i] if groups else None, resamples, rng)[0]
        for i, x in enumerate(values)
    ])  # fmt: skip
    drawn = rng.integers(0, len(values), (len(values), resamples))
    intervals = [np.percentile(means_S_R[drawn, np.arange(resamples)].mean(0), [2.5, 97.5])]
    if shared:
        intervals.append(np.percentile(means_S_R, [2.5, 97.5], axis=1).mean(1))
    lows, highs = zip(*intervals, strict=True)
    return between_seeds([float(np.mean(x)) for x in values], (float(min(lows)), float(max(highs))))


def between_seeds(means: Sequence[float], least: Interval) -> tuple[float, Interval]:
    """The mean of the seeds' means, with the 95 % interval of Student's t over them, widened to `least`.

    A bootstrap over few seeds is too narrow, for it takes their own spread for that of all seeds. Student's t knows how
    little a few numbers say of it; one seed says nothing, and `least` is all there is.
    """
    mean, (low, high) = float(np.mean(means)), least
    if len(means) > 1:
        half = _T[min(len(means) - 1, len(_T)) - 1] * float(np.std(means, ddof=1)) / len(means) ** 0.5
        low, high = min(low, mean - half), max(high, mean + half)
    return mean, (low, high)


def _resampled_means(
    x_K_N: NDArray[np.float64], groups: Sequence[int] | None, resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The means of K measures in every resample of whole groups. [K, R]."""
    n = x_K_N.shape[1]
    index = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums_K_G = np.stack([np.bincount(index, weights=x) for x in x_K_N])
    counts_G = np.bincount(index).astype(np.float64)
    size = counts_G.size
    means_K_R = np.empty((len(x_K_N), resamples))
    for start in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - start)
        draw = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times_R_G = np.bincount(draw.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
        means_K_R[:, start : start + rows] = (sums_K_G @ times_R_G.T) / (times_R_G @ counts_G)
    return means_K_R
