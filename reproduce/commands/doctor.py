"""`dvpo doctor`: what this machine has, which recipe it would pick, and what the other recipes still need."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from reproduce.commands.common import print_json, table_text
from reproduce.recipe import FOLDER

GB = 1e9


@dataclass(frozen=True)
class Needs:
    """What a recipe asks of the machine: GPUs of so many GB, memory, disk, the gpu packages, weights from the hub.

    The figures of the paper's sizes are estimates: none of them was run. small-gpu ran on a GPU of 139 GB.
    """

    recipe: str
    gpus: int = 0
    gpu_gb: int = 0
    memory_gb: int = 4
    disk_gb: int = 2
    gpu_packages: bool = False
    weights: str | None = None


RECIPES = (
    Needs("tiny"),
    Needs("small", 1, 8, 8, 10, weights="HuggingFaceTB/SmolLM2-135M-Instruct"),
    Needs("small-gpu", 1, 79, 32, 10, weights="HuggingFaceTB/SmolLM2-135M-Instruct"),
    Needs("llama3.2-3b-base", 8, 79, 200, 500, True, "meta-llama/Llama-3.2-3B"),
    Needs("llama3-8b-base", 8, 79, 400, 1000, True, "meta-llama/Meta-Llama-3-8B"),
    Needs("mistral-7b-instruct", 8, 79, 400, 1000, True, "mistralai/Mistral-7B-Instruct-v0.2"),
    Needs("llama3-8b-instruct", 8, 79, 400, 1000, True, "meta-llama/Meta-Llama-3-8B-Instruct"),
)
_GPU_PACKAGES = ("deepspeed", "vllm")


@dataclass(frozen=True)
class Package:
    """An installed package against its pin."""

    name: str
    wanted: str
    found: str | None
    fits: bool


@dataclass(frozen=True)
class Machine:
    """What is here. Sizes in GB; `gpus` lists name and memory."""

    python: str
    packages: list[Package]
    cores: int
    memory_gb: float
    disk_free_gb: float
    gpus: list[tuple[str, float]]
    docker: bool
    compose: bool


def run(as_json: bool) -> None:
    """Looks and prints. The network is not tried."""
    machine = look()
    missing = {needs.recipe: lacking(needs, machine) for needs in RECIPES}
    recipe = default_recipe([size for _, size in machine.gpus])
    if as_json:
        accelerator = [{"name": name, "memory_gb": size} for name, size in machine.gpus]
        print_json({**asdict(machine), "gpus": accelerator, "recipe": recipe, "missing": missing})
        return
    print(_text(machine, recipe, missing))


def default_recipe(gpus_gb: list[float]) -> str:
    """The recipe for a machine with these GPUs: the paper's on eight large ones, a small one on fewer, tiny on none."""
    large = sum(size >= 79 for size in gpus_gb)
    if large:
        return "llama3-8b-base" if large >= 8 else "small-gpu"
    return "small" if gpus_gb else "tiny"


def look() -> Machine:
    """What this machine has."""
    import psutil

    docker = shutil.which("docker") is not None
    return Machine(
        platform.python_version(),
        packages(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        round(psutil.virtual_memory().total / GB, 1),
        round(shutil.disk_usage(".").free / GB, 1),
        gpus(),
        docker,
        docker and _output("docker", "compose", "version") is not None,
    )


def packages() -> list[Package]:
    """Every pinned package; those of the `gpu` extra only where they are installed."""
    from packaging.requirements import Requirement

    found = []
    for text in importlib.metadata.requires("dvpo") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "gpu"}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if wanted.name in _GPU_PACKAGES:
                continue
            found.append(Package(wanted.name, str(wanted.specifier), None, False))
        else:
            fits = wanted.specifier.contains(version, prereleases=True)
            found.append(Package(wanted.name, str(wanted.specifier), version, fits))
    return found


def gpus() -> list[tuple[str, float]]:
    """Name and memory in GB of every NVIDIA GPU that the driver shows; empty without a driver."""
    lines = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    rows = [line.rsplit(",", 1) for line in (lines or "").splitlines() if "," in line]
    return [(name.strip(), round(float(mib) * 2**20 / GB, 1)) for name, mib in rows if mib.strip().isdigit()]


def lacking(needs: Needs, machine: Machine) -> list[str]:
    """What a recipe needs that is not here, each with the way to get it."""
    lines = []
    if not (FOLDER / f"{needs.recipe}.yaml").is_file():
        lines.append("its recipe, which is not written yet: name one of your own with --recipe FILE.yaml")
    if any(not package.fits for package in machine.packages):
        lines.append("packages at their pinned versions: pip install -r requirements.lock")
    large = sum(size >= needs.gpu_gb for _, size in machine.gpus)
    if large < needs.gpus:
        way = "without one it runs on the CPU in hours" if needs.recipe == "small" else "run it on such a machine"
        count = "1 GPU" if needs.gpus == 1 else f"{needs.gpus} GPUs"
        lines.append(f"{count} of {needs.gpu_gb} GB or more, {large} found: {way}")
    elif needs.gpus and _cpu_only_torch(machine):
        lines.append("torch with CUDA, this is a CPU build: reinstall the same version from its CUDA index")
    if needs.gpu_packages and not {p.name for p in machine.packages if p.found}.issuperset(_GPU_PACKAGES):
        lines.append("deepspeed and vllm: pip install -e '.[gpu]'")
    if machine.memory_gb < needs.memory_gb:
        lines.append(f"{needs.memory_gb} GB of memory, {machine.memory_gb:g} found: use a larger machine")
    if machine.disk_free_gb < needs.disk_gb:
        lines.append(
            f"{needs.disk_gb} GB of free disk, {machine.disk_free_gb:g} found: free some, or work in another folder"
        )
    if needs.weights is not None and not _cached(needs.weights):
        licence = (
            " (accept its licence on the hub first)" if needs.weights.startswith(("meta-llama", "mistralai")) else ""
        )
        lines.append(f"weights of {needs.weights}: hf download {needs.weights}{licence}")
    return lines


def _cpu_only_torch(machine: Machine) -> bool:
    return any(p.name == "torch" and p.found is not None and p.found.endswith("+cpu") for p in machine.packages)


def _cached(hub_id: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return any((cache / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails, or takes longer than a second."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _text(machine: Machine, recipe: str, missing: dict[str, list[str]]) -> str:
    accelerator = ", ".join(f"{name} ({size:g} GB)" for name, size in machine.gpus) or "none"
    rows = [
        ("python", machine.python),
        ("cores", str(machine.cores)),
        ("memory", f"{machine.memory_gb:g} GB"),
        ("disk free here", f"{machine.disk_free_gb:g} GB"),
        ("accelerator", accelerator),
        ("docker", "yes" if machine.docker else "no"),
        ("docker compose", "yes" if machine.compose else "no"),
        ("network", "not tried"),
    ]
    rows += [
        (p.name, f"{p.found or 'not installed'}{'' if p.fits else f' (wanted {p.wanted})'}") for p in machine.packages
    ]
    lines = [table_text(("machine", ""), rows, left=(0, 1)), "", f"recipe for this machine: {recipe}"]
    for name, needed in missing.items():
        lines += [f"  {name}: {'ready' if not needed else 'needs'}", *(f"    - {line}" for line in needed)]
    return "\n".join(lines)
