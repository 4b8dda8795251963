"""The optimiser of a model in training: torch's fused kernel in bfloat16 runs, its plain loop in float32 ones."""

import copy
from typing import Any

import pytest
import torch

from dvpo import models
from dvpo.distributed import start
from dvpo.training.learner import Learner, learner


def make(checkpoints: dict[Any, Any], bf16: bool) -> Learner:
    return learner(models.load(checkpoints["llama", "policy"], "policy"), 1e-3, 1.0, start(), bf16)


def run(what: Learner, steps: int, seed: int) -> torch.Tensor:
    """Some steps on gradients of its own making; then all weights in one row."""
    noise = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in what.module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=noise)
        what.step()
    return torch.cat([parameter.detach().flatten() for parameter in what.module.parameters()])


def test_both_kernels_go_the_same_way(checkpoints) -> None:
    plain, fused = (make(checkpoints, bf16) for bf16 in (False, True))
    assert [each.optimizer.param_groups[0]["fused"] for each in (plain, fused)] == [None, True]
    before = run(plain, 0, seed=0)
    expected, found = run(plain, 5, seed=0), run(fused, 5, seed=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - before).abs().median() > 1e-3


@pytest.mark.parametrize("of_bf16", [True, False])
def test_a_checkpoint_goes_on_as_the_other_kind(checkpoints, of_bf16: bool) -> None:
    first, second = make(checkpoints, of_bf16), make(checkpoints, not of_bf16)
    run(first, 3, seed=0)
    second.load(copy.deepcopy(first.state()))
    assert second.optimizer.param_groups[0]["fused"] is (None if of_bf16 else True)
    torch.testing.assert_close(run(second, 3, seed=1), run(first, 3, seed=1), rtol=0, atol=1e-6)
