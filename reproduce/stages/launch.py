"""A training stage in several processes: each runs the stage's own function, and the first one's numbers count.

`python -m reproduce.stages.launch FILE` is what every process runs, under torchrun. The strategy stands in accelerate's
environment variables, which `dvpo.distributed` reads.
"""

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvpo.errors import InputError, StageError
from dvpo.files import write_json
from reproduce.pipeline import Context
from reproduce.stages import KINDS

StageFunction = Callable[[Context], dict[str, Any]]
JOB, METRICS, FAILURE = "launch.json", "metrics.json", "failure.json"


def in_processes(stage: StageFunction) -> StageFunction:
    """A stage that starts its processes itself where its settings say `compute: {processes, strategy}`."""

    @functools.wraps(stage)
    def run(ctx: Context) -> dict[str, Any]:
        from dvpo.distributed import launched

        compute = ctx.settings.get("compute")
        return launch(stage.__name__, ctx, **compute) if compute and not launched() else stage(ctx)

    return run


def launch(kind: str, ctx: Context, processes: int, strategy: str) -> dict[str, Any]:
    """Runs the stage in that many processes and returns the first one's metrics.

    Raises:
        InputError: the machine has fewer devices, or as a process of the stage. StageError: a process failed or died;
            the others are ended.
    """
    require_devices(processes)
    for name in (METRICS, FAILURE):
        (ctx.state / name).unlink(missing_ok=True)
    folders = {"out": ctx.out, "state": ctx.state, **{f"inputs.{name}": path for name, path in ctx.inputs.items()}}
    job = {"kind": kind, "settings": ctx.settings, "seed": ctx.seed}
    write_json(ctx.state / JOB, job | {name: str(path.resolve()) for name, path in folders.items()})
    variables, words = command(processes, strategy, str(ctx.state / JOB))
    done = subprocess.run(
        [sys.executable, "-m", *words], env={**os.environ, **variables}, check=False, preexec_fn=_die_with_parent
    )
    if (ctx.state / FAILURE).exists():
        failure = json.loads((ctx.state / FAILURE).read_text(encoding="utf-8"))
        raise (InputError if failure["input"] else StageError)(failure["message"])
    if done.returncode or not (ctx.state / METRICS).exists():
        raise StageError(f"one of {processes} processes died (out of memory?); run the same command to go on")
    return json.loads((ctx.state / METRICS).read_text(encoding="utf-8"))


def command(processes: int, strategy: str, file: str) -> tuple[dict[str, str], list[str]]:
    """The environment variables, and the words after `python -m`, that start the processes."""
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if strategy.startswith("zero"):
        variables |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1]}
    elif strategy == "fsdp2":
        variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    started = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return variables, [*started, "-m", "reproduce.stages.launch", file]


def require_devices(processes: int) -> None:
    """Raises InputError where there are GPUs, but too few. Without any the processes share the CPU."""
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        found = torch.cuda.device_count()
        raise InputError(
            f"{processes} processes need as many GPUs and there are {found}; --set compute.processes={found}"
        )


def main(file: Path) -> None:
    """One process of a stage."""
    _die_with_parent()
    from dvpo.distributed import start

    job = json.loads(file.read_text(encoding="utf-8"))
    inputs = {name.removeprefix("inputs."): Path(path) for name, path in job.items() if name.startswith("inputs.")}
    state = Path(job["state"])
    try:
        processes = start()
        metrics = KINDS[job["kind"]].function()(Context(job["settings"], job["seed"], inputs, Path(job["out"]), state))
        if processes.main:
            write_json(state / METRICS, metrics)
        processes.wait()
    except Exception as error:
        if not (state / FAILURE).exists():  # the first one to fail knows why; the others only lose it
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            write_json(state / FAILURE, {"input": isinstance(error, InputError), "message": text})
        raise


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, also after kill -9


if __name__ == "__main__":
    main(Path(sys.argv[1]))
