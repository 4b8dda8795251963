"""What is run: the models of each method, one update of a job, and how it is spread over devices."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["policy", "value"]
Precision = Literal["bf16", "autocast", "float32"]


@dataclass(frozen=True)
class Method:
    """The models of a method by role (a reward model has the value model's size), and its texts.

    texts: of one item of a batch (a pair has two). generations: rollouts that follow one another.
    """

    name: str
    trained: tuple[Role, ...]
    frozen: tuple[Role, ...] = ()
    texts: int = 1
    generations: int = 0

    @property
    def online(self) -> bool:
        return self.generations > 0


METHODS = {
    method.name: method
    for method in (
        Method("sft", ("policy",)),
        Method("rm", ("value",), texts=2),
        Method("gvm", ("value",)),
        Method("dpo", ("policy",), ("policy",), texts=2),
        Method("ppo", ("policy", "value"), ("policy", "value"), generations=1),
        Method("remax", ("policy",), ("policy", "value"), generations=2),
        Method("grpo", ("policy",), ("policy", "value"), generations=1),
        Method("dvpo", ("policy",), ("policy", "value"), generations=1),
    )
}


@dataclass(frozen=True)
class Job:
    """One update of a method, on each device. Token counts are of a padded text.

    batch: items (prompts, texts or pairs). micro: items in one forward and backward pass; items of an optimiser step:
    `step` (all of the batch by default). epochs: passes over the batch. group: responses per prompt.
    learned: responses per prompt that the gradient is of (all by default).
    """

    method: Method
    prompt_tokens: float
    response_tokens: float
    batch: int
    micro: int
    step: int | None = None
    epochs: int = 1
    group: int = 1
    learned: int | None = None

    @property
    def length(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def responses(self) -> int:
        """Texts that are generated (per generation) and judged, or read where there is no generation."""
        return self.batch * self.group * self.method.texts

    @property
    def learned_texts(self) -> int:
        """Texts in one epoch of learning."""
        return self.batch * (self.learned or self.group) * self.method.texts

    @property
    def micro_texts(self) -> int:
        """Texts in one pass."""
        return min(self.micro * self.method.texts, self.learned_texts)

    @property
    def passes(self) -> int:
        """Forward and backward passes of each trained model in one epoch."""
        return -(-self.learned_texts // self.micro_texts)

    @property
    def steps(self) -> int:
        """Optimiser steps in one epoch."""
        per_step = (self.step or self.batch) * (self.learned or self.group) * self.method.texts
        return max(1, -(-self.learned_texts // per_step))

    @property
    def accumulates(self) -> bool:
        """Whether a gradient is kept from one pass to the next."""
        return self.passes > self.steps


@dataclass(frozen=True)
class Setup:
    """How a job is spread and stored.

    precision: `bf16` as DeepSpeed does (weights and gradients in bf16; weights and both moments in float32 for the
    optimiser), `autocast` (float32 weights and gradients, bf16 arithmetic) or `float32`.
    frozen: `resident` whole on every device, or `sharded` over all, in numbers of `frozen_bytes` bytes (the policy's by
    default). remote: the value or reward model is behind a URL.
    gathered: under ZeRO-3, the policy is put together once for a rollout, not once per token.
    logit_rows: rows of logits computed at a time; None computes them all at once.
    vllm_share: share of the device's memory that a colocated vLLM engine takes; 0 generates with transformers.
    """

    zero: int = 0
    precision: Precision = "bf16"
    checkpointing: bool = False
    frozen: Literal["sharded", "resident"] = "resident"
    frozen_bytes: int | None = None
    remote: bool = False
    gathered: bool = True
    offload: bool = False
    logit_rows: int | None = None
    lora_rank: int | None = None
    vllm_share: float = 0.0

    @property
    def weight_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def optimizer_bytes(self) -> int:
        """Two moments in float32, and under bf16 the float32 weights."""
        return 12 if self.precision == "bf16" else 8

    @property
    def activation_bytes(self) -> int:
        return 4 if self.precision == "float32" else 2
