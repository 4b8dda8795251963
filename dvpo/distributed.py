"""The processes of one training: who there is, what each takes, and what is put together again.

A launcher (`accelerate launch`, torchrun, `dvpo train --processes`) says in the environment how many processes there
are and how the weights are spread over them. The strategies: `ddp` (every process has all), `zero1`, `zero2`, `zero3`
(DeepSpeed) and `fsdp2`. Without a launcher there is one process and none of this takes effect.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dvpo.errors import InputError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others before it gives up."""
BUCKET = 2**25
"""Numbers in one message of gradients."""


@dataclass(frozen=True)
class Processes:
    """This process among the `count` of a run. strategy: as above, or `none` without a launcher."""

    rank: int
    count: int
    device: torch.device
    strategy: str

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed holds the weights."""
        return self.strategy.startswith("zero")

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's equal part of `items`, which every process has: neighbours stay together."""
        if len(items) % self.count:
            raise ValueError(f"{len(items)} items cannot be shared equally by {self.count} processes")
        size = len(items) // self.count
        return list(items[self.rank * size : (self.rank + 1) * size])

    def gather(self, part: list[T]) -> list[T]:
        """The parts of all processes, joined: what `share` divided."""
        if self.count == 1:
            return part
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part)
        return [item for each in parts for item in each]

    def gather_rows(self, rows_b_T: Tensor) -> Tensor:
        """The rows of all processes (the same number of each), padded on the right with 0 to one width. [B, T]."""
        if self.count == 1:
            return rows_b_T
        width = torch.tensor(rows_b_T.shape[1], device=rows_b_T.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        padded = torch.nn.functional.pad(rows_b_T, (0, int(width) - rows_b_T.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums numbers over all processes."""
        if self.count == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors of one type over all processes, as many in one message as fit a bucket."""
        bucket: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET or i + 1 == len(tensors):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for t, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(summed.view_as(t))
                bucket.clear()

    def from_main(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def require_divides(self, name: str, size: int) -> None:
        """Raises InputError where `size` cannot be shared equally."""
        if size % self.count:
            raise InputError(
                f"{name} is {size} for all processes together, which {self.count} processes cannot share equally; "
                f"make it a multiple of {self.count}, or start fewer processes"
            )


def shard_layers(model: Any, processes: Processes) -> None:
    """Spreads a model's layers over the processes by FSDP2, in place; a layer is gathered while it runs.

    What is outside the layers (embeddings, the last norm, the head) stays whole: it may be tied, and is read outside
    the model's own forward. Raises InputError for a model that does not say what its layers are.
    """
    from torch.distributed.fsdp import fully_shard

    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [part for part in model.modules() if type(part).__name__ in names]
    if not layers:
        raise InputError(f"{type(model).__name__} does not say what its layers are, so it cannot be sharded")
    mesh = dist.device_mesh.init_device_mesh(processes.device.type, (processes.count,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)


def launched() -> bool:
    """Whether a launcher started this process as one of several, or with a strategy that wraps the model."""
    started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return started and (int(os.environ["WORLD_SIZE"]) > 1 or strategy() not in ("none", "ddp"))


def strategy() -> str:
    """What the launcher asks for, in accelerate's environment variables."""
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{_zero_section()['stage']}"
    if _flag("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', 1)}"
    return "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "none"


def start() -> Processes:
    """Joins the other processes, once; later calls give the same answer.

    Raises InputError for an unknown strategy, or more processes than GPUs.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized() and not launched():
        return Processes(0, 1, torch.device("cuda" if cuda else "cpu"), "none")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local + 1} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
            "start as many processes as there are GPUs"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        _join(_strategy_of_this_run(), device)
    return Processes(dist.get_rank(), dist.get_world_size(), device, os.environ[_JOINED])


def zero_config() -> dict[str, Any]:
    """DeepSpeed's configuration as transformers reads it: `auto` where the trainer's own settings decide."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW also where the optimizer's state is in the host's memory: DeepSpeed's own needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
            **_zero_section(),
        },
    }


_JOINED = "DVPO_STRATEGY"
"""Which strategy was joined: transformers takes accelerate's own variables out of the environment."""


def _join(name: str, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if name.startswith("zero"):
        try:
            import deepspeed
        except ImportError as error:
            raise InputError(f"{name} needs DeepSpeed; install it with pip install 'dvpo[gpu]'") from error
        # Compiled at the first start, for half a minute, to speed up what gloo does well enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        from accelerate import PartialState

        # Without the backend's name accelerate takes every process of a CPU run for the only one.
        state = PartialState(backend=backend, timeout=TIMEOUT)
        if state.num_processes != dist.get_world_size():
            raise RuntimeError(f"accelerate sees {state.num_processes} of {dist.get_world_size()} processes")
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    os.environ[_JOINED] = name


def _strategy_of_this_run() -> str:
    name = strategy()
    if name not in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        raise InputError(f"the launcher asks for {name}; choose from ddp, zero1, zero2, zero3, fsdp2")
    return name


def _zero_section() -> dict[str, Any]:
    """`zero_optimization` from the launcher's file of DeepSpeed settings or from its flags."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]
    section: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))}
    for part in ("optimizer", "param"):
        where = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if where != "none":
            section[f"offload_{part}"] = {"device": where, "pin_memory": torch.cuda.is_available()}
    return section


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
