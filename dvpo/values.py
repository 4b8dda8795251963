"""The one place where a value model turns [x, y] into h_0..h_T. Training, evaluation and serving all read it here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dvpo.data.templates import Encoded
from dvpo.models import head


@dataclass(frozen=True)
class ValueBatch:
    """B texts [x, y] as one padded block.

    input_ids_B_L, attention_mask_B_L: the tokens of [x, y].
    states_B_S: the position in the row of h_0..h_T (the last prompt token, then y_1..y_T); 0 at padding.
    mask_B_S: true at h_0..h_T.
    """

    input_ids_B_L: Tensor
    attention_mask_B_L: Tensor
    states_B_S: Tensor
    mask_B_S: Tensor

    def to(self, device: torch.device) -> "ValueBatch":
        """The same batch on another device."""
        return ValueBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(items: Sequence[Encoded], pad_id: int, side: Literal["right", "left"] = "right") -> ValueBatch:
    """Pads texts to one block. Masks come from lengths alone, so a padding token that is also EOS does no harm.

    Raises ValueError for an empty prompt: h_0 is the value at the last prompt token.
    """
    length = max(len(i.prompt_ids) + len(i.response_ids) for i in items)
    states = max(len(i.response_ids) for i in items) + 1
    input_ids = torch.full((len(items), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(items), length, dtype=torch.long)
    positions = torch.zeros(len(items), states, dtype=torch.long)
    mask = torch.zeros(len(items), states, dtype=torch.bool)
    for row, item in enumerate(items):
        if not item.prompt_ids:
            raise ValueError("a prompt of no tokens has no value before the first action")
        ids = torch.tensor(item.prompt_ids + item.response_ids)
        start = length - len(ids) if side == "left" else 0
        count = len(item.response_ids) + 1
        input_ids[row, start : start + len(ids)] = ids
        attention_mask[row, start : start + len(ids)] = 1
        positions[row, :count] = torch.arange(count) + start + len(item.prompt_ids) - 1
        mask[row, :count] = True
    return ValueBatch(input_ids, attention_mask, positions, mask)


def position_ids(attention_mask_B_L: Tensor) -> Tensor:
    """Positions that count from 0 at the first real token, whichever side the padding is on. [B, L]."""
    return (attention_mask_B_L.cumsum(1) - 1).clamp(min=0)


def model_inputs(model: Any, batch: ValueBatch) -> dict[str, Any]:
    """What the forward pass of a batch is given.

    The tokens of a causal model never see what stands to their right, so right padding needs no mask, and attention can
    take its causal form.
    """
    mask_B_L: Tensor | None = batch.attention_mask_B_L
    positions_B_L = position_ids(batch.attention_mask_B_L)
    if _is_causal(model) and bool(batch.attention_mask_B_L[:, 0].all()):
        # Positions go on over the padding: where they stand still, transformers sees texts packed in one row.
        positions_B_L = torch.arange(positions_B_L.shape[1], device=positions_B_L.device).expand_as(positions_B_L)
        mask_B_L = None
    return {
        "input_ids": batch.input_ids_B_L,
        "attention_mask": mask_B_L,
        "position_ids": positions_B_L,
        "use_cache": False,
    }


def _is_causal(model: Any) -> bool:
    """Whether every attention layer says that it looks to the left only."""
    said = [module.is_causal for module in unwrapped(model).modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def token_values(model: Any, batch: ValueBatch) -> Tensor:
    """h_0..h_T of every text, float32, 0 at padding. [B, S].

    `model` is a token classifier (GVM, critic) or a sequence classifier (ScalarRM), of one label.
    """
    inputs = model_inputs(model, batch)
    plain = unwrapped(model)
    if type(plain).__name__.endswith("ForTokenClassification"):
        # Through the wrapper's own forward, which a data-parallel wrapper needs to see.
        values_B_L = model(**inputs).logits.squeeze(-1)
    else:
        # A sequence classifier's forward returns one pooled score; its head is read at every token instead.
        values_B_L = head(plain)(plain.base_model(**inputs).last_hidden_state).squeeze(-1)
    return torch.where(batch.mask_B_S, values_B_L.gather(1, batch.states_B_S).float(), 0)


def sequence_scores(model: Any, batch: ValueBatch) -> Tensor:
    """The ScalarRM's score of every response: its head at the last token, h_T. [B]."""
    from dvpo.objectives.stats import last_masked

    return last_masked(token_values(model, batch), batch.mask_B_S)


@torch.no_grad()
def score_all(
    model: Any, items: Sequence[Encoded], pad_id: int, max_tokens: int = 8192, bf16: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index, h_0..h_T) for every text, batched by length so that little padding is computed.

    Args:
        max_tokens: padded tokens in one batch.
        bf16: run the backbone under bfloat16 autocast; values stay float32.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt_ids) + len(items[i].response_ids), reverse=True)
    start = 0
    while start < len(order):
        longest = items[order[start]]
        rows = max(1, max_tokens // (len(longest.prompt_ids) + len(longest.response_ids)))
        chosen = order[start : start + rows]
        start += rows
        batch = collate([items[i] for i in chosen], pad_id).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            values_B_S = token_values(model, batch).cpu()
        for row, i in enumerate(chosen):
            yield i, values_B_S[row, : len(items[i].response_ids) + 1].clone()


def unwrapped(model: Any) -> Any:
    """The transformers model inside data-parallel and peft wrappers (adapters stay in place)."""
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "peft_config") else model
