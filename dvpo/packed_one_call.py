"""Attention of all segments of a packed row in one call: on a GPU a call for every text would take longer to start than
to compute.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from dvpo.packed_row import Packing, Prefix, Together, keys_of


def attend_in_one_call(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: Packing, layer: int
) -> Tensor:
    """See `dvpo.packed_attention.attend_packed`. [1, N, heads, D].

    The last token of a segment's queries is the last of its keys, which is how `varlen_attn` aligns the two.
    """
    attend = varlen_attn if query.dtype in (torch.bfloat16, torch.float16) else padded_attention
    plan = packing.together = packing.together or _lay_out(packing, key)
    _keep(packing, plan, key, value)
    copies = query.shape[1] // key.shape[1]

    def rows(of: Tensor, which: int) -> Tensor:
        if plan.keys_K is not None:
            of = torch.cat([of, *(keys_of(prefix, key, value, layer)[which] for prefix in plan.prefixes)], 2)
            of = of[:, :, plan.keys_K]
        return of[0].transpose(0, 1).repeat_interleave(copies, 1).contiguous()

    found_N_H_D: Any = attend(
        query[0].transpose(0, 1).contiguous(),
        rows(key, 0),
        rows(value, 1),
        plan.queries_G1,
        plan.keys_G1,
        plan.most_queries,
        plan.most_keys,
        scale=scaling,
        window_size=(-1, 0),
    )
    return found_N_H_D[None]


def padded_attention(
    query_N_H_D: Tensor, key_K_H_D: Tensor, value_K_H_D: Tensor, queries_G1: Tensor, keys_G1: Tensor,
    most_queries: int, most_keys: int, *, scale: float | None, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What torch's `varlen_attn` computes in half precision, for float32: causal attention of G texts. [N, H, D].

    The texts are padded to a batch. window_size: only (-1, 0), causal, is known.
    """
    assert window_size == (-1, 0)
    places_Q, places_K = (torch.arange(most, device=queries_G1.device) for most in (most_queries, most_keys))
    lengths_G, key_lengths_G = queries_G1.diff(), keys_G1.diff()
    rows_G_Q = (queries_G1[:-1, None] + places_Q).clamp(max=len(query_N_H_D) - 1)
    rows_G_K = (keys_G1[:-1, None] + places_K).clamp(max=len(key_K_H_D) - 1)
    last_seen_G_Q = places_Q + (key_lengths_G - lengths_G)[:, None]
    seen_G_Q_K = (places_K <= last_seen_G_Q[:, :, None]) & (places_K < key_lengths_G[:, None, None])
    found_G_H_Q_D = functional.scaled_dot_product_attention(
        query_N_H_D[rows_G_Q].transpose(1, 2),
        key_K_H_D[rows_G_K].transpose(1, 2),
        value_K_H_D[rows_G_K].transpose(1, 2),
        attn_mask=seen_G_Q_K[:, None],
        scale=scale,
    )
    places_N = torch.arange(len(query_N_H_D), device=queries_G1.device)
    text_N = torch.bucketize(places_N, queries_G1[1:], right=True)
    return found_G_H_Q_D.transpose(1, 2)[text_N, places_N - queries_G1[text_N]]


def _keep(packing: Packing, plan: Together, key: Tensor, value: Tensor) -> None:
    """Collects one layer's keys and values of the prompts that are to be kept, and hands them out after the last."""
    if plan.kept_P is None:
        return
    plan.kept.append((key.index_select(2, plan.kept_P), value.index_select(2, plan.kept_P)))
    if len(plan.kept) < next(iter(packing.kept.values())).layers:
        return
    keys, values = (torch.stack(layers) for layers in zip(*plan.kept, strict=True))
    plan.kept.clear()
    lengths = [sum(piece.stop - piece.start for piece in _places(pieces)) for pieces in packing.keep.values()]
    for index, *of in zip(packing.keep, keys.split(lengths, 3), values.split(lengths, 3), strict=True):
        packing.kept[index].fill(*(each.contiguous() for each in of))


def _places(pieces: tuple[Any, ...]) -> list[slice]:
    """A prompt's pieces, which stand in the row here: a GPU computes a row whole."""
    assert all(isinstance(piece, slice) for piece in pieces)
    return list(pieces)


def _lay_out(packing: Packing, row: Tensor) -> Together:
    """The plan that serves all layers; `row` is a tensor [1, heads, N, D] of the row."""
    prefixes: dict[int, tuple[int, Prefix]] = {}  # where each kept prompt's keys begin
    end = row.shape[2]
    places: list[int] = []
    queries, keys = [0], [0]
    for segment in packing.segments:
        for piece in segment.before:
            if isinstance(piece, Prefix):
                if id(piece) not in prefixes:
                    prefixes[id(piece)] = (end, piece)
                    end += piece.length
                begin = prefixes[id(piece)][0]
                places += range(begin, begin + piece.length)
            elif isinstance(piece, slice):
                places += range(piece.start, piece.stop)
        places += range(segment.start, segment.stop)
        queries.append(segment.stop)
        keys.append(len(places))
    kept = [i for pieces in packing.keep.values() for piece in _places(pieces) for i in range(piece.start, piece.stop)]

    def longest(ends: list[int]) -> int:
        return max(b - a for a, b in pairwise(ends))

    return Together(
        [prefix for _, prefix in prefixes.values()],
        torch.tensor(places, device=row.device) if any(segment.before for segment in packing.segments) else None,
        torch.tensor(queries, dtype=torch.int32, device=row.device),
        torch.tensor(keys, dtype=torch.int32, device=row.device),
        longest(queries),
        longest(keys),
        torch.tensor(kept, device=row.device) if kept else None,
    )
