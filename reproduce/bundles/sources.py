"""Where a bundle comes from: a folder, a `.tar` file, or a web address; all through one small interface."""

import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from dvpo.errors import InputError, StageError
from reproduce.bundles.manifest import check_path

if TYPE_CHECKING:
    import httpx

CHUNK = 1 << 20
ATTEMPTS = 4
_RANGE = re.compile(r"bytes (\d+)-\d+/")


class Source(Protocol):
    """A place that has the files of a bundle."""

    def small(self, name: str, most: int) -> bytes:
        """A whole small file. Raises StageError if it is absent or has more than `most` bytes."""

    def fetch(self, name: str, size: int, part: Path) -> None:
        """Writes a file of `size` bytes to `part`; goes on from what `part` holds where the source can."""

    def names(self) -> set[str] | None:
        """All names there; None where they cannot be listed."""


class FolderSource:
    """A bundle folder on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder

    def small(self, name: str, most: int) -> bytes:
        """As `Source.small`."""
        with self._open(name) as f:
            return _limited(f, most, f"{self.folder / name}")

    def fetch(self, name: str, size: int, part: Path) -> None:
        """As `Source.fetch`; local files are copied from the start."""
        with self._open(name) as f:
            _copy(f, size, part, str(self.folder / name))

    def names(self) -> None:
        """Not asked for: what the manifest does not list is not copied."""

    def _open(self, name: str) -> IO[bytes]:
        path = self.folder / name
        try:
            # O_NOFOLLOW alone would still follow a linked folder on the way.
            if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
                raise StageError(f"{path}: missing, or a link that leads out of the bundle")
            return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError as error:
            raise StageError(f"{path}: cannot be read ({error.strerror})") from error


class TarSource:
    """An uncompressed archive. Every member is looked at before anything is unpacked."""

    def __init__(self, path: Path):
        self.path = path
        self.members: dict[str, tarfile.TarInfo] = {}
        try:
            self.tar = tarfile.open(path, "r:")  # noqa: SIM115 (open as long as the source is)
            for member in self.tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    raise StageError(
                        f"{path}: {member.name!r} is no plain file (a link, folder, device or sparse file)"
                    )
                check_path(member.name, str(path))
                if member.name in self.members:
                    raise StageError(f"{path}: {member.name!r} stands in it twice")
                self.members[member.name] = member
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # ValueError: numbers in a header
            raise StageError(f"{path}: not a whole uncompressed tar file ({error})") from error

    def small(self, name: str, most: int) -> bytes:
        """As `Source.small`."""
        return _limited(self._open(name), most, f"{self.path}: {name}")

    def fetch(self, name: str, size: int, part: Path) -> None:
        """As `Source.fetch`; members are unpacked from the start."""
        if self.members.get(name) and self.members[name].size != size:
            raise StageError(f"{self.path}: {name} has {self.members[name].size} bytes, the manifest says {size}")
        _copy(self._open(name), size, part, f"{self.path}: {name}")

    def names(self) -> set[str]:
        """All members."""
        return set(self.members)

    def _open(self, name: str) -> IO[bytes]:
        member = self.tar.extractfile(self.members[name]) if name in self.members else None
        if member is None:
            raise StageError(f"{self.path}: it has no {name}")
        return member


class WebSource:
    """The folder of a bundle at an http(s) address. Downloads go on where they were cut."""

    def __init__(self, url: str, token: str | None = None):
        import httpx

        import dvpo

        self.url = url.rstrip("/") + "/"
        # Compressed transfer would make byte ranges and size limits meaningless.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"dvpo/{dvpo.__version__}"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self.client = httpx.Client(headers=headers, follow_redirects=True, timeout=httpx.Timeout(60, connect=15))

    def small(self, name: str, most: int) -> bytes:
        """As `Source.small`."""
        data = b""

        def download() -> None:
            nonlocal data
            with self.get(self.url + name, 0) as response:
                data = b""
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > most:
                        raise StageError(f"{self.url}{name}: more than {most} bytes; that is too large for what it is")

        _again_if_cut(download)
        return data

    def fetch(self, name: str, size: int, part: Path) -> None:
        """As `Source.fetch`."""
        fetch_url(self, self.url + name, size, part)

    def names(self) -> None:
        """Not known of a web address."""

    @contextmanager
    def get(self, url: str, offset: int) -> Iterator["httpx.Response"]:
        """The response from byte `offset` on, its body not read yet. Raises CutError, StageError or InputError."""
        import httpx

        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            with self.client.stream("GET", url, headers=headers) as response:
                if any(r.url.scheme == "https" for r in response.history) and response.url.scheme != "https":
                    raise StageError(f"{url}: it leads to an address without encryption; that is not followed")
                if response.status_code not in (200, 206, 416):
                    raise StageError(f"{url}: the server answers {response.status_code} {response.reason_phrase}")
                yield response
        except httpx.InvalidURL as error:
            raise InputError(f"{url}: not a web address") from error
        except httpx.TransportError as error:
            raise CutError(f"{url}: {_reason(error)}") from error


class CutError(StageError):
    """The connection failed: trying again may help."""


def fetch_url(source: WebSource, url: str, size: int | None, part: Path, most: int | None = None) -> None:
    """Downloads to `part`, going on from what it holds; a cut connection is tried again some times.

    Args:
        size: bytes that the file must have; None where only the server knows.
        most: bytes that it may have; the default is `size`.
    """
    limit = most if size is None else size
    try:
        _again_if_cut(lambda: _download(source, url, size, limit, part))
    except CutError as error:
        have = part.stat().st_size if part.exists() else 0
        raise StageError(f"{error} after {have} bytes; run the same command to go on") from error


def _again_if_cut(download: Callable[[], None]) -> None:
    for attempt in range(1, ATTEMPTS):
        try:
            return download()
        except CutError:
            time.sleep(0.5 * attempt)
    return download()


def _download(source: WebSource, url: str, size: int | None, limit: int | None, part: Path) -> None:
    offset = part.stat().st_size if part.exists() else 0
    if size is not None and offset >= size:
        if offset == size:
            return
        part.unlink()
        offset = 0
    with source.get(url, offset) as response:
        if response.status_code == 416:  # `part` holds all of it, or more than there is now
            part.unlink(missing_ok=True)
            raise CutError(f"{url}: changed on the server")
        start = _RANGE.match(response.headers.get("content-range", ""))
        if response.status_code == 206 and (start is None or int(start[1]) != offset):
            raise StageError(f"{url}: the server sent another part of the file than was asked for")
        if response.status_code == 200:
            offset = 0  # a server without byte ranges: from the start
        with open(part, "r+b" if offset else "wb") as f:
            f.seek(offset)
            for chunk in response.iter_raw():
                if limit is not None and f.tell() + len(chunk) > limit:
                    raise StageError(f"{url}: larger than the {limit} bytes that are allowed")
                f.write(chunk)
            if size is not None and f.tell() < size:
                raise CutError(f"{url}: ended early")


def _limited(f: IO[bytes], most: int, where: str) -> bytes:
    with f:
        data = f.read(most + 1)
    if len(data) > most:
        raise StageError(f"{where}: more than {most} bytes; that is too large for what it is")
    return data


def _copy(f: IO[bytes], size: int, part: Path, where: str) -> None:
    """Copies at most `size` bytes; what is left over or lacking shows in the size check that follows."""
    with f, open(part, "wb") as target:
        shutil.copyfileobj(f, target, CHUNK)
        if target.tell() > size:
            raise StageError(f"{where}: {target.tell()} bytes, the manifest says {size}")


def _reason(error: Exception) -> str:
    return f"the connection failed ({' '.join(str(error).split()) or type(error).__name__})"
