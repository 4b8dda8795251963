"""The models that judge rollouts and never learn: the reference, the value model and the reward model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dvpo import models
from dvpo.config import PolicySettings
from dvpo.data.templates import Encoded
from dvpo.distributed import Processes, shard_layers
from dvpo.errors import InputError
from dvpo.memory import give_back

KEY = "DVPO_API_KEY"
"""The environment variable with the scoring server's key."""
PATIENCE = 15.0
"""Seconds for the server's first answer."""


@dataclass(frozen=True)
class Frozen:
    """The frozen models' folders: `value` for DVPO, `reward` for the others.

    reward_scale: (mean, std) by which the reward model's raw scores are standardised.
    """

    value: Path | None = None
    reward: Path | None = None
    reward_scale: tuple[float, float] = (0.0, 1.0)


class RemoteValues:
    """A value model behind a scoring server, asked by token ids.

    Raises InputError where the server's model has another tokenizer, StageError where no server answers.
    """

    def __init__(self, url: str, tokenizer: Any):
        from dvpo.integrations.client import GVMClient

        key = os.environ.get(KEY)
        # One token, now: a wrong address is known before the first rollout.
        GVMClient(url, api_key=key, tokenizer=tokenizer, timeout=PATIENCE).score([[0]], [[0]])
        self.client = GVMClient(url, api_key=key, tokenizer=tokenizer)

    def __call__(self, texts: list[Encoded]) -> Tensor:
        """h_0..h_T of every text, 0 at padding. [B, S]."""
        found = self.client.score([t.prompt_ids for t in texts], [t.response_ids for t in texts])
        return pad_sequence([torch.from_numpy(values.values_S) for values in found], batch_first=True)


def frozen_model(
    folder: Path | None, role: models.Role, name: str, start: Path, settings: PolicySettings, processes: Processes
) -> Any:
    """The frozen model in `folder`, on the device or spread over the processes, as the settings say.

    Raises InputError where there is none, or where its tokenizer is not that of the policy in `start`.
    """
    if folder is None:
        raise InputError(f"{settings.algorithm.name} needs a {name} model; name its folder")
    models.require_same_tokenizer(start, folder, name)
    model: Any = models.load(folder, role, dtype=getattr(torch, settings.frozen_dtype))
    sharded = settings.frozen == "sharded" and processes.count > 1
    if settings.bf16 and not sharded:
        hold_as_autocast_reads(model)
    model = model.to(processes.device).eval().requires_grad_(False)
    if sharded:
        shard_layers(model, processes)
    return model


def hold_as_autocast_reads(model: Any) -> None:
    """Puts the weights of linear layers in bfloat16, in place: autocast makes them so at every call.

    What the model computes under bfloat16 autocast stays the same to the last bit, in little more than half the memory.
    Weights that are those of the embedding too stay: its output is not cast.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if type(module) is nn.Linear and module.weight is not embedding:
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            # It may stand in the mapped file, all of which would stay in memory with it.
            parameter.data = parameter.data.clone()
    give_back(after_loading=True)
