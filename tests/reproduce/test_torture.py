"""Faults that a whole run must survive: kill -9, a full disk, a read-only folder, damaged results, two runs at once, a
clock set back, SIGTERM. In the end the bytes are those of an undisturbed run.

`make torture` runs it: `DVPO_TORTURE_KILLS` (100) kills, or as many as fit into `DVPO_TORTURE_MINUTES` (25).
"""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dvpo.files import list_files
from reproduce import recipe
from reproduce.pipeline import load_result

pytestmark = pytest.mark.torture
KILLS = int(os.environ.get("DVPO_TORTURE_KILLS", 100))
MINUTES = float(os.environ.get("DVPO_TORTURE_MINUTES", 25))


@dataclass(frozen=True)
class Run:
    """The command of one run folder."""

    recipe: Path
    out: Path

    @property
    def command(self) -> list[str]:
        arguments = ["reproduce", "--recipe", str(self.recipe), "--out", str(self.out)]
        return [sys.executable, "-m", "reproduce.cli", *arguments]

    def finish(self) -> subprocess.CompletedProcess[str]:
        """The command, to its end."""
        return subprocess.run(self.command, capture_output=True, text=True)

    def start(self) -> subprocess.Popen[str]:
        """The command in a process group of its own."""
        return subprocess.Popen(
            self.command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def in_work(self) -> set[str]:
        """The kinds and keys of the stages that a process works on right now: their locks are held."""
        return {path.name for path in (self.out / "stages" / ".locks").glob("*") if _held(path)}

    def outputs(self) -> dict[str, dict[str, str]]:
        """The digests of every stage's files; what measures time is left out."""
        manifests = [json.loads(p.read_text()) for p in (self.out / "stages").glob("*/manifest.json")]
        return {m["id"]: m["outputs"] for m in manifests if m["stage"] != "cost"}


def _held(path: Path) -> bool:
    with open(path) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_for_work(run: Run, process: subprocess.Popen[str], count: int) -> set[str]:
    """The stages in work once `count` have begun, or when the process has ended."""
    seen: set[str] = set()
    while process.poll() is None and len(seen) < count:
        time.sleep(0.02)
        seen |= run.in_work()
    return run.in_work()


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """Signals the whole process group and waits for its end."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.communicate()


def one_sentence(stderr: str) -> str:
    """The command's complaint: the last line, and no traceback before it."""
    lines = stderr.strip().splitlines()
    assert "Traceback" not in stderr
    assert lines and lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    """The tiny recipe with all its stages, cut to seconds."""
    values = recipe.load("tiny").model_dump(mode="json")
    values["name"] = "micro"
    values["atlas"] |= {"places": 6, "lessons": 150, "omissions": 50}
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


@pytest.fixture(scope="module")
def whole(micro: Path, tmp_path_factory) -> Run:
    """An undisturbed run."""
    run = Run(micro, tmp_path_factory.mktemp("whole") / "run")
    done = run.finish()
    assert done.returncode == 0, done.stderr
    assert len(run.outputs()) > 30
    return run


def test_killed_runs_end_with_the_same_bytes(micro: Path, whole: Run, tmp_path: Path) -> None:
    """Each kill comes some moments after the first, second or third stage of the resumed run began."""
    rng, end = random.Random(0), time.monotonic() + 60 * MINUTES
    hit: Counter[str] = Counter()
    kills = passes = 0
    run = Run(micro, tmp_path / "0")
    while kills < KILLS and time.monotonic() < end:
        process = run.start()
        in_work = wait_for_work(run, process, rng.choice([1, 1, 2, 3]))
        time.sleep(rng.uniform(0, 1.5))
        if process.poll() is None:
            kill(process)
            kills += 1
            hit.update(name.rpartition("-")[0] for name in in_work)
            continue
        process.communicate()
        assert run.outputs() == whole.outputs()
        passes += 1
        run = Run(micro, tmp_path / str(passes))
    assert run.finish().returncode == 0
    assert run.outputs() == whole.outputs()
    print(json.dumps({"kills": kills, "whole runs": passes + 1, "stages in work when killed": dict(hit)}))
    assert kills


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)):
        pytest.skip("a file system cannot be mounted here; it needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def published_are_whole(run: Run) -> bool:
    found = [p for p in (run.out / "stages").glob("*") if not p.name.startswith(".")]
    return all(load_result(p) is not None for p in found)


def test_a_full_disk_ends_the_run_in_one_sentence_and_more_room_finishes_it(
    micro: Path, whole: Run, small_disk: Path
) -> None:
    run = Run(micro, small_disk / "run")
    for size in ("600k", "1m", "2m"):
        assert mount("-o", f"remount,size={size}", str(small_disk))
        done = run.finish()
        assert done.returncode == 1
        assert "No space left" in one_sentence(done.stderr)
        assert published_are_whole(run)
    assert mount("-o", "remount,size=2g", str(small_disk))
    done = run.finish()
    assert done.returncode == 0, done.stderr
    assert run.outputs() == whole.outputs()


def test_a_read_only_folder_is_refused_in_one_sentence(micro: Path, whole: Run, small_disk: Path) -> None:
    run = Run(micro, small_disk / "run")
    assert mount("-o", "remount,ro", str(small_disk))
    done = run.finish()
    assert done.returncode in (1, 2)
    assert "read-only" in one_sentence(done.stderr).lower()


def test_damaged_results_are_built_again_and_never_used(whole: Run, micro: Path, tmp_path: Path) -> None:
    run = Run(micro, tmp_path / "run")
    shutil.copytree(whole.out, run.out)
    rng = random.Random(0)
    stages = sorted(p for p in (run.out / "stages").glob("*") if not p.name.startswith("."))
    for number, stage in enumerate(rng.sample(stages, 8)):
        victim = rng.choice(list_files(stage))
        if number % 4 == 0:
            victim.unlink()
        elif number % 4 == 1:
            victim.write_bytes(victim.read_bytes()[:-1])
        elif number % 4 == 2:
            (stage / "more.txt").write_text("not ours")
        else:
            content = bytearray(victim.read_bytes())
            content[rng.randrange(len(content))] ^= 1
            victim.write_bytes(content)
    assert run.finish().returncode == 0
    assert run.outputs() == whole.outputs()


def test_two_runs_at_once_share_the_work_and_agree(whole: Run, micro: Path, tmp_path: Path) -> None:
    run = Run(micro, tmp_path / "run")
    both = [run.start(), run.start()]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    assert run.outputs() == whole.outputs()


def test_a_clock_set_back_runs_nothing_again(whole: Run, micro: Path, tmp_path: Path) -> None:
    run = Run(micro, tmp_path / "run")
    shutil.copytree(whole.out, run.out)
    tomorrow = time.time() + 30 * 86400
    for path in run.out.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    before = {p: p.stat().st_mtime for p in (run.out / "stages").glob("*/manifest.json")}
    done = run.finish()
    assert done.returncode == 0
    assert {p: p.stat().st_mtime for p in before} == before


def test_sigterm_saves_and_says_how_to_go_on(whole: Run, micro: Path, tmp_path: Path) -> None:
    run, rng = Run(micro, tmp_path / "run"), random.Random(0)
    stops = 0
    while True:
        process = run.start()
        wait_for_work(run, process, 1)
        time.sleep(rng.uniform(1, 8))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        if process.returncode == 0:  # it had just finished
            break
        assert process.returncode == 1
        assert "run the same command to go on" in one_sentence(stderr)
        assert published_are_whole(run)
        stops += 1
    assert stops >= 3
    assert run.finish().returncode == 0
    assert run.outputs() == whole.outputs()
