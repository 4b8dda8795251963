"""Attention over a packed row on a CPU, segment by segment, against scores that are written out."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpo.packed_attention import attend_packed
from dvpo.packed_row import Packing, Prefix, Segment

HEADS, SHARING, WIDTH = 2, 3, 8
LAYER = SimpleNamespace(is_causal=True, layer_idx=0)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of n queries [heads, n, D], the last of which sees all keys. [n, heads, D]."""
    key, value = (of.repeat_interleave(SHARING, 0) for of in (key, value))
    scores = query @ key.transpose(1, 2) * 0.3
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@settings(max_examples=40, deadline=None)
@given(
    alone=st.integers(1, 200),
    prompt=st.integers(1, 70),
    after=st.integers(1, 200),
    kept=st.integers(1, 70),
    spare=st.integers(0, 40),
)
def test_every_segment_sees_itself_and_what_stands_before_it(
    dtype: torch.dtype, allowed: float, alone: int, prompt: int, after: int, kept: int, spare: int
) -> None:
    """A text alone, one after a prompt in the row, one after a kept prompt, and rows that belong to no text."""
    torch.manual_seed(alone)
    ends = torch.tensor([alone, prompt, after, after, spare]).cumsum(0).tolist()
    query, key, value = (torch.randn(1, n * HEADS, ends[-1], WIDTH).to(dtype) for n in (SHARING, 1, 1))
    for of in (query, key, value):
        of[:, :, ends[3] :] = float("nan")
    prefix = Prefix(*(torch.randn(1, 1, HEADS, kept, WIDTH).to(dtype) for _ in range(2)), h_0=0.0)
    in_row = slice(ends[0], ends[1])
    segments = [
        Segment(0, ends[0]),
        Segment(ends[0], ends[1]),
        Segment(ends[1], ends[2], (in_row,)),
        Segment(ends[2], ends[3], (prefix, in_row)),
    ]
    with torch.inference_mode():
        attended, _ = attend_packed(LAYER, query, key, value, None, 0.3, packing=Packing(segments))
    before = [[], [], [in_row], [prefix, in_row]]
    for segment, pieces in zip(segments, before, strict=True):
        place = slice(segment.start, segment.stop)
        keys, values = [], []
        for piece in [*pieces, place]:
            is_kept = isinstance(piece, Prefix)
            keys.append(piece.keys_L_1_H_P_D[0, 0] if is_kept else key[0, :, piece])
            values.append(piece.values_L_1_H_P_D[0, 0] if is_kept else value[0, :, piece])
        expected = plain(query[0, :, place].double(), torch.cat(keys, 1).double(), torch.cat(values, 1).double())
        assert (attended[0, place].double() - expected).norm() <= allowed * expected.norm()
