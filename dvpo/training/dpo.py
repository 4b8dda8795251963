"""Direct preference optimisation, through TRL."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import DPOConfig, DPOTrainer

from dvpo import models
from dvpo.config import DpoSettings
from dvpo.data.pairs import EncodedPair
from dvpo.training.common import WholeCheckpoints, argument_values, require_reads, train


class TokenDPOTrainer(WholeCheckpoints, DPOTrainer):
    """TRL's trainer on rows that are token ids already; its own preparation reads text only."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def train_dpo(
    start: str | Path, pairs: Sequence[EncodedPair], settings: DpoSettings, out: Path, state: Path, seed: int
) -> dict[str, Any]:
    """Optimises the SFT policy `start` on pairs (the reference is `start` itself) and saves it in `out`.

    Returns:
        {"losses": [[step, DPO loss], ...]}
    """
    torch.manual_seed(seed)
    model = models.load(start, "policy", lora=settings.lora)
    tokenizer = models.load_tokenizer(start)
    rows = [
        {"prompt_ids": p.better.prompt_ids, "chosen_ids": p.better.response_ids, "rejected_ids": p.worse.response_ids}
        for p in pairs
    ]
    require_reads(model, (len(t.prompt_ids) + len(t.response_ids) for p in pairs for t in (p.better, p.worse)))
    trainer = TokenDPOTrainer(
        model=model,
        ref_model=None if settings.lora else models.load(start, "policy"),
        args=DPOConfig(
            **argument_values(settings, state, seed), max_length=None, beta=settings.beta, pad_token=tokenizer.pad_token
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return train(trainer, tokenizer, out, state)
