"""Frozen models under autocast: their linear weights are held as autocast reads them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo import models
from dvpo.config import PolicySettings
from dvpo.distributed import start
from dvpo.logprobs import response_logprobs
from dvpo.training.frozen import frozen_model, hold_as_autocast_reads
from dvpo.values import collate, sequence_scores, token_values

READ: dict[str, Any] = {
    "policy": lambda model, batch: response_logprobs(model, batch, 1.0),
    "value": token_values,
    "reward": sequence_scores,
}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("role", READ)
@torch.no_grad()
def test_not_a_bit_changes_under_autocast(checkpoints, texts, arch: str, role: str) -> None:
    plain, held = (models.load(checkpoints[arch, role], role).eval() for _ in range(2))
    hold_as_autocast_reads(held)
    batch = collate(texts, 0)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = READ[role](plain, batch), READ[role](held, batch)
    assert torch.equal(found, expected)
    assert expected.abs().sum() > 0


def test_what_is_held_is_smaller_and_the_head_is_exact(checkpoints) -> None:
    model: Any = models.load(checkpoints["llama", "value"], "value")
    hold_as_autocast_reads(model)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert models.head(model).weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("bf16", [True, False])
def test_only_a_run_in_bfloat16_holds_them_so(checkpoints, bf16: bool) -> None:
    settings = PolicySettings(
        algorithm={"name": "dvpo"}, learning_rate=1e-4, updates=1, prompts_per_update=2, minibatch_size=2, bf16=bf16
    )
    start_folder = checkpoints["llama", "policy"]
    model: Any = frozen_model(checkpoints["llama", "value"], "value", "value", start_folder, settings, start())
    held = model.model.layers[0].mlp.up_proj.weight.dtype
    assert held == (torch.bfloat16 if bf16 else torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_no_page_of_the_file_stays_in_memory(checkpoints, tmp_path: Path) -> None:
    """Weights in float32 stand in the mapped file; as long as one does, all that was read stays."""
    folder = tmp_path / "value"
    shutil.copytree(checkpoints["llama", "value"], folder)  # of its own: another test may hold a model of this one
    model: Any = models.load(folder, "value")
    hold_as_autocast_reads(model)
    assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()
    assert torch.isfinite(model.get_input_embeddings().weight).all()
