"""Lemma 3.1 on problems small enough to solve exactly.

The lemma: with no new feedback, a policy gradient that takes its Q from a reward model (R_phi, then the Bellman
equation) and one that takes it from a pretrained value model Q_psi differ by at most kappa(eps_R, eps_Q), and kappa
vanishes with the errors. The paper names no kappa; `bound` derives one.

The problem has S states, A actions and H steps, gamma in (0, 1] (generation is H tokens at gamma = 1). The policy has
one logit per (s, a). At step h, with d_h the distribution of the state and Q_H = 0:

    Q_h(s, a)       = r(s, a) + gamma * sum_s' P(s'|s, a) * b_{h+1}(s'),      b_h(s) = sum_a pi(a|s) * Q_h(s, a)
    dJ/dtheta[s, a] = sum_h gamma^h * d_h(s) * pi(a|s) * (Q_h(s, a) - b_h(s))

Every expectation is a sum, so the only difference between two gradients is the error put into their Q.
Deviation from the paper: finitely many steps in place of a stationary distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mdp:
    """A tabular problem: P(s'|s, a) [S, A, S], r(s, a) [S, A], the first state's distribution [S], gamma, and H."""

    transitions: Array
    rewards: Array
    start: Array
    gamma: float
    horizon: int


def random_mdp(seed: int, states: int = 6, actions: int = 4, horizon: int = 8, gamma: float = 1.0) -> Mdp:
    """A problem with uniform random transitions (on the simplex) and rewards in [-1, 1]."""
    if min(states, actions, horizon) < 1 or not 0 < gamma <= 1:
        raise ValueError("an MDP needs at least one state, action and step, and 0 < gamma <= 1")
    rng = np.random.default_rng([seed, 0])
    return Mdp(
        transitions=rng.dirichlet(np.ones(states), size=(states, actions)),
        rewards=rng.uniform(-1, 1, size=(states, actions)),
        start=rng.dirichlet(np.ones(states)),
        gamma=gamma,
        horizon=horizon,
    )


def softmax_policy(logits_S_A: Array) -> Array:
    """pi(a|s) = exp(theta[s, a]) / sum_b exp(theta[s, b])."""
    weights_S_A = np.exp(logits_S_A - logits_S_A.max(1, keepdims=True))
    policy_S_A: Array = weights_S_A / weights_S_A.sum(1, keepdims=True)
    return policy_S_A


def random_policy(mdp: Mdp, seed: int) -> Array:
    """A softmax policy with standard normal logits."""
    return softmax_policy(np.random.default_rng([seed, 1]).standard_normal(mdp.rewards.shape))


def q_values(mdp: Mdp, policy_S_A: Array, reward_S_A: Array) -> Array:
    """The exact solution Q_0..Q_{H-1} of the policy's Bellman equation for a reward table. [H, S, A]."""
    q_H_S_A = np.empty((mdp.horizon, *reward_S_A.shape))
    value_S = np.zeros(len(reward_S_A))
    for h in reversed(range(mdp.horizon)):
        q_H_S_A[h] = reward_S_A + mdp.gamma * mdp.transitions @ value_S
        value_S = (policy_S_A * q_H_S_A[h]).sum(1)
    return q_H_S_A


def expected_return(mdp: Mdp, policy_S_A: Array) -> float:
    """J(theta) = sum_s d_0(s) * b_0(s)."""
    return float(mdp.start @ (policy_S_A * q_values(mdp, policy_S_A, mdp.rewards)[0]).sum(1))


def discounted_visits(mdp: Mdp, policy_S_A: Array) -> Array:
    """gamma^h * d_h(s), exactly. [H, S]."""
    step_S_S = np.einsum("sa,sat->st", policy_S_A, mdp.transitions)
    visits_H_S = np.empty((mdp.horizon, len(mdp.start)))
    visits_H_S[0] = mdp.start
    for h in range(1, mdp.horizon):
        visits_H_S[h] = mdp.gamma * visits_H_S[h - 1] @ step_S_S
    return visits_H_S


def policy_gradient(mdp: Mdp, policy_S_A: Array, q_H_S_A: Array) -> Array:
    """The exact policy gradient with respect to the logits for any Q, with baseline b_h(s) = sum_a pi * Q_h. [S, A].

    With the true Q it is dJ/dtheta. Adding a function of (h, s) to Q does not change it.
    """
    advantage_H_S_A = q_H_S_A - (policy_S_A * q_H_S_A).sum(2, keepdims=True)
    gradient_S_A: Array = policy_S_A * np.einsum("hs,hsa->sa", discounted_visits(mdp, policy_S_A), advantage_H_S_A)
    return gradient_S_A


def gradient_gap(mdp: Mdp, policy_S_A: Array, eps_r: float, eps_q: float, seed: int) -> float:
    """Euclidean norm of the difference of the two policy gradients, for one draw of the errors.

    Reward-derived: Q^pi of r + (error within eps_r), plus the solver's error within eps_q.
    Directly learned: Q^pi of r, plus another error within eps_q. All errors are uniform and independent.
    """
    _check_errors(eps_r, eps_q)
    rng = np.random.default_rng([seed, 2])
    true_q_H_S_A = q_values(mdp, policy_S_A, mdp.rewards)
    reward_S_A = mdp.rewards + eps_r * rng.uniform(-1, 1, mdp.rewards.shape)
    derived_H_S_A = q_values(mdp, policy_S_A, reward_S_A) + eps_q * rng.uniform(-1, 1, true_q_H_S_A.shape)
    learned_H_S_A = true_q_H_S_A + eps_q * rng.uniform(-1, 1, true_q_H_S_A.shape)
    difference_S_A = policy_gradient(mdp, policy_S_A, derived_H_S_A) - policy_gradient(mdp, policy_S_A, learned_H_S_A)
    return float(np.linalg.norm(difference_S_A))


def bound(mdp: Mdp, policy_S_A: Array, eps_r: float, eps_q: float) -> float:
    """kappa(eps_R, eps_Q) = K_R * eps_R + K_Q * eps_Q, at least the gap of every draw of the errors.

    Let E_h be the difference of the two Q. The Bellman equation is linear in the reward, so a reward error adds up over
    the steps still to come: |E_h| <= c_h * eps_R + 2 * eps_Q with c_h = sum_{k < H-h} gamma^k. What the policy
    gradient sees of it is, for every s and a,

        pi_a * (E_a - sum_b pi_b E_b) = pi_a * ((1 - pi_a) * E_a - sum_{b != a} pi_b E_b),

    of size at most 2 * pi_a * (1 - pi_a) * max|E|, because the other weights sum to 1 - pi_a. Summing over the steps
    and taking the norm of the table over (s, a), with the triangle inequality between the two kinds of error:

        K_R = || 2 * pi * (1 - pi) * sum_h gamma^h * d_h * c_h ||,   K_Q = || 4 * pi * (1 - pi) * sum_h gamma^h * d_h ||
    """
    _check_errors(eps_r, eps_q)
    visits_H_S = discounted_visits(mdp, policy_S_A)
    steps_to_come_H = np.cumsum(mdp.gamma ** np.arange(mdp.horizon))[::-1]
    spread_S_A = 2 * policy_S_A * (1 - policy_S_A)
    k_r = np.linalg.norm(spread_S_A * (steps_to_come_H @ visits_H_S)[:, None])
    k_q = np.linalg.norm(2 * spread_S_A * visits_H_S.sum(0)[:, None])
    return float(k_r * eps_r + k_q * eps_q)


def sweep(errors: Sequence[float], seeds: Sequence[int]) -> list[dict[str, float]]:
    """The gap over many random problems for every error size eps_R = eps_Q = error: the rows of the figure.

    Every seed has its own problem, policy and errors; the errors of a seed are the same at every size but for their
    scale. A row has `error`, `gap` (the mean over seeds), `low` and `high` (its 2.5 and 97.5 percentiles), `bound` (the
    mean over seeds) and `worst_ratio`, the largest gap / bound of any one seed: at most 1 when the bound holds
    everywhere, and 0 without error.
    """
    problems = [(mdp := random_mdp(seed), random_policy(mdp, seed), seed) for seed in seeds]
    rows = []
    for error in errors:
        gaps = np.array([gradient_gap(mdp, policy_S_A, error, error, seed) for mdp, policy_S_A, seed in problems])
        bounds = np.array([bound(mdp, policy_S_A, error, error) for mdp, policy_S_A, _ in problems])
        low, high = np.percentile(gaps, [2.5, 97.5])
        rows.append(
            {
                "error": float(error),
                "gap": float(gaps.mean()),
                "low": float(low),
                "high": float(high),
                "bound": float(bounds.mean()),
                "worst_ratio": float((gaps / bounds).max()) if error > 0 else 0.0,
            }
        )
    return rows


def _check_errors(eps_r: float, eps_q: float) -> None:
    """Refuse an error bound that is negative or not finite."""
    if not (0 <= eps_r < np.inf and 0 <= eps_q < np.inf):
        raise ValueError(f"error bounds must be finite and at least 0, got eps_r={eps_r} and eps_q={eps_q}")
