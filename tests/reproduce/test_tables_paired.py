"""The paired tests against numbers worked by hand and against plain re-implementations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproduce.tables.paired import flip_prompts, flip_seeds, holm, paired

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1 is 0.03, 0.06, 0.04, and never falls: 0.03, 0.06, 0.06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(P_VALUES)
def test_holm_lies_between_the_raw_and_bonferronis(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1.0, len(p_values) * p) + 1e-12


@given(P_VALUES)
def test_holm_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for a, b in itertools.combinations(range(len(p_values)), 2):
        if p_values[a] < p_values[b]:
            assert adjusted[a] <= adjusted[b]


def test_flipped_seeds_by_hand() -> None:
    """Five seeds of one sign: 2 of 32 patterns are as far from zero. 1, 2 and -4 sum to -1, the least of 1, 3, 5, 7."""
    rng = np.random.default_rng(0)
    assert flip_seeds([0.1, 0.2, 0.3, 0.1, 0.2], rng) == 2 / 32
    assert flip_seeds([1, 2, -4], rng) == 1.0
    assert flip_seeds([1, 2, 4], rng) == 2 / 8


def test_patterns_of_many_seeds_are_drawn() -> None:
    """The sum of 24 signs is at least 8 from zero in 15.2 % of patterns, by the binomial distribution."""
    exact = sum(math.comb(24, k) for k in range(25) if abs(2 * k - 24) >= 8) / 2**24
    assert flip_seeds([1.0] * 16 + [-1.0] * 8, np.random.default_rng(0)) == pytest.approx(exact, abs=0.01)


def test_flipped_prompts_agree_with_all_patterns() -> None:
    x = np.array([0.5, -0.2, 0.9, 0.4, -0.1, 0.3, 0.6, 0.2])
    exact = np.mean([abs(np.dot(s, x)) >= abs(x.sum()) - 1e-12 for s in itertools.product((1, -1), repeat=8)])
    assert flip_prompts([x], 20_000, np.random.default_rng(0)) == pytest.approx(exact, abs=0.01)


def test_a_clear_difference_and_none() -> None:
    rng = np.random.default_rng(0)
    clear = paired([(0.3 + rng.normal(0, 0.2, 100)).tolist() for _ in range(5)])
    assert clear.mean == pytest.approx(0.3, abs=0.03)
    assert 0.2 < clear.ci95[0] < clear.mean < clear.ci95[1] < 0.4
    assert max(clear.p_bootstrap, clear.p_flip) < 0.001
    assert clear.p_seeds == 2 / 32
    none = paired([rng.normal(0, 0.2, 100).tolist() for _ in range(5)])
    assert none.ci95[0] < 0 < none.ci95[1]
    assert min(none.p_bootstrap, none.p_flip) > 0.05


def test_seeds_that_disagree_are_not_a_difference_however_many_prompts() -> None:
    """Prompts alone would be sure; the bootstrap draws seeds too."""
    found = paired([[1.0] * 500, [1.1] * 500, [-0.9] * 500])
    assert found.p_flip < 0.001
    assert found.p_bootstrap > 0.1
    assert found.ci95[0] < 0 < found.ci95[1]


def test_the_same_numbers_every_time_and_no_empty_ones() -> None:
    x = [[0.1, 0.2, -0.3], [0.2, 0.0, 0.1]]
    assert paired(x) == paired(x)
    for bad in ([], [[0.1], []]):
        with pytest.raises(ValueError, match="difference for every seed"):
            paired(bad)


def test_the_false_alarm_rate_is_about_the_level() -> None:
    """Under no difference the flip test's p-values are uniform: at most a few of 200 below 0.05."""
    rng = np.random.default_rng(1)
    low = sum(flip_prompts([rng.normal(size=30)], 400, rng) < 0.05 for _ in range(200))
    assert 2 <= low <= 22


def test_p_values_by_hand() -> None:
    """Of 99 resamples none is on the other side, and none of the flips of 30 equal numbers as far out."""
    sure = paired([[1.0] * 10] * 3, resamples=99)
    assert (sure.p_bootstrap, sure.p_flip) == pytest.approx((2 / 100, 1 / 100))
    assert paired([[0.0] * 4] * 2).p_bootstrap == 1.0
    ones = np.ones(10)
    assert flip_prompts([ones, -ones], 99, np.random.default_rng(0)) == 1.0


def test_one_seed_has_its_prompts_spread_and_three_have_students_t() -> None:
    low, high = paired([[0.0, 1.0] * 50]).ci95
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.02)
    half = 4.303 * 0.1 / 3**0.5
    assert paired([[0.1] * 4, [0.2] * 4, [0.3] * 4]).ci95 == pytest.approx((0.2 - half, 0.2 + half))
