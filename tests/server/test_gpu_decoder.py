"""A GPU's decoder against the layers that it stands for: without a GPU what is recorded is done at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvpo import packed_attention
from dvpo.packed_values import Group, can_pack, packed_values
from server.backends import gpu_decoder
from server.backends.gpu_decoder import CudaRecorder, GpuDecoder, record_decoder

GROUPS = [Group([5, 6, 7, 8], [[9, 10], [11, 12, 13]], keep=True), Group([14], [[15] * 80])]


def at_once(function: Callable[[], None]) -> Callable[[], None]:
    """In place of a recording."""
    return function


def flat(values: list[list[Tensor]]) -> Tensor:
    return torch.cat([v for group in values for v in group])


def near(found: Tensor, expected: Tensor, allowed: float) -> bool:
    return bool((found - expected).norm() <= allowed * expected.norm())


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_it_computes_what_the_layers_do(classifier: Any, kind: str, dtype: torch.dtype, allowed: float) -> None:
    model = classifier(kind, dtype, **({"sliding_window": None} if kind == "mistral" else {}))
    assert can_pack(model)
    expected, kept = packed_values(model, GROUPS)
    record_decoder(model.model, at_once)
    assert [type(layer) for layer in model.model.layers] == [GpuDecoder]
    for _ in range(2):  # what the buffers hold of a row before changes nothing
        found, kept_here = packed_values(model, GROUPS)
        assert near(flat(found), flat(expected), allowed)
    assert near(kept_here[0].keys_L_1_H_P_D, kept[0].keys_L_1_H_P_D, allowed)
    warm = [Group(g.prompt_ids, g.responses, kept_here.get(i)) for i, g in enumerate(GROUPS)]
    assert near(flat(packed_values(model, warm)[0]), flat(expected), allowed)


def test_in_one_call_for_all_texts(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    apart = [Group([5, 6, 7], [[8, 9]]), Group([14], [[15] * 80])]
    expected = [packed_values(model, groups)[0] for groups in (GROUPS, apart)]
    record_decoder(model.model, at_once)
    monkeypatch.setattr(packed_attention, "_in_one_call", lambda query: True)  # as on a GPU
    for groups, values in zip((GROUPS, apart), expected, strict=True):
        assert near(flat(packed_values(model, groups)[0]), flat(values), 1e-5)


def test_a_row_longer_than_what_is_recorded(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    expected, _ = packed_values(model, GROUPS)
    monkeypatch.setattr(gpu_decoder, "SIZES", (16, 64))
    record_decoder(model.model, at_once)
    assert near(flat(packed_values(model, GROUPS)[0]), flat(expected), 1e-5)  # 90 tokens
    alone = packed_values(model, [Group([14], [[15] * 30])])[0]
    assert near(flat(alone), flat(packed_values(model, [Group([14], [[15] * 79])])[0])[:31], 1e-5)


def test_a_row_runs_what_was_recorded_for_the_next_larger_size(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    monkeypatch.setattr(gpu_decoder, "SIZES", (16, 64))
    recorded: list[int] = []
    ran: list[int] = []

    def record(function: Callable[[], None]) -> Callable[[], None]:
        number = len(recorded)
        recorded.append(number)

        def run() -> None:
            ran.append(number)
            function()

        return run

    record_decoder(model.model, record)
    assert len(recorded) == 8  # three layers have four pieces between them, for each size; the largest comes first
    packed_values(model, [Group([5], [[6] * 15])])
    assert ran == [4, 5, 6, 7]
    ran.clear()
    packed_values(model, [Group([5], [[6] * 16])])
    assert ran == [0, 1, 2, 3]


def test_weights_are_not_held_twice(classifier: Any) -> None:
    model = classifier("qwen2", torch.float32)
    assert can_pack(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record_decoder(model.model, at_once)
    decoder = model.model.layers[0]
    for layer, fast in zip(decoder.layers, decoder._fast, strict=True):
        storage = fast.qkv.weight.untyped_storage().data_ptr()
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            assert linear.weight.untyped_storage().data_ptr() == storage
    after = {name.replace("layers.0.layers", "layers"): tensor for name, tensor in model.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_layers_of_another_form_are_left_as_they_are(classifier: Any, kind: str) -> None:
    """Qwen3's heads are normed, and Gemma's norms count from 1."""
    model = classifier(kind, torch.float32)
    assert can_pack(model)
    before = list(model.model.layers)
    record_decoder(model.model, at_once)
    assert list(model.model.layers) == before


def test_biases_that_only_some_projections_have(classifier: Any) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(attention.q_proj.in_features, attention.q_proj.out_features, bias=True)
    before = list(model.model.layers)
    record_decoder(model.model, at_once)
    assert list(model.model.layers) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_recorded_on_a_gpu(classifier: Any, dtype: torch.dtype, allowed: float) -> None:
    model = classifier("llama", dtype).cuda()
    assert can_pack(model)
    expected, _ = packed_values(model, GROUPS)
    record_decoder(model.model, CudaRecorder())
    assert [type(layer) for layer in model.model.layers] == [GpuDecoder]
    for _ in range(2):
        assert near(flat(packed_values(model, GROUPS)[0]), flat(expected), allowed)
