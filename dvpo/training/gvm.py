"""Training the Global Value Model: TD(lambda) regression of token values, on the transformers Trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dvpo import models
from dvpo.batching import epochs_of, of_like_length
from dvpo.config import GvmSettings
from dvpo.data.templates import Encoded
from dvpo.objectives.td import td_lambda_targets, value_model_loss
from dvpo.packed_values import PackedBatch, can_train_packed, collate_packed, packed_token_values
from dvpo.training.common import ListDataset, WholeCheckpoints, argument_values, require_reads, train
from dvpo.values import ValueBatch, collate, token_values

_WORTH_PACKING = 128
"""Tokens of a text, in the mean. Shorter ones would gain less, and the built-in world's results were made padded."""


@dataclass(frozen=True, slots=True)
class ValueText:
    """One training text: [x, y] and the reward r(x, y) that arrives at y_T."""

    text: Encoded
    reward: float


class GvmTrainer(WholeCheckpoints, Trainer):
    """The stock Trainer with the TD(lambda) loss, normalised by the states of the whole batch."""

    def __init__(self, *args: Any, td_lambda: float, gamma: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.td_lambda, self.gamma = td_lambda, gamma
        # Makes the Trainer count `labels` over all micro-batches and processes and pass the total to compute_loss.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Eq. 1 with TD(lambda) targets from the model's own detached values."""
        values_B_S, mask_B_S = _read(model, inputs), inputs["mask_B_S"]
        targets_B_S = td_lambda_targets(values_B_S, inputs["rewards_B"], mask_B_S, self.gamma, self.td_lambda)
        count = mask_B_S.sum() if num_items_in_batch is None else num_items_in_batch
        loss = value_model_loss(values_B_S, targets_B_S, mask_B_S, count)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, not summed
        return (loss, {"values": values_B_S}) if return_outputs else loss


def train_gvm(
    start: str | Path, texts: Sequence[ValueText], settings: GvmSettings, out: Path, state: Path, seed: int
) -> dict[str, Any]:
    """Trains a GVM from the SFT checkpoint `start` (zero head) and saves it in `out`.

    Args:
        state: folder of trainer checkpoints; an interrupted training goes on from the last one.

    Returns:
        {"losses": [[step, loss], ...]}
    """
    torch.manual_seed(seed)
    model = models.load(start, "value", lora=settings.lora, fresh_head=True)
    tokenizer = models.load_tokenizer(start)
    require_reads(model, map(_length, texts))
    packed = sum(map(_length, texts)) >= _WORTH_PACKING * len(texts) and can_train_packed(model)

    def batch_of(items: Sequence[ValueText]) -> dict[str, Tensor]:
        encoded = [item.text for item in items]
        batch = collate_packed(encoded) if packed else collate(encoded, tokenizer.pad_token_id)
        fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        rewards = torch.tensor([item.reward for item in items], dtype=torch.float32)
        return {**fields, "rewards_B": rewards, "labels": torch.where(batch.mask_B_S, 1, -100)}

    passes = epochs_of(texts, settings.epochs, seed)
    # By length within a batch only: batches of like length gave a value model that finds wrong tokens less well.
    micro = settings.micro_batch_size or settings.batch_size
    ordered = of_like_length(passes, _length, micro, settings.batch_size // micro, seed)
    in_order = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    trainer = GvmTrainer(
        model=model,
        args=TrainingArguments(**argument_values(settings, state, seed) | in_order),
        train_dataset=ListDataset(ordered),
        data_collator=batch_of,
        td_lambda=settings.td_lambda,
        gamma=settings.gamma,
    )
    return train(trainer, tokenizer, out, state)


def _read(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """h_0..h_T of a collated batch, packed or padded. [B, S]."""
    if "lengths_B" in inputs:
        return packed_token_values(model, PackedBatch(*(inputs[name] for name in PackedBatch.__dataclass_fields__)))
    return token_values(model, ValueBatch(*(inputs[name] for name in ValueBatch.__dataclass_fields__)))


def _length(text: ValueText) -> int:
    return len(text.text.prompt_ids) + len(text.text.response_ids)
