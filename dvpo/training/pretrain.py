"""Training the tiny base model from random weights on plain texts, with the stock Trainer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from dvpo import models
from dvpo.batching import of_like_length
from dvpo.config import PretrainSettings
from dvpo.training.common import ListDataset, argument_values, train
from dvpo.training.muon import MuonWithAdamW

WINDOW = 16
"""Batches among which texts change places, for batches of like length."""


def pretrain(
    start: str | Path,
    texts: Sequence[list[int]],
    settings: PretrainSettings,
    out: Path,
    state: Path,
    seed: int,
    weights: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """Trains the policy in `start` on every token of `texts`, in about their order, and saves it in `out`.

    Args:
        weights: what a token id counts in the loss, where it is not 1.

    Returns:
        {"losses": [[step, weighted mean of the cross-entropy over tokens], ...]}
    """
    torch.manual_seed(seed)
    model = models.load(start, "policy")
    tokenizer = models.load_tokenizer(start)

    def batch_of(rows: Sequence[list[int]]) -> dict[str, Tensor]:
        length = max(map(len, rows))
        # No attention mask: in a causal model right padding is seen by nothing that counts.
        return {
            "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (length - len(row)) for row in rows]),
        }

    weights_V = torch.ones(model.config.vocab_size)
    for token, weight in (weights or {}).items():
        weights_V[token] = weight

    def loss(outputs: Any, labels_B_T: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits_N_V = outputs.logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits_N_V, labels_B_T[:, 1:].flatten(), weight=weights_V.to(logits_N_V.device))

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
        compute_loss_func=loss,
        optimizers=(optimizer, None),  # the Trainer makes the schedule
    )
    return train(trainer, tokenizer, out, state)
