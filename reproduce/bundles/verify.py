"""Checks a bundle: files, signature, tensors, and on demand its numbers."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo.data.splits import brief
from dvpo.errors import InputError, StageError
from dvpo.files import sha256_file, sha256_tree
from reproduce.bundles.adapters import ADAPTER, on_base
from reproduce.bundles.manifest import Difference, Manifest, Metric, check_files
from reproduce.bundles.signing import check_signature


def check(folder: Path, manifest: Manifest, public_key: Path | None = None) -> list[Difference]:
    """Everything in which the bundle is not what its manifest says, its numbers apart. Damaged files are not loaded."""
    differences = check_files(folder, manifest)
    if not differences:
        differences = check_signature(folder, manifest, public_key)
    if not differences:
        from reproduce.bundles.tensors import check_tensors

        differences = check_tensors(folder, manifest)
    return differences


@dataclass(frozen=True)
class Measured:
    """One number of a metric, as the manifest has it and as it came out now."""

    name: str
    recorded: float
    measured: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the two are as near as the manifest allows."""
        return math.isfinite(self.measured) and abs(self.recorded - self.measured) <= self.tolerance


def measure(folder: Path, manifest: Manifest, data: Sequence[Path], base: Path | None) -> list[Measured]:
    """Measures every metric of a checked bundle again.

    Args:
        data: evaluation data that is not in the bundle, found by its digest.
        base: the folder of an adapter's base model.

    Raises:
        InputError: data or base model is not given, or is another one.
        StageError: a measurement failed.
    """
    digests = {sha256_tree(path): path for path in data}
    sources = [_inputs(folder, m, digests) for m in manifest.metrics]
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = _loadable(folder, manifest, base, Path(scratch))
        for i, (metric, inputs) in enumerate(zip(manifest.metrics, sources, strict=True)):
            rows += _again(metric, {**inputs, _model_input(metric): model}, Path(scratch) / str(i))
    return rows


def _model_input(metric: Metric) -> str:
    return "policy" if metric.kind == "gold" else "model"


def _inputs(folder: Path, metric: Metric, digests: dict[str, Path]) -> dict[str, Path]:
    inputs = {}
    for name, source in metric.inputs.items():
        path = folder / source.folder if source.folder else digests.get(source.sha256)
        if path is None:
            raise InputError(
                f"metric {metric.name} was measured on data with sha256 {source.sha256}, which is not in the bundle; "
                "give that file or folder with --data PATH"
            )
        inputs[name] = path
    return inputs


def _loadable(folder: Path, manifest: Manifest, base: Path | None, scratch: Path) -> Path:
    """The bundle itself, or a copy of an adapter that names the checked folder of its base model."""
    if manifest.base is None or not (folder / ADAPTER).is_file():
        return folder
    if base is None:
        raise InputError(
            f"an adapter needs its base model: --base FOLDER of {manifest.base.id}@{manifest.base.revision}"
        )
    for name, digest in manifest.base.files.items():
        if not (base / name).is_file() or sha256_file(base / name) != digest:
            raise InputError(f"{base / name}: not the file of {manifest.base.id}@{manifest.base.revision}")
    return on_base(folder, base, scratch)


def _again(metric: Metric, inputs: dict[str, Path], work: Path) -> Iterator[Measured]:
    from reproduce.pipeline import Context
    from reproduce.stages import KINDS

    context = Context(metric.settings, metric.seed, inputs, work / "out", work / "state")
    context.out.mkdir(parents=True)
    context.state.mkdir()
    try:
        values = KINDS[metric.kind].function()(context)
    except Exception as error:  # settings and data of a bundle may be wrong in any way
        raise StageError(f"metric {metric.name} cannot be measured ({brief(error)})") from error
    now = dict(_numbers(values))
    for name, recorded in _numbers(metric.values):
        # Counts are exact everywhere; only what is computed in floating point may move.
        tolerance = 0.0 if isinstance(recorded, int) else metric.tolerance
        yield Measured(f"{metric.name} {name}", recorded, now.get(name, math.nan), tolerance)


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, number) of every number in nested dicts and lists."""
    if isinstance(values, bool) or values is None or isinstance(values, str):
        return
    if isinstance(values, int | float):
        yield path, values
        return
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield from _numbers(value, f"{path}.{key}" if path else str(key))
