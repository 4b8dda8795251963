"""The six estimators against hand-worked numbers and plain loops over single responses."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.objectives.advantages import ESTIMATORS, Signals, critic, gae, grpo, last_token, official, q, remax

Ragged = Callable[..., tuple[torch.Tensor, torch.Tensor]]
SIZES = (4, 1, 7, 2, 3, 5)
GROUP = 3


def plain(name: str, h: list[float], score: float, greedy: float, group: list[float], gamma: float, lam: float):
    """The advantages of one response, straight from the design: V(s_t) = h_{t-1}, Q(s_t, a_t) = h_t."""
    T = len(h) - 1

    def value_before(t: int) -> float:
        return h[t - 1]

    if name == "q":
        return [h[t] for t in range(1, T + 1)]
    if name == "remax":
        return [score - greedy] * T
    if name == "grpo":
        mean = sum(group) / len(group)
        std = (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5
        return [(score - mean) / (std + 1e-4)] * T
    deltas = {}
    for t in range(1, T + 1):
        last = t == T
        if name == "gae":
            deltas[t] = gamma * h[t] - value_before(t)
        elif name == "official":
            deltas[t] = (0 if last else gamma * h[t]) - value_before(t)
        else:
            deltas[t] = (score if last else 0) + (0 if last else gamma * value_before(t + 1)) - value_before(t)
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, T + 1)) for t in range(1, T + 1)]


def batch(ragged: Ragged, seed: int = 0, gamma: float = 0.98, lam: float = 0.9, fill: float = 0.0, extra: int = 0):
    """Signals of six responses in two groups, and the plain numbers behind them."""
    rng = random.Random(seed)
    rows = [[rng.gauss(0, 1) for _ in range(n + 1)] for n in SIZES]
    scores, greedy = ([rng.gauss(0, 1) for _ in SIZES] for _ in range(2))
    values, mask = ragged(rows, fill=fill, extra=extra)
    signals = Signals(
        completion_mask_B_T=mask[:, 1:],
        values_B_S=values,
        scores_B=torch.tensor(scores, dtype=torch.float64),
        greedy_scores_B=torch.tensor(greedy, dtype=torch.float64),
        group_size=GROUP,
        gamma=gamma,
        lam=lam,
    )
    return signals, rows, scores, greedy


def reordered(s: Signals, order: torch.Tensor) -> Signals:
    return Signals(
        s.completion_mask_B_T[order],
        s.values_B_S[order],
        s.scores_B[order],
        s.greedy_scores_B[order],
        s.group_size,
        s.gamma,
        s.lam,
    )


def test_hand_worked_numbers() -> None:
    h = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    score = torch.tensor([5.0], dtype=torch.float64)
    s = Signals(torch.ones(1, 2, dtype=torch.bool), h, score, score - 4, gamma=1.0, lam=0.5)
    assert q(s).tolist() == [[3.0, 2.0]]
    # gae: delta_1 = 3 - 1 = 2, delta_2 = 2 - 3 = -1; A_2 = -1, A_1 = 2 + 0.5 * -1.
    assert gae(s).tolist() == [[1.5, -1.0]]
    # official: delta_2 = 0 - 3 = -3; A_1 = 2 + 0.5 * -3.
    assert official(s).tolist() == [[0.5, -3.0]]
    # critic: delta_2 = 5 + 0 - 3 = 2; A_1 = 2 + 0.5 * 2.
    assert critic(s).tolist() == [[3.0, 2.0]]
    assert remax(s).tolist() == [[4.0, 4.0]]
    two = Signals(
        torch.ones(2, 1, dtype=torch.bool), scores_B=torch.tensor([1.0, 3.0], dtype=torch.float64), group_size=2
    )
    # mean 2, unbiased std sqrt(2)
    assert grpo(two)[:, 0].tolist() == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)], abs=1e-12)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.7)])
def test_equals_a_plain_loop(ragged: Ragged, name: str, gamma: float, lam: float) -> None:
    signals, rows, scores, greedy = batch(ragged, 1, gamma, lam, fill=1e9, extra=2)
    found = ESTIMATORS[name](signals)
    for i, h in enumerate(rows):
        group = scores[i // GROUP * GROUP : i // GROUP * GROUP + GROUP]
        expected = plain(name, h, scores[i], greedy[i], group, gamma, lam)
        assert found[i, : len(expected)].tolist() == pytest.approx(expected, abs=1e-12)
        assert not found[i, len(expected) :].any()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_padding_never_matters(ragged: Ragged, name: str) -> None:
    base = ESTIMATORS[name](batch(ragged)[0])
    other = ESTIMATORS[name](batch(ragged, fill=-1e15, extra=3)[0])
    assert torch.equal(other[:, : base.shape[1]], base)
    assert not other[:, base.shape[1] :].any()


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"grpo"}))
def test_one_row_alone_equals_the_row_in_a_batch(ragged: Ragged, name: str) -> None:
    signals = batch(ragged)[0]
    together = ESTIMATORS[name](signals)
    for i in range(len(SIZES)):
        assert torch.equal(ESTIMATORS[name](reordered(signals, torch.tensor([i])))[0], together[i])


def test_one_group_alone_equals_the_group_in_a_batch(ragged: Ragged) -> None:
    signals = batch(ragged)[0]
    together = grpo(signals)
    for start in (0, GROUP):
        rows = torch.arange(start, start + GROUP)
        assert torch.allclose(grpo(reordered(signals, rows)), together[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_row_order_commutes_with_every_estimator(ragged: Ragged, name: str, data) -> None:
    """Any permutation of the rows; for grpo, of the groups and of the rows within each."""
    signals = batch(ragged, data.draw(st.integers(0, 5)))[0]
    if name == "grpo":
        order = []
        for g in data.draw(st.permutations(range(len(SIZES) // GROUP))):
            order += data.draw(st.permutations(range(g * GROUP, (g + 1) * GROUP)))
    else:
        order = data.draw(st.permutations(range(len(SIZES))))
    index = torch.tensor(order)
    assert torch.allclose(
        ESTIMATORS[name](reordered(signals, index)), ESTIMATORS[name](signals)[index], atol=1e-12, rtol=0
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=9), min_size=1, max_size=4))
def test_gae_telescopes_without_discount(ragged: Ragged, rows: list[list[float]]) -> None:
    """lambda = gamma = 1: A_t = h_T - h_{t-1}."""
    values, mask = ragged(rows, fill=77.0)
    found = gae(Signals(mask[:, 1:], values, gamma=1.0, lam=1.0))
    for i, h in enumerate(rows):
        assert found[i, : len(h) - 1].tolist() == pytest.approx([h[-1] - h[t - 1] for t in range(1, len(h))], abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=9), min_size=1, max_size=4),
    st.floats(0.5, 1),
    st.floats(0, 1),
)
def test_official_differs_from_gae_by_the_last_step_alone(
    ragged: Ragged, rows: list[list[float]], gamma: float, lam: float
) -> None:
    """The published code drops gamma * h_T from delta_T; it reaches step t with weight (gamma * lambda)^(T - t)."""
    values, mask = ragged(rows)
    s = Signals(mask[:, 1:], values, gamma=gamma, lam=lam)
    difference = gae(s) - official(s)
    for i, h in enumerate(rows):
        T = len(h) - 1
        expected = [(gamma * lam) ** (T - t) * gamma * h[T] for t in range(1, T + 1)]
        assert difference[i, :T].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_response_that_ends_well_is_not_punished_for_ending() -> None:
    """Rising values: gae rewards the last step, the published code punishes it."""
    s = Signals(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.5, 0.7, 0.9]]))
    assert float(gae(s)[0, -1]) > 0 > float(official(s)[0, -1])


def test_grpo_of_equal_scores_is_zero_and_finite() -> None:
    s = Signals(torch.ones(4, 2, dtype=torch.bool), scores_B=torch.full((4,), 2.0), group_size=4)
    assert torch.equal(grpo(s), torch.zeros(4, 2))


def test_last_token() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert last_token(mask).int().tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_missing_signal_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="this estimator needs"):
        ESTIMATORS[name](Signals(torch.ones(2, 3, dtype=torch.bool)))
