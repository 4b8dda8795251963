"""Paired tests over seeds and prompts.

Two questions are kept apart. Would other seeds and prompts show the same sign? That is the bootstrap, which draws seeds
and prompts within them; with few seeds it is too sure of itself, so the interval is widened to Student's t over the
seeds. Could the prompts' differences be chance for these trained models? That is the sign-flip test. A difference
counts as told apart only where both say so after Holm's correction and the interval does not contain zero. The exact
flip of whole seeds is shown beside them: with k seeds it cannot fall below 2 / 2**k. Of many seeds it draws patterns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dvpo.evaluation.intervals import Interval, between_seeds

RESAMPLES = 4000
_AT_ONCE = 500
_EXACT_SEEDS = 16


@dataclass(frozen=True)
class Paired:
    """The mean over seeds of paired differences, its 95 % interval, and three two-sided p-values."""

    seeds: int
    mean: float
    ci95: Interval
    p_bootstrap: float
    p_flip: float
    p_seeds: float


def paired(differences: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """Tests per-seed differences against zero.

    Args:
        differences: per seed, one number for every prompt.

    Raises:
        ValueError: no seeds, or a seed without prompts.
    """
    if not differences or not all(map(len, differences)):
        raise ValueError("a paired test needs a difference for every seed")
    arrays = [np.asarray(x, dtype=np.float64) for x in differences]
    rng = np.random.default_rng(seed)
    means_R = _bootstrap(arrays, resamples, rng)
    low, high = np.percentile(means_R, [2.5, 97.5])
    means = [float(x.mean()) for x in arrays]
    mean, ci95 = between_seeds(means, (float(low), float(high)))
    below, above = int((means_R <= 0).sum()), int((means_R >= 0).sum())
    return Paired(
        seeds=len(means),
        mean=mean,
        ci95=ci95,
        p_bootstrap=min(1.0, 2 * (min(below, above) + 1) / (resamples + 1)),
        p_flip=flip_prompts(arrays, resamples, rng),
        p_seeds=flip_seeds(means, rng),
    )


def flip_prompts(arrays: Sequence[NDArray[np.float64]], resamples: int, rng: np.random.Generator) -> float:
    """Two-sided sign-flip p-value: every prompt's difference has its sign drawn anew."""
    observed = abs(np.mean([x.mean() for x in arrays]))
    at_least = 0
    for start in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - start)
        drawn_R = np.mean([(rng.integers(0, 2, (rows, x.size)) * 2.0 - 1) @ x / x.size for x in arrays], axis=0)
        at_least += int((np.abs(drawn_R) >= observed - 1e-12).sum())
    return (at_least + 1) / (resamples + 1)


def flip_seeds(means: Sequence[float], rng: np.random.Generator) -> float:
    """Two-sided sign-flip p-value over whole seeds: of all 2**k sign patterns, or of as many as are worth drawing."""
    values_S, observed = np.asarray(means), abs(sum(means)) - 1e-12
    if len(means) <= _EXACT_SEEDS:
        patterns_P_S = np.array(list(itertools.product((1, -1), repeat=len(means))))
        return float((np.abs(patterns_P_S @ values_S) >= observed).mean())
    drawn_P_S = rng.integers(0, 2, (2**_EXACT_SEEDS, len(means))) * 2 - 1
    return (int((np.abs(drawn_P_S @ values_S) >= observed).sum()) + 1) / (len(drawn_P_S) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that hold for the whole family, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _bootstrap(arrays: Sequence[NDArray[np.float64]], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means over drawn seeds of means over drawn prompts, as in the tables' intervals."""
    means_S_R = np.empty((len(arrays), resamples))
    for i, x in enumerate(arrays):
        for start in range(0, resamples, _AT_ONCE):
            rows = min(_AT_ONCE, resamples - start)
            means_S_R[i, start : start + rows] = x[rng.integers(0, x.size, (rows, x.size))].mean(1)
    seeds_S_R = rng.integers(0, len(arrays), means_S_R.shape)
    means_R: NDArray[np.float64] = means_S_R[seeds_S_R, np.arange(resamples)].mean(0)
    return means_R
