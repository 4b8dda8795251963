"""Autocast that keeps no copies of the weights: the same bits as torch's own, and less to keep."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dvpo import models
from dvpo.logprobs import response_logprobs
from dvpo.training.mixed import learning_autocast
from dvpo.values import collate, token_values

READ: dict[str, Any] = {
    "policy": lambda model, batch: response_logprobs(model, batch, 1.0),
    "value": token_values,
}


def gradients(model: Any, role: str, texts: Any, autocast: Any) -> list[torch.Tensor]:
    with autocast:
        found = READ[role](model, collate(texts, 0))
    weights = torch.linspace(-1, 2, found.numel()).view_as(found)
    (found * weights).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [found.detach(), *grads]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("role", READ)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_not_a_bit_changes(checkpoints, texts, arch: str, role: str, checkpointing: bool) -> None:
    model: Any = models.load(checkpoints[arch, role], role).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = gradients(model, role, texts, torch.autocast("cpu", torch.bfloat16))
    found = gradients(model, role, texts, learning_autocast("cpu", True))
    assert len(found) == len(expected) == 1 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(g.abs().sum() > 0 for g in expected[1:])


def test_no_copy_of_a_weight_is_kept(checkpoints, texts, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = models.load(checkpoints["llama", "policy"], "policy")
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    kept: list[bool] = []

    def watched(pack: Any, unpack: Any) -> Any:
        def note(saved: torch.Tensor) -> Any:
            found = pack(saved)
            if saved.dtype == torch.bfloat16 and saved.shape in shapes:
                kept.append(isinstance(found, torch.Tensor))
            return found

        return saved_tensors_hooks(note, unpack)

    monkeypatch.setattr("dvpo.training.mixed.saved_tensors_hooks", watched)
    with learning_autocast("cpu", True):
        response_logprobs(model, collate(texts, 0), 1.0)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert kept.count(False) == len(linear) > 0


def test_float32_is_left_alone(checkpoints, texts) -> None:
    model: Any = models.load(checkpoints["llama", "policy"], "policy")
    with learning_autocast("cpu", False):
        found = response_logprobs(model, collate(texts, 0), 1.0)
    assert torch.equal(found, response_logprobs(model, collate(texts, 0), 1.0))


def test_a_weight_changed_before_the_backward_pass_is_an_error() -> None:
    linear = torch.nn.Linear(3, 2)
    x = torch.ones(1, 3, requires_grad=True)
    with learning_autocast("cpu", True):
        found = linear(x)
    with torch.no_grad():
        linear.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed between a forward pass and its backward pass"):
        found.sum().backward()
