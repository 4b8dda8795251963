"""The cost model against updates measured on this machine's CPU: SmolLM2-135M and a model of ten million parameters.

The environment variable DVPO_SMOLLM2 names a folder with SmolLM2-135M-Instruct; its tokenizer serves both. With
DVPO_PLAN_CHECK=FILE.json the comparison is kept there.
"""

import os
import platform
from pathlib import Path
from typing import Any

import pytest

from dvpo import models
from dvpo.config import ModelSize
from dvpo.files import write_json
from reproduce.cost import check, shapes

SMOLLM2 = os.environ.get("DVPO_SMOLLM2")
TEN_MILLION = ModelSize(hidden=128, intermediate=384, layers=20, heads=4, positions=512)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SMOLLM2 is None, reason="DVPO_SMOLLM2 names no folder with SmolLM2-135M-Instruct"),
]


def folders(name: str, root: Path) -> dict[str, Path]:
    """Policy, value and reward models of one size, with fresh heads."""
    assert SMOLLM2 is not None
    tokenizer = models.load_tokenizer(SMOLLM2)
    made = {role: root / role for role in ("policy", "value", "reward")}
    policy = models.load(SMOLLM2, "policy") if name == "SmolLM2-135M" else models.new_policy(tokenizer, TEN_MILLION, 0)
    models.save(policy, tokenizer, made["policy"])
    models.save(models.load(made["policy"], "value", fresh_head=True), tokenizer, made["value"])
    models.save(models.load(made["policy"], "reward", fresh_head=True), tokenizer, made["reward"])
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every method of both models: {model, method, parameters, measured, predicted}."""
    found = []
    for name in ("10M", "SmolLM2-135M"):
        made = folders(name, tmp_path_factory.mktemp(name))
        shape = shapes.find(str(made["policy"]))
        speed = check.speeds(shape)
        for method in check.METHODS:
            measured = check.measure(made, method, updates=2)
            predicted = check.predict(shape, method, measured, speed)
            parameters = shape.parameters("policy")
            found.append({
                "model": name, "method": method, "parameters": parameters, "measured": measured, "predicted": predicted
            })  # fmt: skip
    if file := os.environ.get("DVPO_PLAN_CHECK"):
        write_json(Path(file), check.report(found, platform.processor() or platform.machine()))
    return found


def of(rows: list[dict[str, Any]], model: str, method: str, source: str, what: str) -> float:
    return next(r[source][what] for r in rows if (r["model"], r["method"]) == (model, method))


@pytest.mark.parametrize("model", ["10M", "SmolLM2-135M"])
class TestAgainstMeasurements:
    @pytest.mark.parametrize("method", ["ppo", "remax", "grpo"])
    def test_time_against_dvpo(self, rows: list[dict[str, Any]], model: str, method: str) -> None:
        measured, predicted = (
            of(rows, model, method, source, "seconds") / of(rows, model, "dvpo", source, "seconds")
            for source in ("measured", "predicted")
        )
        assert predicted == pytest.approx(measured, rel=0.3)

    @pytest.mark.parametrize("method", list(check.METHODS))
    def test_peak_memory(self, rows: list[dict[str, Any]], model: str, method: str) -> None:
        """Beside what the model counts, the process's libraries take some room of their own."""
        measured, predicted = (of(rows, model, method, source, "memory_gib") for source in ("measured", "predicted"))
        assert predicted == pytest.approx(measured, rel=0.15, abs=0.25)

    def test_what_ppo_takes_more(self, rows: list[dict[str, Any]], model: str) -> None:
        measured, predicted = (
            of(rows, model, "ppo", source, "memory_gib") - of(rows, model, "dvpo", source, "memory_gib")
            for source in ("measured", "predicted")
        )
        assert predicted == pytest.approx(measured, rel=0.35)


def test_time_grows_with_the_model(rows: list[dict[str, Any]]) -> None:
    measured, predicted = (
        of(rows, "SmolLM2-135M", "dvpo", source, "seconds") / of(rows, "10M", "dvpo", source, "seconds")
        for source in ("measured", "predicted")
    )
    assert predicted == pytest.approx(measured, rel=0.5)
