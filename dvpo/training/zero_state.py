"""AdamW's state under DeepSpeed's ZeRO as a plain torch AdamW would hold it, and back.

DeepSpeed's own checkpoints hold the parts of each process and go on only with as many processes. These hold whole
tensors, so they go on under any number, under another stage, or without DeepSpeed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Groups = Sequence[Sequence[torch.nn.Parameter]]
"""The parameters as the optimizer was given them, before DeepSpeed replaced its groups."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_state(zero: Any, groups: Groups) -> tuple[dict[torch.nn.Parameter, Tensor], dict[str, Any]]:
    """The float32 weights by parameter, and the state dict of a plain AdamW. Every process takes part.

    Tensors are on the CPU, one parameter gathered at a time.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    ordered = [p for group in groups for p in group]
    weights = {p: safe_get_full_fp32_param(p).cpu().clone() for p in ordered}
    steps = _steps(zero)
    state = {}
    if steps:
        _link(zero)
        state = {
            i: {"step": torch.tensor(float(steps))}
            | {key: safe_get_full_optimizer_state(p, key).cpu().clone() for key in MOMENTS}
            for i, p in enumerate(ordered)
        }
    first = 0
    described = []
    for group, own in zip(groups, zero.optimizer.param_groups, strict=True):
        options = {key: value for key, value in own.items() if key != "params"}
        described.append({**options, "params": list(range(first, first + len(group)))})
        first += len(group)
    return weights, {"state": state, "param_groups": described}


def load_zero_state(
    zero: Any,
    groups: Groups,
    optimizer: dict[str, Any],
    weights: dict[torch.nn.Parameter, Tensor] | None = None,
) -> None:
    """Takes up what `zero_state` gave, or the state dict of a plain AdamW over the same parameters.

    weights: by parameter; None where the model held them before DeepSpeed wrapped it.
    """
    import deepspeed

    ordered = [p for group in groups for p in group]
    for p, saved in (weights or {}).items():
        value = saved.to(p.device)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
            p.data.copy_(value)
        _set(p, value.float())
    for own, described in zip(zero.optimizer.param_groups, optimizer["param_groups"], strict=True):
        own.update({key: value for key, value in described.items() if key != "params"})
    state = optimizer["state"]
    if not state:
        return
    for flat in _flat_parts(zero):
        step = torch.tensor(float(state[0]["step"]))
        zero.optimizer.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}
    _link(zero)
    for i, p in enumerate(ordered):
        for key in MOMENTS:
            _set(p, state[i][key].to(p.device).float(), key)


def _set(p: Any, value: Tensor, moment: str | None = None) -> None:
    """Puts this process's part of a whole float32 weight, or of one of its moments, in its place."""
    from deepspeed import utils

    if not hasattr(p, "ds_id"):
        if moment:
            utils.safe_set_full_optimizer_state(p, value, moment)
        else:
            utils.safe_set_full_fp32_param(p, value)
        return
    # DeepSpeed's own function fails where the numbers are not a multiple of the processes.
    size = p.ds_tensor.numel()
    whole = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    part = whole.narrow(0, size * dist.get_rank(), size)
    if moment:
        utils.safe_set_local_optimizer_state(p, part, moment)
    else:
        utils.safe_set_local_fp32_param(p, part)


def _flat_parts(zero: Any) -> list[Tensor]:
    """This process's parts of the float32 weights: what the optimizer really steps."""
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return list(zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups)


def _link(zero: Any) -> None:
    """Lets every parameter find its moments (stages 1 and 2).

    DeepSpeed does it by itself when the first group of parameters has stepped, too early for the other groups.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _steps(zero: Any) -> int:
    """Steps taken so far."""
    return max((int(state["step"]) for state in zero.optimizer.state.values() if "step" in state), default=0)
