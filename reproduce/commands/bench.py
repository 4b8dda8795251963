"""`dvpo bench ...`: checks what was asked for, measures it, and prints it."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from dvpo.errors import InputError
from reproduce.bench import page
from reproduce.bench.common import machine
from reproduce.commands.common import print_json, require_checkpoint, table_text

_SERVE = (sys.executable, "-m", "reproduce.cli", "serve")


def server(
    gvm: Path,
    against: str,
    dtype: str,
    text: Path | None,
    clients: Sequence[int],
    rounds: int,
    as_json: bool,
) -> None:
    """Runs the comparison and prints it. Raises InputError for wrong options and StageError where a server fails."""
    _prepare()
    if against not in ("bare", "vllm"):
        raise InputError(f"--against {against}: unknown; choose bare or vllm")
    _require_dtype(dtype)
    from server import bench

    kind: Literal["float32", "bfloat16"] = "float32" if dtype == "float32" else "bfloat16"
    compare = bench.against_bare if against == "bare" else bench.against_vllm
    result = compare(_SERVE, gvm, kind, text, rounds, clients)
    given = {"gvm": gvm, "against": against, "dtype": dtype, "text": text}
    _print(page.server, _signed(result, "server", **given, clients=clients, rounds=rounds), as_json)


def gvm(model: Path, data: str, against: str | None, dtype: str, batch_pairs: int, rounds: int, as_json: bool) -> None:
    """Runs the comparison and prints it. Raises InputError for wrong options and StageError where a process dies."""
    _prepare()
    _require_trl(against)
    _require_dtype(dtype)
    require_checkpoint(str(model))
    from reproduce.bench import gvm as bench

    result = bench.measure(model, data, against, dtype == "bfloat16", rounds, batch_pairs)
    given = {"model": model, "data": data, "against": against, "dtype": dtype, "batch-pairs": batch_pairs}
    _print(page.gvm, _signed(result, "gvm", **given, rounds=rounds), as_json)


def policy(
    start: Path, gvm: Path, reward: Path, prompts: str, against: str | None, dtype: str, prompts_per_update: int,
    max_new_tokens: int, rounds: int, as_json: bool,
) -> None:  # fmt: skip
    """Runs the comparison and prints it. Raises InputError for wrong options and StageError where a process dies."""
    _prepare()
    _require_trl(against)
    _require_dtype(dtype)
    for folder in (start, gvm, reward):
        require_checkpoint(str(folder))
    from reproduce.bench import policy as bench

    size = {"count": prompts_per_update, "max_new_tokens": max_new_tokens}
    result = bench.measure(start, gvm, reward, prompts, against, dtype == "bfloat16", rounds, **size)
    given = {"start": start, "gvm": gvm, "reward": reward, "prompts": prompts, "against": against, "dtype": dtype}
    given |= {"prompts-per-update": prompts_per_update, "max-new-tokens": max_new_tokens}
    _print(page.policy, _signed(result, "policy", **given, rounds=rounds), as_json)


def growth(rounds: int, as_json: bool) -> None:
    """Runs the measurements and prints them. Raises StageError where a process dies."""
    _prepare()
    from reproduce.bench import growth as bench

    _print(page.growth, _signed(bench.measure(rounds), "growth", rounds=rounds), as_json)


def draw(folder: Path) -> None:
    """Draws the page of a folder's results and prints where it is. Raises InputError where there are none."""
    print(f"drawn: {page.write(folder)}")


def _prepare() -> None:
    # What was started is ended on the way out, which a plain SIGTERM would not take.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Everything that is measured gets every core, unless the caller says otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))


def _signed(result: dict[str, Any], kind: str, **options: Any) -> dict[str, Any]:
    """With the command and the machine. Of a path only its last part: where things lie is this machine's own."""
    words = ["dvpo bench", kind]
    for name, value in options.items():
        values = value if isinstance(value, tuple | list) else [value]
        words += [f"--{name} {Path(str(one)).name}" for one in values if one is not None]
    return {**result, "command": " ".join(words), "machine": machine()}


def _print(show: Callable[[dict[str, Any]], page.Shown], result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    shown = show(result)
    print(table_text(shown.head, shown.rows))
    for note in shown.notes:
        print(note)


def _require_trl(against: str | None) -> None:
    if against not in (None, "trl"):
        raise InputError(f"--against {against}: unknown; choose trl, or leave it out")


def _require_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: unknown; choose float32 or bfloat16")
