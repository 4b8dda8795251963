"""Values of many texts in one unpadded row, where texts that share a prompt share its computation too.

The tokens of all texts stand behind one another in a row of one batch: every layer but attention treats tokens one by
one, and attention is told where each text begins and which prompt a response follows. So nothing is computed for
padding, a prompt followed by several responses is computed once, and the keys and values of a prompt can be kept and
used again. Only models whose attention is plain causal attention can do this; `can_pack` finds out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from dvpo.data.templates import Encoded
from dvpo.models import head
from dvpo.values import collate, position_ids, unwrapped

ATTENTION = "dvpo_packed"
_CPU_STEP = 64
"""Tokens whose attention is computed at once. On a CPU, attention over a whole text also computes what it masks."""
# What models hand to an attention function beside the tensors, and what makes no difference to the result.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"}


@dataclass(frozen=True)
class Prefix:
    """What is kept of a prompt of P tokens: keys and values of every layer, [1, heads, P, D], and h_0."""

    layers: list[tuple[Tensor, Tensor]]
    h_0: float

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


@dataclass(frozen=True)
class Group:
    """A prompt and the responses to it. With `prefix`, what was kept of the prompt, only the responses are run."""

    prompt_ids: list[int]
    responses: list[list[int]]
    prefix: Prefix | None = None
    keep: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return sum(map(len, self.responses)) + (0 if self.prefix else len(self.prompt_ids))


@dataclass
class _Segment:
    """Tokens [start, stop) of the row that attend to themselves, causally, and to all of what stands before them."""

    start: int
    stop: int
    before: slice | Prefix | None = None


@dataclass
class _Packing:
    """How a row is read by attention.

    `kept` collects keys and values of the prompts that are to be kept; `masks` serve all layers, by their shapes.
    """

    segments: list[_Segment] = field(default_factory=list)
    keep: dict[int, slice] = field(default_factory=dict)
    kept: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
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


@torch.inference_mode()
def packed_values(model: Any, groups: Sequence[Group]) -> tuple[list[list[Tensor]], dict[int, Prefix]]:
    """h_0..h_T of every response of every group, [T + 1], float32, on the CPU; and what is kept of prompts, by group.

    `model` is a token or sequence classifier of one label for which `can_pack` was true. One forward pass.
    """
    plain = unwrapped(model)
    device = next(plain.parameters()).device
    packing, ids, positions, wanted = _pack(groups)
    values_W = torch.empty(0)
    if ids:
        hidden_N_D = plain.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        values_W = head(plain)(hidden_N_D[torch.tensor(wanted, device=device)]).squeeze(-1).float().cpu()
    return _unpack(groups, values_W, packing)


def can_pack(model: Any) -> bool:
    """Tries packing on a few tokens and leaves the model ready for it; false, and unchanged, if it computes otherwise.

    Sliding windows, attention in both directions, other kinds of caches, and attention that is not exchangeable
    cannot be packed.
    """
    plain = unwrapped(model)
    if _has_other_attention(plain.config):
        return False
    prompt, first, second = [1, 2, 3, 4, 5], [6, 7, 8], [8, 3, 9, 2]
    vocabulary = plain.get_input_embeddings().num_embeddings
    prompt, first, second = ([i % vocabulary for i in ids] for ids in (prompt, first, second))
    before = plain.config._attn_implementation
    try:
        expected = [_hidden_alone(plain, Encoded(prompt, response)) for response in (first, second)]
        plain.set_attn_implementation(ATTENTION)
        packing, ids, positions, _ = _pack([Group(prompt, [first, second], keep=True)])
        device = next(plain.parameters()).device
        with torch.inference_mode():
            hidden_N_D = plain.base_model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                packing=packing,
            ).last_hidden_state[0]
        found = hidden_N_D.split([len(prompt) + len(first), len(second)])
        alike = _alike(found[0], expected[0]) and _alike(found[1], expected[1][len(prompt) :])
        alike = alike and len(packing.kept.get(0, [])) == plain.config.get_text_config().num_hidden_layers
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
        alike = False
    if not alike:
        plain.set_attn_implementation(before)
    return alike


def _has_other_attention(config: Any) -> bool:
    """Whether some layer does not look at every earlier token, as the configuration says."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ())
    most = getattr(config, "max_position_embeddings", None)
    return bool(layers - {"full_attention"}) or (window is not None and (most is None or window < most))


