"""The stage graph: content-addressed, atomic, resumable, and safe when two runs share a folder.

A stage's key is the sha256 of its kind, version, settings, seed and the digests of its inputs. It works in
`stages/.work-KIND-KEY/` (`out/` for results, `state/` for its own checkpoints) under a file lock, and is published
by renaming `out/` to `stages/KIND-KEY/`. A finished stage is checked against its manifest before it is used; one that
was damaged is built again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import list_files, sha256_file, sha256_json, sha256_tree, write_json
from reproduce.stages import KINDS

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Source:
    """Something from outside the run: a data file or folder, or a checkpoint folder."""

    path: Path

    @cached_property
    def digest(self) -> str:
        """sha256 of its names and bytes. Raises InputError where there is nothing."""
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file or folder")
        return sha256_tree(self.path)


@dataclass(frozen=True)
class Stage:
    """A node: what to run (`kind`), how (`settings`, `seed`), on what (`inputs`). `id` is its name in this run."""

    id: str
    kind: str
    settings: dict[str, Any]
    inputs: dict[str, "Stage | Source"] = field(default_factory=dict)
    seed: int = 0
    exclusive: bool = False
    """Runs with no other stage beside it: it measures time or memory."""

    @property
    def parents(self) -> list["Stage"]:
        """The stages it waits for."""
        return [i for i in self.inputs.values() if isinstance(i, Stage)]


@dataclass(frozen=True)
class Job:
    """A stage whose inputs are all there: what a worker needs to run it."""

    id: str
    kind: str
    settings: dict[str, Any]
    seed: int
    inputs: dict[str, Path]
    digests: dict[str, str]

    @cached_property
    def key(self) -> str:
        """sha256 of everything the result depends on."""
        return sha256_json(
            {
                "stage": self.kind,
                "version": KINDS[self.kind].version,
                "settings": self.settings,
                "seed": self.seed,
                "inputs": self.digests,
            }
        )

    @property
    def folder(self) -> str:
        """Name of its folder below `stages/`."""
        return f"{self.kind}-{self.key[:16]}"


@dataclass(frozen=True)
class Result:
    """A finished stage: its folder, its manifest, and the digest of its outputs."""

    path: Path
    manifest: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Planned:
    """A line of the plan. `state` is `done`, `to run`, `to finish` (interrupted) or `waits`."""

    id: str
    kind: str
    state: str
    why: str


def in_order(targets: Sequence[Stage]) -> list[Stage]:
    """The targets and all they need, each after its inputs. Raises ValueError where two stages share an id."""
    seen: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.id in seen:
            if seen[stage.id] is not stage:
                raise ValueError(f"two stages are called {stage.id}")
            return
        for parent in stage.parents:
            visit(parent)
        seen[stage.id] = stage

    for target in targets:
        visit(target)
    return list(seen.values())


class Store:
    """The `stages/` folder of a run."""

    def __init__(self, root: Path):
        self.root = root
        self._checked: dict[str, Result] = {}

    def job(self, stage: Stage, done: dict[str, Result]) -> Job | None:
        """The stage's job, or None while an input is missing."""
        inputs: dict[str, Path] = {}
        digests: dict[str, str] = {}
        for name, parent in sorted(stage.inputs.items()):
            if isinstance(parent, Source):
                inputs[name], digests[name] = parent.path, parent.digest
            elif parent.id in done:
                inputs[name], digests[name] = done[parent.id].path, done[parent.id].digest
            else:
                return None
        return Job(stage.id, stage.kind, stage.settings, stage.seed, inputs, digests)

    def finished(self, job: Job) -> Result | None:
        """The job's published result, if it is there and every output still has its digest."""
        if job.key not in self._checked:
            result = load_result(self.root / job.folder)
            if result is None:
                return None
            self._checked[job.key] = result
        return self._checked[job.key]

    def work(self, job: Job) -> Path:
        """The job's scratch folder."""
        return self.root / f".work-{job.folder}"


def load_result(folder: Path) -> Result | None:
    """A published stage folder, or None if it is absent, incomplete or damaged."""
    import json

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        outputs = manifest["outputs"]
    except (OSError, ValueError, KeyError):
        return None
    found = {p.relative_to(folder).as_posix() for p in list_files(folder)} - {MANIFEST}
    if found != set(outputs) or any(sha256_file(folder / name) != digest for name, digest in outputs.items()):
        return None
    return Result(folder, manifest, sha256_json(outputs))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive file lock; the kernel drops it if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Context:
    """What a stage function gets: settings, seed, the inputs' folders, where to write, where to keep checkpoints."""

    settings: dict[str, Any]
    seed: int
    inputs: dict[str, Path]
    out: Path
    state: Path


def run_job(job: Job, root: Path) -> Path:
    """Runs one job to its published folder, or takes the result of another run that finished it meanwhile."""
    store = Store(root)
    final, work = root / job.folder, store.work(job)
    with locked(root / ".locks" / job.folder):
        if store.finished(job):
            return final
        if final.exists():
            shutil.rmtree(final)  # damaged: never used, built again
        context = Context(job.settings, job.seed, job.inputs, work / "out", work / "state")
        if context.out.exists():
            shutil.rmtree(context.out)  # half-written results; the checkpoints in state/ are kept
        context.out.mkdir(parents=True)
        context.state.mkdir(exist_ok=True)
        started, clock = datetime.now(UTC), time.perf_counter()
        metrics = KINDS[job.kind].function()(context)
        write_json(context.out / MANIFEST, _manifest(job, context.out, metrics, started, time.perf_counter() - clock))
        for path in list_files(context.out):
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        context.out.rename(final)
        shutil.rmtree(work, ignore_errors=True)
    return final


def _manifest(job: Job, out: Path, metrics: dict[str, Any], started: datetime, seconds: float) -> dict[str, Any]:
    from reproduce.provenance import code_commit, device, image, versions

    found = image()
    return {
        "stage": job.kind,
        "id": job.id,
        "key": job.key,
        "settings": job.settings,
        "inputs": job.digests,
        "outputs": {p.relative_to(out).as_posix(): sha256_file(p) for p in list_files(out)},
        "metrics": metrics,
        "seeds": [job.seed],
        "git_commit": code_commit(),
        "versions": versions(),
        **({"image": found} if found else {}),
        "device": device(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
    }


def plan(stages: Sequence[Stage], root: Path) -> list[Planned]:
    """What a run would do, and why, without doing anything."""
    store, done, lines = Store(root), dict[str, Result](), []
    for stage in stages:
        job = store.job(stage, done)
        if job is None:
            missing = ", ".join(p.id for p in stage.parents if p.id not in done)
            lines.append(Planned(stage.id, stage.kind, "waits", f"for {missing}"))
        elif result := store.finished(job):
            done[stage.id] = result
            lines.append(Planned(stage.id, stage.kind, "done", job.folder))
        elif store.work(job).exists():
            lines.append(
                Planned(stage.id, stage.kind, "to finish", "it was interrupted and goes on from its checkpoint")
            )
        elif (root / job.folder).exists():
            lines.append(Planned(stage.id, stage.kind, "to run", "its stored outputs are damaged"))
        else:
            lines.append(Planned(stage.id, stage.kind, "to run", "no result with these settings and inputs"))
    return lines
