"""The stage graph: keys, plans, reuse, damage, kill -9, two runs on one folder, failures."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dvpo.errors import InputError
from reproduce import provenance
from reproduce.pipeline import (
    MANIFEST,
    Context,
    Job,
    Result,
    Source,
    Stage,
    Store,
    in_order,
    load_result,
    plan,
    run_job,
)
from reproduce.stages import KINDS, Kind

ROOT = Path(__file__).parents[2]
STEPS = 60
JOB = Job("one", "number", {"value": 1, "text": "a"}, 3, {}, {"data": "0" * 64, "model": "1" * 64})


def number(ctx: Context) -> dict[str, Any]:
    """Writes its number plus those of its inputs, in two files of which one is in a folder."""
    (ctx.out / "deep").mkdir()
    total = ctx.settings["value"] + sum(int((p / "number").read_text()) for p in ctx.inputs.values())
    (ctx.out / "number").write_text(str(total))
    (ctx.out / "deep" / "seed").write_text(str(ctx.seed))
    return {"total": total}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Adds the kind `number` and lists the seeds it was called with."""
    made: list[int] = []

    def counted(ctx: Context) -> dict[str, Any]:
        made.append(ctx.seed)
        return number(ctx)

    module = ModuleType("reproduce.stages.cheap")
    module.number = counted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(KINDS, "number", Kind(1, "cheap:number"))
    monkeypatch.setattr(provenance, "versions", dict)
    return made


def chain() -> tuple[Stage, Stage]:
    """A stage, and one that adds to it."""
    first = Stage("first", "number", {"value": 1}, seed=1)
    return first, Stage("second", "number", {"value": 10}, {"before": first}, seed=2)


def run_all(root: Path, *targets: Stage) -> dict[str, Result]:
    """What the runner does, in this process: in the graph's order, leaving out what is finished."""
    store, done = Store(root), dict[str, Result]()
    for stage in in_order(targets):
        job = store.job(stage, done)
        assert job is not None
        result = store.finished(job) or load_result(run_job(job, root))
        assert result is not None
        done[stage.id] = result
    return done


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, settings={"value": 2, "text": "a"}),
        replace(JOB, settings={"value": 1}),
        replace(JOB, settings={"value": 1, "text": "a", "more": None}),
        replace(JOB, seed=4),
        replace(JOB, kind="sft"),
        replace(JOB, digests={"data": "0" * 64, "model": "2" * 64}),
        replace(JOB, digests={"data": "0" * 64}),
        replace(JOB, digests={"data": "1" * 64, "model": "0" * 64}),
    ],
)
def test_the_key_changes_with_all_that_shapes_the_result(calls, other: Job) -> None:
    assert other.key != JOB.key
    assert other.folder != JOB.folder


def test_the_key_changes_with_the_version(calls, monkeypatch) -> None:
    key = JOB.key
    monkeypatch.setitem(KINDS, "number", Kind(2, "cheap:number"))
    assert replace(JOB).key != key


def test_the_key_does_not_change_with_order_name_or_place(calls) -> None:
    turned = replace(JOB, settings={"text": "a", "value": 1}, digests={"model": "1" * 64, "data": "0" * 64})
    assert turned.key == JOB.key
    assert replace(JOB, id="two", inputs={"data": Path("/elsewhere")}).key == JOB.key


def test_a_source_is_its_names_and_bytes(calls, tmp_path) -> None:
    stage = Stage("one", "number", {"value": 1}, {"data": Source(tmp_path / "data")})
    with pytest.raises(InputError, match="data: no such file or folder"):
        Store(tmp_path / "stages").job(stage, {})

    def key() -> str:
        job = Store(tmp_path / "stages").job(replace(stage, inputs={"data": Source(tmp_path / "data")}), {})
        assert job is not None
        return job.key

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "number").write_text("5")
    keys = [key()]
    (tmp_path / "data" / "number").write_text("6")
    keys.append(key())
    (tmp_path / "data" / "number").rename(tmp_path / "data" / "figure")
    keys.append(key())
    assert len(set(keys)) == 3
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    assert key() == keys[-1]


