"""The advantage estimators, side by side. All see the same rollouts; a comparison of methods compares only these."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """What an estimator may read of a batch of B responses of up to T tokens.

    completion_mask_B_T: true at response tokens y_1..y_T (EOS included).
    values_B_S: h_0..h_T of the frozen value model (DVPO) or of the online critic (PPO).
    scores_B: the reward model's score of the response; greedy_scores_B: of the greedy response to the same prompt.
    group_size: responses per prompt; the rows of a prompt are neighbours.
    """

    completion_mask_B_T: Tensor
    values_B_S: Tensor | None = None
    scores_B: Tensor | None = None
    greedy_scores_B: Tensor | None = None
    group_size: int = 1
    gamma: float = 1.0
    lam: float = 0.95


def discounted_sum(x_B_T: Tensor, mask_B_T: Tensor, decay: float) -> Tensor:
    """sum over l >= 0 of decay^l * x_{t+l}, over the masked steps of a row. [B, T].

    Computed on the CPU: on a GPU each of the T small steps would wait for its own launch.
    """
    device = x_B_T.device
    x_B_T, mask_B_T = x_B_T.cpu(), mask_B_T.cpu()
    out_B_T = torch.zeros_like(x_B_T)
    running_B = torch.zeros_like(x_B_T[:, 0])
    for t in reversed(range(x_B_T.shape[1])):
        running_B = torch.where(mask_B_T[:, t], x_B_T[:, t] + decay * running_B, 0)
        out_B_T[:, t] = running_B
    return out_B_T.to(device)


def last_token(mask_B_T: Tensor) -> Tensor:
    """True at every row's last masked step. [B, T]."""
    return mask_B_T & ~torch.cat([mask_B_T[:, 1:], torch.zeros_like(mask_B_T[:, :1])], 1)


def q(s: Signals) -> Tensor:
    """DVPO as the paper writes it (section 3.3): A_t = Q(s_t, a_t) = h_t."""
    return torch.where(s.completion_mask_B_T, _need(s.values_B_S, "values")[:, 1:], 0)


def gae(s: Signals) -> Tensor:
    """DVPO with differences of the frozen values: delta_t = gamma * h_t - h_{t-1}, summed with gamma * lambda.

    The last step uses the value model's own h_T, so a response that ends well is not punished for ending.
    """
    h_B_S = _need(s.values_B_S, "values")
    delta_B_T = s.gamma * h_B_S[:, 1:] - h_B_S[:, :-1]
    return discounted_sum(delta_B_T, s.completion_mask_B_T, s.gamma * s.lam)


def official(s: Signals) -> Tensor:
    """The authors' published code: GAE without reward, the last step bootstrapping 0 (delta_T = -h_{T-1})."""
    h_B_S = _need(s.values_B_S, "values")
    after_B_T = torch.where(last_token(s.completion_mask_B_T), 0, h_B_S[:, 1:])
    return discounted_sum(s.gamma * after_B_T - h_B_S[:, :-1], s.completion_mask_B_T, s.gamma * s.lam)


def critic(s: Signals) -> Tensor:
    """PPO (GAE): delta_t = r_t + gamma * V(s_{t+1}) - V(s_t); r_T is the reward model's score, V after the end is 0."""
    rewards_B_T = torch.where(last_token(s.completion_mask_B_T), _need(s.scores_B, "scores")[:, None], 0)
    return discounted_sum(rewards_B_T, s.completion_mask_B_T, s.gamma * s.lam) + official(s)


def remax(s: Signals) -> Tensor:
    """ReMax: r(x, y) - r(x, greedy y), the same for every token."""
    advantage_B = _need(s.scores_B, "scores") - _need(s.greedy_scores_B, "greedy scores")
    return torch.where(s.completion_mask_B_T, advantage_B[:, None], 0)


def grpo(s: Signals, eps: float = 1e-4) -> Tensor:
    """GRPO: (r - mean) / (std + eps) within the group of a prompt, the same for every token."""
    scores_P_G = _need(s.scores_B, "scores").view(-1, s.group_size)
    spread_P_1 = scores_P_G.std(1, keepdim=True) if s.group_size > 1 else torch.ones_like(scores_P_G)
    advantage_B = ((scores_P_G - scores_P_G.mean(1, keepdim=True)) / (spread_P_1 + eps)).view(-1)
    return torch.where(s.completion_mask_B_T, advantage_B[:, None], 0)


def _need(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ValueError(f"this estimator needs {name}")
    return x


ESTIMATORS: dict[str, Callable[[Signals], Tensor]] = {
    "q": q,
    "gae": gae,
    "official": official,
    "critic": critic,
    "remax": remax,
    "grpo": grpo,
}
