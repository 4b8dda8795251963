"""The rollout engine that the settings name, and what corrects for the difference between it and the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpo.config import PolicySettings, VllmRollouts, VllmServerRollouts
from dvpo.objectives.policy_loss import truncated_importance_weights
from dvpo.rollout import Engine
from dvpo.rollout.transformers import TransformersEngine


def make_engine(settings: PolicySettings, policy: Any, tokenizer: Any, start: Path) -> Engine:
    """The engine for `policy`, whose configuration and tokenizer are in the folder `start`.

    Raises InputError where vLLM is not installed, or no server answers.
    """
    limits: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature}
    if isinstance(settings.engine, VllmRollouts):
        from dvpo.rollout.vllm import VllmEngine

        longest = settings.max_prompt_tokens + settings.max_new_tokens
        return VllmEngine(policy, tokenizer, start, max_tokens=longest, options=settings.engine.options, **limits)
    if isinstance(settings.engine, VllmServerRollouts):
        from dvpo.rollout.vllm_server import VllmServerEngine

        return VllmServerEngine(policy, tokenizer, settings.engine.url, Path(settings.engine.folder), **limits)
    return TransformersEngine(policy, tokenizer, settings.max_new_tokens, settings.temperature)


def importance_weights(logprobs_B_T: Tensor, drawn: Sequence[Sequence[float]], mask_B_T: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_engine, cap) of every token that the engine drew; 1 at padding. [B, T].

    Without it a policy gradient is taken of samples from a slightly other policy (truncated importance sampling, Yao et
    al. 2025).

    Args:
        drawn: the engine's own log-probabilities of the tokens.
    """
    engine_B_T = torch.zeros_like(logprobs_B_T)
    for row, values in enumerate(drawn):
        engine_B_T[row, : len(values)] = torch.tensor(values)
    weights_B_T = truncated_importance_weights(logprobs_B_T, engine_B_T, cap)
    return torch.where(mask_B_T, weights_B_T, 1)
