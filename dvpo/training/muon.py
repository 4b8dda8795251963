"""Muon for the weight matrices of the layers, AdamW for everything else, as one optimizer.

torch's own Muon orthogonalises in bfloat16, matrix by matrix. On a CPU without bfloat16 instructions that takes more
than twenty times as long as the rest of a step; here it is done in float32, all matrices of one shape at a time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan et al., 2024): steepest at zero, singular values end between about 0.7 and 1.2."""
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalised(matrices_N_R_C: Tensor) -> Tensor:
    """Each matrix U S V^T of the stack as about U V^T, by Newton-Schulz iterations. [N, R, C], as given."""
    tall = matrices_N_R_C.shape[1] > matrices_N_R_C.shape[2]
    x = matrices_N_R_C.mT if tall else matrices_N_R_C
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised Nesterov momentum of each matrix; the rate grows with sqrt(rows / columns)."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape go together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), same in by_shape.items():
                directions = orthogonalised(torch.stack([self._momentum(p) for p in same]))
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(same, list(directions), alpha=-rate)

    def _momentum(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(buffer, MOMENTUM)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW side by side; learning-rate schedules and checkpoints see one optimizer.

    Muon takes the matrices inside the layers. Embeddings, the output head and vectors go by AdamW.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, adam_beta2: float):
        embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        rest = embeddings | (set(outputs.parameters()) if outputs is not None else set())
        matrices = [p for p in model.parameters() if p.dim() == 2 and p not in rest]
        others = [p for p in model.parameters() if p.dim() != 2 or p in rest]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, muon_lr),
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
