"""Seconds of an update on one device, phase by phase.

A pass takes the time of its arithmetic and of moving its weights and activations, or the host's time to start kernels
if that is longer (on a CPU both). Collectives are added, as if nothing overlapped them.
"""

from dataclasses import dataclass

from reproduce.cost.hardware import (
    HOST_SECONDS_PER_LAYER,
    HOST_SECONDS_PER_STEP,
    ZERO3_SECONDS_PER_LAYER,
    Cluster,
)
from reproduce.cost.memory import layer_activations, trainable
from reproduce.cost.shapes import Shape
from reproduce.cost.work import Job, Role, Setup

VLLM_SECONDS_PER_STEP = 1.5e-3
"""Our allowance for the engine's own scheduling of one decoding step, with kernels started as one graph."""
MOVES = 3
"""How often what a pass keeps is read or written by kernels that only move: written once, read twice."""


def seconds(job: Job, shape: Shape, setup: Setup, cluster: Cluster, utilisation: float) -> dict[str, float]:
    """Seconds of one update: generate, judge and learn. Offline methods learn, and DPO's reference judges.

    utilisation: the share of a device's best arithmetic that a pass reaches.
    """
    run = _Run(job, shape, setup, cluster, cluster.device.flops * utilisation)
    found: dict[str, float] = {}
    if job.method.online:
        found["generate"] = job.method.generations * run.generate()
        found["judge"] = run.judge()
    elif job.method.frozen:
        found["judge"] = sum(map(run.frozen, job.method.frozen))
    found["learn"] = sum(map(run.learn, job.method.trained))
    return found


@dataclass(frozen=True)
class _Run:
    """One update; flops: operations a second that are reached."""

    job: Job
    shape: Shape
    setup: Setup
    cluster: Cluster
    flops: float

    @property
    def spread(self) -> bool:
        """Whether the trained models' weights lie in parts on all devices."""
        return self.setup.zero == 3 and self.cluster.devices > 1

    def generate(self) -> float:
        """One rollout: the prompts' pass, then a step per token for all responses together."""
        job, shape = self.job, self.shape
        weights = self.weights("policy")
        width = self.setup.weight_bytes
        per_token = self.spread and not self.setup.gathered and not self.setup.vllm_share
        host = VLLM_SECONDS_PER_STEP if self.setup.vllm_share else self.host(per_token)
        cache = shape.cache_bytes(job.responses * (job.prompt_tokens + job.response_tokens / 2), width)
        read = (weights + cache) / self.cluster.device.bandwidth
        flops = shape.forward_flops(job.responses, job.length, job.responses)
        step = self.together(host, max(read, flops / self.flops))
        prefill = shape.forward_flops(job.responses * job.prompt_tokens, job.prompt_tokens, job.responses)
        gather = self.gather(weights) if self.spread else 0.0
        return gather + prefill / self.flops + job.response_tokens * (step + (gather if per_token else 0.0))

    def judge(self) -> float:
        """The policy's own pass, the critic's, every frozen model's; and the reward of ReMax's greedy responses."""
        own = sum(self.over(role, self.spread) for role in self.job.method.trained)
        others = sum(map(self.frozen, self.job.method.frozen))
        return own + others + (self.job.method.generations - 1) * self.frozen("value")

    def frozen(self, role: Role) -> float:
        """A frozen model's pass over all texts."""
        return self.over(role, self.cluster.devices > 1 and self.setup.frozen == "sharded")

    def over(self, role: Role, spread: bool) -> float:
        """A model's forward pass over all texts, in as many calls as the micro-batch makes of them."""
        calls = -(-self.job.responses // self.job.micro_texts)
        one = self.forward(role, self.job.responses / calls, spread)
        return calls * (one + (self.gather(self.weights(role)) if spread else 0.0))

    def forward(self, role: Role, texts: float, spread: bool) -> float:
        """One forward call, without collectives."""
        job = self.job
        rows = texts * job.response_tokens if role == "policy" else 0
        flops = self.shape.forward_flops(texts * job.length, job.length, rows)
        kept = texts * job.length * self.shape.layers * layer_activations(self.shape, self.setup)
        moved = self.weights(role) + MOVES * (kept + 8.0 * rows * self.shape.vocab)
        return self.together(self.host(spread), flops / self.flops + moved / self.cluster.device.bandwidth)

    def learn(self, role: Role) -> float:
        """All epochs: forward, backward (twice the forward), with checkpointing the forward again; the optimiser."""
        job, setup = self.job, self.setup
        # With an adapter the backward pass makes no gradient of the weights, only of what passes through them.
        times = 3.0 + setup.checkpointing - bool(setup.lora_rank)
        one = times * self.forward(role, job.learned_texts / job.passes, self.spread)
        if self.spread:  # gathered in the forward and in the backward pass
            one += 2 * self.gather(self.weights(role))
        if setup.zero >= 2:  # each pass's gradients go to their owners
            one += self.gather(trainable(self.shape, role, setup) * float(setup.weight_bytes))
        return job.epochs * (job.passes * one + job.steps * self.optimise(role))

    def optimise(self, role: Role) -> float:
        """Reads and writes the states; exchanges gradients (stages 0 and 1) and new weights (stages 1 and 2)."""
        setup = self.setup
        count = trainable(self.shape, role, setup)
        shards = self.cluster.devices if setup.zero else 1
        states = 2.0 * count * (setup.optimizer_bytes + setup.weight_bytes) / shards
        exchanges = {0: 2, 1: 2, 2: 1, 3: 0}[setup.zero]
        return states / self.cluster.device.bandwidth + exchanges * self.gather(count * float(setup.weight_bytes))

    def weights(self, role: Role) -> float:
        """Bytes of a whole model."""
        return self.shape.parameters(role) * float(self.setup.weight_bytes)

    def gather(self, size: float) -> float:
        """Seconds until each device has `size` bytes that are spread over all; a reduce-scatter takes as long."""
        return size * (self.cluster.devices - 1) / self.cluster.devices / self.cluster.collective

    def together(self, host: float, device: float) -> float:
        """The host's work and the device's: side by side, or one after the other where they are the same."""
        return max(host, device) if self.cluster.device.ahead else host + device

    def host(self, spread: bool) -> float:
        """What the host needs to start one forward pass."""
        layer = ZERO3_SECONDS_PER_LAYER if spread else HOST_SECONDS_PER_LAYER
        return self.shape.layers * layer + HOST_SECONDS_PER_STEP
