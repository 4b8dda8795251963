"""What the offline trainers share: arguments, several processes, resuming, saving, and the loss curve."""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dvpo import distributed, models, stopping
from dvpo.config import TrainSettings
from dvpo.errors import StageError
from dvpo.training.zero_state import load_zero_state, zero_state


class ListDataset(torch.utils.data.Dataset):
    """A list as a torch dataset."""

    def __init__(self, items: Sequence[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def argument_values(settings: TrainSettings, state: Path, seed: int) -> dict[str, Any]:
    """The keyword arguments of TrainingArguments (and of TRL's configs, which derive from it) for these settings.

    Joins the other processes, if there are any. Raises InputError where they cannot share a batch equally.
    """
    processes = distributed.start()
    processes.require_divides("batch_size", settings.batch_size)
    share = settings.batch_size // processes.count
    micro = math.gcd(settings.micro_batch_size or share, share)
    cuda = processes.device.type == "cuda"
    return {
        "output_dir": str(state),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        # With this, accelerate would take DeepSpeed for plain data parallelism.
        "use_cpu": not cuda and not processes.zero,
        "deepspeed": distributed.zero_config() if processes.zero else None,
        "accelerator_config": {"use_configured_state": True} if processes.zero else None,
        "dataloader_pin_memory": cuda,
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


def require_reads(model: Any, lengths: Iterable[int]) -> None:
    """Raises InputError where a training text is longer than the model reads."""
    models.require_reads(model, max(lengths, default=0), "max_prompt_tokens or max_response_tokens")


class WholeCheckpoints:
    """Put before a Trainer: its checkpoints under DeepSpeed hold whole tensors, in the files of a plain run.

    DeepSpeed's own checkpoints go on only under the same stage and number of processes.
    """

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps the order of the parameters, which DeepSpeed takes out of the optimizer."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled or checkpoint is None:
            return super()._prepare_for_training(max_steps, loader, checkpoint)  # type: ignore[misc]
        self._load_from_checkpoint(checkpoint)  # into the model that is not wrapped yet
        prepared = super()._prepare_for_training(max_steps, loader, None)  # type: ignore[misc]
        optimizer, scheduler, exact = (_load(checkpoint, name) for name in ("optimizer", "scheduler", "float32"))
        names = dict(self.model.named_parameters())
        weights = {names[name]: value for name, value in exact.items()} if exact else None
        load_zero_state(self.deepspeed.optimizer, self._groups, optimizer, weights)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared

    def _save_optimizer_and_scheduler(self: Any, folder: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(folder)  # type: ignore[misc]
            return
        weights, optimizer = zero_state(self.deepspeed.optimizer, self._groups)
        if self.args.should_save:
            torch.save(optimizer, Path(folder) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(folder) / "scheduler.pt")
            if self.args.bf16:  # the model's own file has rounded them
                names = {p: name for name, p in self.model.named_parameters()}
                torch.save({names[p]: value for p, value in weights.items()}, Path(folder) / "float32.pt")


def train(trainer: Trainer, tokenizer: Any, out: Path, state: Path) -> dict[str, Any]:
    """Trains from the last checkpoint in `state`, and saves the model in `out` as an ordinary folder.

    Every process takes part; the main one writes. Returns {"losses": [[step, loss], ...]}.
    """
    processes = distributed.start()
    if processes.count > 1 and trainer.args.world_size != processes.count:
        raise StageError(f"the trainer sees {trainer.args.world_size} of {processes.count} processes")
    trainer.add_callback(_StopWhenAsked())
    trainer.train(resume_from_checkpoint=processes.from_main(last_checkpoint(state) if processes.main else None))
    if trainer.state.global_step < trainer.state.max_steps:
        raise stopping.Stopped(f"stopped as asked after step {trainer.state.global_step} of {trainer.state.max_steps}")
    weights = None
    if processes.zero or trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if processes.main:
        models.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out, weights)
    processes.wait()
    return {"losses": step_losses(trainer)}


class _StopWhenAsked(TrainerCallback):
    """Saves and ends at a logged step, so that a resumed training logs the same losses as an uninterrupted one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after every step."""
        if state.global_step % args.logging_steps or state.global_step >= state.max_steps:
            return
        if any(distributed.start().gather([stopping.asked()])):
            control.should_save = control.should_training_stop = True


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


def _load(checkpoint: str, name: str) -> Any:
    path = Path(checkpoint) / f"{name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
