"""A value model is trained on packed rows as on padded ones: the same values, gradients and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dvpo import models, packed_attention
from dvpo.config import GvmSettings, LoraSettings
from dvpo.data.templates import Encoded
from dvpo.packed_row import Packing, Segment
from dvpo.packed_values import can_train_packed, collate_packed, packed_token_values
from dvpo.training import gvm
from dvpo.training.gvm import ValueText, train_gvm
from dvpo.values import collate, token_values

SETTINGS = {"learning_rate": 1e-3, "schedule": "constant", "batch_size": 8, "max_steps": 3, "log_steps": 1}
LORA = LoraSettings(r=4, alpha=8)
ids = st.lists(st.integers(3, 60), max_size=12)
encoded = st.lists(st.builds(Encoded, ids.filter(bool), ids), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def both(checkpoints) -> tuple[Any, Any]:
    """The same value model twice: as it is loaded, and ready for packed rows."""
    plain, packs = (models.load(checkpoints["llama", "value"], "value") for _ in range(2))
    assert can_train_packed(packs)
    return plain, packs


def gradients(model: Any, values_B_S: torch.Tensor, mask_B_S: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ((values_B_S - 0.3).square() * mask_B_S).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Up to rounding, beside the size of the whole gradient."""
    assert one.keys() == other.keys()
    off = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return off**0.5 <= 1e-5 * sum(float(g.square().sum()) for g in other.values()) ** 0.5


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=encoded, in_one_call=st.booleans())
def test_values_and_gradients_are_those_of_padded_texts(both, monkeypatch, texts, in_one_call: bool) -> None:
    plain, packs = both
    batch, row = collate(texts, 0), collate_packed(texts)
    assert row.input_ids_1_N.shape == (1, int(batch.attention_mask_B_L.sum()))
    monkeypatch.setattr(packed_attention, "_in_one_call", lambda query: in_one_call)  # the way that GPUs take
    values_B_S, packed_B_S = token_values(plain, batch), packed_token_values(packs, row)
    assert torch.equal(row.mask_B_S, batch.mask_B_S)
    assert torch.allclose(packed_B_S, values_B_S, atol=1e-5)
    expected, found = gradients(plain, values_B_S, batch.mask_B_S), gradients(packs, packed_B_S, row.mask_B_S)
    assert alike(found, expected)


def test_checkpointed_gradients_are_the_same(both) -> None:
    _, packs = both
    texts = [Encoded([5, 6, 7], [8, 9]), Encoded([4, 4], [3, 5, 7, 9, 11])]
    row = collate_packed(texts)
    expected = gradients(packs, packed_token_values(packs, row), row.mask_B_S)
    packs.gradient_checkpointing_enable()
    packs.train()
    try:
        assert alike(gradients(packs, packed_token_values(packs, row), row.mask_B_S), expected)
    finally:
        packs.gradient_checkpointing_disable()
        packs.eval()


def test_under_bfloat16_the_values_stay_near(both) -> None:
    plain, packs = both
    texts = [Encoded([5, 6, 7], [8, 9]), Encoded([4, 4], [3, 5, 7, 9, 11])]
    with torch.autocast("cpu", torch.bfloat16):
        values_B_S, packed_B_S = (
            token_values(plain, collate(texts, 0)),
            packed_token_values(packs, collate_packed(texts)),
        )
    assert packed_B_S.dtype == torch.float32
    assert (packed_B_S - values_B_S).norm() <= 0.03 * values_B_S.norm()


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no value before the first action"):
        collate_packed([Encoded([], [1, 2])])


def test_a_shared_prompt_cannot_be_trained_on(both) -> None:
    """Its gradient would be that of one text only if attention kept it, which the one for training does not."""
    _, packs = both
    packing = Packing([Segment(0, 3), Segment(3, 5, (slice(0, 2),))])
    with pytest.raises(ValueError, match="cannot be trained on"):
        packs(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False, packing=packing)


@pytest.fixture
def trained(
    checkpoints, texts: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, torch.Tensor], list[float], int]]:
    """Trains with packing from so many tokens a text on: weights, losses, and how many batches were packed."""
    rows = [ValueText(t, 1.0 + 0.25 * i) for i, t in enumerate(texts)]

    def train(worth: float, arch: str = "llama", **changes: Any) -> tuple[dict[str, torch.Tensor], list[float], int]:
        packed: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(gvm, "_WORTH_PACKING", worth)
            patch.setattr(gvm, "collate_packed", lambda items: (packed.append(items), collate_packed(items))[1])
            out = tmp_path / f"{arch}-{worth}-{len(list(tmp_path.iterdir()))}"
            start = checkpoints[arch, "value"]
            done = train_gvm(start, rows, GvmSettings(**{**SETTINGS, **changes}), out, out.with_suffix(".state"), 0)
        name = "adapter_model.safetensors" if changes.get("lora") else "model.safetensors"
        return load_file(out / name), [loss for _, loss in done["losses"]], len(packed)

    return train


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch_size": 2}, {"lora": LORA}, {"gradient_checkpointing": True}], ids=str
)
def test_the_trained_weights_are_those_of_padded_training(trained, changes: dict[str, Any]) -> None:
    weights, losses, none = trained(1e9, **changes)
    packed_weights, packed_losses, some = trained(0, **changes)
    assert none == 0
    assert some >= 3
    assert packed_losses == pytest.approx(losses, abs=2e-4)
    assert weights.keys() == packed_weights.keys()
    if not torch.cuda.is_available():  # there products of other sizes round otherwise, and Adam makes steps of it
        assert max(float((weights[n] - packed_weights[n]).abs().max()) for n in weights) <= 5e-6


def test_short_texts_are_padded_and_long_ones_packed(trained, texts: list[Encoded]) -> None:
    mean = sum(len(t.prompt_ids) + len(t.response_ids) for t in texts) / len(texts)
    assert mean < gvm._WORTH_PACKING
    assert trained(mean + 0.1)[2] == 0
    assert trained(mean - 0.1)[2] > 0


def test_a_model_whose_positions_are_learned_is_trained_too(trained) -> None:
    """Whether or not it can be packed, the weights are the same."""
    weights, _, _ = trained(1e9, "gpt2")
    others, _, _ = trained(0, "gpt2")
    assert max(float((weights[n] - others[n]).abs().max()) for n in weights) <= 5e-6
