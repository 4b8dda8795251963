"""Attention over a packed row: many texts behind one another, each a segment that sees itself and its prompt.

On a CPU segment by segment (in steps where nothing is trained); on a GPU all segments in one call. Gradients flow
through both.
"""

import threading
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

ATTENTION = "dvpo_packed"
_STEP = 64
_STEP_AFTER_PROMPT = 256
"""Tokens whose attention is computed at once on a CPU, where attention over a whole text also computes what it masks.
After a prompt, which all of them see, little is masked, and a step only bounds the mask.
"""
# What models hand to an attention function beside the tensors, and what makes no difference to the result.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"}


@dataclass(frozen=True)
class Prefix:
    """What is kept of a prompt of P tokens: keys and values of all L layers, and h_0."""

    keys_L_1_H_P_D: Tensor
    values_L_1_H_P_D: Tensor
    h_0: float

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.keys_L_1_H_P_D.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return int(self.keys_L_1_H_P_D.nbytes + self.values_L_1_H_P_D.nbytes)


class Handover:
    """Keys and values of one part of a row, layer by layer, for the parts behind it, which other threads compute.

    first_layer: the first that is computed in parts.
    """

    def __init__(self, first_layer: int = 0) -> None:
        self._first_layer = first_layer
        self._start, self._stop = -1, -1  # what is passed on, from the first token that is wanted to the last
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._failed = False
        self._changed = threading.Condition()

    @property
    def wanted(self) -> bool:
        """Whether anybody asked for anything."""
        return self._stop > 0

    def want(self, place: slice) -> "Passed":
        """Asks for tokens of the part, before it is computed."""
        self._start = place.start if self._start < 0 else min(self._start, place.start)
        self._stop = max(self._stop, place.stop)
        return Passed(self, place)

    def put(self, key: Tensor, value: Tensor) -> None:
        """Passes on the next layer's keys and values, [1, heads, N, D] of the part."""
        with self._changed:
            # Cloned, so that the rest of the part's need not be kept.
            self._layers.append(
                (key[:, :, self._start : self._stop].clone(), value[:, :, self._start : self._stop].clone())
            )
            self._changed.notify_all()

    def fail(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def get(self, layer: int, place: slice) -> tuple[Tensor, Tensor]:
        """Waits for a layer's keys and values of some tokens. Raises RuntimeError where they will not come."""
        at = layer - self._first_layer
        with self._changed:
            self._changed.wait_for(lambda: self._failed or len(self._layers) > at)
            if len(self._layers) <= at:
                raise RuntimeError("an earlier part of the row failed")
            key, value = self._layers[at]
        here = slice(place.start - self._start, place.stop - self._start)
        return key[:, :, here], value[:, :, here]


@dataclass(frozen=True)
class Passed:
    """Tokens of an earlier part of the row, by their place there."""

    handover: Handover
    place: slice

    @property
    def length(self) -> int:
        """How many."""
        return int(self.place.stop - self.place.start)


Earlier = slice | Prefix | Passed
"""Tokens that stand before others: in the same row, kept from a former one, or in an earlier part of this one."""


@dataclass
class Segment:
    """Tokens [start, stop) of the row that attend to themselves, causally, and to all of what stands before them."""

    start: int
    stop: int
    before: tuple[Earlier, ...] = ()

    @property
    def keys(self) -> int:
        """Tokens that its last token sees."""
        return sum(map(_length, self.before)) + self.stop - self.start


class Kept:
    """Collects a prompt's keys and values, in one tensor each: many small ones would lie scattered in memory."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.count = 0

    def put(self, key_1_H_P_D: Tensor, value_1_H_P_D: Tensor) -> None:
        """Takes the next layer's."""
        if not self.count:
            self.keys_L_1_H_P_D, self.values_L_1_H_P_D = (
                of.new_empty(self._layers, *of.shape) for of in (key_1_H_P_D, value_1_H_P_D)
            )
        self.keys_L_1_H_P_D[self.count] = key_1_H_P_D
        self.values_L_1_H_P_D[self.count] = value_1_H_P_D
        self.count += 1


@dataclass
class Packing:
    """How a row is read.

    keep, kept: prompts whose keys and values are to be collected, by group, and what collects them. wanted: where the
    last hidden state is read, if not everywhere; a model may leave out the others after its last layer. handover:
    given where later parts of the row are computed beside it. `masks` and `rotation` serve all layers.
    """

    segments: list[Segment] = field(default_factory=list)
    keep: dict[int, tuple[Earlier, ...]] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    wanted: list[int] | None = None
    handover: Handover | None = None
    masks: dict[int, Tensor] = field(default_factory=dict)
    rotation: Tensor | None = None
    together: "_Together | None" = None


@dataclass(frozen=True)
class _Together:
    """All segments of a row for one call of an attention that takes texts of many lengths.

    prefixes: the kept prompts, whose keys stand behind those of the row. keys_K: the places of every segment's keys
    there, one segment behind the other. queries_G1, keys_G1: where each of G segments begins, and the last one's end.
    """

    prefixes: list[Prefix]
    keys_K: Tensor
    queries_G1: Tensor
    keys_G1: Tensor
    most_queries: int
    most_keys: int


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
    for index, pieces in packing.keep.items():
        keys, values = zip(*(_of(piece, key, value, module.layer_idx) for piece in pieces), strict=True)
        packing.kept[index].put(*(torch.cat(of, 2) if len(of) > 1 else of[0] for of in (keys, values)))
    if packing.handover is not None and packing.handover.wanted:
        packing.handover.put(key, value)
    one_call = _in_one_call(query)
    if torch.is_grad_enabled() and not one_call:
        return _attend_whole(query, key, value, scaling, packing), None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions made them float32
    if one_call:
        return _attend_together(query, key, value, scaling, packing, module.layer_idx), None
    return _attend_in_steps(query, key, value, scaling, packing, module.layer_idx), None


def _of(piece: Earlier, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of earlier tokens, [1, heads, length, D]."""
    if isinstance(piece, Prefix):
        return piece.keys_L_1_H_P_D[layer], piece.values_L_1_H_P_D[layer]
    if isinstance(piece, Passed):
        return piece.handover.get(layer, piece.place)
    return key[:, :, piece], value[:, :, piece]


def _length(piece: Earlier) -> int:
    return int(piece.stop - piece.start) if isinstance(piece, slice) else piece.length


def _in_one_call(query: Tensor) -> bool:
    """On a GPU, where a call for every text would take longer to start than to compute."""
    return query.is_cuda


def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: Packing, layer: int
) -> Tensor:
    """`attend_packed` of all segments in one call. [1, N, heads, D].

    The last token of a segment's queries is the last of its keys, which is how `varlen_attn` aligns the two.
    """
    attend = varlen_attn if query.dtype in (torch.bfloat16, torch.float16) else padded_attention
    plan = packing.together = packing.together or _lay_out(packing, query)
    copies = query.shape[1] // key.shape[1]

    def rows(of: Tensor, which: int) -> Tensor:
        whole = torch.cat([of, *(_of(prefix, key, value, layer)[which] for prefix in plan.prefixes)], 2)
        return whole[0, :, plan.keys_K].repeat_interleave(copies, 0).transpose(0, 1).contiguous()

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


def _lay_out(packing: Packing, row: Tensor) -> _Together:
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

    def longest(ends: list[int]) -> int:
        return max(b - a for a, b in pairwise(ends))

    return _Together(
        [prefix for _, prefix in prefixes.values()],
        torch.tensor(places, device=row.device),
        torch.tensor(queries, dtype=torch.int32, device=row.device),
        torch.tensor(keys, dtype=torch.int32, device=row.device),
        longest(queries),
        longest(keys),
    )


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
            found = [_of(piece, key, value, layer) for piece in segment.before]
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
