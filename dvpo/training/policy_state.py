"""Checkpoints of the online loop: one file, replaced atomically. Sampling is seeded per update, so no RNG is in it.

It holds whole tensors, whatever the strategy: a run goes on under another one, and with another number of processes.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from dvpo.distributed import Processes
from dvpo.files import atomic_write
from dvpo.objectives.kl import AdaptiveKL
from dvpo.training.learner import Learner

FILE = "online.pt"


class Loop(Protocol):
    """The parts of an online trainer that change from update to update."""

    update: int
    kl: AdaptiveKL
    log: list[dict[str, float]]
    processes: Processes
    policy_learner: Learner
    critic_learner: Learner | None


def save_state(trainer: Loop, folder: Path) -> None:
    """Writes what the next update depends on. Every process takes part, the main one writes."""
    policy = trainer.policy_learner.state()
    state: dict[str, Any] = {
        "update": trainer.update,
        "beta": trainer.kl.beta,
        "log": trainer.log,
        "policy": policy["weights"],
        "optimizer": policy["optimizer"],
    }
    if trainer.critic_learner is not None:
        critic = trainer.critic_learner.state()
        state |= {"critic": critic["weights"], "critic_optimizer": critic["optimizer"]}
    if trainer.processes.main:
        with atomic_write(folder / FILE) as temporary:
            torch.save(state, temporary)
    trainer.processes.wait()


def load_state(trainer: Loop, folder: Path) -> None:
    """Goes on from `folder`'s checkpoint, if there is one."""
    path = folder / FILE
    if not path.is_file():
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    trainer.update, trainer.kl.beta, trainer.log = state["update"], state["beta"], state["log"]
    trainer.policy_learner.load({"weights": state["policy"], "optimizer": state["optimizer"]})
    if trainer.critic_learner is not None:
        trainer.critic_learner.load({"weights": state["critic"], "optimizer": state["critic_optimizer"]})
