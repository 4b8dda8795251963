"""The compiled kernels against plain loops in float64."""

import math
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dvpo.packed_parts import Row, cut
from dvpo.packed_row import Packing, Prefix, Segment
from server.backends.cpu_kernels import Heads, Kernels, Kind, Panels, gate_and_up, kernels, split, turning

FOUND = kernels()
needs_kernels = pytest.mark.skipif(FOUND is None, reason="no kernels: they need AVX-512 and a C++ compiler")
needs_tiles = pytest.mark.skipif(FOUND is None or not FOUND.tiles, reason="no kernels for tiles: they need AMX too")
TYPES = [
    pytest.param(torch.float32, 2e-6, marks=needs_kernels),
    pytest.param(torch.bfloat16, 0.006, marks=needs_tiles),
]
KINDS = [
    pytest.param("float32", torch.float32, 8e-7, marks=needs_kernels),
    pytest.param("split", torch.float32, 8e-7, marks=needs_tiles),
    pytest.param("tiles", torch.bfloat16, 0.004, marks=needs_tiles),
]
"""Of products, the type of the weights, and how far off they may be."""


def made() -> Kernels:
    assert FOUND is not None
    return FOUND


def unit(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attended(qkv_N_C: Tensor, heads: Heads, segment: Segment, prefix: Prefix | None) -> Tensor:
    """Attention of one segment, a token, a head and a key at a time in float64. [n, queries * width]."""
    rows = qkv_N_C.double().unflatten(1, (-1, heads.width))
    keys_of, values_of = [], []
    for piece in (*segment.before, slice(segment.start, segment.stop)):
        if isinstance(piece, slice):
            keys_of.append(rows[piece, heads.queries : heads.queries + heads.keys])
            values_of.append(rows[piece, heads.queries + heads.keys :])
        else:
            assert piece is prefix
            keys_of.append(prefix.keys_L_1_H_P_D[1, 0].transpose(0, 1).double())
            values_of.append(prefix.values_L_1_H_P_D[1, 0].transpose(0, 1).double())
    keys, values = torch.cat(keys_of), torch.cat(values_of)
    count = segment.stop - segment.start
    out = torch.empty(count, heads.queries, heads.width, dtype=torch.float64)
    for token in range(count):
        seen = len(keys) - count + token + 1
        for head in range(heads.queries):
            of = head * heads.keys // heads.queries
            scores = keys[:seen, of] @ rows[segment.start + token, head] * heads.scaling
            out[token, head] = scores.softmax(0) @ values[:seen, of]
    return out.flatten(1)


@st.composite
def rows_of_texts(draw: st.DrawFn) -> tuple[Heads, Packing, int, int]:
    """Heads, how a row is read, its tokens, and how many tokens were kept of a prompt, which some texts follow."""
    keys = draw(st.integers(1, 3))
    heads = Heads(keys * draw(st.integers(1, 3)), keys, draw(st.sampled_from([16, 32, 48, 64, 80])), 0.2)
    lengths = st.one_of(st.integers(1, 40), st.integers(1, 300))
    kept = draw(lengths)
    segments: list[Segment] = []
    end = 0
    prompt: slice | None = None
    for _ in range(draw(st.integers(1, 4))):
        count = draw(lengths)
        place = slice(end, end + count)
        follows = draw(st.sampled_from(["nothing", "row", "kept", "both"]))
        before: list[Any] = [SimpleNamespace(kept=True)] if follows in ("kept", "both") else []
        if prompt is not None and follows in ("row", "both"):
            before.append(prompt)
        segments.append(Segment(place.start, place.stop, tuple(before)))
        prompt = place if prompt is None or draw(st.booleans()) else prompt
        end += count
    return heads, Packing(segments), end, kept


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
@settings(max_examples=40, deadline=None)
@given(given_row=rows_of_texts(), seed=st.integers(0, 1000))
def test_attention_is_that_of_a_plain_loop(
    dtype: torch.dtype, allowed: float, given_row: tuple[Heads, Packing, int, int], seed: int
) -> None:
    heads, packing, tokens, kept = given_row
    random = torch.Generator().manual_seed(seed)
    qkv_N_C = (2 * torch.randn(tokens, heads.turning + heads.keys * heads.width, generator=random)).to(dtype)
    before = torch.randn(2, 3, 1, heads.keys, kept, heads.width, generator=random).to(dtype)
    prefix = Prefix(before[0], before[1], 0.0)
    for segment in packing.segments:
        segment.before = tuple(prefix if isinstance(piece, SimpleNamespace) else piece for piece in segment.before)
    found = made().attend(qkv_N_C, heads, packing, 1)
    for segment in packing.segments:
        mine = found[segment.start : segment.stop, : heads.queries * heads.width].double()
        theirs = attended(qkv_N_C, heads, segment, prefix)
        assert (mine - theirs).norm() <= allowed * theirs.norm()


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
@pytest.mark.parametrize("size", [0.0, 1e-20, 0.5, 30.0, 300.0])
def test_scores_of_any_size_are_weighed(dtype: torch.dtype, allowed: float, size: float) -> None:
    """None overflows, and where one key outweighs all others by far nothing is left of them."""
    heads = Heads(2, 1, 32, 1.0)
    qkv_N_C = torch.randn(600, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    qkv_N_C[:, :96] *= size
    found = made().attend(qkv_N_C, heads, Packing([Segment(0, 600)]), 0)[:600, :64].double()
    expected = attended(qkv_N_C, heads, Segment(0, 600), None)
    assert (found - expected).norm() <= 10 * allowed * expected.norm()


@needs_kernels
def test_sums_over_many_keys_lose_no_digits() -> None:
    """In one long chain 32,000 keys cost a digit (3e-6)."""
    heads = Heads(1, 1, 32, 0.2)
    qkv_N_C = torch.randn(32_016, 96, generator=torch.Generator().manual_seed(3))
    segment = Segment(32_000, 32_016, (slice(0, 32_000),))
    found = made().attend(qkv_N_C, heads, Packing([segment]), 0)[32_000:32_016, :32].double()
    expected = attended(qkv_N_C, heads, segment, None)
    assert (found - expected).norm() <= 1.2e-6 * expected.norm()


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_a_text_that_is_no_number_leaves_the_others_alone(dtype: torch.dtype, allowed: float) -> None:
    heads = Heads(2, 1, 16, 0.3)
    qkv_N_C = torch.randn(103, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    packing = Packing([Segment(0, 70), Segment(70, 103)])  # what the longer leaves is not read
    before = made().attend(qkv_N_C, heads, packing, 0)[70:103, :32].clone()
    qkv_N_C[:70] = math.nan
    after = made().attend(qkv_N_C, heads, packing, 0)
    assert torch.equal(after[70:103, :32], before) and bool(after[:70, :32].isnan().all())


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
@pytest.mark.parametrize("which", [0, 32, 48], ids=["query", "key", "value"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 40, 299])
def test_what_is_no_number_stays_none(dtype: torch.dtype, allowed: float, which: int, what: float, at: int) -> None:
    """Weights that are damaged or overflow are found by it. Tokens before it see nothing of a query or a key."""
    heads = Heads(2, 1, 16, 0.3)
    qkv_N_C = torch.rand(300, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = made().attend(qkv_N_C, heads, Packing([Segment(0, 300)]), 0)[:300, :16].clone()
    qkv_N_C[at, which] = what
    found = made().attend(qkv_N_C, heads, Packing([Segment(0, 300)]), 0)[:300, :16]
    assert not found[at].isfinite().all()
    if which == 32:
        assert not found[at:].isfinite().all(1).any()
    if which < 48:
        assert torch.equal(found[:at], before[:at])


@needs_kernels
def test_tensors_of_another_kind_are_refused() -> None:
    heads, angles_2_N_W = Heads(1, 1, 16, 1.0), torch.ones(2, 4, 16)
    with pytest.raises(ValueError, match="bfloat16 for torch"):
        made().unit(torch.ones(4, 32, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ValueError, match="rows with gaps"):
        made().rotate(torch.ones(4, 64)[:, :48], heads, angles_2_N_W)
    with pytest.raises(ValueError, match="heads of 16 are rotated by 8 angles"):
        made().rotate(torch.ones(4, 48), heads, angles_2_N_W[:, :, :8].contiguous())


@needs_kernels
def test_no_memory_is_an_error_of_python() -> None:
    """Not the end of the process."""
    code = """if True:
        import resource, torch
        from dvpo.packed_row import Packing, Segment
        from server.backends.cpu_kernels import Heads, kernels
        qkv = torch.zeros(400_000, 96)
        most = int(open("/proc/self/statm").read().split()[0]) * 4096 + (120 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            kernels().attend(qkv, Heads(1, 1, 32, 1.0), Packing([Segment(0, 400_000)]), 0)
        except MemoryError as error:
            print("refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "refused: no memory for attend_float32" in done.stdout, done.stderr


@needs_kernels
@given(rows=st.integers(0, 40), width=st.sampled_from([16, 64, 576]), seed=st.integers(0, 9))
def test_rows_are_divided_by_their_size(rows: int, width: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    expected = unit(x.double(), 1e-5)
    assert bool(((made().unit(x, 1e-5) - expected).abs() <= 2e-6).all())


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines as models have them: the first half of a head's, twice. [N, W] each."""
    of = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(7)) * 6
    return torch.cat([of.cos(), of.cos()], 1), torch.cat([of.sin(), of.sin()], 1)


def rotated(x_N_H_W: Tensor, cos_N_W: Tensor, sin_N_W: Tensor) -> Tensor:
    """Neighbours as complex numbers, turned."""
    pairs = torch.view_as_complex(x_N_H_W.double().unflatten(-1, (-1, 2)).contiguous())
    half = cos_N_W.shape[1] // 2
    by = torch.complex(cos_N_W[:, None, :half].double(), sin_N_W[:, None, :half].double())
    return torch.view_as_real(pairs * by).flatten(-2)


@needs_kernels
@pytest.mark.parametrize("width", [16, 48, 64])
def test_queries_and_keys_are_rotated_and_values_are_not(width: int) -> None:
    heads = Heads(3, 1, width, 1.0)
    qkv_N_C = torch.randn(9, 5 * width, generator=torch.Generator().manual_seed(1))
    cos, sin = angles(9, width)
    before = qkv_N_C.clone()
    made().rotate(qkv_N_C, heads, turning(cos, sin))
    expected = rotated(before[:, : 4 * width].unflatten(1, (-1, width)), cos, sin).flatten(1)
    assert torch.allclose(qkv_N_C[:, : 4 * width].double(), expected, atol=1e-6)
    assert torch.equal(qkv_N_C[:, 4 * width :], before[:, 4 * width :])


def random_weight(out: int, depth: int, seed: int) -> Tensor:
    return torch.randn(out, depth, generator=torch.Generator().manual_seed(seed)) / depth**0.5


@pytest.fixture(params=[1, 3], ids=["one-thread", "three-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many share the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "dtype", "allowed"), KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "inner", "width"),
    [
        (0, 64, 128),
        (1, 160, 128),
        (31, 32, 128),
        (32, 64, 128),
        (33, 160, 128),
        (256, 2048, 128),
        (300, 2080, 640),  # the last product's columns are a group and a part of one
    ],
)
def test_a_layers_products(
    kind: Kind, dtype: torch.dtype, allowed: float, threads: int, tokens: int, inner: int, width: int, biased: bool
) -> None:
    """What is rounded to bfloat16 on the way is rounded here too; the sums are in float64."""
    heads = Heads(6, 1, 16, 1.0)
    random = torch.Generator().manual_seed(tokens)
    weights = [random_weight(out, depth, i).to(dtype) for i, (out, depth) in enumerate(
        [(128, width), (width, 96), (inner, width), (inner, width), (width, inner)]
    )]  # fmt: skip
    biases = [torch.randn(len(w), generator=random).to(dtype) if biased else None for w in weights]
    qkv, output, down = (Panels(weights[i], biases[i], kind) for i in (0, 1, 4))
    gate_bias = gate_and_up(biases[2], biases[3]) if biases[2] is not None and biases[3] is not None else None
    gated = Panels(gate_and_up(weights[2], weights[3]), gate_bias, kind)
    hidden = 3 * torch.randn(tokens, width, generator=random)
    cos, sin = angles(tokens, 16)

    def linear(x: Tensor, which: int) -> Tensor:
        bias = biases[which]
        return functional.linear(x.double(), weights[which].double(), None if bias is None else bias.double())

    found = made().project(hidden, 1e-5, qkv, heads, turning(cos, sin))
    expected = linear(unit(hidden, 1e-5).to(dtype), 0)
    expected[:, :112] = rotated(expected[:, :112].unflatten(1, (-1, 16)), cos, sin).flatten(1)
    assert (found.double() - expected).norm() <= allowed * expected.norm()

    attended_N_C = torch.randn(tokens, 96, generator=random).to(dtype)
    rows = torch.full((-(-tokens // 32) * 32, 160), math.nan, dtype=dtype)  # what stands beside is not read
    rows[:tokens, :96] = attended_N_C
    after = hidden.double() + linear(attended_N_C, 1)
    between = unit(after.float(), 1e-5).to(dtype)
    more = linear((functional.silu(linear(between, 2)) * linear(between, 3)).to(dtype), 4)
    here = hidden.clone()
    made().finish(rows, here, 1e-5, output, gated, down)
    assert (here - (after + more)).norm() <= allowed * (after + more - hidden).norm()


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1))
def test_three_of_bfloat16_are_a_float32(numbers: list[float]) -> None:
    """But for what is below the least of normal numbers, where bfloat16 ends."""
    whole = torch.tensor([numbers])
    parts = split(whole)
    assert parts.dtype == torch.bfloat16 and parts.shape == (1, 3, len(numbers))
    rest = (whole.double() - parts.double().sum(1)).abs()
    assert bool((rest <= 2**-133).all())


@pytest.mark.parametrize("depth", [32, 576, 4096])
@needs_tiles
def test_split_products_are_as_exact_as_those_of_float32(depth: int) -> None:
    """Of numbers whose digits are all used, beside torch's own product."""
    attended = torch.randn(64, depth, generator=torch.Generator().manual_seed(1))
    weight = random_weight(64, depth, 2)
    expected = attended.double() @ weight.double().T
    hidden, nothing = torch.zeros(64, 64), torch.zeros(64, 64)
    output, rest = Panels(weight, None, "split"), Panels(nothing, None, "split")
    made().finish(attended, hidden, 1.0, output, Panels(torch.zeros(128, 64), None, "split"), rest)
    off, off_in_torch = ((found - expected).norm() / expected.norm() for found in (hidden, attended @ weight.T))
    assert off <= min(2 * off_in_torch, torch.tensor(8e-7))


@pytest.mark.parametrize(("kind", "dtype", "allowed"), KINDS)
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("where", ["attended", "hidden", "weight"])
def test_a_layers_products_of_what_is_no_number(
    kind: Kind, dtype: torch.dtype, allowed: float, where: str, what: float
) -> None:
    """Where torch's own are none ours are none, and other rows are left alone."""
    random = torch.Generator().manual_seed(5)
    weights = [random_weight(out, 128, i).to(dtype) for i, out in enumerate((128, 128, 128, 128))]
    attended_R_S, hidden_N_D = torch.randn(64, 160, generator=random).to(dtype), torch.randn(40, 128, generator=random)
    if where == "weight":
        weights[1][3, 3] = what
    else:
        (attended_R_S if where == "attended" else hidden_N_D)[7, 3] = what

    def finish(hidden_N_D: Tensor) -> Tensor:
        panels = [Panels(of, None, kind) for of in (weights[0], gate_and_up(weights[1], weights[2]), weights[3])]
        made().finish(attended_R_S, hidden_N_D, 1e-5, panels[0], panels[1], panels[2])
        return hidden_N_D

    found = finish(hidden_N_D.clone())
    after = hidden_N_D + functional.linear(attended_R_S[:40, :128].float(), weights[0].float())
    between = unit(after, 1e-5)
    gate, up = (functional.linear(between, of.float()) for of in weights[1:3])
    expected = after + functional.linear(functional.silu(gate) * up, weights[3].float())
    assert not found[~expected.isfinite().all(1)].isfinite().all(1).any()
    if where != "weight":
        assert found[torch.arange(40) != 7].isfinite().all()


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
@settings(max_examples=15, deadline=None)
@given(parts=st.integers(2, 5), tokens=st.integers(5, 600), seed=st.integers(0, 9))
def test_a_row_in_parts_is_the_same_to_the_last_bit(
    dtype: torch.dtype, allowed: float, parts: int, tokens: int, seed: int
) -> None:
    heads = Heads(4, 2, 32, 0.2)
    qkv_N_C = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole = Packing([Segment(0, tokens)])
    expected = made().attend(qkv_N_C, heads, whole, 0)[:tokens, :128]
    found, end = [], 0
    for row in cut(Row(whole, [0] * tokens, [0] * tokens), parts, 64):
        here = qkv_N_C[end : end + len(row.ids)]
        if row.packing.handover is not None:
            row.packing.handover.put(*heads.keys_and_values(here))
        found.append(made().attend(here, heads, row.packing, 0)[: len(row.ids), :128])
        end += len(row.ids)
    assert torch.equal(torch.cat(found), expected)
