"""A GVM behind a scoring server as the reward of verl. Written against verl 0.9.1, which is not a requirement of ours.

All of these read the server's address from DVPO_GVM_URL and its key, if it asks for one, from DVPO_GVM_API_KEY; hand
them to the workers with `+ray_kwargs.ray_init.runtime_env.env_vars.DVPO_GVM_URL=http://HOST:PORT`.

One number for each response, at its last token:

- from ids, what the policy sampled: `reward.reward_manager.source=importlib
  reward.reward_manager.name=GVMRewardManager reward.reward_manager.module.path=pkg://dvpo.integrations.verl`
- from text: `reward.custom_reward_function.path=pkg://dvpo.integrations.verl
  reward.custom_reward_function.name=compute_score`, with the prompt in every row's `extra_info`

A number for every token (`rm_scores` of shape [B, T]): verl's trainers take no more than one number from a reward
manager, so the values enter with the rollout. `GVMAgentLoop` does that; name it in the file that
`actor_rollout_ref.rollout.agent.agent_loop_config_path` points to, and with `trainer.use_v1=true` (the default):

    - name: gvm
      _target_: dvpo.integrations.verl.GVMAgentLoop

and `actor_rollout_ref.rollout.agent.default_agent_loop=gvm`. A loop that has a whole batch at hand (and verl up to 0.6)
calls the manager itself: `GVMRewardManager(tokenizer=tokenizer)(batch)`.

The token rewards are differences, r_1 = Q_1 and r_t = Q_t - Q_{t-1}: their sum is Q_T, the response's score `last`,
which is what verl logs and what its estimators for whole responses (GRPO, RLOO) use. Where verl sums rewards to come
(REINFORCE++, gamma 1), the sum at t > 1 is Q_T - V(s_t), the estimator `gae` at lambda 1. With the Q themselves as
rewards such sums would count every token's value many times.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvpo.errors import InputError
from dvpo.integrations.client import GVMClient, Prompt, TokenValues

URL, API_KEY = "DVPO_GVM_URL", "DVPO_GVM_API_KEY"


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    aggregate: str = "mean",
    **_: Any,
) -> dict[str, float]:
    """verl's custom reward function: the score of one response, given as text (which is taken to end with EOS).

    Args:
        extra_info: holds the question under "prompt", as text or as chat messages; verl itself does not pass it on.
        aggregate: mean, last, p1, p5, p10, p90, p95, p99 or bellman; set it in `reward_kwargs`.

    Returns:
        {"score": float}.

    Raises:
        InputError: no prompt in `extra_info`, no server named, or the server's refusal.
    """
    prompt: Prompt | None = (extra_info or {}).get("prompt")
    if prompt is None:
        raise InputError(
            f'a row of {data_source} has no "prompt" in its extra_info; copy the chat messages there when you write '
            "the data"
        )
    chat: Prompt = prompt if isinstance(prompt, str) else list(prompt)  # type: ignore[assignment]  # parquet: an array
    (values,) = await open_client().ascore([chat], [solution_str], [aggregate])
    return {"score": values.scores[aggregate]}


class GVMRewardManager:
    """verl's reward manager. `run_single` gives one number for a response, a call fills a batch's `rm_scores`.

    Args:
        tokenizer: the policy's. A server whose GVM has another one is refused.
        client: in place of the one that the environment names.
        verl: what verl passes to every manager (config, compute_score, and so on); not used.
    """

    def __init__(
        self, config: Any = None, tokenizer: Any = None, *, client: GVMClient | None = None, **verl: Any
    ) -> None:
        self.client = client or open_client(tokenizer)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The score Q_T of the one response in `data`, a DataProto; its mean Q goes to verl's log."""
        prompts, responses = ids_of(data.batch)
        if len(responses) != 1:
            raise InputError(f"a trajectory of {len(responses)} outputs cannot be scored; use a single-turn agent loop")
        (values,) = await self.client.ascore(prompts, responses)
        return {"reward_score": float(values.q_T[-1]), "reward_extra_info": {"gvm_mean": values.scores["mean"]}}

    def __call__(self, data: Any, return_dict: bool = False) -> Any:
        """Fills `data.batch["rm_scores"]`, float32 [B, T], 0 at padding, and returns it.

        Args:
            data: a DataProto. Its batch holds `prompts` [B, P], `responses` [B, T] and `attention_mask` [B, P + T],
                padded on any side.
            return_dict: return {"reward_tensor", "reward_extra_info"} instead.
        """
        scored = self.client.score(*ids_of(data.batch))
        data.batch["rm_scores"] = spread(scored, data.batch)
        if not return_dict:
            return data.batch["rm_scores"]
        info = {"gvm_mean": [values.scores["mean"] for values in scored]}
        return {"reward_tensor": data.batch["rm_scores"], "reward_extra_info": info}


