"""Turns of measured processes, the growth fits, and `dvpo bench gvm` on a tiny model."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dvpo.errors import InputError, StageError
from reproduce.bench import common, growth, gvm
from reproduce.bench.common import Job, in_turns

ROOT = Path(__file__).parents[2]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that the measured processes, which have these paths too, can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("bench_jobs")


def test_turns_are_taken_one_after_another_and_the_first_is_not_counted(jobs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = in_turns({name: Job(jobs.counting, (str(log), name)) for name in "ab"}, 3)
    # Each is already on its way into the turn that it will never report.
    assert log.read_text()[:8] == "baabbaab"
    assert {name: [row["number"] for row in turns] for name, turns in rows.items()} == {"a": [1, 2, 3], "b": [1, 2, 3]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the jobs hold main memory, and a GPU's is what counts")
def test_memory_is_the_peak_of_the_process_itself(jobs) -> None:
    rows = in_turns({str(size): Job(jobs.holding, (size,)) for size in (300, 20)}, 1)
    for name, (row,) in rows.items():
        assert int(name) - 1 <= row["memory_mb"] < int(name) + 30
        assert row["seconds"] >= 0.05


@pytest.mark.parametrize(
    ("job", "error", "said"), [("failing", InputError, "mend it"), ("dying", StageError, "process of one was killed")]
)
def test_what_ends_a_measured_process_ends_the_measuring(jobs, job, error, said) -> None:
    with pytest.raises(error, match=said):
        in_turns({"one": Job(getattr(jobs, job))}, 2)


def test_spreads_and_ratios() -> None:
    assert common.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert common.ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == {"median": 2.0, "low": 0.5, "high": 3.0}


def test_a_power_law_is_found_and_its_error_is_the_farthest_point() -> None:
    k, error = growth.power([1, 2, 4, 8], [3 * x**1.7 for x in (1, 2, 4, 8)])
    assert k == pytest.approx(1.7)
    assert error == pytest.approx(0, abs=1e-12)
    # Points (1, 1), (2, 2), (4, 1): the best line is level, at the geometric mean 2^(1/3).
    k, error = growth.power([1, 2, 4], [1, 2, 1])
    assert k == pytest.approx(0)
    assert error == pytest.approx(1 - 2 ** (-2 / 3))  # at the middle point


def test_the_cost_model_predicts_growth_for_every_point() -> None:
    for kind in growth.KINDS:
        for axis, points in growth.AXES.items():
            seconds, memory = zip(*(growth._predicted(kind, point) for point in points), strict=True)
            assert list(seconds) == sorted(seconds), (kind, axis)
            assert list(memory) == sorted(memory), (kind, axis)


def pairs_file(tmp_path: Path, examples) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": e.prompt[0]["content"], "chosen": e.responses[0].text, "rejected": e.responses[1].text}
        for e in examples
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_too_few_pairs_are_refused(checkpoints, examples, tmp_path) -> None:
    path = pairs_file(tmp_path, examples)
    assert len(gvm.read_pairs(checkpoints["llama", "policy"], str(path), 8)) == 8
    with pytest.raises(InputError, match=r"pairs.jsonl: only 11 pairs .* 12 are needed"):  # one pair is of equals
        gvm.read_pairs(checkpoints["llama", "policy"], str(path), 12)


def test_tokens_are_counted_without_the_padding(checkpoints, examples, tmp_path) -> None:
    """Eight pairs are two steps of four: a turn of two steps goes through all of them once."""
    start = checkpoints["llama", "policy"]
    pairs = gvm.read_pairs(start, str(pairs_file(tmp_path, examples)), 8)
    work = gvm.Work(start, pairs, False, steps=2)
    rows = in_turns({"trl": Job(gvm.train_trl, (work,))}, 1)
    tokens = sum(len(t.prompt_ids) + len(t.response_ids) for p in pairs for t in (p.better, p.worse))
    (row,) = rows["trl"]
    (mine,) = in_turns({"ours": Job(gvm.train_ours, (work,))}, 1)["ours"]
    assert row["tokens"] == mine["tokens"] == tokens
    assert row["computed"] > tokens and mine["computed"] > tokens  # ragged
    found = gvm.document(work, {"ours": rows["trl"], "trl": rows["trl"]})
    assert found["tokens_per_second_ratio"]["median"] == found["texts_per_second_ratio"]["median"] == 1
    assert found["trainers"]["trl"]["texts_per_second"]["median"] == pytest.approx(16 / row["seconds"])
    assert found["model"] == start.name and str(start) not in json.dumps(found)


def test_wrong_options_end_with_2(checkpoints) -> None:
    folder = str(checkpoints["llama", "policy"])
    for options, said in (
        (("--model", folder, "--data", "x", "--against", "vllm"), "--against vllm: unknown; choose trl"),
        (("--model", "nowhere", "--data", "x"), "nowhere: no such folder"),
        (("--model", folder, "--data", "x", "--dtype", "int8"), "--dtype int8: unknown"),
    ):
        done = bench("gvm", *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "reproduce.cli", "bench", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_the_command_beside_trl(checkpoints, atlas, tmp_path) -> None:
    rows = [
        {"prompt": q.text, "chosen": f"{q.text} {q.text}"[: 40 + i], "rejected": q.text}
        for i, q in enumerate(atlas.questions(0, 70))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", str(checkpoints["llama", "policy"]), "--data", str(tmp_path / "pairs.jsonl"))
    done = bench("gvm", *options, "--against", "trl", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document["trainers"]) == {"ours", "trl"}
    assert document["trainers"]["ours"]["computed_per_token"]["median"] >= 1
    assert document["machine"]["versions"]["trl"]
    folder = checkpoints["llama", "policy"].name
    options = "--data pairs.jsonl --against trl --dtype bfloat16 --batch-pairs 4 --rounds 1"
    assert document["command"] == f"dvpo bench gvm --model {folder} {options}"
