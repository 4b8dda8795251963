"""Every stage of the paper's recipes run for real, on two-layer cuts of their models: in one process, and in two."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reproduce.graph import Graph
from reproduce.pipeline import Result, Store, load_result, run_job

Cut = Callable[[str, int], Graph]
NAMES = ("llama3-8b-base", "mistral-7b-instruct")


def walk(graph: Graph, root: Path, *wanted: str) -> dict[str, Result]:
    """Runs the stages in this process, but for the processes that they start themselves."""
    store, done = Store(root), dict[str, Result]()
    for stage in graph.order(set(wanted) or None):
        job = store.job(stage, done)
        assert job is not None
        result = store.finished(job) or load_result(run_job(job, root))
        assert result is not None
        done[stage.id.removeprefix("seed0/")] = done[stage.id] = result
    return done


def check(done: dict[str, Result], base: bool) -> None:
    """What every run must have made, whatever its numbers."""
    from dvpo import models

    for name, role in {"gvm": "value", "gvm-from-rm": "value", "rm": "reward", "dpo": "policy"}.items():
        assert models.role_of(done[name].path) == role
    assert models.role_of(done["policy/ppo"].path / "critic") == "value"
    for method in ("dvpo-gae", "ppo", "remax", "grpo"):
        metrics = done[f"policy/{method}"].manifest["metrics"]
        assert metrics["updates"] == 1
        assert done[f"mt-bench/{method}"].manifest["metrics"]["score"] == 7.0
    assert done["policy/grpo"].manifest["metrics"]["last"]["length"] <= 8
    bench = done["mt-bench/sft"].manifest["metrics"]
    assert (bench["n"], bench["part"], bench["judge"]) == (2, "2 of 80 questions", "seven")
    assert len(list((done["mt-bench/sft"].path / "archive" / "judgments").rglob("*.json"))) == 4
    for model in ("gvm", "rm", "critic"):
        for where in ("in-domain", "hh-rlhf"):
            table = done[f"{where}/{model}"].manifest["metrics"]["accuracy"]
            assert done[f"{where}/{model}"].manifest["metrics"]["pairs"] > 0, table
    sections = done["rewardbench/gvm"].manifest["metrics"]["sections"]
    assert {name: (s["pairs"], s["of"]) for name, s in sections.items()} == {"Chat": (3, 358), "Reasoning": (3, 1431)}
    assert ("sft" in done) == base
    if base:  # one demonstration of each prompt: the best
        assert done["sft"].manifest["metrics"]["texts"] == done["data"].manifest["metrics"]["examples"]["sft"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_on_a_cut_of_the_model(name: str, cut: Cut, tmp_path: Path) -> None:
    check(walk(cut(name, 1), tmp_path / "stages"), base=name.endswith("base"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_in_two_zero3_processes(name: str, cut: Cut, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="ZeRO needs DeepSpeed (dvpo[gpu])")
    check(walk(cut(name, 2), tmp_path / "stages"), base=name.endswith("base"))
