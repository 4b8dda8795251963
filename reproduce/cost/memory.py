"""Peak memory of a device over the phases of an update, part by part, in bytes.

Sources: ZeRO's partition of weights, gradients and optimiser state (Rajbhandari et al. 2020) and DeepSpeed's default
buckets; activations counted from what autograd keeps in transformers' Llama layer (see `layer_activations`).
"""

from reproduce.cost.hardware import Cluster
from reproduce.cost.shapes import Shape
from reproduce.cost.work import Job, Role, Setup

Parts = dict[str, float]
BUCKET = 5e8
"""Numbers in DeepSpeed's default reduce bucket, and in its all-gather bucket (stages 1 and 2)."""
LIVE = 1e9
"""Parameters that DeepSpeed's stage 3 keeps put together at most (stage3_max_live_parameters)."""


def peak(phases: dict[str, Parts]) -> tuple[str, float]:
    """The phase with the most memory, and its bytes."""
    return max(((name, sum(parts.values())) for name, parts in phases.items()), key=lambda item: item[1])


def phases(job: Job, shape: Shape, setup: Setup, cluster: Cluster, slack: float = 1.0) -> dict[str, Parts]:
    """Memory in each phase: generate and judge (online methods), learning of each trained model, and the update.

    slack: what the allocator holds over what is in use, under stage 3, where whole weights come and go.
    """
    always = resident(job, shape, setup, cluster)
    found: dict[str, Parts] = {}
    if job.method.online:
        found["generate"] = always | _generating(job, shape, setup, cluster)
    if job.method.online or job.method.frozen:
        rows = min(job.micro * job.method.texts, job.responses)
        found["judge"] = always | {
            "activations": one_layer(shape, setup, rows * job.length),
            "logits": logits(shape, setup, rows * job.response_tokens, learning=False),
        }
    gradients = {role: _gradients(shape, role, setup, cluster) for role in job.method.trained}
    # Our own loss makes logits of the response alone, TRL's of the whole text.
    counted = job.response_tokens if job.method.online else job.length
    for i, role in enumerate(job.method.trained):
        held = job.method.trained if job.accumulates else job.method.trained[:i]
        found[f"learn {role}"] = always | {
            "gradients": sum(gradients[r] for r in held),
            "activations": activations(shape, setup, job.micro_texts * job.length),
            "logits": logits(shape, setup, job.micro_texts * counted) if role == "policy" else 0.0,
            "working copies": _working(job, shape, role, setup, cluster),
        }
    found["update"] = always | {
        "gradients": sum(gradients.values()),
        "working copies": max(_working(job, shape, role, setup, cluster) for role in job.method.trained),
    }
    if setup.zero == 3 and cluster.devices > 1:
        return {name: parts | {"allocator": (slack - 1) * sum(parts.values())} for name, parts in found.items()}
    return found


def resident(job: Job, shape: Shape, setup: Setup, cluster: Cluster) -> Parts:
    """What is there in every phase: the trained models' weights and optimiser states, and the frozen models."""
    parts = {"weights": 0.0, "optimizer": 0.0, "frozen models": 0.0}
    for role in job.method.trained:
        parts["weights"] += _weights(shape, role, setup, cluster)
        if not setup.offload:
            parts["optimizer"] += trainable(shape, role, setup) * setup.optimizer_bytes / _shards(setup, cluster, 1)
    for role in frozen_models(job, setup):
        parts["frozen models"] += _frozen(shape, role, setup, cluster)
    return parts


def frozen_models(job: Job, setup: Setup) -> tuple[Role, ...]:
    """The frozen models that take memory here: with an adapter the reference is the policy with the adapter off."""
    return tuple(r for r in job.method.frozen if not (setup.lora_rank if r == "policy" else setup.remote))


def trainable(shape: Shape, role: Role, setup: Setup) -> int:
    """Parameters that get a gradient."""
    return shape.lora_parameters(setup.lora_rank) if setup.lora_rank else shape.parameters(role)


def layer_activations(shape: Shape, setup: Setup) -> float:
    """Bytes per token that one layer keeps for its backward pass, in transformers' Llama without recomputation.

    Each norm keeps its input in float32, the normalised input, and its output (which the projections read). Attention
    keeps queries, keys and values at full width, and its output before and after the heads are put side by side. The
    MLP keeps the gate before and after its activation, the other branch, and their product.
    """
    a = setup.activation_bytes
    norms = 2 * (4 * shape.hidden + 2 * a * shape.hidden)
    return norms + 5 * a * shape.attention_width + 4 * a * shape.intermediate


