"""From a finished run to a bundle. The same run gives the same bytes; only a signature differs from time to time."""

import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo.errors import InputError, StageError
from dvpo.files import list_files, sha256_file, sha256_json, sha256_tree, write_json, write_text
from reproduce.bundles import signing
from reproduce.bundles.card import card, intended_use, limits
from reproduce.bundles.manifest import (
    CARD,
    KEY,
    MANIFEST,
    SUFFIXES,
    Base,
    Manifest,
    Metric,
    MetricInput,
    StageRecord,
    manifest_bytes,
    parse_manifest,
)
from reproduce.bundles.trained import PREFIX, trained_stage
from reproduce.pipeline import load_result

ROLES = {"gvm": "value", "rm": "reward", "sft": "policy", "dpo": "policy", "policy": "policy", "base": "policy"}
# What loading a checkpoint reads; training curves and the run's own manifests stay behind.
_CHECKPOINT = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(adapter_|generation_)?config\.json"
    r"|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\.jinja"
    r"|reward_scale\.json"
)
# Files of a metric's inputs that are read when it is measured again.
_EVALUATION: dict[str, dict[str, tuple[str, ...]]] = {
    "pairwise": {"data": ("{split}.jsonl",)},
    "credit": {"data": ("{split}.jsonl",), "atlas": ("world.json",)},
    "gold": {"atlas": ("{split}.jsonl", "world.json")},
}
# How far another machine's arithmetic may move a number; sampled answers may part at a near tie.
_TOLERANCE = {"pairwise": 0.01, "credit": 0.01, "gold": 0.02}
# bfloat16 turns pairs whose values are near: four of 165 net at most, between a GPU and a CPU (by the last value).
_TOLERANCE_IN_BFLOAT16 = 0.03


@dataclass(frozen=True)
class _Stage:
    """A published stage: its folder, manifest, and the digest that its children name it by."""

    folder: Path
    manifest: dict[str, Any]
    digest: str

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def kind(self) -> str:
        return self.manifest["stage"]


def release(
    run: Path,
    out: Path | None,
    stage_id: str = "seed0/gvm",
    name: str | None = None,
    base: tuple[str, str] | None = None,
    key: Path | None = None,
) -> tuple[Path, Manifest]:
    """Makes a bundle of one model of a run.

    Args:
        out: the bundle's folder, or a name that ends in `.tar`; the default is `released/NAME` in the run.
        stage_id: a stage of the run, or `trained/NAME`, a model of its recipe's `trained` that the run measured.
        base: (owner/name@REVISION, licence) of the model that training started from, unless that was random weights.
        key: a PEM private key to sign with.

    Raises:
        InputError: no such run, stage or base; something is at `out` already.
        StageError: the stage's stored files are damaged.
    """
    stages = _stages(run)
    stage = next((s for s in stages if s.id == stage_id), None)
    if stage_id.startswith(PREFIX):
        stage = _Stage(*trained_stage(run, stage_id))
    if stage is None or stage.kind not in ROLES:
        known = ", ".join(sorted(s.id for s in stages if s.kind in ROLES))
        raise InputError(f"{run} has no model {stage_id!r}; choose --stage from: {known}")
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["name"]
    name = name or _default_name(stage, recipe)
    out = out or run / "released" / name
    if os.path.lexists(out):
        raise InputError(f"{out}: something is there already; remove it, or name another place with --out")
    public_key = signing.public_key_of(key) if key else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        _copy_model(stage, folder)
        lineage = _lineage(stage, stages)
        origin = _origin(stage, stages, folder, base)
        metrics = _metrics(stage, stages, folder)
        if public_key:
            (folder / KEY).write_bytes(public_key)
        manifest = _write(folder, name, recipe, stage, lineage, origin, metrics)
        if key:
            signing.sign(folder, key)
        _publish(folder, out)
    return out, manifest


