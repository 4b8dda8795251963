"""`dvpo bench ...`: checks what was asked for, measures it, and prints it."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dvpo.errors import InputError
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
    if as_json:
        print_json(result)
    else:
        print(_text(result))


def gvm(model: Path, data: str, against: str | None, dtype: str, batch_pairs: int, rounds: int, as_json: bool) -> None:
    """Runs the comparison and prints it. Raises InputError for wrong options and StageError where a process dies."""
    _prepare()
    _require_trl(against)
    _require_dtype(dtype)
    require_checkpoint(str(model))
    from reproduce.bench import gvm as bench

    result = bench.measure(model, data, against, dtype == "bfloat16", rounds, batch_pairs)
    given = {"model": model, "data": data, "against": against, "dtype": dtype, "batch-pairs": batch_pairs}
    result["command"] = _command("gvm", **given, rounds=rounds)
    if as_json:
        print_json(result)
        return
    rows = [
        (
            name,
            _spread(row["tokens_per_second"], 0),
            _spread(row["texts_per_second"], 2),
            f"{row['computed_per_token']['median']:.2f}",
            f"{row['memory_mb']:.0f}",
        )
        for name, row in result["trainers"].items()
    ]
    print(table_text(("trainer", "tokens/s", "texts/s", "computed per token", "peak memory, MB"), rows))
    if against:
        speeds = [f"{_spread(result[f'{what}_per_second_ratio'], 2)} by {what}" for what in ("tokens", "texts")]
        print(f"ours / {against}: speed {', '.join(speeds)}; memory {result['memory_ratio']:.2f}")


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
    result["command"] = _command("policy", **given, rounds=rounds)
    if as_json:
        print_json(result)
        return
    rows = [
        (
            name,
            _spread(row["seconds"], 2),
            f"{row['memory_mb']:.0f}",
            ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items() if seconds >= 0.005),
        )
        for name, row in result["methods"].items()
    ]
    print(table_text(("method", "seconds", "peak memory, MB", "where the time goes"), rows, left=(0, 3)))
    for name, row in result["ratios"].items():
        print(f"{name}: {_spread(row['seconds'], 2)} of the time, {row['memory']:.2f} of the memory")


def growth(rounds: int, as_json: bool) -> None:
    """Runs the measurements and prints them. Raises StageError where a process dies."""
    _prepare()
    from reproduce.bench import growth as bench

    result = {**bench.measure(rounds), "command": _command("growth", rounds=rounds)}
    if as_json:
        print_json(result)
        return
    rows = [
        (fit["kind"], fit["axis"], fit["what"], f"{fit['exponent']:.2f}", f"{fit['largest_error']:.0%}")
        for fit in result["fits"]
    ]
    print(table_text(("training", "grows with", "what", "exponent", "largest error"), rows, left=(0, 1, 2)))


def _prepare() -> None:
    # What was started is ended on the way out, which a plain SIGTERM would not take.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Everything that is measured gets every core, unless the caller says otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))


def _command(kind: str, **options: Any) -> str:
    """What was asked for, with the last part of every path: where things lie is this machine's own."""
    given = [f"--{name} {Path(str(value)).name}" for name, value in options.items() if value is not None]
    return " ".join(["dvpo bench", kind, *given])


def _require_trl(against: str | None) -> None:
    if against not in (None, "trl"):
        raise InputError(f"--against {against}: unknown; choose trl, or leave it out")


def _require_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: unknown; choose float32 or bfloat16")


def _text(result: dict[str, Any]) -> str:
    other = result["against"]
    lines = [
        f"{result['dtype']}, {result['cores']} cores, {result['rounds']} rounds in turns; median (range); "
        f"largest difference of a value {result['largest_difference']:.1e}"
    ]
    rows = [
        (
            row["workload"],
            *(_spread(row[name], 0) for name in ("ours_tokens_per_second", "other_tokens_per_second")),
            _spread(row["ratio"], 2),
            *(_waits(row[name]) for name in ("ours_seconds", "other_seconds")),
        )
        for row in result["workloads"]
    ]
    heads = ("workload", "server, tokens/s", f"{other}, tokens/s", f"server / {other}")
    lines.append(table_text((*heads, "server, p50 and p99 s", f"{other}, p50 and p99 s"), rows))
    return "\n".join(lines)


def _waits(seconds: dict[str, float] | None) -> str:
    return "" if seconds is None else f"{seconds['p50']:.2f}, {seconds['p99']:.2f}"


def _spread(numbers: dict[str, float], digits: int) -> str:
    median, low, high = (f"{numbers[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"