def test_the_graph_is_put_in_order_and_two_stages_of_one_name_are_refused() -> None:
    first, second = chain()
    assert in_order([second, first]) == [first, second]
    with pytest.raises(ValueError, match="two stages are called first"):
        in_order([second, Stage("first", "number", {"value": 1}, seed=1)])


def test_the_plan_says_what_is_to_do_and_why(calls, tmp_path) -> None:
    first, second = chain()

    def lines() -> list[tuple[str, str, str]]:
        return [(p.id, p.state, p.why) for p in plan([first, second], tmp_path)]

    assert lines() == [
        ("first", "to run", "no result with these settings and inputs"),
        ("second", "waits", "for first"),
    ]
    assert not list(tmp_path.iterdir())
    assert not calls
    done = run_all(tmp_path, first)
    one = ("first", "done", done["first"].path.name)
    assert lines() == [one, ("second", "to run", "no result with these settings and inputs")]

    job = Store(tmp_path).job(second, done)
    assert job is not None
    (Store(tmp_path).work(job) / "state").mkdir(parents=True)
    assert lines() == [one, ("second", "to finish", "it was interrupted and goes on from its checkpoint")]
    run_all(tmp_path, second)
    assert [state for _, state, _ in lines()] == ["done", "done"]
    (done["first"].path / "number").write_text("2")
    assert lines() == [("first", "to run", "its stored outputs are damaged"), ("second", "waits", "for first")]


def test_a_second_run_reuses_everything(calls, tmp_path) -> None:
    done = run_all(tmp_path, *chain())
    assert calls == [1, 2]
    assert (done["second"].path / "number").read_text() == "11"
    assert run_all(tmp_path, *chain()) == done
    assert calls == [1, 2]
    job = Store(tmp_path).job(chain()[0], {})
    assert job is not None
    assert run_job(job, tmp_path) == done["first"].path  # another run has finished it meanwhile
    assert calls == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".locks") == sorted(
        r.path.name for r in done.values()
    )


def test_the_manifest_says_how_it_was_made(calls, tmp_path) -> None:
    done = run_all(tmp_path, *chain())
    manifest = json.loads((done["second"].path / MANIFEST).read_text())
    assert set(manifest) - {"image"} == {
        "stage", "id", "key", "settings", "inputs", "outputs", "metrics", "seeds", "git_commit", "versions", "device",
        "started", "seconds",
    }  # fmt: skip
    assert manifest.get("image") == provenance.image()  # where these tests run in a container
    assert manifest["inputs"] == {"before": done["first"].digest}
    assert set(manifest["outputs"]) == {"number", "deep/seed"}
    assert (manifest["metrics"], manifest["settings"], manifest["seeds"]) == ({"total": 11}, {"value": 10}, [2])
    assert manifest["key"].startswith(done["second"].path.name.removeprefix("number-"))


def test_a_changed_setting_runs_only_what_hangs_on_it(calls, tmp_path) -> None:
    first, second = chain()
    run_all(tmp_path, second)
    run_all(tmp_path, replace(second, seed=9))
    assert calls == [1, 2, 9]
    run_all(tmp_path, replace(second, inputs={"before": replace(first, seed=7)}))
    assert calls == [1, 2, 9, 7, 2]