def _stages(run: Path) -> list[_Stage]:
    """The stages of the run's last `dvpo reproduce`, and others in its folder whose name is not among those."""
    index = run / "manifests.json"
    if not index.is_file() or not (run / "recipe.json").is_file():
        raise InputError(f"{run}: no finished run is there; give the --out folder of `dvpo reproduce` when it is done")
    last = {m["id"]: m["key"] for m in json.loads(index.read_text(encoding="utf-8")).values()}
    found = []
    for path in sorted((run / "stages").glob(f"*/{MANIFEST}")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if last.get(manifest["id"], manifest["key"]) == manifest["key"]:
            found.append(_Stage(path.parent, manifest, sha256_json(manifest["outputs"])))
    return sorted(found, key=lambda s: s.id)


def _default_name(stage: _Stage, recipe: str) -> str:
    seed, _, rest = stage.id.partition("/")
    name = f"{rest.replace('/', '-')}-{recipe}".lower()
    return name if seed == "seed0" else f"{name}-{seed}"


def _copy_model(stage: _Stage, folder: Path) -> None:
    if not stage.id.startswith(PREFIX) and load_result(stage.folder) is None:
        raise StageError(f"{stage.folder}: its files are not those of its manifest; run `dvpo reproduce` again")
    folder.mkdir()
    names = [n for n in stage.manifest["outputs"] if _CHECKPOINT.fullmatch(n)]
    if other := [n for n in names if not n.endswith(SUFFIXES)]:
        raise StageError(f"{stage.folder}: {other[0]} is of no kind that a bundle may hold")
    for file in names:
        shutil.copyfile(stage.folder / file, folder / file)


def _lineage(stage: _Stage, stages: list[_Stage]) -> list[_Stage]:
    """The stage and all that it was made from, each after its inputs."""
    by_digest = {s.digest: s for s in reversed(stages)}
    order: dict[str, _Stage] = {}

    def visit(one: _Stage) -> None:
        for _, digest in sorted(one.manifest["inputs"].items()):
            if digest in by_digest and by_digest[digest].id not in order:
                visit(by_digest[digest])
        order[one.id] = one

    visit(stage)
    return list(order.values())


def _origin(stage: _Stage, stages: list[_Stage], folder: Path, base: tuple[str, str] | None) -> Base | None:
    """The model from outside that training started from; None where that was random weights.

    An adapter in `folder` is made to name its base by hub id and revision.
    """
    first, digest = stage, stage.manifest["inputs"].get("start")
    while parent := next((s for s in stages if s.digest == digest), None):
        first, digest = parent, parent.manifest["inputs"].get("start")
    adapter = folder / "adapter_config.json"
    config = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else None
    if digest is None:
        if base:
            raise InputError(f"{first.id} trained from random weights; leave --base out")
        if config:
            raise InputError(f"{stage.id} is an adapter on another stage of the run; release a whole model")
        return None
    if base is None:
        raise InputError("training started from another model; name it: --base OWNER/NAME@REVISION --base-licence SPDX")
    if config is None:
        return _base(base, digest, {})
    source = Path(config["base_model_name_or_path"])
    if not source.is_dir() or sha256_tree(source) != digest:
        raise InputError(f"{source}: not the base model that {stage.id} was trained on; put that folder back")
    config["base_model_name_or_path"], _, config["revision"] = base[0].partition("@")
    config |= {k: sorted(set(config[k])) for k in ("target_modules", "modules_to_save") if isinstance(config[k], list)}
    write_json(adapter, dict(sorted(config.items())))
    files = {p.name: sha256_file(p) for p in list_files(source) if _CHECKPOINT.fullmatch(p.name) and p.parent == source}
    return _base(base, digest, files)


def _base(base: tuple[str, str], digest: str, files: dict[str, str]) -> Base:
    hub_id, _, revision = base[0].partition("@")
    return Base(id=hub_id, revision=revision, licence=base[1], sha256=digest, files=files)


def _metrics(stage: _Stage, stages: list[_Stage], folder: Path) -> list[Metric]:
    """Every measurement of this model in the run; what the run itself made to measure on is copied into the bundle."""
    metrics = []
    for measured in stages:
        inputs = dict(measured.manifest["inputs"])
        model = inputs.pop("policy" if measured.kind == "gold" else "model", None)
        if measured.kind not in _EVALUATION or model != stage.digest or measured.manifest["settings"].get("subfolder"):
            continue
        read = {}
        for name, digest in inputs.items():
            source = next((s for s in stages if s.digest == digest), None)
            read[name] = MetricInput(sha256=digest, folder=source and f"evaluation/{_short(source.id)}")
            if source:
                _copy_evaluation(measured, name, source, folder)
        metrics.append(
            Metric(
                name=_short(measured.id),
                kind=measured.kind,
                key=measured.manifest["key"],
                settings=measured.manifest["settings"],
                seed=measured.manifest["seeds"][0],
                inputs=read,
                values={k: v for k, v in measured.manifest["metrics"].items() if k not in ("said", "words")},
                tolerance=tolerance_of(measured.kind, measured.manifest["settings"]),
            )
        )
    return metrics


def tolerance_of(kind: str, settings: Mapping[str, Any]) -> float:
    """How far a metric may be from what is recorded when it is measured again, absolute."""
    return max(_TOLERANCE[kind], _TOLERANCE_IN_BFLOAT16 if settings.get("bf16") else 0.0)


def _copy_evaluation(measured: _Stage, name: str, source: _Stage, folder: Path) -> None:
    for pattern in _EVALUATION[measured.kind][name]:
        file = pattern.format(split=measured.manifest["settings"]["split"])
        if sha256_file(source.folder / file) != source.manifest["outputs"][file]:
            raise StageError(f"{source.folder / file}: damaged; run `dvpo reproduce` again")
        target = folder / "evaluation" / _short(source.id) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / file, target)