def token_rewards(q_T: NDArray[np.float32]) -> NDArray[np.float32]:
    """r_1 = Q_1, r_t = Q_t - Q_{t-1}; they sum to Q_T."""
    return np.diff(q_T, prepend=np.float32(0))


def ids_of(batch: Mapping[str, Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts and responses of a padded batch, without its padding."""
    split = batch["prompts"].shape[1]
    mask = batch["attention_mask"].bool()
    parts = ((batch["prompts"], mask[:, :split]), (batch["responses"], mask[:, split:]))
    prompts, responses = ([row[m].tolist() for row, m in zip(ids, m_B_L, strict=True)] for ids, m_B_L in parts)
    return prompts, responses


def spread(scored: Sequence[TokenValues], batch: Mapping[str, Tensor]) -> Tensor:
    """The token rewards of every response at their places in the padded batch. [B, T]."""
    mask_B_T = batch["attention_mask"][:, batch["prompts"].shape[1] :].bool()
    rewards_B_T = torch.zeros(mask_B_T.shape, device=mask_B_T.device)
    rewards_B_T[mask_B_T] = torch.from_numpy(np.concatenate([token_rewards(s.q_T) for s in scored])).to(mask_B_T.device)
    return rewards_B_T


def open_client(tokenizer: Any = None) -> GVMClient:
    """A client of the server that the environment names. Raises InputError where it names none."""
    url = os.environ.get(URL)
    if not url:
        raise InputError(f"no scoring server is named; set {URL} for verl's workers, for example http://127.0.0.1:8000")
    return _client(url, os.environ.get(API_KEY), tokenizer)


@lru_cache(maxsize=4)
def _client(url: str, api_key: str | None, tokenizer: Any) -> GVMClient:
    return GVMClient(url, api_key=api_key, tokenizer=tokenizer)


def __getattr__(name: str) -> Any:
    # The class below has a parent in verl, which only verl's own workers can import.
    if name != "GVMAgentLoop":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _agent_loop()
    return globals()[name]


def _agent_loop() -> type:
    from verl.experimental.agent_loop.agent_loop import AgentLoopOutput  # type: ignore[import-not-found]
    from verl.experimental.agent_loop.single_turn_agent_loop import (  # type: ignore[import-not-found]
        SingleTurnAgentLoop,
    )

    class DenseOutput(AgentLoopOutput):
        """A rollout with a reward for every token."""

        token_rewards: list[float]

        def as_dict(self) -> dict[str, Any]:
            """What the trainer reads, `rm_scores` [T] with it."""
            fields: dict[str, Any] = super().as_dict()
            fields["rm_scores"] = torch.tensor(fields.pop("token_rewards"))
            return fields

    class GVMAgentLoop(SingleTurnAgentLoop):
        """verl's single-turn rollout, with the GVM's values as its rewards."""

        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
            """Samples a response, then scores it; verl's own reward is not asked for."""
            output = await super().run(sampling_params, **kwargs)
            (values,) = await open_client(self.tokenizer).ascore([output.prompt_ids], [output.response_ids])
            output.extra_fields["reward_extra_info"] = {"gvm_mean": values.scores["mean"]}
            return DenseOutput(
                **{name: getattr(output, name) for name in output.model_fields_set},
                reward_score=float(values.q_T[-1]),
                token_rewards=token_rewards(values.q_T).tolist(),
            )

    GVMAgentLoop.__module__, GVMAgentLoop.__qualname__ = __name__, "GVMAgentLoop"
    return GVMAgentLoop
