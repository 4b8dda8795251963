"""Lemma 3.1: the gradient is right, the bound holds for every draw, and the gap vanishes with the errors only."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo.objectives.lemma import (
    Array,
    Mdp,
    bound,
    discounted_visits,
    expected_return,
    gradient_gap,
    policy_gradient,
    q_values,
    random_mdp,
    random_policy,
    softmax_policy,
    sweep,
)
from reproduce.lemma_figure import draw

DECADES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
seeds = st.integers(0, 2**31)
mdps = st.builds(
    random_mdp,
    seed=seeds,
    states=st.integers(1, 5),
    actions=st.integers(1, 4),
    horizon=st.integers(1, 6),
    gamma=st.floats(0.05, 1),
)
sizes = st.just(0.0) | st.floats(1e-6, 10)


def gap_of(mdp: Mdp, policy_S_A: Array, first_H_S_A: Array, second_H_S_A: Array) -> float:
    """The gap between the gradients of two given Q."""
    first_S_A, second_S_A = (policy_gradient(mdp, policy_S_A, q_H_S_A) for q_H_S_A in (first_H_S_A, second_H_S_A))
    return float(np.linalg.norm(first_S_A - second_S_A))


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_q_values_are_the_mean_return_of_every_path(gamma: float) -> None:
    mdp = random_mdp(3, states=2, actions=2, horizon=3, gamma=gamma)
    policy_S_A = random_policy(mdp, 3)

    def walk(state: int, action: int, steps: int) -> float:
        total = float(mdp.rewards[state, action])
        if steps > 1:
            for following in range(2):
                for choice in range(2):
                    chance = mdp.transitions[state, action, following] * policy_S_A[following, choice]
                    total += gamma * float(chance) * walk(following, choice, steps - 1)
        return total

    expected = [[[walk(s, a, 3 - h) for a in range(2)] for s in range(2)] for h in range(3)]
    np.testing.assert_allclose(q_values(mdp, policy_S_A, mdp.rewards), expected, rtol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_return(seed: int, gamma: float) -> None:
    mdp = random_mdp(seed, gamma=gamma)
    logits_S_A = np.random.default_rng(seed).standard_normal(mdp.rewards.shape)
    policy_S_A = softmax_policy(logits_S_A)
    measured_S_A = np.empty_like(logits_S_A)
    for index in np.ndindex(logits_S_A.shape):
        step_S_A = np.zeros_like(logits_S_A)
        step_S_A[index] = 1e-5
        up, down = (expected_return(mdp, softmax_policy(logits_S_A + sign * step_S_A)) for sign in (1, -1))
        measured_S_A[index] = (up - down) / 2e-5
    exact_S_A = policy_gradient(mdp, policy_S_A, q_values(mdp, policy_S_A, mdp.rewards))
    np.testing.assert_allclose(exact_S_A, measured_S_A, rtol=1e-6, atol=1e-9)
    assert np.abs(exact_S_A).max() > 1e-2


def test_visits_are_distributions() -> None:
    mdp = random_mdp(0, gamma=0.9)
    visits_H_S = discounted_visits(mdp, random_policy(mdp, 0))
    np.testing.assert_allclose(visits_H_S.sum(1), 0.9 ** np.arange(mdp.horizon), rtol=1e-12)


def test_softmax_stands_large_logits() -> None:
    np.testing.assert_allclose(softmax_policy(np.array([[1e4, 1e4, -1e4]])), [[0.5, 0.5, 0.0]])


def test_a_shift_that_depends_on_the_state_only_is_invisible() -> None:
    mdp = random_mdp(1)
    policy_S_A = random_policy(mdp, 1)
    q_H_S_A = q_values(mdp, policy_S_A, mdp.rewards)
    shift_H_S_1 = np.random.default_rng(1).normal(size=(mdp.horizon, len(mdp.start), 1))
    assert gap_of(mdp, policy_S_A, q_H_S_A, q_H_S_A + shift_H_S_1) < 1e-12


@settings(max_examples=200, deadline=None)
@given(mdp=mdps, seed=seeds, eps_r=sizes, eps_q=sizes)
def test_the_gap_stays_within_the_bound(mdp: Mdp, seed: int, eps_r: float, eps_q: float) -> None:
    policy_S_A = random_policy(mdp, seed)
    limit = bound(mdp, policy_S_A, eps_r, eps_q)
    assert gradient_gap(mdp, policy_S_A, eps_r, eps_q, seed) <= limit * (1 + 1e-9) + 1e-12


@settings(max_examples=100, deadline=None)
@given(mdp=mdps, seed=seeds, eps_r=sizes, eps_q=sizes)
def test_the_bound_holds_at_the_corners_of_the_error_box(mdp: Mdp, seed: int, eps_r: float, eps_q: float) -> None:
    policy_S_A, rng = random_policy(mdp, seed), np.random.default_rng(seed)
    true_q_H_S_A = q_values(mdp, policy_S_A, mdp.rewards)
    reward_S_A = mdp.rewards + eps_r * rng.choice([-1.0, 1.0], mdp.rewards.shape)
    signs_H_S_A = rng.choice([-1.0, 1.0], true_q_H_S_A.shape)
    derived_H_S_A = q_values(mdp, policy_S_A, reward_S_A) + eps_q * signs_H_S_A
    gap = gap_of(mdp, policy_S_A, derived_H_S_A, true_q_H_S_A - eps_q * signs_H_S_A)
    assert gap <= bound(mdp, policy_S_A, eps_r, eps_q) * (1 + 1e-9) + 1e-12


def test_the_value_part_of_the_bound_is_attained() -> None:
    """With two actions the worst errors push them apart; a smaller K_Q would be wrong."""
    mdp = random_mdp(2, actions=2)
    policy_S_A = random_policy(mdp, 2)
    q_H_S_A = q_values(mdp, policy_S_A, mdp.rewards)
    apart_A = np.array([0.3, -0.3])
    gap = gap_of(mdp, policy_S_A, q_H_S_A + apart_A, q_H_S_A - apart_A)
    assert gap == pytest.approx(bound(mdp, policy_S_A, 0, 0.3), rel=1e-12)


def test_the_reward_part_of_the_bound_is_attained() -> None:
    """The worst case: the only choice, at the first step, leads to a reward error of one sign or the other for good."""
    first, good, bad = 0, 1, 2
    transitions_S_A_S = np.zeros((3, 2, 3))
    transitions_S_A_S[first, 0, good] = transitions_S_A_S[first, 1, bad] = 1
    transitions_S_A_S[good, :, good] = transitions_S_A_S[bad, :, bad] = 1
    mdp = Mdp(transitions_S_A_S, np.zeros((3, 2)), np.array([1.0, 0.0, 0.0]), gamma=0.9, horizon=4)
    policy_S_A = softmax_policy(np.array([[0.4, 0.0], [80.0, 0.0], [80.0, 0.0]]))
    error_S_A = 0.3 * np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    derived_H_S_A, true_H_S_A = (q_values(mdp, policy_S_A, mdp.rewards + shift) for shift in (error_S_A, 0))
    gap = gap_of(mdp, policy_S_A, derived_H_S_A, true_H_S_A)
    assert gap == pytest.approx(bound(mdp, policy_S_A, 0.3, 0), rel=1e-12)


def test_no_error_no_gap() -> None:
    mdp = random_mdp(0)
    policy_S_A = random_policy(mdp, 0)
    assert gradient_gap(mdp, policy_S_A, 0, 0, seed=0) < 1e-12
    assert bound(mdp, policy_S_A, 0, 0) == 0


@pytest.mark.parametrize(("reward_share", "value_share"), [(1, 1), (1, 0), (0, 1)])
def test_the_gap_shrinks_linearly_with_the_errors(reward_share: float, value_share: float) -> None:
    mdp = random_mdp(0)
    policy_S_A = random_policy(mdp, 0)
    gaps = [gradient_gap(mdp, policy_S_A, e * reward_share, e * value_share, seed=0) for e in DECADES]
    np.testing.assert_allclose(np.divide(gaps[1:], gaps[:-1]), 10, rtol=1e-6)


@pytest.mark.parametrize("kept", ["reward", "value"])
def test_an_error_that_stays_keeps_the_gap_open(kept: str) -> None:
    """The counter-example: only one of the two errors goes to zero."""
    mdp = random_mdp(0)
    policy_S_A = random_policy(mdp, 0)
    gaps = [gradient_gap(mdp, policy_S_A, *((0.5, e) if kept == "reward" else (e, 0.5)), seed=0) for e in DECADES]
    assert min(gaps) > 0.05
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3)


def test_gap_is_a_function_of_its_seed() -> None:
    mdp = random_mdp(0)
    policy_S_A = random_policy(mdp, 0)
    first, again, other = (gradient_gap(mdp, policy_S_A, 0.1, 0.1, seed) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("errors", [(-1e-3, 0), (0, -1e-3), (np.nan, 0), (0, np.inf)])
def test_impossible_errors_are_refused(errors: tuple[float, float]) -> None:
    mdp = random_mdp(0)
    policy_S_A = random_policy(mdp, 0)
    with pytest.raises(ValueError, match="error bounds"):
        gradient_gap(mdp, policy_S_A, *errors, seed=0)
    with pytest.raises(ValueError, match="error bounds"):
        bound(mdp, policy_S_A, *errors)


@pytest.mark.parametrize("wrong", [{"states": 0}, {"actions": 0}, {"horizon": 0}, {"gamma": 0.0}, {"gamma": 1.1}])
def test_impossible_problems_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="an MDP needs"):
        random_mdp(0, **wrong)  # type: ignore[arg-type]


def test_sweep_summarises_every_error_size() -> None:
    rows = sweep([0.0, *DECADES], range(20))
    assert [row["error"] for row in rows] == [0.0, *DECADES]
    assert rows[0]["gap"] < 1e-12
    assert rows[0]["worst_ratio"] == 0
    for row in rows[1:]:
        assert 0 < row["low"] <= row["gap"] <= row["high"] < row["bound"]
        assert 0 < row["worst_ratio"] <= 1
    slope = np.polyfit(np.log([row["error"] for row in rows[1:]]), np.log([row["gap"] for row in rows[1:]]), 1)[0]
    assert slope == pytest.approx(1, abs=1e-6)


def test_the_figure_is_the_same_file_every_time(tmp_path: Path) -> None:
    rows = sweep(DECADES, range(5))
    first, second = (draw(rows, tmp_path / name) for name in ("first", "second"))
    assert [file.suffix for file in first] == [".svg", ".png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="above 0"):
        draw(sweep([0.0], range(5)), tmp_path / "zero")


def test_a_row_of_the_sweep_is_that_of_its_problems() -> None:
    problems = [(mdp := random_mdp(s), random_policy(mdp, s), s) for s in range(20)]
    gaps = [gradient_gap(mdp, policy, 0.1, 0.1, s) for mdp, policy, s in problems]
    bounds = [bound(mdp, policy, 0.1, 0.1) for mdp, policy, _ in problems]
    (row,) = sweep([0.1], range(20))
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(gaps, [2.5, 97.5]))
    assert row["worst_ratio"] == pytest.approx(np.divide(gaps, bounds).max())
