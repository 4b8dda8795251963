"""A policy's weights as another engine wants them: whole, under the plain model's names, adapters merged."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dvpo.values import unwrapped


@torch.no_grad()
def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, weight) of the transformers model inside wrappers and adapters, one at a time.

    A tied weight comes under each of its names: an engine may hold a layer's weights in a form of its own. A sharded
    weight is gathered while it is out, which is a collective: every process must walk to the end. An adapter's share is
    added to a copy, so that the base weights keep their bits.
    """
    plain = unwrapped(model)
    modules = dict(plain.named_modules())
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        owner, _, kind = name.rpartition(".")
        if "lora_" in name:
            continue
        layer = modules.get(owner.removesuffix(".base_layer")) if owner.endswith(".base_layer") else None
        needed = [parameter, *(p for n, p in layer.named_parameters() if "lora_" in n)] if layer else [parameter]
        with _gathered(needed):
            weight = _whole(parameter.data)
            if layer is not None and kind == "weight":
                for adapter in layer.active_adapters:
                    weight = weight + _whole(layer.get_delta_weight(adapter)).to(weight.dtype)
            yield name.replace(".base_layer.", "."), weight


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 may have cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Whole parameters where ZeRO-3 has cut them."""
    if not hasattr(parameters[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
