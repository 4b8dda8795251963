"""Masked statistics: padding never counts, and the sums may run over several processes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dvpo.objectives.stats import last_masked, masked_mean, masked_percentile, masked_whiten

Ragged = Callable[..., tuple[torch.Tensor, torch.Tensor]]
rows_of_numbers = st.lists(st.lists(st.floats(-20, 20), min_size=1, max_size=6), min_size=1, max_size=5)


def test_mean_and_last_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 50.0], [3.0, 60.0, 70.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    assert float(masked_mean(x, mask)) == 2.0
    assert float(masked_mean(x, torch.zeros_like(mask))) == 0.0
    assert last_masked(x, mask).tolist() == [2.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(rows_of_numbers, st.floats(-1e6, 1e6), st.integers(0, 3))
def test_whitening_gives_mean_0_and_variance_1_and_ignores_padding(
    ragged: Ragged, rows: list[list[float]], fill: float, extra: int
) -> None:
    flat = np.array([v for row in rows for v in row])
    assume(flat.std() > 0.1)
    block, mask = ragged(rows, fill=fill, extra=extra)
    white = masked_whiten(block, mask)
    inside = white[mask].numpy()
    assert inside.mean() == pytest.approx(0, abs=1e-9)
    assert inside.var() == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()
    assert inside.tolist() == pytest.approx(((flat - flat.mean()) / flat.std()).tolist(), abs=1e-5)


def test_whitening_of_equal_entries_is_zero() -> None:
    assert torch.equal(masked_whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3))


def test_whitening_over_two_processes_equals_one_over_all() -> None:
    """Each process sees its own rows; `reduce` adds what the other one has."""
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    whole = masked_whiten(x, mask)
    parts = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    # The sums that whitening asks for, in order: total and count of x, then of the squared deviations.
    mean = x[mask].mean()
    sums = [[torch.where(m, v, 0).sum(), m.sum(), torch.where(m, (v - mean) ** 2, 0).sum(), m.sum()] for v, m in parts]
    for i, (v, m) in enumerate(parts):
        calls = iter(sums[1 - i])
        part = masked_whiten(v, m, reduce=lambda own, calls=calls: own + next(calls))
        assert torch.allclose(part, whole[2 * i : 2 * i + 2], atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(rows_of_numbers, st.sampled_from([0, 1, 5, 10, 50, 90, 95, 99, 100]))
def test_percentile_equals_numpy(ragged: Ragged, rows: list[list[float]], percent: int) -> None:
    block, mask = ragged(rows, fill=-1e9, extra=1)
    expected = [float(np.percentile(row, percent)) for row in rows]
    assert masked_percentile(block, mask, percent).tolist() == pytest.approx(expected, abs=1e-9)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        masked_percentile(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), 50)
