"""Starts a stage on several processes of this machine and watches them: one that fails ends all, with its reason.

The processes find their place and strategy in accelerate's environment variables, as under `accelerate launch`, which
serves for several machines (see `launchers/`).
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from dvpo import stopping
from dvpo.errors import InputError, StageError
from dvpo.files import write_json

if TYPE_CHECKING:
    from reproduce.pipeline import Context

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
DISTRIBUTED = frozenset({"base", "sft", "rm", "gvm", "dpo", "policy"})
"""The stages that can run on several processes; the others run on one."""

GRACE = 1.0
"""Seconds in which the other processes may end by themselves, so that the first cause can be told from its effects."""
LAST_SAVE = 60.0
"""The same, where they were asked to stop."""


@dataclass(frozen=True)
class Devices:
    """On how many processes of this machine a stage runs, and how the weights are spread over them.

    processes: None takes every GPU, or one process where there is none. offload: DeepSpeed keeps the optimizer's state
    in the host's memory.
    """

    processes: int | None = None
    strategy: Strategy = "ddp"
    offload: bool = False

    @property
    def count(self) -> int:
        """The number of processes."""
        return self.processes or found_gpus() or 1

    @property
    def plain(self) -> bool:
        """Whether the stage can run in the process that asks for it.

        Beside other GPUs it cannot: transformers would put a copy of the model on each.
        """
        return self.count == 1 and self.strategy in ("ddp", "fsdp2") and found_gpus() <= 1


def found_gpus() -> int:
    """The GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def run_stage(kind: str, context: "Context", devices: Devices, log: Path | None = None) -> dict[str, Any]:
    """Runs a stage's function, here or on several processes, and returns its metrics.

    Args:
        log: where the processes' own output goes; by default where this process's goes.

    Raises:
        InputError, StageError: as the function does; StageError names the process that died.
    """
    # The processes are started here, and by nothing that the stage itself finds in its settings.
    context = replace(context, settings={k: v for k, v in context.settings.items() if k != "compute"})
    if devices.plain or kind not in DISTRIBUTED:
        from reproduce.stages import KINDS

        return KINDS[kind].function()(context)
    with tempfile.TemporaryDirectory(prefix="dvpo-") as folder:
        job = Path(folder)
        write_json(job / "job.json", {"kind": kind, "context": _plain(context)})
        with open(log, "a") if log else nullcontext() as output:
            _watch([sys.executable, "-m", "reproduce.launch", str(job)], job, devices, output)
        return json.loads((job / "metrics.json").read_text(encoding="utf-8"))


def environment(rank: int, devices: Devices, port: int) -> dict[str, str]:
    """What one process finds in its environment: the variables that `accelerate launch` sets."""
    count = devices.count
    values: dict[str, int | str] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": _threads(count)}
    if count == 1 and found_gpus() > 1:
        values["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if devices.strategy.startswith("zero"):
        values |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": devices.strategy[-1]}
        values |= {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu" if devices.offload else "none"}
    elif devices.strategy == "fsdp2":
        values |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        values |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    return {**os.environ, **{name: str(value) for name, value in values.items()}}


def worker(job: Path) -> int:
    """One of the processes: runs the stage of `job`. What fails is written beside it, for the launcher to say."""
    rank = int(os.environ["RANK"])
    _die_with_parent()
    stopping.listen()
    try:
        task = json.loads((job / "job.json").read_text(encoding="utf-8"))
        context = _context(task["context"], rank)
        from reproduce.stages import KINDS

        metrics = KINDS[task["kind"]].function()(context)
        if rank == 0:
            write_json(job / "metrics.json", metrics)
        _leave()
    except BaseException as error:
        first = (str(error).strip().splitlines() or [""])[0][:500]
        wrong_input = isinstance(error, InputError)
        said = first if isinstance(error, InputError | StageError) else f"{type(error).__name__}: {first}"
        write_json(job / f"error-{rank}.json", {"input": wrong_input, "said": said})
        if not wrong_input:
            raise
        return 2
    return 0


def _watch(command: Sequence[str], job: Path, devices: Devices, output: IO[str] | None) -> None:
    """Starts the processes and returns when all have ended well; raises when one has not."""
    port = _free_port()
    processes = [
        subprocess.Popen(command, env=environment(rank, devices, port), stdout=output, stderr=output)
        for rank in range(devices.count)
    ]
    try:
        told = False
        while not any(codes := [p.poll() for p in processes]) and None in codes:
            if stopping.asked() and not told:
                told = True
                for process in processes:
                    process.terminate()
            time.sleep(0.05)
        if any(codes):
            _wait(processes, LAST_SAVE if told else GRACE)
        codes = [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    if any(codes):
        _complain(codes, job)


def _complain(codes: Sequence[int | None], job: Path) -> None:
    """Says what went wrong first: a process that was killed, or wrong input, before what the others made of it."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            raise StageError(
                f"process {rank} of {len(codes)} was killed by {signal.Signals(-code).name} (out of memory?); "
                "run the same command to go on from the last checkpoint"
            )
    errors = {
        rank: json.loads(p.read_text()) for rank in range(len(codes)) if (p := job / f"error-{rank}.json").exists()
    }
    if wrong := [error["said"] for error in errors.values() if error["input"]]:
        raise InputError(wrong[0])
    effects = ("closed by peer", "Connection reset", "NCCL", "Broken pipe", "gloo")
    causes = {r: e["said"] for r, e in errors.items() if not any(word in e["said"] for word in effects)}
    rank, said = next(iter((causes or {r: e["said"] for r, e in errors.items()}).items()), (0, ""))
    if not said:
        rank, code = next((r, c) for r, c in enumerate(codes) if c)
        said = f"it ended with exit code {code}"
    if stopping.asked():
        raise stopping.Stopped(said)
    raise StageError(f"process {rank} of {len(codes)} failed: {said}")


def _wait(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _threads(count: int) -> int:
    """OpenMP threads of each process: what the user said, or an equal share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // count))


def _plain(context: "Context") -> dict[str, Any]:
    values = asdict(context)
    values["inputs"] = {name: str(path) for name, path in context.inputs.items()}
    return {**values, "out": str(context.out), "state": str(context.state)}


def _context(values: dict[str, Any], rank: int) -> "Context":
    """The stage's context; what processes other than the first write beside the result is thrown away."""
    from reproduce.pipeline import Context

    inputs = {name: Path(path) for name, path in values["inputs"].items()}
    out, state = Path(values["out"]), Path(values["state"])
    if rank:
        out = Path(tempfile.mkdtemp(prefix=f"rank{rank}-", dir=out.parent))
    return Context(values["settings"], values["seed"], inputs, out, state)


def _die_with_parent() -> None:
    """No process goes on alone after the launcher was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    from reproduce.commands.common import quiet

    quiet()
    sys.exit(worker(Path(sys.argv[1])))
