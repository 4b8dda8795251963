"""TD(lambda) targets and response scores against hand-worked numbers, plain loops and numpy."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.objectives.td import (
    AGGREGATES,
    BELLMAN_LAMBDA,
    PERCENTILES,
    aggregate,
    lambda_backup,
    td_lambda_targets,
    value_model_loss,
)

Ragged = Callable[..., tuple[torch.Tensor, torch.Tensor]]
numbers = st.floats(-10, 10, allow_nan=False)


def plain_targets(h: list[float], r: float, gamma: float, lam: float) -> list[float]:
    """The lambda-return in its forward view, a weighted sum, not the recursion of the implementation.

    From state t < T, gamma^n * h_{t+n} has the weight (1 - lambda) * lambda^{n-1} for n = 1..T-t, and the whole return
    gamma^{T-t} * r has what is left, lambda^{T-t}.
    """
    T = len(h) - 1
    targets = []
    for t in range(T + 1):
        if t == T:
            targets.append(r)
            continue
        total, weight = 0.0, 1.0
        for n in range(1, T - t + 1):
            total += weight * (1 - lam) * gamma**n * h[t + n]
            weight *= lam
        targets.append(total + weight * gamma ** (T - t) * r)
    return targets


def random_rows(seed: int, sizes: tuple[int, ...]) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.gauss(0, 2) for _ in range(n)] for n in sizes]


def test_hand_worked_targets() -> None:
    h = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    r = torch.tensor([3.0], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    # lambda 0: the next prediction, and r itself at y_T.
    assert td_lambda_targets(h, r, mask, 1.0, 0.0).tolist() == [[-1.0, 2.0, 3.0]]
    assert td_lambda_targets(h, r, mask, 1.0, 1.0).tolist() == [[3.0, 3.0, 3.0]]
    # lambda 0.5, gamma 0.9: G_1 = 0.9 * (0.5 * 2 + 0.5 * 3) = 2.25; G_0 = 0.9 * (0.5 * -1 + 0.5 * 2.25) = 0.5625.
    assert td_lambda_targets(h, r, mask, 0.9, 0.5)[0].tolist() == pytest.approx([0.5625, 2.25, 3.0], abs=1e-12)
    assert td_lambda_targets(h, r, mask, 0.5, 1.0).tolist() == [[0.75, 1.5, 3.0]]


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5])
def test_targets_equal_the_forward_view(ragged: Ragged, gamma: float, lam: float) -> None:
    rows = random_rows(1, (5, 1, 9, 2))
    rewards = [1.0, -1.0, 0.3, 7.0]
    block, mask = ragged(rows, fill=1e6, extra=2)
    found = td_lambda_targets(block, torch.tensor(rewards, dtype=torch.float64), mask, gamma, lam)
    for i, (row, r) in enumerate(zip(rows, rewards, strict=True)):
        assert found[i, : len(row)].tolist() == pytest.approx(plain_targets(row, r, gamma, lam), abs=1e-9)
        assert found[i, len(row) :].tolist() == [0.0] * (block.shape[1] - len(row))


def test_targets_carry_no_gradient() -> None:
    h = torch.randn(2, 4, requires_grad=True)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert not td_lambda_targets(h, torch.ones(2), mask, 1.0, 0.95).requires_grad


def test_padding_order_and_batch_do_not_matter(ragged: Ragged) -> None:
    rows = random_rows(2, (3, 7, 4))
    rewards = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    block, mask = ragged(rows)
    base = td_lambda_targets(block, rewards, mask, 0.9, 0.95)
    garbage, wide = ragged(rows, fill=-1e12, extra=5)
    other = td_lambda_targets(garbage, rewards, wide, 0.9, 0.95)
    assert torch.equal(other[:, :7], base)
    assert torch.equal(other[:, 7:], torch.zeros(3, 5, dtype=torch.float64))
    order = torch.tensor([2, 0, 1])
    assert torch.equal(td_lambda_targets(block[order], rewards[order], mask[order], 0.9, 0.95), base[order])
    for i, row in enumerate(rows):
        one = td_lambda_targets(
            block[i : i + 1, : len(row)], rewards[i : i + 1], mask[i : i + 1, : len(row)], 0.9, 0.95
        )
        assert torch.equal(one[0], base[i, : len(row)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(numbers, min_size=1, max_size=8), min_size=1, max_size=5), st.data())
def test_monte_carlo_targets_equal_the_reward_everywhere(ragged: Ragged, rows: list[list[float]], data) -> None:
    rewards = data.draw(st.lists(numbers, min_size=len(rows), max_size=len(rows)))
    block, mask = ragged(rows, fill=99.0)
    found = td_lambda_targets(block, torch.tensor(rewards, dtype=torch.float64), mask, 1.0, 1.0)
    for i, row in enumerate(rows):
        assert found[i, : len(row)].tolist() == [rewards[i]] * len(row)


def test_loss_is_the_sum_over_states_divided_by_the_count(ragged: Ragged) -> None:
    rows, aims = random_rows(3, (3, 5)), random_rows(4, (3, 5))
    block, mask = ragged(rows, fill=1e8)
    targets, _ = ragged(aims, fill=-1e8)
    block.requires_grad_(True)
    loss = value_model_loss(block, targets, mask, 8)
    expected = sum((v - g) ** 2 for row, aim in zip(rows, aims, strict=True) for v, g in zip(row, aim, strict=True)) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert torch.equal(block.grad[~mask], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(block.grad[mask], (2 * (block - targets) / 8)[mask])


@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregate_equals_numpy_on_the_unpadded_row(ragged: Ragged, how: str) -> None:
    rows = random_rows(5, (2, 5, 12, 43))
    block, mask = ragged(rows, fill=1e7, extra=3)
    found = aggregate(block, mask, how)
    for i, row in enumerate(rows):
        actions = np.array(row[1:])
        if how == "mean":
            expected = actions.mean()
        elif how == "last":
            expected = actions[-1]
        elif how == "bellman":
            expected = plain_targets(row, row[-1], 1.0, BELLMAN_LAMBDA)[0]
        else:
            expected = np.percentile(actions, PERCENTILES[how])
        assert float(found[i]) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregate_of_a_row_does_not_depend_on_its_batch(ragged: Ragged, how: str) -> None:
    rows = random_rows(6, (4, 9, 2))
    block, mask = ragged(rows, fill=-1e9, extra=4)
    together = aggregate(block, mask, how)
    order = torch.tensor([1, 2, 0])
    assert torch.equal(aggregate(block[order], mask[order], how), together[order])
    for i, row in enumerate(rows):
        alone = aggregate(torch.tensor([row], dtype=torch.float64), torch.ones(1, len(row), dtype=torch.bool), how)
        assert float(alone) == pytest.approx(float(together[i]), abs=1e-12)


def test_no_aggregate_reads_the_value_before_the_first_token(ragged: Ragged) -> None:
    """h_0 is V(s_1): it says nothing of the response, so it must not move the score."""
    block, mask = ragged(random_rows(7, (6, 4)))
    moved = block.clone()
    moved[:, 0] += 100
    for how in AGGREGATES:
        assert torch.equal(aggregate(block, mask, how), aggregate(moved, mask, how)), how


def test_aggregate_refuses_nonsense(ragged: Ragged) -> None:
    block, mask = ragged([[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="no tokens"):
        aggregate(block, mask, "mean")
    block, mask = ragged([[1.0, 2.0]])
    with pytest.raises(ValueError, match="unknown aggregate"):
        aggregate(block, mask, "median")


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_backup_has_the_closed_form_of_its_docstring(ragged: Ragged, lam: float) -> None:
    rows = random_rows(8, (2, 3, 8))
    block, mask = ragged(rows, fill=55.0)
    found = lambda_backup(block, mask, 1.0, lam)
    for i, row in enumerate(rows):
        T = len(row) - 1
        expected = (1 - lam) * sum(lam ** (t - 1) * row[t] for t in range(1, T)) + lam ** (T - 1) * row[T]
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)


def test_the_bellman_score_by_hand() -> None:
    """0.05 * h_1 + 0.95 * (0.05 * h_2 + 0.95 * h_3) of 1, 0, 2."""
    values = torch.tensor([[5.0, 1.0, 0.0, 2.0]])
    assert float(aggregate(values, torch.ones(1, 4, dtype=torch.bool), "bellman")) == pytest.approx(1.855)
