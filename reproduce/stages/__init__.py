"""Every kind of stage: where its function is, and the version that belongs to its key.

A version goes up when the same settings and inputs would give another result. Importing this loads nothing heavy.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A stage function `module:name`, imported when it runs."""

    version: int
    target: str

    def function(self) -> Callable[[Any], dict[str, Any]]:
        """The function: Context -> metrics."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(f"reproduce.stages.{module}"), name)


KINDS = {
    "checkpoint": Kind(1, "data:checkpoint"),
    "preferences": Kind(1, "data:preferences"),
    "atlas": Kind(1, "atlas:atlas"),
    "base": Kind(2, "atlas:base"),
    "coverage": Kind(2, "atlas:coverage"),
    "gold": Kind(2, "atlas:gold"),
    "sft": Kind(1, "training:sft"),
    "rm": Kind(2, "training:rm"),
    "reward_scale": Kind(1, "training:reward_scale"),
    "dpo": Kind(2, "training:dpo"),
    "policy": Kind(2, "training:policy"),
    "gvm": Kind(4, "training:gvm"),
    "credit": Kind(2, "credit:credit"),
    "cost": Kind(1, "cost:cost"),
    "token_values": Kind(1, "pictures:token_values"),
    "lemma": Kind(1, "pictures:lemma"),
    "pairwise": Kind(2, "evaluation:pairwise"),
    "rewardbench": Kind(1, "benchmarks:rewardbench"),
    "mt_bench": Kind(2, "benchmarks:mt_bench"),
    "arena_hard": Kind(2, "benchmarks:arena_hard"),
    "alpaca_eval": Kind(2, "benchmarks:alpaca_eval"),
}
