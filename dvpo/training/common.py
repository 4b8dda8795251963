"""What the offline trainers share: arguments, resuming, and the loss curve."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dvpo.config import TrainSettings


class ListDataset(torch.utils.data.Dataset):
    """A list as a torch dataset."""

    def __init__(self, items: Sequence[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def argument_values(settings: TrainSettings, state: Path, seed: int) -> dict[str, Any]:
    """The keyword arguments of TrainingArguments (and of TRL's configs, which derive from it) for these settings."""
    micro = settings.micro_batch_size or settings.batch_size
    return {
        "output_dir": str(state),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // micro,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "logging_steps": settings.log_steps,
        "logging_first_step": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": seed,
        "data_seed": seed,
    }


def training_arguments(settings: TrainSettings, state: Path, seed: int) -> TrainingArguments:
    """TrainingArguments for these settings."""
    return TrainingArguments(**argument_values(settings, state, seed))


def last_checkpoint(state: Path) -> str | None:
    """The newest whole trainer checkpoint in `state`, if there is one.

    The Trainer writes a checkpoint's files straight into its folder; one without the file that is written last was cut
    off, and the one before it is used.
    """
    while state.is_dir() and (found := get_last_checkpoint(str(state))):
        try:
            json.loads((Path(found) / "trainer_state.json").read_text())
            return found
        except (OSError, ValueError):
            shutil.rmtree(found)
    return None


def step_losses(trainer: Trainer) -> list[list[float]]:
    """The logged training losses as [step, loss]."""
    return [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]
