"""Stages that fetch or read what a run starts from."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvpo.data.formats import read
from dvpo.data.records import dump_examples
from dvpo.data.splits import brief, check_disjoint, split_by_prompt
from dvpo.errors import InputError
from dvpo.files import sha256_file
from reproduce.pipeline import Context

CHECKPOINT = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""What a checkpoint needs: no second copy of the weights in another format."""


def checkpoint(ctx: Context) -> dict[str, Any]:
    """A model of the hub as a checkpoint folder. Settings: id, revision, chat_template (None: the tokenizer's own).

    What the hub's cache holds of that revision is not fetched again.
    """
    s = ctx.settings
    folder = _snapshot(s["id"], s["revision"])
    for path in {path for pattern in CHECKPOINT for path in folder.glob(pattern)}:
        shutil.copyfile(path, ctx.out / path.name)
    if not any(ctx.out.glob("*.safetensors")):
        raise InputError(f"{s['id']}@{s['revision']} has no .safetensors weights; name a model that has")
    if s["chat_template"] is not None and not _has_template(ctx.out):
        (ctx.out / "chat_template.jinja").write_text(s["chat_template"], encoding="utf-8")
    return {"config_sha256": sha256_file(ctx.out / "config.json")}


def _snapshot(name: str, revision: str) -> Path:
    """Raises InputError where it is gated, not there, or the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    what = f"{name}@{revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(CHECKPOINT)))
    except GatedRepoError as error:
        raise InputError(
            f"{what} is behind a licence: accept it on its page, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{what} is not on the hub, or only for those who log in with `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{what} is not in the hub's cache and the hub cannot be reached; go online, or name a folder with "
            "--set model=FOLDER"
        ) from error
    except Exception as error:  # the library raises whatever its network and cache raise
        raise InputError(f"{what} cannot be fetched ({brief(error)}); name a folder with --set model=FOLDER") from error


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    named = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return named or (folder / "chat_template.jinja").is_file()


def preferences(ctx: Context) -> dict[str, Any]:
    """Reads preference data and splits it by prompt. Settings: shares {split: share}, hub id or None, file split."""
    source = ctx.settings["hub"] or ctx.inputs["data"]
    data = read(source, split=ctx.settings["split"])
    splits = split_by_prompt(data.examples, ctx.settings["shares"], ctx.seed)
    check_disjoint(splits)
    for name, examples in splits.items():
        dump_examples(examples, ctx.out / f"{name}.jsonl")
    return {
        "data_digest": data.digest,
        "notes": asdict(data.notes),
        "said": data.notes.lines(),
        "examples": {name: len(examples) for name, examples in splits.items()},
    }
