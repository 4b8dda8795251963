"""Verdicts: every bound has a reason, and the words follow from the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproduce import paper, verdicts
from reproduce.verdicts import DIFFERS, OTHER_SCALE, REPRODUCED, WITHIN, cell, gain, match, tie

NUMBERS = st.floats(-10, 10, allow_nan=False)


def test_every_table_has_bounds_with_reasons() -> None:
    found = verdicts.tolerances()
    assert {f"T{n}" for n in range(1, 11)} | {"F2", "F4"} == set(found)
    for name, bound in found.items():
        every = [*bound.cells.values(), *filter(None, (bound.direction, bound.tie))]
        assert every, name
        assert all(len(b.reason) > 10 for b in every)
        assert all(c.reproduced <= c.within for c in bound.cells.values())


def test_every_numeric_cell_of_the_paper_has_a_bound() -> None:
    for table in range(1, 11):
        for c in paper.cells(table):
            assert cell(f"T{table}", c.metric, c.value, c.value, None) == REPRODUCED


@pytest.mark.parametrize(
    ("measured", "ci95", "verdict"),
    [
        (5.62, None, REPRODUCED),  # 0.4 off
        (5.64, None, WITHIN),
        (6.0, None, WITHIN),
        (6.1, None, DIFFERS),
        (5.64, [5.2, 7.0], REPRODUCED),  # the paper's number is in the interval
        (6.1, [5.2, 7.0], OTHER_SCALE),  # so is it here, but so is what differs: a wide interval reproduces nothing
        (6.1, [5.3, 7.0], DIFFERS),
    ],
)
def test_a_cell_of_table_1(measured: float, ci95: list[float] | None, verdict: str) -> None:
    assert cell("T1", "MT-Bench", 5.22, measured, ci95) == verdict


def test_cells_of_table_7_are_relative() -> None:
    """40 +- 10 % is 36 to 44, +- 25 % is 30 to 50."""
    verdict = [cell("T7", "memory (GB)", 40.0, x, None) for x in (36.0, 43.9, 35.9, 50.0, 29.9)]
    assert verdict == [REPRODUCED, REPRODUCED, WITHIN, WITHIN, DIFFERS]


def test_symbols_are_equal_or_not() -> None:
    assert cell("T6", "C_back", "c_back", "c_back", None) == REPRODUCED
    assert cell("T6", "C_back", "c_back", "n*c_back", None) == DIFFERS
    assert cell("T6", "C_gene", 5.0, 5.0, None) == REPRODUCED
    assert cell("T6", "C_gene", 5.0, 5.001, None) == DIFFERS


@pytest.mark.parametrize(
    ("ci95", "said"),
    [  # of a gain, of a match; the margin of Table 1 is 0.05
        ((0.01, 0.2), (REPRODUCED, REPRODUCED)),
        ((0.01, 0.02), (REPRODUCED, REPRODUCED)),
        ((-0.04, 0.2), (OTHER_SCALE, WITHIN)),
        ((-0.2, 0.2), (OTHER_SCALE, OTHER_SCALE)),
        ((-0.04, 0.04), (DIFFERS, WITHIN)),  # a gain of 0.05 is ruled out, and so is a loss of 0.05
        ((-0.2, 0.04), (DIFFERS, OTHER_SCALE)),
        ((-0.04, -0.01), (DIFFERS, WITHIN)),
        ((-0.2, -0.01), (DIFFERS, DIFFERS)),
    ],
)
def test_gains_and_matches(ci95: tuple[float, float], said: tuple[str, str]) -> None:
    assert (gain("T1", ci95, 3), match("T1", ci95, 3)) == said
    assert (gain("T1", ci95, 2), match("T1", ci95, 2)) == (OTHER_SCALE, OTHER_SCALE), "two seeds are too few"


@pytest.mark.parametrize(
    ("ci95", "verdict"),
    [
        ((-1.9, 1.9), WITHIN),
        ((0.5, 1.5), WITHIN),
        ((-1.0, 2.5), OTHER_SCALE),
        ((1.0, 9.0), OTHER_SCALE),
        ((2.1, 9.0), DIFFERS),
        ((-9.0, -2.1), DIFFERS),
    ],
)
def test_ties(ci95: tuple[float, float], verdict: str) -> None:
    assert tie("T3", ci95, 3) == verdict
    low, high = ci95
    assert tie("T3", (-high, -low), 3) == verdict, "neither side is the paper's"
    assert tie("T3", ci95, 2) == OTHER_SCALE, "two seeds are too few"


@given(NUMBERS, NUMBERS, st.floats(0, 5))
def test_a_better_interval_never_has_a_worse_verdict(low: float, width: float, more: float) -> None:
    order = {DIFFERS: 0, OTHER_SCALE: 1, WITHIN: 2, REPRODUCED: 3}
    for verdict in (gain, match):
        before, after = (verdict("T1", (low + up, low + up + abs(width)), 3) for up in (0.0, more))
        assert order[before] <= order[after]


def test_bounds_in_words() -> None:
    (benchmark, *_, gains) = verdicts.in_words("T1")
    assert benchmark.startswith("MT-Bench: reproduced up to 0.4 off")
    assert "0.05 of gold score" in gains
    assert "Fewer than 3 seeds" in gains
    assert "10 % of the paper's number" in verdicts.in_words("T7")[0]
    assert "Ties" in verdicts.in_words("T3")[-1]
    assert verdicts.in_words("credit") == []


def test_a_bound_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match="direction for T6"):
        gain("T6", (0, 1), 3)
    with pytest.raises(KeyError, match="tie for T1"):
        tie("T1", (0, 1), 3)
    assert set(verdicts.as_document()["T3"]) == {"cells", "tie"}


def test_bounds_hold_at_their_edge() -> None:
    assert 4.82 - 4.02 > 0.8  # rounding
    assert cell("T1", "MT-Bench", 4.02, 4.82, None) == WITHIN
    assert (
        cell("T1", "MT-Bench", 5.22, 5.64, [5.22, 6.0]) == cell("T1", "MT-Bench", 5.22, 5.0, [4.0, 5.22]) == REPRODUCED
    )
    assert gain("T1", (0.0, 0.2), 3) == OTHER_SCALE
