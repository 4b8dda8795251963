"""Log-probabilities of a response's tokens under a policy, without ever holding a [B, T, V] block of a large V.

The model's last layer is made to return log-probabilities in place of logits. So the model is still called as a whole,
which data-parallel, sharded and adapted models need, and the logits live for one chunk of tokens at a time; the
backward pass computes them again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dvpo.errors import StageError
from dvpo.objectives.policy_loss import token_logprobs
from dvpo.values import ValueBatch, model_inputs, unwrapped

MOST_LOGITS = 2**24
"""Logits held at once (64 MiB in float32). A batch below it is computed in one piece."""

CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings of architectures that do something to the logits after the last layer; they are computed in one piece."""


def response_logprobs(model: Any, batch: ValueBatch, temperature: float) -> Tensor:
    """log pi(y_t | s_t) of every response token at a temperature, float32, 0 at padding. [B, T].

    Logits are computed for the response alone. Raises StageError for a model that changes its logits after its last
    layer in a way not known here.
    """
    config = unwrapped(model).config
    rows, length = batch.input_ids_B_L.shape
    keep = length - int(batch.states_B_S[:, 0].min())
    if rows * keep * config.vocab_size <= MOST_LOGITS or any(hasattr(config, name) for name in CHANGES_LOGITS):
        return _in_one_piece(model, batch, temperature, keep)
    return _in_chunks(model, batch, temperature, max(1, MOST_LOGITS // config.vocab_size))


def _in_one_piece(model: Any, batch: ValueBatch, temperature: float, keep: int) -> Tensor:
    logits_B_K_V = _forward(model, batch, logits_to_keep=keep)
    mask_B_T = batch.mask_B_S[:, 1:]
    before_B_T = torch.where(mask_B_T, batch.states_B_S[:, :-1] - (batch.input_ids_B_L.shape[1] - keep), 0)
    actions_B_T = batch.input_ids_B_L.gather(1, batch.states_B_S[:, 1:])
    logits_B_T_V = logits_B_K_V.gather(1, before_B_T[..., None].expand(-1, -1, logits_B_K_V.shape[-1]))
    return torch.where(mask_B_T, token_logprobs(logits_B_T_V, actions_B_T, temperature), 0)


def _in_chunks(model: Any, batch: ValueBatch, temperature: float, size: int) -> Tensor:
    """`size` tokens at a time. N are the response tokens of the whole batch, one after another."""
    mask_B_T = batch.mask_B_S[:, 1:]
    rows_N = mask_B_T.nonzero()[:, 0]
    before_N = batch.states_B_S[:, :-1][mask_B_T]
    actions_N = batch.input_ids_B_L[rows_N, batch.states_B_S[:, 1:][mask_B_T]]
    plain = unwrapped(model)
    head = plain.get_output_embeddings()
    to_logits = head.forward
    returned = []

    def of_chunk(hidden_n_H: Tensor, actions_n: Tensor) -> Tensor:
        return token_logprobs(to_logits(hidden_n_H), actions_n, temperature)

    def instead_of_logits(hidden_B_L_H: Tensor) -> Tensor:
        hidden_N_H = hidden_B_L_H[rows_N, before_N]
        chunks = zip(hidden_N_H.split(size), actions_N.split(size), strict=True)
        returned.append(torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]))
        return returned[0]

    with _forward_replaced(head, instead_of_logits):
        logprobs_N = _forward(model, batch)
    # A wrapper may hand on a copy.
    if not (logprobs_N is returned[0] or torch.equal(logprobs_N, returned[0])):
        raise StageError(f"{type(plain).__name__} changes its logits after its last layer; use another model")
    return logprobs_N.new_zeros(mask_B_T.shape).masked_scatter(mask_B_T, logprobs_N)


def _forward(model: Any, batch: ValueBatch, **options: Any) -> Tensor:
    return model(**model_inputs(model, batch), **options).logits


@contextmanager
def _forward_replaced(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The hooks of the module still run around the new forward: a sharded one gathers its weights there."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
