"""`dvpo bench server`: the scoring server beside a bare forward pass, or beside vLLM's server."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal

from dvpo.errors import InputError
from reproduce.commands.common import print_json, table_text

_SERVE = (sys.executable, "-m", "reproduce.cli", "serve")


def server(
    gvm: Path,
    against: str,
    dtype: str,
    text: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Runs the comparison and prints it. Raises InputError for wrong options and StageError where a server fails."""
    # The servers are ended on the way out, which a plain SIGTERM would not take.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Both sides and the bare pass in this process get every core, unless the caller says otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    if against not in ("bare", "vllm"):
        raise InputError(f"--against {against}: unknown; choose bare or vllm")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: unknown; choose float32 or bfloat16")
    from server import bench

    kind: Literal["float32", "bfloat16"] = "float32" if dtype == "float32" else "bfloat16"
    compare = bench.against_bare if against == "bare" else bench.against_vllm
    result = compare(_SERVE, gvm, kind, text, rounds)
    if as_json:
        print_json(result)
    else:
        print(_text(result))


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
        )
        for row in result["workloads"]
    ]
    lines.append(table_text(("workload", "server, tokens/s", f"{other}, tokens/s", f"server / {other}"), rows))
    return "\n".join(lines)


def _spread(numbers: dict[str, float], digits: int) -> str:
    median, low, high = (f"{numbers[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"
