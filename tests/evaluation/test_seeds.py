"""Intervals over seeds: Student's t over the seeds' means, never less than the prompts say."""

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo.evaluation.intervals import between_seeds, mean_over_seeds, mean_with_interval

NUMBERS = st.lists(st.floats(-1, 1), min_size=1, max_size=20)


def test_three_seeds_by_hand() -> None:
    """The means 1, 2 and 3 spread by 1, so t (4.303 with 2 degrees) gives 2 plus and minus 4.303 / sqrt(3)."""
    mean, (low, high) = between_seeds([1, 2, 3], (1.9, 2.1))
    assert (mean, low, high) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)


def test_ten_seeds_and_more_have_the_last_t() -> None:
    values = [float(i % 2) for i in range(40)]
    _, (low, high) = between_seeds(values, (0.5, 0.5))
    assert high - low == pytest.approx(2 * 2.262 * statistics.stdev(values) / 40**0.5)


@given(NUMBERS, st.floats(-2, 2), st.floats(0, 2))
def test_an_interval_holds_the_mean_and_what_it_is_widened_to(means: list[float], low: float, width: float) -> None:
    mean, (found_low, found_high) = between_seeds(means, (low, low + width))
    assert found_low <= low
    assert low + width <= found_high
    if len(means) > 1:
        assert found_low - 1e-12 <= mean <= found_high + 1e-12
    else:
        assert (found_low, found_high) == (low, low + width)


def test_one_seed_has_the_interval_over_its_prompts() -> None:
    values = [float(i % 3) for i in range(60)]
    mean, interval = mean_over_seeds([values])
    assert mean == 1
    assert interval == pytest.approx(mean_with_interval(values)[1], abs=0.05)


def test_seeds_that_answer_the_same_prompts_do_not_make_them_more() -> None:
    values = [float(i % 2) for i in range(100)]
    _, alone = mean_over_seeds([values])
    _, apart = mean_over_seeds([values] * 4)
    _, together = mean_over_seeds([values] * 4, shared=True)
    assert apart[1] - apart[0] < 0.75 * (alone[1] - alone[0])
    assert together[1] - together[0] == pytest.approx(alone[1] - alone[0], rel=0.1)


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers_what_it_says_and_a_bootstrap_alone_does_not(seeds: int) -> None:
    """Runs whose true mean is 0: seeds spread by 0.08 and 400 prompts in each by 0.6. 95 of 100 intervals hold 0."""
    rng = np.random.default_rng(0)
    runs = [rng.normal(0, 0.08, (seeds, 1)) + rng.normal(0, 0.6, (seeds, 400)) for _ in range(300)]

    def bootstrap(values: Any) -> tuple[float, float]:
        of = rng.integers(0, seeds, (200, seeds))
        means = [np.mean([rng.choice(values[seed], 400).mean() for seed in drawn]) for drawn in of]
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)

    covered = [low <= 0 <= high for _, (low, high) in (mean_over_seeds(x.tolist(), resamples=200) for x in runs)]
    alone = [low <= 0 <= high for low, high in map(bootstrap, runs[:150])]
    assert sum(covered) / len(covered) == pytest.approx(0.96, abs=0.03)
    assert sum(alone) / len(alone) < 0.93


def test_prompts_are_drawn_whole_within_a_seed() -> None:
    x, groups = [[0.0] * 50 + [1.0] * 50], [[0] * 50 + [1] * 50]
    assert mean_over_seeds(x, groups)[1] == (0.0, 1.0)
