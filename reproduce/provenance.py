"""What made a result: commit, package versions, machine."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from dvpo.errors import InputError

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "numpy")


@cache
def code_commit() -> str:
    """The commit of this image, or of this checkout with `+changes` if files differ from it; else `unknown`."""
    if (found := image()) is not None:
        return found["commit"]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", "*.yaml", "*.lock")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def image() -> dict[str, Any] | None:
    """Commit and packages {name: version} that the container image was built with; None outside one."""
    commit, packages = ROOT / "commit", ROOT / "packages.json"
    if not commit.is_file() or not packages.is_file():
        return None
    return {"commit": commit.read_text().strip(), "packages": json.loads(packages.read_text())}


def refuse_other_code(stages: Path) -> None:
    """In an image, raises InputError where `stages` holds results that were made by the code of another commit."""
    if image() is None:
        return
    commits = set()
    for path in stages.glob("*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: that stage is built again
            commits.add(json.loads(path.read_text(encoding="utf-8"))["git_commit"])
    if others := sorted(commits - {code_commit()}):
        raise InputError(
            f"{stages.parent} has results of commit {', '.join(others)}, and this image is of {code_commit()}; go on "
            "with an image of that commit, name another folder with --out, or say --mix-commits"
        )


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
