"""A model that `dvpo train` made and a run only measured (`trained` in its recipe), as a stage that can be released."""

import json
from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import list_files, sha256_file, sha256_json, sha256_tree
from reproduce.commands.train import TRAINING

PREFIX = "trained/"


def trained_stage(run: Path, stage_id: str) -> tuple[Path, dict[str, Any], str]:
    """The model's folder, what a stage's manifest would say of it, and the digest that the run knows it by.

    Raises InputError where the run names no such model, or its folder is not there or not by `dvpo train`.
    """
    name = stage_id.removeprefix(PREFIX)
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    given = recipe.get("trained", {}).get(name)
    if given is None:
        raise InputError(f"{run}: its recipe has no trained.{name}")
    folder = Path(given)
    try:
        training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        config = training["config"]
        start, settings, seed = config["start"], config["settings"], config["seed"]
        kind, data = training["kind"], training["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no {TRAINING} of `dvpo train` is there; put that folder back") from error
    if not Path(start).is_dir():
        raise InputError(f"{start}: the base model of {folder} is not there; put that folder back")
    manifest = {
        "id": stage_id,
        "stage": kind,
        "key": sha256_json({"config": config, "data_sha256": data}),
        "settings": settings,
        "seeds": [seed],
        "inputs": {"start": sha256_tree(Path(start)), "data": data},
        "outputs": {p.relative_to(folder).as_posix(): sha256_file(p) for p in list_files(folder)},
        # Older folders do not say these.
        "git_commit": training.get("git_commit", "unknown"),
        "versions": training.get("versions", {}),
        "device": training.get("device", {}),
    }
    return folder, manifest, sha256_tree(folder)
