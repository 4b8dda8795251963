"""Digests, places for results, and atomic writes: nothing is ever seen half-written under its final name."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvpo.errors import InputError


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def list_files(folder: Path) -> list[Path]:
    """Every regular file below `folder`, sorted by its path."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def sha256_tree(path: Path) -> str:
    """Hex digest of a file, or of a folder's relative names and contents."""
    if path.is_file():
        return sha256_file(path)
    return sha256_json({p.relative_to(path).as_posix(): sha256_file(p) for p in list_files(path)})


def require_place(file: Path | None) -> None:
    """Raises InputError where no file can be written at `file`: to be asked before the work, not after it."""
    if file is not None:
        if file.is_dir():
            raise InputError(f"{file}: is a folder; name a file")
        require_folder(file.absolute().parent)


def require_folder(folder: Path) -> None:
    """Raises InputError where `folder` is something else, or cannot be made."""
    there = folder
    while not there.exists() and not there.is_symlink() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        what = "a link that leads nowhere" if there.is_symlink() else "a file"
        raise InputError(f"{folder}: no folder can be there, for {there} is {what}; name another place")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is flushed to disk and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Non-finite numbers are an error, never `NaN`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
