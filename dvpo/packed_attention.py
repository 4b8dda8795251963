"""Attention over a packed row: many texts behind one another, each a segment that sees itself and its prompt.

On a CPU segment by segment (in steps where nothing is trained); on a GPU all segments in one call. Gradients flow
through both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from dvpo.packed_one_call import attend_in_one_call
from dvpo.packed_row import Packing, keys_of

ATTENTION = "dvpo_packed"
_STEP = 64
_STEP_AFTER_PROMPT = 128
"""Tokens whose attention is computed at once on a CPU, where attention over a whole text also computes what it masks.
After a prompt, which all of them see, little is masked, and a step only bounds the mask.
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
        for index, pieces in packing.keep.items():
            keys, values = zip(*(keys_of(piece, key, value, module.layer_idx) for piece in pieces), strict=True)
            packing.kept[index].put(*(torch.cat(of, 2) if len(of) > 1 else of[0] for of in (keys, values)))
        if packing.handover is not None and packing.handover.wanted:
            packing.handover.put(key, value)
        if torch.is_grad_enabled():
            return _attend_whole(query, key, value, scaling, packing), None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions made them float32
    if _in_one_call(query):
        return attend_in_one_call(query, key, value, scaling, packing, module.layer_idx), None
    return _attend_in_steps(query, key, value, scaling, packing, module.layer_idx), None


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


def _attend_in_steps(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: Packing, layer: int
) -> Tensor:
    """`attend_packed` segment by segment, some tokens at once. [1, N, heads, D].

    Query heads that share keys (G of them) stand as rows of one head: larger products, the same numbers.
    """
    heads = key.shape[1]
    query_1_H_N_G_D = query.unflatten(1, (heads, -1)).transpose(2, 3).contiguous()
    sharing = query_1_H_N_G_D.shape[3]
    output_N_H_G_D = query.new_empty(query.shape[2], heads, sharing, value.shape[3])
    for segment in packing.segments:
        place = slice(segment.start, segment.stop)
        keys, values = key[:, :, place], value[:, :, place]
        if segment.before:
            found = [keys_of(piece, key, value, layer) for piece in segment.before]
            keys, values = (torch.cat([*(f[i] for f in found), own], 2) for i, own in enumerate((keys, values)))
        step = _STEP_AFTER_PROMPT if segment.before else _STEP
        later = keys.shape[2] - segment.stop  # from a token's place in the row to its place among the keys
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            mask = _mask(stop - start, sharing, packing, query)
            attended = functional.scaled_dot_product_attention(
                query_1_H_N_G_D[:, :, start:stop].flatten(2, 3),
                keys[:, :, : stop + later],
                values[:, :, : stop + later],
                attn_mask=mask[:, mask.shape[1] - stop - later :],  # its columns end with the last token seen
                scale=scaling,
            )
            output_N_H_G_D[start:stop] = attended[0].unflatten(1, (-1, sharing)).transpose(0, 1)
    return output_N_H_G_D.flatten(1, 2)[None]


def _mask(tokens: int, sharing: int, packing: Packing, like: Tensor) -> Tensor:
    """What the last `tokens` of a segment may look at, to be added to the scores, each `sharing` times."""
    if tokens not in packing.masks:
        longest = max(segment.keys for segment in packing.segments)
        allowed = torch.ones(tokens, longest, dtype=torch.bool, device=like.device).tril(longest - tokens)
        mask = torch.zeros(tokens, longest, dtype=like.dtype, device=like.device).masked_fill(~allowed, float("-inf"))
        packing.masks[tokens] = mask.repeat_interleave(sharing, 0)
    return packing.masks[tokens]


AttentionInterface.register(ATTENTION, attend_packed)
