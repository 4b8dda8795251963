"""Fetches a bundle by digest: resumable, checked before it is used, published with one rename."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo.data.splits import is_hub_id
from dvpo.errors import InputError, StageError
from reproduce.bundles.manifest import (
    MANIFEST,
    MOST_MANIFEST_BYTES,
    SIGNATURE,
    Manifest,
    check_file,
    parse_manifest,
    read_manifest,
)
from reproduce.bundles.sources import FolderSource, Source, TarSource, WebSource, fetch_url
from reproduce.bundles.verify import check

_WEB = ("http://", "https://")
REGISTRY = Path(__file__).parents[1] / "checkpoints.json"
MOST_SIGNATURE_BYTES = 1_000_000


@dataclass(frozen=True)
class Place:
    """Where a name leads, and the bundle's digest if it is known beforehand."""

    where: str
    sha256: str | None


def pull(
    name: str, out: Path | None, sha256: str | None = None, most_gb: float = 20, public_key: Path | None = None
) -> tuple[Path, Manifest]:
    """Fetches a bundle into a folder.

    Args:
        name: a name of the registry, a bundle folder, a `.tar` file, a web address of either, or owner/name@REVISION.
        out: the new folder; the default is `checkpoints/NAME`.
        sha256: the digest that the bundle must have (its manifest's own `sha256`).
        most_gb: a larger bundle is refused before it is fetched.

    Raises:
        InputError: no such source; something else is at `out`; too large; not enough disk.
        StageError: the source is damaged, cut off or another bundle. What was fetched is kept for the next try.
    """
    place = locate(name)
    wanted = sha256 or place.sha256
    root = out.parent if out else Path("checkpoints")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root}: cannot be made ({error.strerror})") from error
    with _one_at_a_time(root), _opened(place, root, most_gb) as source:
        data = source.small(MANIFEST, MOST_MANIFEST_BYTES)
        manifest = parse_manifest(data, f"{place.where}: {MANIFEST}")
        if wanted and manifest.sha256 != wanted:
            raise StageError(f"{place.where}: this is bundle {manifest.sha256}, not the wanted {wanted}")
        listed = {MANIFEST, *manifest.files} | ({SIGNATURE} if manifest.signed_by else set())
        if extra := sorted((source.names() or set()) - listed):
            raise StageError(f"{place.where}: {extra[0]} is not in the manifest")
        target = out or root / manifest.name
        if os.path.lexists(target):
            return _already(target, manifest, public_key), manifest
        _check_room(manifest, root, most_gb, place.where)
        scratch = root / f".{target.name}.{manifest.sha256[:16]}.pull"
        scratch.mkdir(exist_ok=True)
        _fetch(source, manifest, data, scratch, place.where)
        if differences := check(scratch, manifest, public_key):
            shutil.rmtree(scratch)
            raise StageError(f"{place.where}: not a sound bundle: {'; '.join(map(str, differences[:3]))}")
        scratch.rename(target)
    return target, manifest


def locate(name: str) -> Place:
    """Where a bundle of this name is. Raises InputError for a name that leads nowhere.

    A name of the registry is looked up before a folder, which has no known digest: `./NAME` is the folder.
    """
    if name.startswith(_WEB):
        return Place(name, None)
    released = registry()
    if name in released:
        entry = released[name]
        if entry["source"] is None:
            raise InputError(f"{name}: {entry['verdict']}; {entry['note']}")
        where = REGISTRY.parents[1] / entry["source"]
        if not where.is_dir():
            raise InputError(
                f"{name}: {entry['source']} is not in this installation; it is in the project's repository"
            )
        return Place(str(where), entry["sha256"])
    if Path(name).is_dir() or (name.endswith(".tar") and Path(name).is_file()):
        return Place(name, None)
    if is_hub_id(name):
        return Place(name, None)
    known = ", ".join(n for n, e in released.items() if e["source"])
    raise InputError(
        f"{name}: no such folder, .tar file or released checkpoint (released: {known or 'none'}); "
        "a hub id is written owner/name@REVISION, with a commit or tag as the revision"
    )


def registry() -> dict[str, dict[str, Any]]:
    """{name: source, sha256, verdict, note} of the checkpoints that are known by name."""
    return json.loads(REGISTRY.read_text(encoding="utf-8"))


@contextmanager
def _opened(place: Place, root: Path, most_gb: float) -> Iterator[Source]:
    if Path(place.where).is_dir():
        yield FolderSource(Path(place.where))
    elif Path(place.where).is_file():
        yield TarSource(Path(place.where))
    else:
        _require_network(place.where)
        if not place.where.startswith(_WEB):
            from huggingface_hub import get_token, hf_hub_url

            hub_id, _, revision = place.where.partition("@")
            url = hf_hub_url(hub_id, MANIFEST, revision=revision).removesuffix(MANIFEST)
            yield WebSource(url, get_token())
        elif place.where.endswith(".tar"):
            with _archive(place.where, root, most_gb) as source:
                yield source
        else:
            yield WebSource(place.where)


@contextmanager
def _archive(url: str, root: Path, most_gb: float) -> Iterator[Source]:
    """A downloaded archive; it is kept only while it is not whole."""
    import hashlib

    archive = root / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar.pull"
    web = WebSource(url)
    fetch_url(web, url, None, archive, int(most_gb * 1e9))
    try:
        yield TarSource(archive)
    finally:
        archive.unlink(missing_ok=True)


def _fetch(source: Source, manifest: Manifest, data: bytes, scratch: Path, where: str) -> None:
    """Every file that `scratch` does not have yet, each checked as it comes."""
    for name, expected in manifest.files.items():
        path = scratch / name
        if path.is_file() and not check_file(path, name, expected):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        source.fetch(name, expected.size, part)
        if differences := check_file(part, name, expected):
            part.unlink()
            raise StageError(f"{where}: {differences[0]}; it was dropped, the rest is kept")
        part.chmod(0o644)
        part.rename(path)
    if manifest.signed_by:
        (scratch / SIGNATURE).write_bytes(source.small(SIGNATURE, MOST_SIGNATURE_BYTES))
    (scratch / MANIFEST).write_bytes(data)


def _already(target: Path, manifest: Manifest, public_key: Path | None) -> Path:
    """`target`, if it is this very bundle and sound."""
    try:
        same = read_manifest(target).sha256 == manifest.sha256 and not check(target, manifest, public_key)
    except (InputError, StageError):
        same = False
    if not same:
        raise InputError(f"{target}: something else is there; remove it, or name another folder with --out")
    return target


def _check_room(manifest: Manifest, root: Path, most_gb: float, where: str) -> None:
    if manifest.size > most_gb * 1e9:
        raise InputError(f"{where}: {manifest.size / 1e9:.1f} GB; if that is right, allow it with --max-gb")
    free = shutil.disk_usage(root).free
    if manifest.size > free:
        raise InputError(f"{root}: {free / 1e9:.1f} GB free, the bundle has {manifest.size / 1e9:.1f}; free some")


def _require_network(where: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError(f"{where}: offline mode is on; unset HF_HUB_OFFLINE, or name a folder or .tar file")


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Holds a lock on the folder itself, so that two pulls into it do not mix and no lock file is left."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
