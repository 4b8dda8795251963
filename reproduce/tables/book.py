"""The finished stages of a run, looked up by name over all seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproduce.pipeline import Result
from reproduce.recipe import AtlasRecipe, DataRecipe

LABELS = {
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "remax": "ReMax",
    "grpo": "GRPO",
    "dvpo": "DVPO",
    "dvpo-q": "DVPO (A = Q)",
    "dvpo-q-whitened": "DVPO (A = Q, whitened)",
    "dvpo-gae": "DVPO (GAE)",
    "dvpo-official": "DVPO (official)",
}
"""The policies, in the order of every table."""

Nested = list[list[float]]
"""Values per seed."""


@dataclass(eq=False)
class Book:
    """The results of a run. What is read from files is kept, so it must not be changed."""

    recipe: AtlasRecipe | DataRecipe
    results: dict[str, Result]
    _read: dict[tuple[str, str], list[list[dict[str, Any]]]] = field(default_factory=dict)

    def seeds(self, name: str) -> list[Result]:
        """The results of one stage name, a result per seed; empty where it was not run."""
        found = (self.results.get(f"seed{s}/{name}") for s in range(self.recipe.seeds))
        return [r for r in found if r is not None]

    def names(self, prefix: str) -> list[str]:
        """The names below a prefix, in the order of the graph."""
        start = f"seed0/{prefix}/"
        return [i.removeprefix(start) for i in self.results if i.startswith(start)]

    def methods(self) -> list[str]:
        """The policies of LABELS whose gold score was measured."""
        return [name for name in LABELS if self.seeds(f"gold/{name}")]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """A stage's metrics, per seed."""
        return [r.manifest["metrics"] for r in self.seeds(name)]

    def rows(self, name: str, file: str) -> list[list[dict[str, Any]]]:
        """The lines of a stage's JSON-lines file, per seed."""
        if (name, file) not in self._read:
            paths = [r.path / file for r in self.seeds(name)]
            self._read[name, file] = [[json.loads(line) for line in p.read_text().splitlines()] for p in paths]
        return self._read[name, file]

    def curves(self, name: str) -> list[list[dict[str, float]]]:
        """The log of a policy's updates, per seed."""
        return [json.loads((r.path / "curves.json").read_text()) for r in self.seeds(f"policy/{name}")]

    def gold(self, name: str) -> Nested:
        """Gold scores per seed and test prompt."""
        return [[row["gold"] for row in seed] for seed in self.rows(f"gold/{name}", "gold.jsonl")]

    def gains(self, name: str, over: str) -> Nested:
        """By how much one policy's gold score exceeds another's, per seed and test prompt."""
        return differences(self.gold(name), self.gold(over))

    def wins(self, name: str, aggregate: str) -> tuple[Nested, list[list[int]]]:
        """Per seed: 1, 0.5 or 0 for every pair, and the pair's prompt."""
        seeds = self.rows(name, "pairs.jsonl")
        return [[_won(r, aggregate) for r in rows] for rows in seeds], [[r["prompt"] for r in rows] for rows in seeds]

    @property
    def in_domain(self) -> str:
        """The prefix of the accuracies on held-out pairs of the training data's own source."""
        return "accuracy" if isinstance(self.recipe, AtlasRecipe) else "in-domain"

    @property
    def shares_prompts(self) -> bool:
        """Whether all seeds are tested on the same prompts; each built-in world has its own."""
        return isinstance(self.recipe, DataRecipe)

    @property
    def size(self) -> str:
        """What model the measured rows are about."""
        if isinstance(self.recipe, DataRecipe):
            named = self.recipe.model or (self.recipe.hub.id if self.recipe.hub else "the recipe's model")
            return Path(named).name
        return "tiny Llama"


def _won(row: dict[str, Any], key: str) -> float:
    """As `dvpo.evaluation.pairwise.wins`, which loads torch."""
    better, worse = row["better"][key], row["worse"][key]
    return (better > worse) + 0.5 * (better == worse)


def differences(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> Nested:
    """Left minus right, value by value. Raises ValueError where they are not of one shape."""
    return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(left, right, strict=True)]
