"""The gradient of a tied embedding: the same numbers where its rows are added in place."""

from typing import Any

import pytest
import torch

from dvpo import models
from dvpo.logprobs import response_logprobs
from dvpo.training.mixed import learning_autocast
from dvpo.training.tied import add_rows_in_place
from dvpo.values import collate


def gradients(model: Any, texts: Any, calls: int) -> dict[str, torch.Tensor]:
    for _ in range(calls):
        with learning_autocast("cpu", True):
            logprobs = response_logprobs(model, collate(texts, 0), 1.0)
        (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_added_in_place_are_the_tied_gradient(
    checkpoints, texts, monkeypatch: pytest.MonkeyPatch, arch: str, chunks: bool, checkpointing: bool
) -> None:
    if chunks:
        monkeypatch.setattr("dvpo.logprobs.MOST_LOGITS", 2 * 300)
    model: Any = models.load(checkpoints[arch, "policy"], "policy").train()
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = gradients(model, texts, calls=2)
    add_rows_in_place(model)
    found = gradients(model, texts, calls=2)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        # In float32 the order of a sum matters by this much, which depends on the CPU.
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * max(1.0, float(gradient.abs().max())))
        assert gradient.abs().sum() > 0


def test_weights_that_are_not_tied_or_do_not_learn_are_left_alone(checkpoints) -> None:
    value: Any = models.load(checkpoints["llama", "value"], "value")
    frozen: Any = models.load(checkpoints["llama", "policy"], "policy").requires_grad_(False)
    for model in (value, frozen):
        add_rows_in_place(model)
        assert not model.get_input_embeddings()._forward_hooks
