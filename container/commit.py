"""Prints the commit of the sources that an image is built from: the one given, else what .git/HEAD points at."""

import sys
from pathlib import Path


def commit_of(git: Path) -> str:
    """The commit of a checkout from its HEAD, refs and packed refs alone; `unknown` where there are none."""
    head = git / "HEAD"
    if not head.is_file():
        return "unknown"
    text = head.read_text(encoding="utf-8").strip()
    if not text.startswith("ref: "):
        return text
    name = text.removeprefix("ref: ")
    if (git / name).is_file():
        return (git / name).read_text(encoding="utf-8").strip()
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "unknown")


if __name__ == "__main__":
    given, folder = sys.argv[1:]
    print(given or commit_of(Path(folder)))
