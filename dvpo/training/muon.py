"""Muon for the weight matrices of the layers, AdamW for everything else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's own Muon and AdamW side by side; learning-rate schedules and checkpoints see one optimizer.

    Muon takes the matrices inside the layers. Embeddings, the output head and vectors go by AdamW.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, adam_beta2: float):
        embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        rest = embeddings | (set(outputs.parameters()) if outputs is not None else set())
        matrices = [p for p in model.parameters() if p.dim() == 2 and p not in rest]
        others = [p for p in model.parameters() if p.dim() != 2 or p in rest]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, adam_beta2), weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dicts, so that a scheduler that sets a group's learning rate sets the part's.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