def _short(stage_id: str) -> str:
    return stage_id.partition("/")[2] or stage_id


def _write(
    folder: Path,
    name: str,
    recipe: str,
    stage: _Stage,
    lineage: list[_Stage],
    origin: Base | None,
    metrics: list[Metric],
) -> Manifest:
    """Writes the card and the manifest."""
    role = ROLES[stage.kind]
    built_in = any(s.kind == "atlas" for s in lineage)
    data = {s.id: s.digest for s in lineage if s.kind in ("atlas", "coverage", "preferences")}
    known = {s.digest for s in lineage} | ({origin.sha256} if origin else set())
    for s in lineage:
        data |= {f"{s.id}/{n}": d for n, d in s.manifest["inputs"].items() if d not in known}
    content: dict[str, Any] = {
        "format": 1,
        "name": name,
        "role": role,
        "recipe": recipe,
        "stage": stage.id,
        "seed": stage.manifest["seeds"][0],
        "base": origin.model_dump() if origin else None,
        "stages": [_record(s).model_dump() for s in lineage],
        "data": data,
        "metrics": [m.model_dump() for m in metrics],
        "git_commit": stage.manifest["git_commit"],
        "versions": stage.manifest["versions"],
        "image": stage.manifest.get("image"),
        "device": stage.manifest["device"],
        "intended_use": intended_use(role, built_in),
        "limits": limits(role, built_in, len(metrics)),
        "signed_by": sha256_file(folder / KEY) if (folder / KEY).exists() else None,
    }
    write_text(folder / CARD, card(content))
    content["files"] = {
        p.relative_to(folder).as_posix(): {"sha256": sha256_file(p), "size": p.stat().st_size}
        for p in list_files(folder)
    }
    data_bytes = manifest_bytes(content)
    (folder / MANIFEST).write_bytes(data_bytes)
    return parse_manifest(data_bytes, f"{name}: {MANIFEST}")


def _record(stage: _Stage) -> StageRecord:
    m = stage.manifest
    return StageRecord(
        id=stage.id,
        kind=stage.kind,
        key=m["key"],
        settings=m["settings"],
        seed=m["seeds"][0],
        inputs=m["inputs"],
        outputs_sha256=stage.digest,
        git_commit=m["git_commit"],
    )


def _publish(folder: Path, out: Path) -> None:
    for path in list_files(folder):
        path.chmod(0o644)
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    folder.chmod(0o755)
    if out.suffix != ".tar":
        folder.rename(out)
        return
    archive = folder.with_name("archive.tar")
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in list_files(folder):
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size, info.mode = path.stat().st_size, 0o644
            with open(path, "rb") as f:
                tar.addfile(info, f)
    archive.rename(out)
