"""Values of many texts in one unpadded row, where texts that share a prompt share its computation too.

The tokens of all texts stand behind one another in a row of one batch: every layer but attention treats tokens one by
one, and attention is told where each text begins and which prompt a response follows. So nothing is computed for
padding, a prompt followed by several responses is computed once, and the keys and values of a prompt can be kept and
used again. Only models whose attention is plain causal attention can do this; `can_pack` finds out.

Training reads its batches in such a row too (`PackedBatch`), every text with a prompt of its own.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dvpo.data.templates import Encoded
from dvpo.models import head
from dvpo.packed_attention import ATTENTION
from dvpo.packed_parts import Row, cut, run_together
from dvpo.packed_row import Earlier, Kept, Packing, Prefix, Segment
from dvpo.values import collate, position_ids, unwrapped


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


@dataclass(frozen=True)
class PackedBatch:
    """B texts [x, y] as one row of N tokens, for training. `dvpo.values.ValueBatch` is the padded form.

    input_ids_1_N, positions_1_N: the tokens and their places in their texts.
    lengths_B: tokens of each text.
    states_B_S: the place in the row of h_0..h_T; 0 at padding.
    mask_B_S: true at h_0..h_T.
    """

    input_ids_1_N: Tensor
    positions_1_N: Tensor
    lengths_B: Tensor
    states_B_S: Tensor
    mask_B_S: Tensor


def collate_packed(items: Sequence[Encoded]) -> PackedBatch:
    """Puts texts behind one another. Raises ValueError for an empty prompt."""
    row = _pack([Group(item.prompt_ids, [item.response_ids]) for item in items])
    counts_B = torch.tensor([len(item.response_ids) + 1 for item in items])
    mask_B_S = torch.arange(int(counts_B.max())) < counts_B[:, None]
    states_B_S = torch.zeros(mask_B_S.shape, dtype=torch.long)
    states_B_S[mask_B_S] = torch.tensor(row.packing.wanted)
    lengths_B = torch.tensor([len(item.prompt_ids) + len(item.response_ids) for item in items])
    return PackedBatch(torch.tensor([row.ids]), torch.tensor([row.positions]), lengths_B, states_B_S, mask_B_S)


def packed_token_values(model: Any, batch: PackedBatch) -> Tensor:
    """h_0..h_T of every text, float32, 0 at padding, with gradients. [B, S].

    `model` is a token classifier for which `can_train_packed` was true, under whatever wrapper.
    """
    ends = batch.lengths_B.cumsum(0).tolist()
    segments = [Segment(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    values_N = model(
        input_ids=batch.input_ids_1_N,
        position_ids=batch.positions_1_N,
        use_cache=False,
        packing=Packing(segments),
    ).logits[0, :, 0]
    return torch.where(batch.mask_B_S, values_N[batch.states_B_S].float(), 0)


def can_train_packed(model: Any) -> bool:
    """Whether `packed_token_values` can read the model, which is left ready for it; if not, it is unchanged.

    To be asked before the model is wrapped, or spread over processes.
    """
    forward = inspect.signature(unwrapped(model).forward)
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward.parameters.values())
    return takes_more and can_pack(model)


def packed_values(model: Any, groups: Sequence[Group], parts: int = 1) -> tuple[list[list[Tensor]], dict[int, Prefix]]:
    """h_0..h_T of every response of every group, [T + 1], float32, on the CPU; and what is kept of prompts, by group.

    Args:
        model: a token or sequence classifier of one label for which `can_pack` was true. One forward pass.
        parts: on a CPU, so many threads compute a part of the row each; see `dvpo.packed_parts`.
    """
    plain = unwrapped(model)
    config = plain.config.get_text_config()
    row = _pack(groups, config.num_hidden_layers)
    if not row.ids:
        found = []
    elif len(rows := cut(row, parts, config.hidden_size)) > 1:
        threads = max(1, torch.get_num_threads() // len(rows))
        found = run_together(lambda part: _values_of(plain, rows[part]), [each.packing for each in rows], threads)
    else:
        found = [_values_of(plain, row)]
    return _unpack(groups, torch.cat([torch.empty(0), *found]), row.packing.kept)


@torch.inference_mode()
def _values_of(plain: Any, row: Row) -> Tensor:
    """The values that are wanted of a row, float32, on the CPU. [W]."""
    wanted: Any = row.packing.wanted
    hidden_N_D = _hidden(plain, row)
    if len(hidden_N_D) > len(wanted):  # else the model has left out the others
        hidden_N_D = hidden_N_D[torch.tensor(wanted, dtype=torch.long, device=hidden_N_D.device)]
    return head(plain)(hidden_N_D).squeeze(-1).float().cpu()


def _hidden(plain: Any, row: Row) -> Tensor:
    """The last hidden states of a row. [N, D]."""
    device = next(plain.parameters()).device
    hidden_1_N_D: Tensor = plain.base_model(
        input_ids=torch.tensor([row.ids], device=device),
        position_ids=torch.tensor([row.positions], device=device),
        use_cache=False,
        packing=row.packing,
    ).last_hidden_state
    return hidden_1_N_D[0]


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
    # From the middle: many first ones were never trained on, and bfloat16 alone changes what comes of them by a half.
    prompt, first, second = ([(vocabulary // 2 + i) % vocabulary for i in ids] for ids in (prompt, first, second))
    before = plain.config._attn_implementation
    try:
        expected = [_hidden_alone(plain, Encoded(prompt, response)) for response in (first, second)]
        plain.set_attn_implementation(ATTENTION)
        layers = plain.config.get_text_config().num_hidden_layers
        row = _pack([Group(prompt, [first, second], keep=True)], layers)
        with torch.inference_mode():
            hidden_N_D = _hidden(plain, row)
        found = hidden_N_D.split([len(prompt) + len(first), len(second)])
        alike = _alike(found[0], expected[0]) and _alike(found[1], expected[1][len(prompt) :])
        alike = alike and row.packing.kept[0].count == layers
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


def _pack(groups: Sequence[Group], layers: int = 0) -> Row:
    """The texts of all groups in one row. layers: of the model, where prompts are kept."""
    ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    packing = Packing(wanted=wanted)
    for index, group in enumerate(groups):
        length = len(group.prompt_ids)
        if not length:
            raise ValueError("a prompt of no tokens has no value before the first action")
        before: tuple[Earlier, ...] = () if group.prefix is None else (group.prefix,)
        start = len(ids)
        if group.prefix is None:
            ids += group.prompt_ids
            positions += range(length)
            wanted.append(start + length - 1)
            prompt = slice(start, start + length)
            if group.keep:
                packing.keep[index] = (prompt,)
                packing.kept[index] = Kept(layers)
        for response in group.responses:
            # The first response after a prompt in the row goes on in the prompt's own segment.
            first = len(ids)
            ids += response
            positions += range(length, length + len(response))
            wanted += range(first, len(ids))
            if not before:
                packing.segments.append(Segment(start, len(ids)))
                before = (prompt,)
            elif response:
                packing.segments.append(Segment(first, len(ids), before))
    return Row(packing, ids, positions)


def _unpack(
    groups: Sequence[Group], values_W: Tensor, collected: dict[int, Kept]
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
        if index in collected:
            of = collected[index]
            kept[index] = Prefix(of.keys_L_1_H_P_D, of.values_L_1_H_P_D, float(h_0))
    return values, kept