def flip(folder: Path) -> None:
    data = bytearray((folder / "deep" / "seed").read_bytes())
    data[0] ^= 1
    (folder / "deep" / "seed").write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one flipped byte": flip,
    "an extra file": lambda f: (f / "deep" / "more").write_text(""),
    "a missing file": lambda f: (f / "number").unlink(),
    "a cut manifest": lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:40]),
    "a manifest of another kind": lambda f: (f / MANIFEST).write_text("{}"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_found_and_mended(calls, tmp_path, damage: str) -> None:
    second = chain()[1]
    whole = run_all(tmp_path, second)
    DAMAGE[damage](whole["first"].path)
    assert load_result(whole["first"].path) is None
    again = run_all(tmp_path, second)
    assert calls == [1, 2, 1]  # the same bytes came out, so what hangs on them is still good
    assert [again[i].digest for i in ("first", "second")] == [whole[i].digest for i in ("first", "second")]
    assert load_result(whole["first"].path) == again["first"]


def test_a_manifest_with_a_number_that_is_not_finite_is_never_published(calls, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["reproduce.stages.cheap"], "number", lambda ctx: {"loss": float("nan")})
    job = Store(tmp_path).job(chain()[0], {})
    assert job is not None
    with pytest.raises(ValueError, match="Out of range float"):
        run_job(job, tmp_path)
    assert not (tmp_path / job.folder).exists()


# The real runner, in processes of its own. The script is also what a spawned worker imports, so it knows the kinds too.
SCRIPT = '''
import hashlib, json, os, sys, time
from pathlib import Path
from types import ModuleType

from dvpo.errors import InputError, StageError
from reproduce import provenance
from reproduce.pipeline import Stage, in_order
from reproduce.runner import run
from reproduce.stages import KINDS, Kind

FOLDER = Path(__file__).parent


def note(**event):
    with open(FOLDER / "events", "a") as f:
        f.write(json.dumps({"pid": os.getpid(), "time": time.time(), **event}) + "\\n")


def slow(ctx):
    """A chain of digests with a checkpoint after every link."""
    name, checkpoint = ctx.settings["name"], ctx.state / "chain.json"
    links = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    note(name=name, event="begin", at=len(links))
    draft = ctx.out / f"draft-{os.getpid()}"
    draft.write_text("half-written")
    while len(links) < ctx.settings["steps"]:
        time.sleep(0.02)
        links.append(hashlib.sha256(f"{ctx.seed} {links[-1:]}".encode()).hexdigest())
        temporary = checkpoint.with_suffix(".new")
        temporary.write_text(json.dumps(links))
        temporary.replace(checkpoint)
        note(name=name, event="step", at=len(links))
    (ctx.out / "chain").write_text("\\n".join(links))
    draft.unlink()
    note(name=name, event="end", at=len(links))
    return {"steps": len(links)}


def fail(ctx):
    print("just before the end")
    raise {"key": KeyError, "input": InputError}[ctx.settings["error"]]("the lost thing")


def die(ctx):
    os._exit(9)


cheap = ModuleType("reproduce.stages.cheap")
cheap.slow, cheap.fail, cheap.die = slow, fail, die
sys.modules[cheap.__name__] = cheap
KINDS.update({name: Kind(1, f"cheap:{name}") for name in ("slow", "fail", "die")})
provenance.device = provenance.versions = dict
provenance.code_commit = str


def made(spec):
    stages = {}
    for id, kind, settings, parents, exclusive in spec:
        stages[id] = Stage(id, kind, settings, {p: stages[p] for p in parents}, 5, exclusive)
    return in_order(list(stages.values()))


if __name__ == "__main__":
    root, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
    reports = []
    try:
        done = run(made(spec), root, 2, 1, lambda stage, what, seconds: reports.append([stage.id, what]))
        print(json.dumps({"reports": reports, "digests": {i: r.digest for i, r in done.items()}}))
    except (InputError, StageError) as error:
        print(json.dumps({"reports": reports, "error": type(error).__name__, "message": str(error)}))
'''
Spec = list[tuple[str, str, dict[str, Any], list[str], bool]]


class Runner:
    """Starts the script in a folder and reads what its stages noted."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "run" / "stages"
        (folder / "script.py").write_text(SCRIPT)

    def start(self, spec: Spec) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self.folder / "script.py"), str(self.root), json.dumps(spec)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return json.loads(out)

    def run(self, spec: Spec) -> dict[str, Any]:
        return self.finish(self.start(spec))

    def events(self, event: str, name: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "events"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r for r in rows if r["event"] == event and name in (None, r["name"])]

    def wait_for(self, event: str, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.events(event)) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def slow(name: str, *parents: str, steps: int = STEPS, exclusive: bool = False) -> tuple[Any, ...]:
    return (name, "slow", {"name": name, "steps": steps}, list(parents), exclusive)


def test_the_runner_runs_a_graph_and_reuses_it(runner) -> None:
    spec = [slow("a", steps=2), slow("b", "a", steps=3), slow("c", "a", steps=4)]
    first = runner.run(spec)
    assert sorted(first["reports"]) == sorted([i, what] for i in "abc" for what in ("started", "done"))
    assert first["reports"][:2] == [["a", "started"], ["a", "done"]]
    second = runner.run(spec)
    assert second["reports"] == [[i, "reused"] for i in "abc"]
    assert second["digests"] == first["digests"]
    assert len(runner.events("begin")) == 3


def test_kill_9_at_any_moment_loses_nothing(tmp_path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    spec = [slow("a")]
    whole, killed = Runner(tmp_path / "whole"), Runner(tmp_path / "killed")
    expected = whole.run(spec)["digests"]
    rng, kills = random.Random(0), 0
    for _ in range(5):
        seen = len(killed.events("step"))
        process = killed.start(spec)
        killed.wait_for("step", seen + 1)
        time.sleep(rng.random() * 0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        assert not any(p.name.startswith("slow-") for p in killed.root.iterdir())  # nothing half-done is published
    assert killed.run(spec)["digests"] == expected
    begun = [e["at"] for e in killed.events("begin")]
    assert begun == sorted(set(begun))  # every start was further on
    # One link a kill may have been made and not yet kept, or kept and not yet noted.
    assert STEPS - kills <= len(killed.events("step")) <= STEPS + kills
    (folder,) = killed.root.glob("slow-*")
    (other,) = whole.root.glob("slow-*")
    assert sorted(p.name for p in folder.iterdir()) == ["chain", MANIFEST]
    assert (folder / "chain").read_bytes() == (other / "chain").read_bytes()
    assert not list(killed.root.glob(".work-*"))


def test_two_runs_at_once_do_the_work_once(runner) -> None:
    processes = [runner.start([slow("a"), slow("b", "a", steps=2)]) for _ in range(2)]
    one, other = (runner.finish(p) for p in processes)
    assert one["digests"] == other["digests"]
    assert [e["name"] for e in runner.events("begin")] == ["a", "b"]
    assert len(runner.events("step")) == STEPS + 2


def test_an_exclusive_stage_runs_alone(runner) -> None:
    names = ["a", "b", "c", "d"]
    runner.run([slow(n, steps=8, exclusive=n == "b") for n in names])
    spans = {n: (runner.events("begin", n)[0]["time"], runner.events("end", n)[0]["time"]) for n in names}
    start, end = spans.pop("b")
    assert all(e <= start or s >= end for s, e in spans.values())


def test_a_failing_stage_is_named_with_its_log(runner) -> None:
    spec: Any = [slow("good", steps=1), ("bad one", "fail", {"error": "key"}, ["good"], False)]
    for time_run in (1, 2):
        said = runner.run(spec)
        log = runner.root.parent / "logs" / "bad_one.log"
        assert said["error"] == "StageError"
        assert said["message"] == f"stage bad one failed: KeyError: 'the lost thing' (the log is {log})"
        assert log.read_text().count("just before the end") == time_run
        assert "Traceback" in log.read_text()
    assert len(runner.events("begin", "good")) == 1  # what was finished stays


def test_an_input_error_of_a_stage_passes_through(runner) -> None:
    said = runner.run([("bad", "fail", {"error": "input"}, [], False)])
    assert (said["error"], said["message"]) == ("InputError", "the lost thing")


def test_a_worker_that_is_killed_is_a_stage_error(runner) -> None:
    said = runner.run([("bad", "die", {}, [], False)])
    assert said["error"] == "StageError"
    assert said["message"].startswith("stage bad: its process was killed")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is signalled on Linux only")
def test_workers_die_with_the_command(runner) -> None:
    process = runner.start([slow("a", steps=2000), slow("b", steps=2000)])
    deadline = time.monotonic() + 30
    while len(pids := {e["pid"] for e in runner.events("step")}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        assert process.pid not in pids
        assert all(map(alive, pids))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 5
        while any(map(alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
