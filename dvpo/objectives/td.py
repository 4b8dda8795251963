"""TD(lambda) targets of the value model, and the response scores read from its token values."""

import torch
from torch import Tensor

from dvpo.objectives.stats import last_masked, masked_percentile


def td_lambda_targets(values_B_S: Tensor, rewards_B: Tensor, mask_B_S: Tensor, gamma: float, lam: float) -> Tensor:
    """The regression targets G_0..G_T of h_0..h_T.

    The reward is 0 at every step but the last, r(x, y) at y_T, so with h detached:

        G_T = r(x, y)
        G_t = gamma * ((1 - lambda) * h_{t+1} + lambda * G_{t+1})

    lambda = 0 is the paper's Eq. 1 (G_t = r_t + gamma * Q_{t+1}), lambda = 1 is Monte Carlo. Computed on the CPU: on a
    GPU each of the T small steps would wait for its own launch.

    Args:
        values_B_S: h_0..h_T, right-padded.
        rewards_B: r(x, y).
        mask_B_S: true at h_0..h_T.

    Returns:
        [B, S], 0 at padding, no gradient.
    """
    device = values_B_S.device
    values_B_S, rewards_B, mask_B_S = values_B_S.detach().cpu(), rewards_B.cpu(), mask_B_S.cpu()
    targets_B_S = torch.zeros_like(values_B_S)
    last_B_S = mask_B_S & ~torch.cat([mask_B_S[:, 1:], torch.zeros_like(mask_B_S[:, :1])], 1)
    following_B = torch.zeros_like(rewards_B)
    for t in reversed(range(values_B_S.shape[1])):
        if t + 1 < values_B_S.shape[1]:
            backup_B = gamma * ((1 - lam) * values_B_S[:, t + 1] + lam * following_B)
        else:
            backup_B = torch.zeros_like(rewards_B)
        following_B = torch.where(last_B_S[:, t], rewards_B, backup_B)
        targets_B_S[:, t] = torch.where(mask_B_S[:, t], following_B, 0)
    return targets_B_S.to(device)


def value_model_loss(values_B_S: Tensor, targets_B_S: Tensor, mask_B_S: Tensor, count: Tensor | int) -> Tensor:
    """Squared error of Eq. 1 summed over the masked states and divided by `count`, the states of the whole batch."""
    return torch.where(mask_B_S, (values_B_S - targets_B_S) ** 2, 0).sum() / count


def lambda_backup(values_B_S: Tensor, mask_B_S: Tensor, gamma: float, lam: float) -> Tensor:
    """The Bellman-style backup of token values to one score: G_0 when the model's own h_T stands for the reward. [B].

    Equal to (1 - lambda) * sum_t lambda^{t-1} * h_t over t = 1..T-1, plus lambda^{T-1} * h_T, at gamma = 1.
    """
    return td_lambda_targets(values_B_S, last_masked(values_B_S, mask_B_S), mask_B_S, gamma, lam)[:, 0]


PERCENTILES = {f"p{k}": k for k in (1, 5, 10, 90, 95, 99)}
AGGREGATES = ("mean", "last", *PERCENTILES, "bellman")
BELLMAN_LAMBDA = 0.95


def aggregate(values_B_S: Tensor, mask_B_S: Tensor, how: str) -> Tensor:
    """One score per response from its values h_0..h_T. [B].

    All but `bellman` read the action values h_1..h_T: their mean, the last, or a percentile.
    Raises ValueError for an unknown name or a response of no tokens.
    """
    q_B_T, mask_B_T = values_B_S[:, 1:], mask_B_S[:, 1:]
    if not bool(mask_B_T.any(1).all()):
        raise ValueError("a response of no tokens has no score")
    if how == "mean":
        return torch.where(mask_B_T, q_B_T, 0).sum(1) / mask_B_T.sum(1)
    if how == "last":
        return last_masked(q_B_T, mask_B_T)
    if how == "bellman":
        return lambda_backup(values_B_S, mask_B_S, gamma=1.0, lam=BELLMAN_LAMBDA)
    if how in PERCENTILES:
        return masked_percentile(q_B_T, mask_B_T, PERCENTILES[how])
    raise ValueError(f"unknown aggregate {how!r}; one of {', '.join(AGGREGATES)}")
