"""A model in training with its AdamW, however its weights are spread over the processes.

`backward` once for every micro-batch, `step` once for every mini-batch. A loss is this process's part of a sum that is
divided by counts over all processes, so the gradients of the processes are added, not averaged.
What `state` gives does not depend on the strategy or on the number of processes: float32 weights by name, and the
state of a plain torch AdamW. A checkpoint of one kind of run goes on as another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from dvpo import models
from dvpo.distributed import Processes, shard_layers, zero_config
from dvpo.training.tied import add_rows_in_place
from dvpo.training.zero_state import load_zero_state, zero_state

State = dict[str, Any]


def learner(
    module: Any, learning_rate: float, max_grad_norm: float, processes: Processes, bf16: bool = False
) -> "Learner":
    """The learner of the processes' strategy."""
    if processes.zero:
        return ZeroLearner(module, learning_rate, max_grad_norm, processes, bf16)
    if processes.strategy == "fsdp2":
        return ShardedLearner(module, learning_rate, max_grad_norm, processes)
    return Learner(module, learning_rate, max_grad_norm, processes, bf16)


class Learner:
    """All weights on every process; the gradients are summed before a step.

    module: the plain model. model: what forward passes go through.
    """

    in_place = True
    """Whether a weight stands whole in one place from a forward pass to the end of its backward pass."""

    def __init__(
        self, module: Any, learning_rate: float, max_grad_norm: float, processes: Processes, bf16: bool = False
    ):
        self.module = self.model = module
        self.max_grad_norm, self.processes = max_grad_norm, processes
        self.optimizer = adamw(module, learning_rate, fused=bf16)
        if bf16:  # the sum is rounded otherwise; float32 runs keep autograd's
            add_rows_in_place(module)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds a micro-batch's gradient; `last` says that a step follows."""
        loss.backward()

    def step(self) -> None:
        """One step of the optimizer, with the gradient's norm clipped."""
        if self.processes.count > 1:
            self.processes.sum_in_place([p.grad for p in trainable(self.module) if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(trainable(self.module), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While it lasts, `module` is whole on every process and may run on its own, any number of times."""
        yield

    def state(self) -> State:
        """{"weights", "optimizer"}, whole; every process takes part, and the main one's answer is to be used."""
        weights = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def load(self, state: State) -> None:
        """Takes up a `state`."""
        self.module.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(self._as_here(state["optimizer"]))

    def save(self, tokenizer: Any, folder: Path) -> None:
        """An ordinary checkpoint folder, written by the main process; every process takes part."""
        weights = self._consolidated()
        if self.processes.main:
            models.save(self.module, tokenizer, folder, weights)
        self.processes.wait()

    def _as_here(self, saved: State) -> State:
        """An optimizer's state to be computed with as this run does, whatever kind of run it is of."""
        here = {name: self.optimizer.param_groups[0][name] for name in ("foreach", "fused")}
        return {**saved, "param_groups": [{**group, **here} for group in saved["param_groups"]]}

    def _consolidated(self) -> dict[str, Tensor] | None:
        """The weights as they are to be saved; None where the module holds them."""
        return None


class ZeroLearner(Learner):
    """DeepSpeed holds the optimizer's state (stage 1), the gradients (2) and the weights (3) in parts."""

    in_place = False

    def __init__(self, module: Any, learning_rate: float, max_grad_norm: float, processes: Processes, bf16: bool):
        import deepspeed

        self.module, self.max_grad_norm, self.processes = module, max_grad_norm, processes
        self.optimizer = adamw(module, learning_rate)
        self.groups = [list(group["params"]) for group in self.optimizer.param_groups]
        config = zero_config()
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        config |= {"gradient_clipping": max_grad_norm, "bf16": {"enabled": bf16}}
        zero = config["zero_optimization"]
        if zero["stage3_param_persistence_threshold"] == "auto":
            zero["stage3_param_persistence_threshold"] = 10 * module.config.hidden_size
        self.stage = zero["stage"]
        self.model, self.zero, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Learner`. DeepSpeed averages over the processes."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.processes.count)

    def step(self) -> None:
        """See `Learner`."""
        self.model.step()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Learner`. At stage 3 the hooks that fetch and free the weights are off meanwhile."""
        if self.stage < 3:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            remove_hooks(self.model)
            try:
                yield
            finally:
                add_hooks(self.model)

    def state(self) -> State:
        """See `Learner`."""
        names = {p: name for name, p in self.module.named_parameters()}
        weights, optimizer = zero_state(self.zero, self.groups)
        return {"weights": {names[p]: value for p, value in weights.items()}, "optimizer": optimizer}

    def load(self, state: State) -> None:
        """See `Learner`."""
        parameters = dict(self.module.named_parameters())
        weights = {parameters[name]: value for name, value in state["weights"].items()}
        load_zero_state(self.zero, self.groups, self._as_here(state["optimizer"]), weights)

    def _consolidated(self) -> dict[str, Tensor] | None:
        return self.model._zero3_consolidated_16bit_state_dict() if self.stage == 3 else None


class ShardedLearner(Learner):
    """FSDP2: weights, gradients and optimizer state of the layers in parts; a layer is gathered while it runs."""

    in_place = False

    def __init__(self, module: Any, learning_rate: float, max_grad_norm: float, processes: Processes):
        shard_layers(module, processes)
        super().__init__(module, learning_rate, max_grad_norm, processes)
        self.optimizer.param_groups[0]["foreach"] = False  # one call cannot take parts and whole tensors

    @property
    def _parts(self) -> list[FSDPModule]:
        return [m for m in self.module.modules() if isinstance(m, FSDPModule)]

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Learner`. FSDP averages over the processes."""
        for part in self._parts:
            part.set_requires_gradient_sync(last)
        (loss * self.processes.count).backward()

    def step(self) -> None:
        """See `Learner`."""
        gradients = [p.grad for p in trainable(self.module) if p.grad is not None]
        parts = [g for g in gradients if isinstance(g, DTensor)]
        others = [g for g in gradients if not isinstance(g, DTensor)]  # outside the layers: whole on every process
        self.processes.sum_in_place(others)
        for gradient in others:
            gradient.div_(self.processes.count)
        norms = [whole(torch.nn.utils.get_total_norm(part)) for part in (parts, others) if part]
        scale = (self.max_grad_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0).to(self.processes.device)
        for gradient in gradients:
            gradient.mul_(scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Learner`."""
        for part in self._parts:
            part.set_reshard_after_forward(False)
            part.unshard()
        try:
            yield
        finally:
            for part in self._parts:
                part.reshard()
                part.set_reshard_after_forward(True)

    def state(self) -> State:
        """See `Learner`."""
        weights = {name: whole(p) for name, p in self.module.named_parameters() if p.requires_grad}
        saved = self.optimizer.state_dict()
        state = {i: {key: whole(value) for key, value in moments.items()} for i, moments in saved["state"].items()}
        return {"weights": weights, "optimizer": {**saved, "state": state}}

    def load(self, state: State) -> None:
        """See `Learner`."""
        for name, p in self.module.named_parameters():
            if name in state["weights"]:
                p.data.copy_(like(p, state["weights"][name]))
        saved = state["optimizer"]
        parameters = trainable(self.module)
        parts = {
            i: {key: like(parameters[i], value) if value.dim() else value for key, value in moments.items()}
            for i, moments in saved["state"].items()
        }
        self.optimizer.load_state_dict(self._as_here({**saved, "state": parts}))

    def _consolidated(self) -> dict[str, Tensor] | None:
        return {name: whole(value) for name, value in self.module.state_dict().items()}


def whole(value: Tensor) -> Tensor:
    """A tensor that may be in parts, whole and on the CPU."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, which every process has, in parts where the parameter is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def trainable(module: Any) -> list[torch.nn.Parameter]:
    """The parameters that learn."""
    return [p for p in module.parameters() if p.requires_grad]


def adamw(module: Any, learning_rate: float, fused: bool = False) -> torch.optim.AdamW:
    """AdamW without weight decay over what learns.

    fused: by torch's kernel, which is faster and makes no copies of the largest weights, but rounds otherwise than its
    plain loop.
    """
    return torch.optim.AdamW(trainable(module), lr=learning_rate, weight_decay=0.0, fused=fused or None)
