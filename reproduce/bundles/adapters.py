"""An adapter names its base model by hub id; here it is laid on a folder that holds that model."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dvpo.errors import InputError
from dvpo.files import write_json

ADAPTER = "adapter_config.json"


@contextmanager
def laid_on(folder: str | Path, base: Path | None) -> Iterator[str | Path]:
    """The model in `folder`, as long as this is open; an adapter laid on the folder `base` where one is named.

    Raises InputError as `on_base` does.
    """
    if base is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dvpo-") as scratch:
        yield on_base(Path(folder), base, Path(scratch))


def on_base(folder: Path, base: Path, scratch: Path) -> Path:
    """A copy of the adapter in `folder`, below `scratch`, that names the folder `base` as its base model.

    Raises InputError where there is no adapter, or no folder `base`.
    """
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} is a whole model, not an adapter; leave --base out")
    if not base.is_dir():
        raise InputError(f"{base}: no such folder; name the one that holds the adapter's base model")
    copy = scratch / "model"
    shutil.copytree(folder, copy)
    config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    write_json(copy / ADAPTER, {**config, "base_model_name_or_path": str(base.resolve()), "revision": None})
    return copy
