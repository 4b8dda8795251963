"""A bundle's `manifest.json`, and the check that a folder holds exactly the files it lists.

The manifest is written in one canonical form and carries the sha256 of its own content, so that a changed byte in it
shows. That digest names the bundle. `bundle.sig`, where the bundle is signed, is the only file it does not list.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dvpo.config import Settings
from dvpo.errors import InputError, StageError
from dvpo.files import sha256_file, sha256_json

MANIFEST = "manifest.json"
SIGNATURE = "bundle.sig"
KEY = "signing-key.pub"
CARD = "README.md"
MOST_FILES = 1000
MOST_MANIFEST_BYTES = 4_000_000
# No format that can carry code: no pickle (.bin, .pt, .ckpt), no Python.
SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".md", ".pub")
_PART = re.compile(r"[\w@+-][\w.@+-]*", re.ASCII)
_NAME = r"^[a-z0-9][a-z0-9._-]*$"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Difference:
    """Something that is not as the manifest says. `where` is a file, a tensor (FILE:TENSOR) or a metric."""

    where: str
    what: str

    def __str__(self) -> str:
        """One line, whatever the names of files and tensors hold."""
        text = f"{self.where}: {self.what}"
        return text if text.isprintable() else repr(text)[1:-1]


class File(Settings):
    """Digest and size in bytes of a file."""

    sha256: Digest
    size: int = Field(ge=0)


class Base(Settings):
    """The model that training started from. `sha256` is that of its folder, `files` are those a checkpoint needs."""

    id: str
    revision: str
    licence: str
    sha256: Digest
    files: dict[str, Digest]


class StageRecord(Settings):
    """A stage of the run that the checkpoint comes from."""

    id: str
    kind: str
    key: Digest
    settings: dict[str, Any]
    seed: int
    inputs: dict[str, Digest]
    outputs_sha256: Digest
    git_commit: str


class MetricInput(Settings):
    """What a metric was measured on: its digest in the run, and its folder in the bundle if it is there."""

    sha256: Digest
    folder: str | None


class Metric(Settings):
    """A measurement of this checkpoint, with all that is needed to repeat it. `tolerance` is absolute."""

    name: str
    kind: Literal["pairwise", "credit", "gold"]
    key: Digest
    settings: dict[str, Any]
    seed: int
    inputs: dict[str, MetricInput]
    values: dict[str, Any]
    tolerance: float = Field(ge=0)


class Manifest(Settings):
    """What a bundle is, where it comes from, and the digest and size of every file.

    image: commit and packages of the container that trained it, if it was one.
    """

    format: Literal[1]
    name: str = Field(pattern=_NAME)
    role: Literal["value", "reward", "policy"]
    recipe: str
    stage: str
    seed: int
    base: Base | None
    stages: list[StageRecord]
    data: dict[str, Digest]
    metrics: list[Metric]
    git_commit: str
    versions: dict[str, str]
    image: dict[str, Any] | None
    device: dict[str, Any]
    intended_use: str
    limits: list[str]
    signed_by: Digest | None
    files: dict[str, File]
    sha256: Digest

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(f.size for f in self.files.values())


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a manifest, its own digest included."""
    whole = {**content, "sha256": sha256_json({k: v for k, v in content.items() if k != "sha256"})}
    return (json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Reads and checks a manifest. Raises StageError, naming `where`, for the first thing that is wrong with it."""
    try:
        content = json.loads(data)
        manifest = Manifest.model_validate(content)
        canonical = manifest_bytes(content)
    except (ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else "it is not plain JSON"
        raise StageError(f"{where}: this is no manifest of a bundle ({why})") from error
    if canonical != data:
        raise StageError(f"{where}: it was changed (its content does not have the digest that it carries)")
    _check_paths(manifest, where)
    _check_metrics(manifest, where)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder. Raises InputError where there is no folder, StageError as `parse_manifest`."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a bundle")
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise StageError(f"{path}: missing; a bundle has its manifest there")
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise StageError(f"{path}: {path.stat().st_size} bytes; no manifest is so large")
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _check_paths(manifest: Manifest, where: str) -> None:
    if len(manifest.files) > MOST_FILES:
        raise StageError(f"{where}: {len(manifest.files)} files; a bundle has at most {MOST_FILES}")
    folded = {MANIFEST, SIGNATURE}
    for name in manifest.files:
        check_path(name, where)
        if not name.endswith(SUFFIXES):
            raise StageError(f"{where}: {name!r} is of no kind that a bundle may hold ({', '.join(SUFFIXES)})")
        if name.endswith(".safetensors") and "/" in name:
            raise StageError(f"{where}: {name!r} is in a folder of the bundle; its weights stand at the top")
        if name.casefold() in folded:
            raise StageError(f"{where}: {name!r} is listed twice")
        folded.add(name.casefold())
    if clash := folded.intersection(str(parent) for name in folded for parent in PurePosixPath(name).parents):
        raise StageError(f"{where}: {min(clash)!r} is listed as a file and as a folder")
    if (manifest.signed_by is not None) != (KEY in manifest.files):
        raise StageError(f"{where}: a signed bundle holds {KEY}, and only a signed one")


def _check_metrics(manifest: Manifest, where: str) -> None:
    """A metric is one of the bundle's own model, on data inside the bundle or given by the user."""
    for metric in manifest.metrics:
        if metric.settings.get("subfolder"):
            raise StageError(f"{where}: metric {metric.name} is of a model in a subfolder, not of the bundle's own")
        split = metric.settings.get("split")
        for path in (split, *(source.folder for source in metric.inputs.values())):
            if path is not None:
                check_path(str(path), where)


def check_path(name: str, where: str) -> None:
    """Raises StageError unless `name` is a plain relative path that stays inside its folder."""
    parts = name.split("/")
    if len(name) > 200 or len(parts) > 4 or not all(_PART.fullmatch(part) for part in parts):
        raise StageError(f"{where}: {name!r} is not a plain path inside the bundle")


def check_files(folder: Path, manifest: Manifest) -> list[Difference]:
    """Everything in which the folder is not what the manifest lists: missing, extra, changed, or no regular file."""
    allowed = {MANIFEST, *manifest.files} | ({SIGNATURE} if manifest.signed_by else set())
    folders = {str(parent) for name in allowed for parent in PurePosixPath(name).parents}
    found, differences = set(), []
    for name, mode in _walk(folder):
        if stat.S_ISDIR(mode):
            if name not in folders:
                differences.append(Difference(name, "a folder that is not in the manifest"))
            continue
        found.add(name)
        if stat.S_ISLNK(mode):
            differences.append(Difference(name, "a symbolic link; a bundle holds regular files only"))
        elif not stat.S_ISREG(mode):
            differences.append(Difference(name, "not a regular file"))
        elif name not in allowed:
            differences.append(Difference(name, "not in the manifest"))
        elif name in manifest.files:
            differences += check_file(folder / name, name, manifest.files[name])
    return differences + [Difference(name, "missing") for name in sorted(allowed - found)]


def check_file(path: Path, name: str, expected: File) -> list[Difference]:
    """The difference of one regular file, if there is one."""
    size = path.stat().st_size
    if size != expected.size:
        return [Difference(name, f"{size} bytes, the manifest says {expected.size}")]
    digest = sha256_file(path)
    if digest != expected.sha256:
        return [Difference(name, f"its sha256 is {digest}, the manifest says {expected.sha256}")]
    return []


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """(path relative to `folder`, file mode) of everything below it; links are not followed."""
    for root, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(root) / name
            yield path.relative_to(folder).as_posix(), path.lstat().st_mode
