"""A CPU's decoder against the layers that it stands for, alone and with cores that join in."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from dvpo.packed_parts import Cores
from dvpo.packed_values import Group, can_pack, packed_values
from server.backends import cpu_decoder, cpu_decoder_layers, cpu_layers
from server.backends.cpu_decoder import PackedDecoder, pack_decoder
from server.backends.cpu_decoder_layers import KernelDecoderLayer, PackedDecoderLayer, VectorDecoderLayer
from server.backends.cpu_kernels import Kind, kernels
from server.backends.cpu_layers import PackedLinear, rows_for_tiles

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this machine has no oneDNN")


@pytest.fixture(params=[False, True], ids=["plain", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken to have tiles: what is done for those of bfloat16 without kernels can be on any."""
    for module in (cpu_decoder_layers, cpu_layers):
        monkeypatch.setattr(module, "has_tiles", lambda dtype: request.param and dtype == torch.bfloat16)
    found = kernels()
    if found is not None:
        monkeypatch.setattr(found, "tiles", request.param and found.tiles)
    return bool(request.param)


def none() -> None:
    """Finds no kernels."""


def form_of(tiles: bool, dtype: torch.dtype) -> type:
    """The form that a layer takes with kernels, on a CPU with tiles or without. Skips what this one cannot have."""
    found = kernels()
    if found is None:
        pytest.skip("no kernels: they need AVX-512 and a C++ compiler")
    if dtype == torch.float32:
        return KernelDecoderLayer
    if not tiles:
        return VectorDecoderLayer
    if not found.tiles:
        pytest.skip("no kernels for tiles: they need AMX too")
    return KernelDecoderLayer


