"""`dvpo release`, `dvpo pull` and `dvpo verify`: checkpoints that others can fetch and check."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvpo.data.splits import is_hub_id
from dvpo.errors import InputError, StageError
from reproduce.commands.common import print_json, say, table_text


def release(
    run: Path,
    out: Path | None,
    stage: str,
    name: str | None,
    base: str | None,
    base_licence: str | None,
    key: Path | None,
    as_json: bool,
) -> None:
    """Makes a bundle and says its digest."""
    from reproduce.bundles.release import release as make

    if (base is None) != (base_licence is None):
        raise InputError("--base and --base-licence go together: --base OWNER/NAME@REVISION --base-licence SPDX")
    if base is not None and not is_hub_id(base):
        raise InputError(f"--base {base}: write owner/name@REVISION, with a commit or tag as the revision")
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise InputError(f"--name {name}: use lower-case letters, digits, dots, dashes and underscores")
    made, manifest = make(run, out, stage, name, (base, base_licence) if base and base_licence else None, key)
    _print(made, manifest, as_json)


def pull(
    name: str, out: Path | None, sha256: str | None, max_gb: float, public_key: Path | None, as_json: bool
) -> None:
    """Fetches a bundle and says its digest."""
    from reproduce.bundles.pull import pull as fetch
    from reproduce.bundles.pull import registry

    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InputError(f"--sha256 {sha256}: give the 64 digits that `dvpo release` or `dvpo verify` prints")
    if name in registry() and Path(name).exists():
        say(f"{name} is taken for the released checkpoint; write ./{name} for what has that name here")
    _print(*fetch(name, out, sha256, max_gb, public_key), as_json)


def verify(
    folder: Path, metrics: bool, data: Sequence[Path], base: Path | None, public_key: Path | None, as_json: bool
) -> None:
    """Checks a bundle. Raises StageError, after naming every difference, where it is not what it says."""
    from reproduce.bundles.manifest import Difference, read_manifest
    from reproduce.bundles.verify import check, measure

    for path in (*data, *([base] if base else [])):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    manifest = read_manifest(folder)
    differences = check(folder, manifest, public_key)
    measured = measure(folder, manifest, data, base) if metrics and not differences else []
    differences += [
        Difference(m.name, f"{m.measured:.6g}, the manifest says {m.recorded:.6g} +- {m.tolerance:g}")
        for m in measured
        if not m.within
    ]
    if as_json:
        print_json(
            {
                "bundle": manifest.name,
                "sha256": manifest.sha256,
                "signed_by": manifest.signed_by,
                "differences": [{"where": d.where, "what": d.what} for d in differences],
                "metrics": [
                    {"name": m.name, "recorded": m.recorded, "measured": m.measured, "within": m.within}
                    for m in measured
                ],
            }
        )
    elif not differences:
        if measured:
            rows = [(m.name, f"{m.recorded:.5g}", f"{m.measured:.5g}", f"{m.tolerance:g}") for m in measured]
            print(table_text(("metric", "recorded", "measured", "tolerance"), rows) + "\n")
        signed = f"signed by key {manifest.signed_by}" if manifest.signed_by else "not signed"
        checked = f"files, tensors{' and metrics' if measured else ''} are as in the manifest"
        print(f"{manifest.name}: {checked}; {signed}\nsha256 {manifest.sha256}")
    if differences:
        if not as_json:
            print("\n".join(map(str, differences)))
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise StageError(f"{folder}: not as its manifest says: {differences[0]}{more}")


def _print(folder: Path, manifest: Any, as_json: bool) -> None:
    if as_json:
        print_json({"bundle": str(folder), "name": manifest.name, "sha256": manifest.sha256, "bytes": manifest.size})
        return
    print(f"{folder} ({manifest.size / 1e6:.1f} MB)\nsha256 {manifest.sha256}")
