"""The distance to the reference policy: as a reward stream or as a loss term, with an adaptive coefficient."""

from dataclasses import dataclass

import torch
from torch import Tensor


def kl_rewards(logprobs_B_T: Tensor, ref_logprobs_B_T: Tensor, mask_B_T: Tensor, beta: float) -> Tensor:
    """The stream -beta * (log pi - log pi_ref) (the k1 estimate, no gradient); 0 at padding. [B, T]."""
    return torch.where(mask_B_T, -beta * (logprobs_B_T - ref_logprobs_B_T), 0).detach()


def kl_loss(logprobs_B_T: Tensor, ref_logprobs_B_T: Tensor, mask_B_T: Tensor, count: Tensor | int) -> Tensor:
    """The k3 estimate exp(d) - d - 1 with d = log pi_ref - log pi, never negative, with a gradient. A scalar."""
    d_B_T = torch.where(mask_B_T, ref_logprobs_B_T - logprobs_B_T, 0)
    return (torch.exp(d_B_T) - d_B_T - 1).sum() / count


@dataclass
class AdaptiveKL:
    """Proportional controller of beta (Ziegler et al. 2019, section 2.2).

    beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon, for a batch of n responses. `target` is in nats per
    response token, as the KL that is passed in; None keeps beta fixed.
    """

    beta: float
    target: float | None
    horizon: int

    def update(self, kl: float, n: int) -> None:
        """Moves beta after a batch of `n` responses whose mean KL per token was `kl`."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * n / self.horizon
