"""Supervised fine-tuning through TRL. Also pretrains the tiny base model: there a text is all response."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import SFTConfig, SFTTrainer

from dvpo import models
from dvpo.config import SftSettings
from dvpo.data.templates import Encoded
from dvpo.training.common import WholeCheckpoints, argument_values, require_reads, train


class WholeSFTTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's trainer with checkpoints that go on anywhere."""


def train_sft(
    start: str | Path, texts: Sequence[Encoded], settings: SftSettings, out: Path, state: Path, seed: int
) -> dict[str, Any]:
    """Fine-tunes the policy in `start` on the responses of `texts` (EOS included) and saves it in `out`.

    Returns:
        {"losses": [[step, mean cross-entropy per response token], ...]}
    """
    torch.manual_seed(seed)
    model = models.load(start, "policy", lora=settings.lora)
    tokenizer = models.load_tokenizer(start)
    rows = [
        {
            "input_ids": t.prompt_ids + t.response_ids,
            "completion_mask": [0] * len(t.prompt_ids) + [1] * len(t.response_ids),
        }
        for t in texts
    ]
    require_reads(model, (len(row["input_ids"]) for row in rows))
    trainer = WholeSFTTrainer(
        model=model,
        args=SFTConfig(
            **argument_values(settings, state, seed),
            max_length=None,
            completion_only_loss=True,
            shuffle_dataset=False,
            pad_token=tokenizer.pad_token,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return train(trainer, tokenizer, out, state)
