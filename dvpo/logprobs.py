"""Log-probabilities of a response's tokens under a policy."""

from typing import Any

import torch
from torch import Tensor

from dvpo.objectives.policy_loss import token_logprobs
from dvpo.values import ValueBatch, position_ids


def response_logprobs(model: Any, batch: ValueBatch, temperature: float) -> Tensor:
    """log pi(y_t | s_t) of every response token, 0 at padding. The logits of the prompt are not computed. [B, T]."""
    length = batch.input_ids_B_L.shape[1]
    keep = length - int(batch.states_B_S[:, 0].min())
    logits_B_K_V = model(
        input_ids=batch.input_ids_B_L,
        attention_mask=batch.attention_mask_B_L,
        position_ids=position_ids(batch.attention_mask_B_L),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    mask_B_T = batch.mask_B_S[:, 1:]
    before_B_T = torch.where(mask_B_T, batch.states_B_S[:, :-1] - (length - keep), 0)
    actions_B_T = batch.input_ids_B_L.gather(1, batch.states_B_S[:, 1:])
    logits_B_T_V = logits_B_K_V.gather(1, before_B_T[..., None].expand(-1, -1, logits_B_K_V.shape[-1]))
    return torch.where(mask_B_T, token_logprobs(logits_B_T_V, actions_B_T, temperature), 0)
