"""What all stage graphs share."""

from dataclasses import dataclass, field
from typing import Any

from dvpo.config import GvmSettings, Settings
from reproduce.pipeline import Stage, in_order


@dataclass
class Graph:
    """The stages by name, and for every table or figure ("T1", "F4", "credit", "study") the names that it reads.

    A plain run leaves the `optional` stages out; they run where a table or figure that reads them is asked for.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    leaves: dict[str, set[str]] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)

    def add(self, stage: Stage, *wanted_by: str, optional: bool = False) -> Stage:
        """Adds a stage; a name is used once."""
        self.stages[stage.id] = stage
        for name in wanted_by:
            self.leaves.setdefault(name, set()).add(stage.id)
        if optional:
            self.optional.add(stage.id)
        return stage

    def order(self, wanted: set[str] | None) -> list[Stage]:
        """All stages but the optional ones, or those that the wanted tables and figures need, each after its inputs."""
        plain = self.stages.keys() - self.optional
        ids = plain if wanted is None else {i for w in wanted for i in self.leaves.get(w, ())}
        return in_order([stage for name, stage in self.stages.items() if name in ids])


def as_json(settings: Settings) -> dict[str, Any]:
    """Settings as a stage's key reads them."""
    return settings.model_dump(mode="json")


def with_target(settings: GvmSettings, target: str) -> GvmSettings:
    """The settings of a GVM whose rewards come from elsewhere."""
    return settings.model_copy(update={"target": target})