@torch.inference_mode()
def _hidden_alone(model: Any, item: Encoded) -> Tensor:
    batch = collate([item], pad_id=0).to(next(model.parameters()).device)
    hidden_B_L_D = model.base_model(
        input_ids=batch.input_ids_B_L,
        attention_mask=batch.attention_mask_B_L,
        position_ids=position_ids(batch.attention_mask_B_L),
        use_cache=False,
    ).last_hidden_state
    return hidden_B_L_D[0]


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding. The error of a text read wrongly is of the size of the numbers themselves."""
    allowed = 1e-3 if found.dtype == torch.float32 else 0.1
    return bool((found.float() - expected.float()).norm() <= allowed * expected.float().norm())


def _pack(groups: Sequence[Group]) -> tuple[_Packing, list[int], list[int], list[int]]:
    """The row: how attention reads it, token ids, their positions, and the places where a value is wanted."""
    packing = _Packing()
    ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    for index, group in enumerate(groups):
        length = len(group.prompt_ids)
        if not length:
            raise ValueError("a prompt of no tokens has no value before the first action")
        before: slice | Prefix | None = group.prefix
        start = len(ids)
        if before is None:
            ids += group.prompt_ids
            positions += range(length)
            wanted.append(start + length - 1)
            prompt = slice(start, start + length)
            if group.keep:
                packing.keep[index] = prompt
        for response in group.responses:
            # The first response after a prompt in the row goes on in the prompt's own segment.
            first = len(ids)
            ids += response
            positions += range(length, length + len(response))
            wanted += range(first, len(ids))
            if before is None:
                packing.segments.append(_Segment(start, len(ids)))
                before = prompt
            elif response:
                packing.segments.append(_Segment(first, len(ids), before))
    return packing, ids, positions, wanted


def _unpack(
    groups: Sequence[Group], values_W: Tensor, packing: _Packing
) -> tuple[list[list[Tensor]], dict[int, Prefix]]:
    """Splits the wanted values by group and response; h_0 of a kept prompt comes from what was kept."""
    values: list[list[Tensor]] = []
    kept: dict[int, Prefix] = {}
    at = 0
    for index, group in enumerate(groups):
        if group.prefix is None:
            h_0 = values_W[at : at + 1]
            at += 1
        else:
            h_0 = torch.tensor([group.prefix.h_0])
        values.append([])
        for response in group.responses:
            values[-1].append(torch.cat([h_0, values_W[at : at + len(response)]]))
            at += len(response)
        if index in packing.kept:
            kept[index] = Prefix(packing.kept[index], float(h_0))
    return values, kept


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packing: _Packing,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row. query [1, heads, N, D]; returns [1, N, heads, D].

    Raises ValueError for attention with anything more to it: `can_pack` then says no.
    """
    strange = {name for name, given in others.items() if given is not None} - _HARMLESS
    if strange or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"this attention cannot be packed: {', '.join(sorted(strange)) or type(module).__name__}")
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for index, place in packing.keep.items():
        pair = (key[:, :, place].clone(), value[:, :, place].clone())
        packing.kept.setdefault(index, []).append(pair)
    if _takes_varlen(query):
        return _attend_together(query, key, value, scaling, packing, module.layer_idx), None
    for segment in packing.segments:
        place = slice(segment.start, segment.stop)
        keys, values = key[:, :, place], value[:, :, place]
        step = _CPU_STEP if query.device.type == "cpu" else segment.stop - segment.start
        if segment.before is not None:
            if isinstance(segment.before, Prefix):
                past = segment.before.layers[module.layer_idx]
            else:
                past = (key[:, :, segment.before], value[:, :, segment.before])
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
            step = segment.stop - segment.start
        later = keys.shape[2] - segment.stop  # from a token's place in the row to its place among the keys
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            seen = slice(0, stop + later)
            attended = _attend(query[:, :, start:stop], keys[:, :, seen], values[:, :, seen], scaling, packing.masks)
            output[:, start:stop] = attended.transpose(1, 2)
    return output, None


def _takes_varlen(query: Tensor) -> bool:
    """Whether there is an attention over texts of many lengths: on GPUs, in half precision."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packing: _Packing, layer: int
) -> Tensor:
    """`_attention` of all segments in one call. [1, N, heads, D].

    The last token of a segment's queries is the last of its keys, which is how `varlen_attn` aligns the two.
    """
    plan = packing.together = packing.together or _lay_out(packing, query)
    copies = query.shape[1] // key.shape[1]

    def rows(of: Tensor, which: int) -> Tensor:
        whole = torch.cat([of, *(prefix.layers[layer][which] for prefix in plan.prefixes)], 2)
        return whole[0, :, plan.keys_K].repeat_interleave(copies, 0).transpose(0, 1).contiguous()

    return varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        rows(key, 0),
        rows(value, 1),
        plan.queries_G1,
        plan.keys_G1,
        plan.most_queries,
        plan.most_keys,
        scale=scaling,
        window_size=(-1, 0),
    )[None]  # type: ignore[index]  # no second result was asked for


def _lay_out(packing: _Packing, row: Tensor) -> _Together:
    """The plan that serves all layers; `row` is a tensor [1, heads, N, D] of the row."""
    prefixes: dict[int, tuple[int, Prefix]] = {}  # where each kept prompt's keys begin
    end = row.shape[2]
    places: list[int] = []
    queries, keys = [0], [0]
    for segment in packing.segments:
        before = segment.before
        if isinstance(before, Prefix):
            length = before.layers[0][0].shape[2]
            if id(before) not in prefixes:
                prefixes[id(before)] = (end, before)
                end += length
            begin = prefixes[id(before)][0]
            places += range(begin, begin + length)
        elif before is not None:
            places += range(before.start, before.stop)
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


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, masks: dict[tuple[int, int], Tensor]
) -> Tensor:
    """Attention of the last R tokens [1, heads, R, D] to C tokens, causally. Returns [1, heads, R, D]."""
    shape = query.shape[2], keys.shape[2]
    if shape[0] != shape[1] and shape not in masks:
        masks[shape] = _mask(*shape, query)
    mask = masks.get(shape)
    return functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=keys.shape[1] != query.shape[1],
    )


def _mask(rows: int, columns: int, like: Tensor) -> Tensor:
    """What the last `rows` of `columns` tokens may look at, to be added to the scores. [rows, columns]."""
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril(columns - rows)
    return torch.zeros(rows, columns, dtype=like.dtype, device=like.device).masked_fill(~allowed, float("-inf"))


AttentionInterface.register(ATTENTION, _attention)