def only(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The CPU has this kind of products, and their type. Skips what it cannot have."""
    found = kernels()
    if found is None:
        pytest.skip("no kernels: they need AVX-512 and a C++ compiler")
    if kind == "float32":
        monkeypatch.setattr(found, "tiles", False)
    elif not found.tiles:
        pytest.skip("no kernels for tiles: they need AMX too")
    return torch.bfloat16 if kind == "tiles" else torch.float32


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("find", [none, kernels], ids=["torch", "kernels"])
def test_decoder_layers_compute_what_they_stand_for(
    classifier: Any, tiles: bool, kind: str, dtype: torch.dtype, allowed: float, find: Any
) -> None:
    form = PackedDecoderLayer if find is none else form_of(tiles, dtype)
    more = {"sliding_window": None} if kind == "mistral" else {}
    model = classifier(kind, dtype, **more)
    groups = [Group([5, 6, 7, 8], [[9, 10], [11, 12, 13]], keep=True), Group([14], [[15] * 80])]
    assert can_pack(model)
    expected, kept = packed_values(model, groups)
    pack_decoder(model.model, Cores(1), find)
    assert [type(layer) for layer in model.model.layers] == [PackedDecoder]
    assert {type(layer) for layer in model.model.layers[0].layers} == {form}
    found, kept_here = packed_values(model, groups)
    warm, _ = packed_values(model, [Group(g.prompt_ids, g.responses, kept_here.get(i)) for i, g in enumerate(groups)])
    for values in (found, warm):
        a, b = (torch.cat([v for group in each for v in group]) for each in (values, expected))
        assert (a - b).norm() <= allowed * b.norm()
    assert kept.keys() == kept_here.keys()
    assert kept_here[0].keys_L_1_H_P_D.dtype == (torch.bfloat16 if tiles and dtype == torch.bfloat16 else torch.float32)


@pytest.mark.parametrize(
    ("odd", "kind", "form"),
    [
        ({"intermediate_size": 72}, "float32", VectorDecoderLayer),
        ({"head_dim": 48}, "float32", KernelDecoderLayer),
        ({"num_key_value_heads": 1}, "float32", VectorDecoderLayer),
        ({"num_key_value_heads": 1}, "split", KernelDecoderLayer),
        ({"intermediate_size": 72}, "split", VectorDecoderLayer),
        ({"num_key_value_heads": 1}, "tiles", KernelDecoderLayer),
        ({"intermediate_size": 72}, "tiles", PackedDecoderLayer),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, "tiles", PackedDecoderLayer),
        ({"head_dim": 24}, "float32", PackedDecoderLayer),
        ({"head_dim": 24}, "tiles", PackedDecoderLayer),
    ],
)
def test_a_layer_whose_sizes_kernels_do_not_fit_takes_the_next_form(
    classifier: Any, monkeypatch: pytest.MonkeyPatch, odd: dict[str, int], kind: Kind, form: type
) -> None:
    dtype = only(kind, monkeypatch)
    model = classifier("llama", dtype, **odd)
    groups = [Group([5, 6, 7, 8], [[9, 10], [11] * 40])]
    assert can_pack(model)
    expected = torch.cat(packed_values(model, groups)[0][0])
    pack_decoder(model.model, Cores(1), kernels)
    assert {type(layer) for layer in model.model.layers[0].layers} == {form}
    allowed = 1e-5 if dtype == torch.float32 else 0.03
    assert (torch.cat(packed_values(model, groups)[0][0]) - expected).norm() <= allowed * expected.norm()


def test_layers_of_two_kinds_take_no_form(classifier: Any, tiles: bool) -> None:
    """What is kept of prompts is of one type in all layers; a layer in between that computes otherwise spoils it."""
    model = classifier("llama", torch.bfloat16)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.7
    model.model.layers[1].input_layernorm.eps = 1e-5  # which is not what it computes with
    assert can_pack(model)
    groups = [Group([5, 6, 7, 8], [[9, 10], [11] * 40], keep=True)]
    expected = torch.cat(packed_values(model, groups)[0][0])
    before = list(model.model.layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_decoder_layers, "eps_of", lambda norm: 1e-5)
        pack_decoder(model.model, Cores(1), kernels)
    assert list(model.model.layers) == before
    assert torch.equal(torch.cat(packed_values(model, groups)[0][0]), expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "split", "tiles"])
@settings(max_examples=40, deadline=None)
@given(given_groups=st.deferred(lambda: groups), parts=st.integers(1, 3), warm=st.booleans())
def test_in_kernels_a_text_has_the_same_values_to_the_last_bit_in_any_company(
    classifier: Any, given_groups: list[Group], parts: int, warm: bool, threads: int, kind: Kind
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        dtype = only(kind, patch)
        model = classifier("llama", dtype)
        assert can_pack(model)
        pack_decoder(model.model, Cores(1), kernels)
    assert {layer._qkv.kind for layer in model.model.layers[0].layers} == {kind}
    if dtype == torch.float32:  # torch's product at the end depends on the number of rows
        model.score = EachRow(model.score)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare_with_alone(model, given_groups, parts, warm)
    finally:
        torch.set_num_threads(before)


class EachRow(nn.Module):
    """A layer of one output that sums every row for itself."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.linear.weight[0]).sum(-1, keepdim=True) + self.linear.bias


def compare_with_alone(model: Any, given_groups: list[Group], parts: int, warm: bool) -> None:
    together, kept = packed_values(model, given_groups, parts)
    if warm:
        again = [Group(g.prompt_ids, g.responses, kept.get(i)) for i, g in enumerate(given_groups)]
        together, _ = packed_values(model, again, parts)
    for group, values in zip(given_groups, together, strict=True):
        for response, values_S in zip(group.responses, values, strict=True):
            alone = packed_values(model, [Group(group.prompt_ids, [response])])[0][0][0]
            assert torch.equal(values_S, alone)


def test_a_row_has_rows_for_tiles_and_its_values_do_not_change(
    classifier: Any, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are made of few numbers of rows, whatever the texts' lengths."""
    model = classifier("llama", torch.bfloat16)
    assert can_pack(model)
    pack_decoder(model.model, Cores(1), none)
    seen: set[int] = set()
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: (seen.add(x.shape[1]), forward(self, x))[1])
    text = [7] * 90
    alone = torch.cat(packed_values(model, [Group([14, 3], [text])])[0][0])
    for other in (1, 13, 40):
        together = packed_values(model, [Group([14, 3], [text]), Group([5], [[6] * other])])[0][0]
        assert (torch.cat(together) - alone).norm() <= 0.02 * alone.norm()
    assert all(rows % 32 == 0 for rows in seen) == tiles
    assert len(seen) < 4 or not tiles


@given(count=st.integers(0, 5000))
def test_rows_for_tiles_are_few(count: int) -> None:
    rows = rows_for_tiles(count)
    assert count <= rows <= count + max(31, count // 16)
    assert rows_for_tiles(rows) == rows
    assert len({rows_for_tiles(i) for i in range(1, 4097)}) == 64


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_layers_of_another_form_are_left_as_they_are(classifier: Any, kind: str) -> None:
    """Qwen3's heads are normed, and Gemma's norms count from 1."""
    model = classifier(kind, torch.float32)
    assert can_pack(model)
    before = list(model.model.layers)
    pack_decoder(model.model, Cores(1), none)
    assert list(model.model.layers) == before


def test_biases_that_only_some_projections_have_are_no_error(classifier: Any) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    for name in ("q_proj", "k_proj"):
        attention = model.model.layers[0].self_attn
        linear = getattr(attention, name)
        biased = nn.Linear(linear.in_features, linear.out_features, bias=name == "q_proj")
        setattr(attention, name, biased)
    before = list(model.model.layers)
    pack_decoder(model.model, Cores(1), none)
    assert list(model.model.layers) == before


def test_a_model_without_layers_of_its_own_is_left_alone(classifier: Any) -> None:
    mlp = classifier("llama", torch.float32).model.layers[0].mlp
    pack_decoder(mlp, Cores(1), none)
    assert type(mlp) is LlamaMLP


class Joining(Cores):
    """So many cores join in between the layers before `layer` and that one, whatever runs."""

    def __init__(self, layer: int, count: int) -> None:
        super().__init__(count)
        self._asked, self._layer, self._count = 0, layer, count
        self.joined: list[int] = []

    def claim(self, most: int) -> int:
        self._asked += 1
        if self._asked != self._layer:
            return 0
        self.joined.append(min(self._count, most))
        return self.joined[-1]


some = st.lists(st.integers(3, 60), max_size=30)
groups = st.lists(
    st.builds(
        Group,
        st.lists(st.integers(3, 60), min_size=1, max_size=40),
        st.lists(some, min_size=1, max_size=3),
        keep=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("find", [none, kernels], ids=["torch", "kernels"])
@settings(max_examples=60, deadline=None)
@given(given_groups=groups, layer=st.integers(1, 2), count=st.integers(1, 3))
def test_cores_that_join_in_change_nothing(
    classifier: Any, find: Any, given_groups: list[Group], layer: int, count: int
) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    expected, kept = packed_values(model, given_groups)
    cores = Joining(layer, count)
    pack_decoder(model.model, cores, find)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_decoder, "LEAST_PART", 4)
        found, kept_here = packed_values(model, given_groups)
    tokens = sum(group.tokens for group in given_groups)
    if model.model.layers[0].shares_work:
        assert cores.joined == [min(count, tokens // 32)]
    else:
        assert cores.joined == ([min(count, tokens // 4 - 1)] if tokens >= 8 else [])
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert kept.keys() == kept_here.keys()
    for index, prefix in kept.items():
        other = kept_here[index]
        assert torch.allclose(prefix.values_L_1_H_P_D, other.values_L_1_H_P_D, atol=1e-5)
        # Keys stand in pairs here, so only their products with each other are the same.
        assert torch.allclose(prefix.keys_L_1_H_P_D.square().sum(-1), other.keys_L_1_H_P_D.square().sum(-1), atol=1e-4)


def test_a_batch_has_the_threads_that_others_leave(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it has all. From the next layer on it has what others leave, at least its share, and all again later."""
    form_of(False, torch.float32)
    model = classifier("llama", torch.float32, num_hidden_layers=5)
    assert can_pack(model)
    cores = Cores(3, 2)
    assert pack_decoder(model.model, cores, kernels)
    seen: list[int] = []
    whole = PackedDecoder._from

    def look(self: PackedDecoder, first: int, *others: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        cores._change({1: -1, 2: -2, 3: 3}.get(first, 0))  # others begin and end
        return whole(self, first, *others)

    monkeypatch.setattr(PackedDecoder, "_from", look)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with cores.busy(3):
            packed_values(model, [Group([5] * 20, [[6] * 20])])
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
    assert seen == [6, 6, 4, 2, 6]


@pytest.mark.parametrize("fails", [False, True])
def test_cores_that_join_in_bring_their_threads_and_are_released(
    classifier: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    form_of(False, torch.float32)
    model = classifier("llama", torch.float32, num_hidden_layers=4)
    assert can_pack(model)
    cores = Joining(2, 3)
    cores.threads = 2
    assert pack_decoder(model.model, cores, kernels)
    seen, released = [], []
    monkeypatch.setattr(cores, "release", released.append)
    whole = PackedDecoder._from

    def look(self: PackedDecoder, first: int, *others: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        if fails and first == 2:
            raise MemoryError("no room for this layer")
        return whole(self, first, *others)

    monkeypatch.setattr(PackedDecoder, "_from", look)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(MemoryError, match="this layer"):
                packed_values(model, [Group([5] * 64, [[6] * 64])])
        else:
            packed_values(model, [Group([5] * 64, [[6] * 64])])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 8, 8, 8][: 3 if fails else 4]
    assert cores.joined == [3] and released == [3]


def test_a_part_that_fails_frees_the_cores_that_joined_in(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama", torch.float32)
    assert can_pack(model)
    cores = Joining(1, 1)
    pack_decoder(model.model, cores, none)
    released: list[int] = []
    monkeypatch.setattr(cores, "release", released.append)

    def fails(self: PackedDecoder, first: int, stop: int, *others: Any) -> torch.Tensor:
        if first == 1 and threading.current_thread().name == "part-1":
            raise MemoryError("no room for this part")
        return whole(self, first, stop, *others)

    whole = PackedDecoder._from
    monkeypatch.setattr(PackedDecoder, "_from", fails)
    before = threading.active_count()
    with pytest.raises(MemoryError, match="no room for this part"):
        packed_values(model, [Group([5] * 200, [[6] * 200])])
    assert released == [1]
    assert threading.active_count() == before


def test_a_model_of_no_layers_is_left_alone() -> None:
    body = nn.Module()
    body.layers = nn.ModuleList()
    pack_decoder(body, Cores(1), none)
    assert not len(body.layers)


def test_layers_some_of_which_do_not_rotate_are_left_as_they_are(classifier: Any) -> None:
    """As every fourth of SmolLM3's. On seven tokens the difference can be too small to show."""
    model = classifier("llama", torch.bfloat16)
    assert can_pack(model)
    model.model.layers[1].self_attn.use_rope = 0
    before = list(model.model.layers)
    pack_decoder(model.model, Cores(1), kernels)
    assert list(model.model.layers) == before
