"""The planner: whether stages fit on a cluster, how to spread them, how long they take, and what breaks first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dvpo.config import PolicySettings, TrainSettings
from reproduce.cost import memory, table7, timing
from reproduce.cost.hardware import GIB, RESERVED, Cluster
from reproduce.cost.shapes import Shape
from reproduce.cost.work import METHODS, Job, Setup

MOST_LOGITS = 2**24
"""Logits that the loss computes at once (see dvpo.logprobs)."""
ADVICE = {
    "weights": "spread the weights (ZeRO-3), or train an adapter",
    "optimizer": "spread the optimiser's states over more devices, keep them in the host's memory, or train an adapter",
    "gradients": "spread the gradients (ZeRO-2 or 3)",
    "frozen models": "shard the frozen models, keep them in bfloat16, or serve the value model behind a URL",
    "activations": "recompute activations (gradient_checkpointing), or take a smaller micro_batch_size",
    "logits": "take a smaller micro_batch_size",
    "kv cache": "generate for fewer prompts at a time (prompts_per_update), or shorter",
    "gathered policy": "use more devices or a smaller model: a rollout needs the whole policy on each",
    "working copies": "spread the model over more devices, or train an adapter",
    "allocator": "use more devices",
    "vllm": "give vLLM a smaller share",
}
"""What to change, by the part of memory that is the largest."""


@dataclass(frozen=True)
class Stage:
    """A stage to plan. settings say batches and lengths; updates: how many there will be, where that is known.

    optional: it is run only where it is asked for.
    """

    name: str
    method: str
    shape: Shape
    settings: TrainSettings | PolicySettings
    updates: float | None = None
    optional: bool = False


@dataclass(frozen=True)
class Wish:
    """What is fixed beforehand; None lets the planner choose. response_tokens: of a typical response, for the time.

    own: nothing is recomputed, sharded, offloaded or made smaller but by the stage's own settings.
    """

    zero: int | None = None
    response_tokens: int | None = None
    vllm_share: float = 0.0
    own: bool = False


def plan(stage: Stage, cluster: Cluster, wish: Wish) -> dict[str, Any]:
    """The answers for one stage: the first way of spreading it that fits, from the quickest to the most sparing.

    Times are [least, most]; sizes are GiB. `devices_needed` is None where 1024 devices are not enough. `uneven` says
    which batches of the settings the devices cannot share equally, or is None.
    """
    chosen = next(_fitting(stage, cluster, wish), None)
    fits = chosen is not None
    setup, job = chosen or list(_ways(stage, cluster, wish))[-1]
    phases = memory.phases(job, stage.shape, setup, cluster, table7.constants().slack)
    where, most = memory.peak(phases)
    timed = replace(job, response_tokens=min(wish.response_tokens or job.response_tokens, job.response_tokens))
    slow, fast = (timing.seconds(timed, stage.shape, setup, cluster, share) for share in cluster.device.reached)
    per_update = [round(sum(fast.values()), 3), round(sum(slow.values()), 3)]
    largest = max(phases[where], key=lambda part: phases[where][part])
    return {
        "stage": stage.name,
        "method": stage.method,
        "optional": stage.optional,
        "parameters": stage.shape.parameters("policy"),
        "fits": fits,
        "zero": setup.zero,
        "checkpointing": setup.checkpointing,
        "offload": setup.offload,
        "frozen": setup.frozen if METHODS[stage.method].frozen else None,
        "micro_batch": job.micro,
        "batch": job.batch * cluster.devices,
        "uneven": _uneven(stage, cluster),
        "memory_gib": {name: round(sum(parts.values()) / GIB, 2) for name, parts in phases.items()},
        "peak": {"phase": where, "gib": round(most / GIB, 2),
                 "parts_gib": {part: round(size / GIB, 2) for part, size in phases[where].items() if size}},
        "limit_gib": round(limit(cluster) / GIB, 2),
        "largest_micro_batch": _largest_micro(stage, cluster, setup, job) if fits else None,
        "seconds": {phase: [round(fast[phase], 3), round(slow[phase], 3)] for phase in fast},
        "seconds_per_update": per_update,
        "updates": stage.updates,
        "hours": None if stage.updates is None else [round(s * stage.updates / 3600, 3) for s in per_update],
        "breaks_first": {"phase": where, "part": largest},
        "advice": ADVICE.get(largest, "use more devices"),
        "least_zero": _least_zero(stage, cluster, wish, setup.zero if fits else None),
        "devices_needed": cluster.devices if fits else _devices_needed(stage, cluster, wish),
    }  # fmt: skip


def limit(cluster: Cluster) -> float:
    """Bytes of a device that a run can use."""
    return cluster.device.memory - (RESERVED if cluster.device.memory > 4 * RESERVED else 0)


def _fitting(stage: Stage, cluster: Cluster, wish: Wish) -> Iterator[tuple[Setup, Job]]:
    slack = table7.constants().slack
    for setup, job in _ways(stage, cluster, wish):
        if memory.peak(memory.phases(job, stage.shape, setup, cluster, slack))[1] <= limit(cluster):
            yield setup, job


def _ways(stage: Stage, cluster: Cluster, wish: Wish) -> Iterator[tuple[Setup, Job]]:
    """Ways of running a stage, the quickest first: stages of ZeRO without and with recomputation, then sharded frozen
    models, smaller passes, states in the host's memory."""
    zeros = [wish.zero] if wish.zero is not None else [0] if cluster.devices == 1 else [1, 2, 3]
    job = job_of(stage, cluster)
    own = stage.settings.gradient_checkpointing
    for zero in zeros:
        for checkpointing in [own] if wish.own else sorted({own, True}):
            setup = setup_of(stage, cluster, zero, checkpointing, wish)
            yield setup, job
    if wish.own:
        return
    if cluster.devices > 1 and isinstance(stage.settings, PolicySettings):
        setup = replace(setup, frozen="sharded")
        yield setup, job
    while job.micro > 1:
        job = replace(job, micro=job.micro // 2)
        yield setup, job
    if setup.zero:
        yield replace(setup, offload=True), job


def setup_of(stage: Stage, cluster: Cluster, zero: int, checkpointing: bool, wish: Wish) -> Setup:
    """How the project's own trainers run a stage: DeepSpeed's bf16 under ZeRO, else autocast over float32 weights.

    TRL shards the reference of DPO under ZeRO-3, and only there.
    """
    s = stage.settings
    online = isinstance(s, PolicySettings)
    sharded = zero == 3 and cluster.devices > 1
    remote = isinstance(s, PolicySettings) and bool(getattr(s.algorithm, "value_url", None))
    return Setup(
        zero=zero,
        precision="float32" if not s.bf16 else "bf16" if zero else "autocast",
        checkpointing=checkpointing,
        frozen=s.frozen if isinstance(s, PolicySettings) else "sharded" if sharded else "resident",
        frozen_bytes={"float32": 4, "bfloat16": 2}[s.frozen_dtype] if isinstance(s, PolicySettings) else None,
        remote=remote,
        logit_rows=max(1, MOST_LOGITS // stage.shape.vocab) if online else None,
        lora_rank=s.lora.r if s.lora else None,
        vllm_share=wish.vllm_share if online else 0.0,
    )


def job_of(stage: Stage, cluster: Cluster) -> Job:
    """One update on each device. The settings' batches are of all devices together."""
    s, method, devices = stage.settings, METHODS[stage.method], cluster.devices
    if isinstance(s, PolicySettings):
        group = s.algorithm.group_size if s.algorithm.name == "grpo" else 1
        batch, step = -(-s.prompts_per_update // devices), -(-s.minibatch_size // devices)
        micro = s.micro_batch_size or step * group
        return Job(method, s.max_prompt_tokens, s.max_new_tokens, batch, micro, step, s.epochs, group)
    batch = -(-s.batch_size // devices)
    return Job(method, s.max_prompt_tokens, s.max_response_tokens, batch, min(s.micro_batch_size or batch, batch))


def _uneven(stage: Stage, cluster: Cluster) -> str | None:
    """Says where the trainers would refuse to share a batch. What is shared online is responses."""
    s, devices = stage.settings, cluster.devices
    if isinstance(s, PolicySettings):
        group = s.algorithm.group_size if s.algorithm.name == "grpo" else 1
        sizes = {"prompts_per_update": s.prompts_per_update, "minibatch_size": s.minibatch_size}
    else:
        group, sizes = 1, {"batch_size": s.batch_size}
    if named := [f"{name} {size}" for name, size in sizes.items() if size * group % devices]:
        return (
            f"{devices} devices cannot share {' and '.join(named)} equally, which training refuses; planned as the "
            "next larger that they can"
        )
    return None


def _least_zero(stage: Stage, cluster: Cluster, wish: Wish, chosen: int | None) -> int | None:
    """The lowest stage of ZeRO that fits: the chosen one, or the planner's first; None where none does."""
    first = next((setup.zero for setup, _ in _fitting(stage, cluster, replace(wish, zero=None))), None)
    return min((zero for zero in (chosen, first) if zero is not None), default=None)


def _largest_micro(stage: Stage, cluster: Cluster, setup: Setup, job: Job) -> int:
    """The most items of one pass that still fit, up to the batch of a device."""
    slack = table7.constants().slack

    def fits(micro: int) -> bool:
        phases = memory.phases(replace(job, micro=micro), stage.shape, setup, cluster, slack)
        return memory.peak(phases)[1] <= limit(cluster)

    return max((m for m in range(1, job.batch * job.group + 1) if fits(m)), default=job.micro)


def _devices_needed(stage: Stage, cluster: Cluster, wish: Wish) -> int | None:
    """The smallest power of two of such devices on which the stage fits; None where 1024 are not enough."""
    for count in (2**i for i in range(11)):
        nodes = -(-count // cluster.per_node)
        other = replace(cluster, per_node=min(count, max(cluster.per_node, 1)), nodes=nodes)
        if count > cluster.devices and next(_fitting(stage, other, wish), None):
            return count
    return None
