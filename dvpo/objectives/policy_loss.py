"""The clipped objectives. Sums are divided by a given count, so that any split of a batch gives the same gradient."""

import torch
from torch import Tensor


def token_logprobs(logits_B_T_V: Tensor, token_ids_B_T: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(y_t | s_t) at the sampling temperature, in float32. [B, T]."""
    logits = logits_B_T_V.float() / temperature
    return logits.gather(-1, token_ids_B_T[..., None]).squeeze(-1) - logits.logsumexp(-1)


def policy_loss(
    logprobs_B_T: Tensor,
    old_logprobs_B_T: Tensor,
    advantages_B_T: Tensor,
    mask_B_T: Tensor,
    clip: float,
    count: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of Eq. 2, negated: -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A).

    Args:
        count: the response tokens of the whole batch (all micro-batches, all processes).

    Returns:
        The loss (a scalar) and the share of tokens where the clipped branch is the smaller one.
    """
    ratio_B_T = torch.exp(torch.where(mask_B_T, logprobs_B_T - old_logprobs_B_T, 0))
    free_B_T = ratio_B_T * advantages_B_T
    clipped_B_T = ratio_B_T.clamp(1 - clip, 1 + clip) * advantages_B_T
    loss = -torch.where(mask_B_T, torch.minimum(free_B_T, clipped_B_T), 0).sum() / count
    clipped_share = ((clipped_B_T < free_B_T) & mask_B_T).sum() / count
    return loss, clipped_share.detach()


def truncated_importance_weights(old_logprobs_B_T: Tensor, engine_logprobs_B_T: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_engine, cap) per token, without gradient. [B, T].

    The rollout engine samples from slightly other probabilities than the trainer's (its own kernels and precision). A
    token's surrogate, multiplied by this weight, is an estimate under the trainer's again; the cap bounds its variance.

    Args:
        old_logprobs_B_T: by the trainer, before the update.
        engine_logprobs_B_T: by the engine that sampled the tokens, at the same temperature.
        cap: about 2.
    """
    return torch.exp(old_logprobs_B_T - engine_logprobs_B_T).clamp(max=cap).detach()


def critic_loss(
    values_B_T: Tensor, old_values_B_T: Tensor, returns_B_T: Tensor, mask_B_T: Tensor, clip: float, count: Tensor | int
) -> Tensor:
    """PPO's value loss: half the larger of the plain and the clipped squared error, summed and divided by `count`."""
    clipped_B_T = old_values_B_T + (values_B_T - old_values_B_T).clamp(-clip, clip)
    worst_B_T = torch.maximum((values_B_T - returns_B_T) ** 2, (clipped_B_T - returns_B_T) ** 2)
    return 0.5 * torch.where(mask_B_T, worst_B_T, 0).sum() / count
