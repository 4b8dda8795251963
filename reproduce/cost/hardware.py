"""Machines as data: memory, arithmetic, bandwidth, links, and what one kernel start costs the host."""

from dataclasses import dataclass, replace

from dvpo.errors import InputError

GIB = 2**30
HOST_SECONDS_PER_LAYER = 0.77e-3
"""Python and dispatch of one Llama layer in one decoding step of transformers' `generate`, without its arithmetic:
the difference of a 28- and a 4-layer model of width 32 on one core of the development machine, 0.77 ms."""
HOST_SECONDS_PER_STEP = 1.85e-3
"""The same measurement: what a decoding step costs beside its layers."""
ZERO3_SECONDS_PER_LAYER = 7.5e-3
"""The first measurement again under DeepSpeed 0.19.8 stage 3 (one process, gloo; 4 and 16 layers): its hooks fetch and
release every weight of a layer. Starting the collectives is in it, moving their bytes is not."""


RESERVED = 1.5 * GIB
"""Our allowance on a GPU for its context, the collectives' buffers and fragments."""


@dataclass(frozen=True)
class Device:
    """One accelerator or CPU core.

    memory: bytes. flops: dense bf16 operations a second at its best. bandwidth: bytes a second of its own memory.
    reached: from which to which share of the flops training gets. ahead: kernels are started while others run.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    reached: tuple[float, float] = (0.03, 0.35)
    ahead: bool = True


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `per_node` devices.

    link, network: bytes a second that one device gets in a collective within a node, and between nodes.
    source: where the numbers come from.
    """

    name: str
    device: Device
    per_node: int
    link: float
    nodes: int = 1
    network: float = 25e9
    source: str = ""

    @property
    def devices(self) -> int:
        return self.per_node * self.nodes

    @property
    def collective(self) -> float:
        """Bytes a second of a collective over all devices: the slowest link counts."""
        return self.link if self.nodes == 1 else min(self.link, self.network)


# Reached: 3 % is what the paper's times need (table7.py), 35 % what well-fed training gets.
_A100 = Device("A100 80 GB", 79.2 * GIB, 312e12, 2.04e12)
_H100 = Device("H100 80 GB", 79.2 * GIB, 989e12, 3.35e12)
_H200 = Device("H200 141 GB", 139.8 * GIB, 989e12, 4.8e12)
_A10 = Device("A10G 24 GB", 22.2 * GIB, 70e12, 0.6e12)
_CPU = Device("2 CPU cores", 22 * GIB, 200e9, 16e9, reached=(0.2, 0.8), ahead=False)
_SHEET = "the vendor's data sheet; links at about four fifths of the sheet's one-way NVLink speed"
CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("8xa100-80gb", _A100, 8, 240e9, source=_SHEET),
        Cluster("4xa100-80gb", _A100, 4, 240e9, source=_SHEET),
        Cluster("2x8xa100-80gb", _A100, 8, 240e9, nodes=2, source=_SHEET),
        Cluster("8xh100-80gb", _H100, 8, 360e9, source=_SHEET),
        Cluster("8xh200-141gb", _H200, 8, 360e9, source=_SHEET),
        Cluster("1xh200-141gb", _H200, 1, 360e9, source=_SHEET),
        Cluster("1xa10g-24gb", _A10, 1, 20e9, source="the vendor's data sheet"),
        Cluster("2-core-cpu", _CPU, 1, 4e9, source="measured on the development machine, bfloat16"),
    )
}


def find(name: str, gpus: int | None = None, memory_gb: float | None = None) -> Cluster:
    """A known cluster, on request with another number of devices, or other memory (GiB) in each.

    Raises InputError for an unknown name, or numbers that are not positive.
    """
    if name not in CLUSTERS:
        raise InputError(f"there is no cluster {name!r}; choose one of {', '.join(CLUSTERS)}")
    cluster = CLUSTERS[name]
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: at least 1")
    if gpus is not None and gpus != cluster.devices:
        nodes = max(1, -(-gpus // cluster.per_node)) if gpus > cluster.per_node else 1
        if gpus % nodes:
            raise InputError(
                f"{gpus} devices of {name} are not a whole number on each of {nodes} nodes; take {gpus - gpus % nodes}"
            )
        cluster = replace(cluster, name=f"{gpus}x {cluster.device.name}", per_node=gpus // nodes, nodes=nodes)
    if memory_gb is not None:
        if not 0 < memory_gb < 1e6:
            raise InputError(f"--memory {memory_gb:g}: a size in GB, more than 0")
        device = replace(cluster.device, name=f"{memory_gb:g} GB device", memory=memory_gb * GIB)
        cluster = replace(cluster, name=f"{cluster.devices}x {device.name}", device=device)
    return cluster