def one_layer(shape: Shape, setup: Setup, tokens: float) -> float:
    """Bytes of a forward pass that keeps nothing: the widest point of one layer."""
    return tokens * setup.activation_bytes * (4 * shape.hidden + 3 * shape.intermediate)


def activations(shape: Shape, setup: Setup, tokens: float) -> float:
    """Bytes kept for one backward pass over `tokens` tokens; with checkpointing, layer inputs and one layer's all."""
    whole = layer_activations(shape, setup)
    if setup.checkpointing:
        return tokens * (shape.layers * setup.activation_bytes * shape.hidden + whole)
    return tokens * shape.layers * whole


def logits(shape: Shape, setup: Setup, rows: float, learning: bool = True) -> float:
    """Bytes of the vocabulary head over `rows` response tokens.

    The head's output and its picked copy, then float32 and the scaled float32; in the backward pass a float32
    gradient in place of one of them, and its copy in the head's own precision.
    """
    a = setup.activation_bytes
    wide = (2 * a + 8 + (a if learning else 0)) * shape.vocab
    return min(rows, setup.logit_rows or rows) * wide


def _weights(shape: Shape, role: Role, setup: Setup, cluster: Cluster) -> float:
    adapter = trainable(shape, role, setup) if setup.lora_rank else 0
    return (shape.parameters(role) + adapter) * setup.weight_bytes / _shards(setup, cluster, 3)


def _frozen(shape: Shape, role: Role, setup: Setup, cluster: Cluster) -> float:
    """A frozen model. Ours holds its linear weights in bfloat16 where it is whole and does not run in float32."""
    width = setup.frozen_bytes or setup.weight_bytes
    if setup.frozen == "sharded" and cluster.devices > 1:
        return shape.parameters(role) * width / cluster.devices
    head = 0 if shape.tied or role != "policy" else shape.embedding_parameters
    linear = shape.layers * (shape.layer_parameters - 2 * shape.hidden) + head
    linear_width = 2 if setup.frozen_bytes and setup.precision != "float32" else width
    return float(linear * linear_width + (shape.parameters(role) - linear) * width)


def _gradients(shape: Shape, role: Role, setup: Setup, cluster: Cluster) -> float:
    return trainable(shape, role, setup) * setup.weight_bytes / _shards(setup, cluster, 2)


def _working(job: Job, shape: Shape, role: Role, setup: Setup, cluster: Cluster) -> float:
    """Copies that come and go: casts of float32 weights, ZeRO's buckets, stage 3's parameters in use.

    Our online loop keeps no casts of weights that learn (`dvpo.training.mixed`); the offline trainers are the
    libraries'.
    """
    parameters = shape.parameters(role)
    keeps_casts = setup.precision == "autocast" and (not job.method.online or bool(setup.lora_rank))
    casts = 2.0 * parameters if keeps_casts else 0.0
    if cluster.devices == 1 or setup.zero == 0:
        return casts
    if setup.zero == 3:
        return casts + min(LIVE, parameters) * setup.weight_bytes
    return casts + 2 * min(BUCKET, trainable(shape, role, setup)) * setup.weight_bytes


def _generating(job: Job, shape: Shape, setup: Setup, cluster: Cluster) -> Parts:
    """The key-value cache, one row of logits a text, and the policy put together; or vLLM's fixed share."""
    if setup.vllm_share:
        return {"vllm": setup.vllm_share * cluster.device.memory}
    width = setup.weight_bytes
    whole = 0.0
    if setup.zero == 3 and cluster.devices > 1:
        whole = (shape.parameters("policy") if setup.gathered else min(LIVE, shape.parameters("policy"))) * float(width)
    return {
        "gathered policy": whole,
        "kv cache": shape.cache_bytes(job.responses * job.length, width),
        "activations": one_layer(shape, setup, job.responses * job.prompt_tokens),
        "logits": job.responses * shape.vocab * (width + 8.0),
    }


def _shards(setup: Setup, cluster: Cluster, stage: int) -> int:
    """Over how many devices something is spread that ZeRO spreads from `stage` on."""
    return cluster.devices if setup.zero >= stage else 1
