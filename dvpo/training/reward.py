"""The ScalarRM: Bradley-Terry on pairs, through TRL."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import RewardConfig, RewardTrainer

from dvpo import models
from dvpo.config import RewardSettings
from dvpo.data.pairs import EncodedPair
from dvpo.training.common import WholeCheckpoints, argument_values, require_reads, train


class WholeRewardTrainer(WholeCheckpoints, RewardTrainer):
    """TRL's trainer with checkpoints that go on anywhere."""


def train_reward(
    start: str | Path, pairs: Sequence[EncodedPair], settings: RewardSettings, out: Path, state: Path, seed: int
) -> dict[str, Any]:
    """Trains a ScalarRM from the SFT checkpoint `start` and saves it in `out`.

    Returns:
        {"losses": [[step, Bradley-Terry loss], ...]}
    """
    torch.manual_seed(seed)
    model = models.load(start, "reward", lora=settings.lora, fresh_head=True)
    tokenizer = models.load_tokenizer(start)
    rows = [
        {
            "chosen_ids": p.better.prompt_ids + p.better.response_ids,
            "rejected_ids": p.worse.prompt_ids + p.worse.response_ids,
        }
        for p in pairs
    ]
    require_reads(model, (len(ids) for row in rows for ids in row.values()))
    trainer = WholeRewardTrainer(
        model=model,
        # The padding token must not be EOS: the library's pooling would then read the token before it.
        args=RewardConfig(**argument_values(settings, state, seed), max_length=None, pad_token=tokenizer.pad_token),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return train(trainer, tokenizer, out, state)
