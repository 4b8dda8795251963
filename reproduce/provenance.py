"""What made a result: commit, package versions, machine."""

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "numpy")


@cache
def code_commit() -> str:
    """The commit of this checkout, with `+changes` if files differ from it; `unknown` outside a checkout."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", "*.yaml", "*.lock")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that shape a result."""
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}}


@cache
def device() -> dict[str, str | int]:
    """The machine: processor model and cores, and the accelerator if there is one."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    found: dict[str, str | int] = {"cpu": model, "cores": os.cpu_count() or 1, "torch_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found
