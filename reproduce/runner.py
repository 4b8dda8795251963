"""Runs a stage graph in worker processes, each importing the heavy libraries once."""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from dvpo import stopping
from dvpo.errors import InputError, StageError
from dvpo.stopping import Stopped
from reproduce.pipeline import Job, Result, Stage, Store, load_result, run_job
from reproduce.reasons import reason

Report = Callable[[Stage, str, float], None]
"""Called as (stage, "started" | "done" | "reused", seconds)."""


def run(stages: Sequence[Stage], root: Path, workers: int, threads: int, report: Report) -> dict[str, Result]:
    """Runs what is not there yet, up to `workers` stages at a time, and returns every stage's result by id.

    SIGTERM stops it in order: stages in training save a checkpoint at their next safe step, others finish.

    Raises:
        InputError, StageError: as the first stage that failed; finished stages stay.
        Stopped: on SIGTERM.
    """
    store, done = Store(root), dict[str, Result]()
    root.mkdir(parents=True, exist_ok=True)
    waiting = list(stages)
    running: dict[Future[Path], Stage] = {}
    folders: dict[Future[Path], str] = {}
    pool: ProcessPoolExecutor | None = None
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        while waiting or running:
            for stage in list(waiting):
                job = store.job(stage, done)
                if job is None:
                    continue
                if result := store.finished(job):
                    shutil.rmtree(store.work(job), ignore_errors=True)  # left by a kill just after publishing
                    done[stage.id] = result
                    waiting.remove(stage)
                    report(stage, "reused", 0.0)
                    break  # its children may be ready now: look again from the start, in the graph's order
                alone = stage.exclusive or any(s.exclusive for s in running.values())
                same = job.folder in folders.values()  # two names for one result: the second is reused
                if len(running) >= workers or (alone and running) or same:
                    continue
                pool = pool or _pool(workers, threads)
                future = pool.submit(_work, job, root)
                running[future], folders[future] = stage, job.folder
                waiting.remove(stage)
                report(stage, "started", 0.0)
            else:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    stage = running.pop(future)
                    del folders[future]
                    done[stage.id] = _take(stage, future, root)
                    report(stage, "done", done[stage.id].manifest["seconds"])
        return done
    except _Terminated:
        _ask_to_stop(pool, running)
        running.clear()
        raise Stopped("stopped as asked, with everything saved; run the same command to go on") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if pool is not None:
            _stop(pool, kill=bool(running))


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminated(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the saving short
    raise _Terminated


def _ask_to_stop(pool: ProcessPoolExecutor | None, running: "dict[Future[Path], Stage]") -> None:
    """Tells the workers, and waits for the stages in work: each is then published or has its checkpoint."""
    for process in list(pool._processes.values()) if pool is not None else []:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
    wait(running)


def log_file(root: Path, stage_id: str) -> Path:
    """Where a stage's own output goes."""
    return root.parent / "logs" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', stage_id)}.log"


def _take(stage: Stage, future: "Future[Path]", root: Path) -> Result:
    log = log_file(root, stage.id)
    try:
        result = load_result(future.result())
    except InputError:
        raise
    except BrokenProcessPool as error:
        raise StageError(
            f"stage {stage.id}: its process was killed (out of memory?); run the same command to go on"
        ) from error
    except Exception as error:
        raise StageError(f"stage {stage.id} failed: {reason(error, root)} (the log is {log})") from error
    if result is None:
        raise StageError(f"stage {stage.id}: its outputs changed while they were published; run the same command again")
    return result


def _pool(workers: int, threads: int) -> ProcessPoolExecutor:
    # Workers inherit this; two OpenMP threads that compete for one core are far slower than one.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Of what a killed worker held, which is freed all the same: our last line is to be the error.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))


def _start_worker(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on after kill -9 of the command
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping.listen()


def _work(job: Job, root: Path) -> Path:
    """Runs a job in this worker with everything it prints going to its log."""
    log = log_file(root, job.id)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        try:
            return run_job(job, root)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def _stop(pool: ProcessPoolExecutor, kill: bool) -> None:
    if kill:
        for process in list(pool._processes.values()):
            process.kill()  # their stages go on from their checkpoints next time
    pool.shutdown(wait=True, cancel_futures=True)
