"""kill -9 at random moments of a whole run, then the same command again: the same bytes as an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from reproduce import recipe

KILLS = 5


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    """The tiny recipe with all its stages, cut to seconds."""
    values = recipe.load("tiny").model_dump(mode="json")
    values["name"] = "micro"
    values["atlas"] |= {"places": 6, "lessons": 150}
    values["atlas"]["prompts"] = {"base": 100, "sft": 60, "reward": 60, "rl": 60, "validation": 8, "test": 60}
    small = {"hidden": 16, "intermediate": 32, "layers": 1, "heads": 2, "positions": 256}
    values |= {"size": small, "other_sizes": {"small": small | {"hidden": 8}}, "cost_updates": 1, "cost_rounds": 1}
    for stage in ("base", "sft", "rm", "gvm", "dpo"):
        values[stage] |= {"max_steps": 12, "save_steps": 4, "log_steps": 2, "batch_size": 8}
    values["policy"] |= {
        "updates": 4,
        "save_updates": 1,
        "prompts_per_update": 8,
        "minibatch_size": 4,
        "max_new_tokens": 8,
    }
    values["sampling"]["max_new_tokens"] = 8
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(micro: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "reproduce.cli", "reproduce", "--recipe", str(micro), "--out", str(out)]


def outputs(out: Path) -> dict[str, dict[str, str]]:
    """The digests of every stage's files; what measures time is left out."""
    manifests = [json.loads(p.read_text()) for p in (out / "stages").glob("*/manifest.json")]
    return {m["id"]: m["outputs"] for m in manifests if m["stage"] != "cost"}


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(micro: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    subprocess.run(command(micro, whole), check=True, capture_output=True)
    length = time.monotonic() - started
    rng = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(micro, killed), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(rng.uniform(0.15, 0.5) * length)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(micro, killed), check=True, capture_output=True)
    expected = outputs(whole)
    assert len(expected) > 30
    assert outputs(killed) == expected
