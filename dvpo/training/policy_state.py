"""Checkpoints of the online loop: one file, replaced atomically. Sampling is seeded per update, so no RNG is in it."""

from pathlib import Path
from typing import Any, Protocol

import torch

from dvpo.files import atomic_write
from dvpo.objectives.kl import AdaptiveKL

FILE = "online.pt"


class Loop(Protocol):
    """The parts of an online trainer that change from update to update."""

    update: int
    kl: AdaptiveKL
    log: list[dict[str, float]]
    device: torch.device
    policy: Any
    optimizer: torch.optim.Optimizer
    critic: Any
    critic_optimizer: torch.optim.Optimizer | None


def save_state(trainer: Loop, folder: Path) -> None:
    """Writes what the next update depends on."""
    state: dict[str, Any] = {
        "update": trainer.update,
        "beta": trainer.kl.beta,
        "log": trainer.log,
        "policy": _trained(trainer.policy),
        "optimizer": trainer.optimizer.state_dict(),
    }
    if trainer.critic is not None and trainer.critic_optimizer is not None:
        state |= {"critic": _trained(trainer.critic), "critic_optimizer": trainer.critic_optimizer.state_dict()}
    with atomic_write(folder / FILE) as temporary:
        torch.save(state, temporary)


def load_state(trainer: Loop, folder: Path) -> None:
    """Goes on from `folder`'s checkpoint, if there is one."""
    path = folder / FILE
    if not path.is_file():
        return
    state = torch.load(path, map_location=trainer.device, weights_only=True)
    trainer.update, trainer.kl.beta, trainer.log = state["update"], state["beta"], state["log"]
    trainer.policy.load_state_dict(state["policy"], strict=False)
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.critic is not None and trainer.critic_optimizer is not None:
        trainer.critic.load_state_dict(state["critic"], strict=False)
        trainer.critic_optimizer.load_state_dict(state["critic_optimizer"])


def _trained(model: Any) -> dict[str, torch.Tensor]:
    """The trainable weights: all, or the adapter."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
