"""Training the tiny base model from random weights on plain texts, with the stock Trainer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from dvpo import models
from dvpo.batching import of_like_length
from dvpo.config import PretrainSettings
from dvpo.training.common import ListDataset, argument_values, train
from dvpo.training.muon import MuonWithAdamW

WINDOW = 16
"""Batches among which texts change places, for batches of like length."""


def pretrain(
    start: str | Path, texts: Sequence[list[int]], settings: PretrainSettings, out: Path, state: Path, seed: int
) -> dict[str, Any]:
    """Trains the policy in `start` on every token of `texts`, in about their order, and saves it in `out`.

    Returns:
        {"losses": [[step, mean cross-entropy per token], ...]}
    """
    torch.manual_seed(seed)
    model = models.load(start, "policy")
    tokenizer = models.load_tokenizer(start)

    def batch_of(rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        length = max(map(len, rows))
        # No attention mask: in a causal model right padding is seen by nothing that counts.
        return {
            "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (length - len(row)) for row in rows]),
        }

    steps = settings.max_steps or math.ceil(len(texts) / settings.batch_size * settings.epochs)
    optimizer = MuonWithAdamW(model, settings.muon_learning_rate, settings.learning_rate, settings.adam_beta2)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **argument_values(settings, state, seed),
            train_sampling_strategy="sequential",
            lr_scheduler_kwargs={"num_decay_steps": round(settings.decay * steps), "decay_type": "linear"},
        ),
        train_dataset=ListDataset(of_like_length(texts, len, settings.batch_size, WINDOW, seed)),
        data_collator=batch_of,
        optimizers=(optimizer, None),  # the Trainer makes the schedule
    )
    return train(trainer, tokenizer, out, state)
