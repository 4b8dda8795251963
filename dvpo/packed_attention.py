"""Attention over a packed row: many texts behind one another, each a segment that sees itself and its prompt.

On a CPU segment by segment (in steps where nothing is trained, but for bfloat16 that nothing stands before); on a GPU
all segments in one call. Gradients flow through both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from dvpo.packed_one_call import attend_in_one_call
from dvpo.packed_row import Packing, Segment, keys_of

ATTENTION = "dvpo_packed"
_STEP = 64
_STEP_AFTER_PROMPT = 128
"""Tokens whose attention is computed at once on a CPU, where attention over a whole text also computes what it masks.
After a prompt, which all of them see, little is masked, and a step only bounds the mask.
"""
_VECTOR = 16
"""Keys that a CPU treats at once. torch's attention takes longer for a number of them that is no multiple of it: in a
trial in bfloat16, 150 tokens after 150 took 1.3 to 2.6 ms in steps of 48 to 304, and 1.1 to 1.4 ms with some masked
keys more.
"""
# What models hand to an attention function beside the tensors, and what makes no difference to the result.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"}


def attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packing: Packing,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row. query [1, heads, N, D]; returns [1, N, heads, D].

    Raises ValueError for attention with anything more to it: `can_pack` then says no.
    """
    strange = {name for name, given in others.items() if given is not None} - _HARMLESS
    if strange or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"this attention cannot be packed: {', '.join(sorted(strange)) or type(module).__name__}")
    if not _in_one_call(query):
        hand_on(key, value, packing, module.layer_idx)
        if torch.is_grad_enabled():
            return _attend_whole(query, key, value, scaling, packing), None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions made them float32
    if _in_one_call(query):
        return attend_in_one_call(query, key, value, scaling, packing, module.layer_idx), None
    return _attend_by_segment(query, key, value, scaling, packing, module.layer_idx), None


def hand_on(key: Tensor, value: Tensor, packing: Packing, layer: int) -> None:
    """Gives a layer's keys and values, [1, heads, N, D], to the later parts of a row and to what is kept of prompts."""
    for index, pieces in packing.keep.items():
        keys, values = zip(*(keys_of(piece, key, value, layer) for piece in pieces), strict=True)
        packing.kept[index].put(*(torch.cat(of, 2) if len(of) > 1 else of[0] for of in (keys, values)))
    if packing.handover is not None and packing.handover.wanted:
        packing.handover.put(key, value)


def _in_one_call(query: Tensor) -> bool:
    """On a GPU, where a call for every text would take longer to start than to compute."""
    return query.is_cuda


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: Packing) -> Tensor:
    """`attend_packed` of texts that nothing stands before, each in one call. [1, N, heads, D].

    For training: torch's kernel keeps no scores for the backward pass, and steps would each need a gradient of all keys
    before them. In float32 also under bfloat16 autocast: that kernel's two passes are no faster in bfloat16.
    """
    lengths = [segment.stop - segment.start for segment in packing.segments]
    if any(segment.before for segment in packing.segments):
        raise ValueError("a text whose prompt stands elsewhere cannot be trained on")
    texts = zip(*(tensor.float().split(lengths, 2) for tensor in (query, key, value)), strict=True)
    with torch.autocast(query.device.type, enabled=False):
        attended = [
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            for q, k, v in texts
        ]
    return torch.cat(attended, 2).transpose(1, 2)


def _attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: Packing, layer: int
) -> Tensor:
    """`attend_packed` of one segment after the other. [1, N, heads, D]; what belongs to no segment is left empty."""
    output_N_H_D = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for segment in packing.segments:
        place = slice(segment.start, segment.stop)
        own = (key[:, :, place], value[:, :, place])
        pieces = zip(*(keys_of(piece, key, value, layer) for piece in segment.before), own, strict=True)
        keys, values = (_joined(list(of), segment.keys) for of in pieces)
        # In bfloat16 one call is faster than steps on a CPU with AMX (300 tokens: 1.8 and 2.0 to 2.7 ms in a trial).
        if segment.before or query.dtype == torch.float32:
            output_N_H_D[place] = _in_steps(query[:, :, place], keys, values, scaling, packing, segment)
        else:
            attended = functional.scaled_dot_product_attention(
                query[:, :, place], keys, values, is_causal=True, scale=scaling, enable_gqa=True
            )
            output_N_H_D[place] = attended[0].transpose(0, 1)
    return output_N_H_D[None]


def _joined(pieces: list[Tensor], length: int) -> Tensor:
    """Keys or values behind one another, and zeros up to a whole number of vectors. [1, heads, K, D]."""
    first = pieces[0]
    zeros = first.new_zeros(1, first.shape[1], -length % _VECTOR, first.shape[3])
    return torch.cat([*pieces, zeros], 2)


def _in_steps(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, packing: Packing, segment: Segment
) -> Tensor:
    """Attention of one segment, query [1, heads, n, D], some tokens at once. [n, heads, D].

    Query heads that share keys (G of them) stand as rows of one head: larger products, the same numbers.
    """
    query_1_H_n_G_D = query.unflatten(1, (keys.shape[1], -1)).transpose(2, 3).contiguous()
    tokens, sharing = query_1_H_n_G_D.shape[2:4]
    output_n_H_G_D = query.new_empty(tokens, keys.shape[1], sharing, values.shape[3])
    step = _STEP_AFTER_PROMPT if segment.before else _STEP
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        seen = segment.keys - tokens + stop
        attended = functional.scaled_dot_product_attention(
            query_1_H_n_G_D[:, :, start:stop].flatten(2, 3),
            keys[:, :, : seen + -seen % _VECTOR],
            values[:, :, : seen + -seen % _VECTOR],
            attn_mask=_mask(stop - start, seen, sharing, packing, query),
            scale=scaling,
        )
        output_n_H_G_D[start:stop] = attended[0].unflatten(1, (-1, sharing)).transpose(0, 1)
    return output_n_H_G_D.flatten(1, 2)


def _mask(tokens: int, seen: int, sharing: int, packing: Packing, like: Tensor) -> Tensor:
    """To be added to the scores of so many tokens, the last of which sees so many keys; each `sharing` times."""
    if tokens not in packing.masks:
        longest = max(segment.keys for segment in packing.segments)
        allowed = torch.ones(tokens, longest, dtype=torch.bool, device=like.device).tril(longest - tokens)
        allowed = functional.pad(allowed, (0, _VECTOR))
        mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, float("-inf"))
        packing.masks[tokens] = mask.repeat_interleave(sharing, 0)
    mask = packing.masks[tokens]
    longest = mask.shape[1] - _VECTOR
    return mask[:, longest - seen : longest + -seen % _VECTOR]


AttentionInterface.register(ATTENTION, attend_packed)
