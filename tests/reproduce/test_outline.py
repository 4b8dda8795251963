"""The outline of a dry run: the recipe's own run, with the numbers of `dvpo plan`."""

import json
from pathlib import Path
from typing import Any

import pytest

from reproduce import app, recipe
from reproduce.commands import dry_run, plan
from reproduce.graph import build
from reproduce.graphs.outline import Line, Outline, outline
from reproduce.recipe import DataRecipe

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 1000,
}  # fmt: skip


def outlined(*overrides: str, name: str = "llama3-8b-base") -> tuple[Outline, dict[str, Line]]:
    """The outline, and its lines by the names that `dvpo plan` gives the stages."""
    loaded = recipe.load(name, overrides)
    assert isinstance(loaded, DataRecipe)
    found = outline(loaded, build(loaded, None).order(None))
    return found, {line.id.removeprefix("seed0/").removeprefix("policy/"): line for line in found.lines}


def planned(capsys: pytest.CaptureFixture[str], folder: Path, text: str) -> dict[str, Any]:
    """What `dvpo plan` says of a recipe on top of llama3-8b-base."""
    file = folder / "own.yaml"
    file.write_text(f"extends: llama3-8b-base\nname: own\n{text}\n")
    plan.run(str(file), None, None, None, None, None, None, 0.0, True)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("compute", ["strategy=zero1", "strategy=zero2", "strategy=fsdp2", "processes=4"])
def test_the_dry_run_and_the_plan_say_the_same(
    compute: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found, lines = outlined(f"compute.{compute}", "pairs.most=4000")
    document = planned(capsys, tmp_path, f"compute: {{{compute.replace('=', ': ')}}}\npairs: {{most: 4000}}")
    assert document["cluster"]["name"] == found.machine == ("4x A100 80 GB" if "4" in compute else "8xa100-80gb")
    same = 0
    for row in document["stages"]:
        line = lines[row["stage"]]
        assert line.memory is not None
        if line.fits:  # as the recipe has it, so that the planner had nothing to change
            same += 1
            assert (line.memory, line.hours) == ((row["peak"]["gib"], row["limit_gib"]), tuple(row["hours"]))
    assert same >= 7


def test_a_run_that_cannot_fit_is_not_called_fitting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = outlined("compute.strategy=ddp")[1]
    rows = planned(capsys, tmp_path, "compute: {strategy: ddp}")["stages"]
    for line, row in ((lines[row["stage"]], row) for row in rows):
        assert row["fits"] is line.fits is False
        assert line.memory is not None
        assert line.memory[0] >= row["peak"]["gib"]  # what the planner tried last is the most sparing
        assert "it would fit with compute.strategy: zero" in line.wrong[0]


def test_the_settings_are_those_of_the_run() -> None:
    """Memory is that of the recipe's own settings; what would have to change is named."""
    memory = outlined()[1]["sft"].memory
    lines = outlined("sft.gradient_checkpointing=false", "sft.micro_batch_size=8", "policy.frozen=resident")[1]
    assert memory is not None
    assert lines["sft"].memory is not None
    assert lines["sft"].memory[0] > lines["sft"].memory[1] > memory[0]
    assert lines["sft"].wrong == ("too large by its activations; it would fit with gradient_checkpointing: true",)
    assert lines["ppo"].wrong == ("too large by its frozen models; it would fit with frozen: sharded",)
    assert lines["rm"].wrong == ()


def test_steps_are_of_what_each_stage_reads() -> None:
    """`pairs.most` limits pairs: SFT reads none, and the GVM learns from two texts of each."""
    every, few = (outlined(*overrides)[1] for overrides in ((), ("pairs.most=4000",)))
    assert every["sft"].hours == few["sft"].hours
    hours = {name: few[name].hours for name in ("rm", "gvm")}
    longer = {name: outlined("pairs.most=8000")[1][name].hours for name in hours}
    for name, found in hours.items():
        assert found is not None
        assert longer[name] == pytest.approx([2 * h for h in found], rel=0.05)
    gvm, rm = hours["gvm"], hours["rm"]
    assert gvm is not None
    assert rm is not None
    assert gvm[1] == pytest.approx(rm[1], rel=0.15)  # a pair is two texts: the same tokens


def test_the_model_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    found, lines = outlined(f"model={tmp_path}")
    memory = lines["sft"].memory
    assert memory is not None
    assert memory[0] < 2
    assert found.disk is not None
    assert found.disk[1] < 0.02


def test_a_model_that_the_planner_does_not_know(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The run's stages are listed all the same, and why they have no numbers."""
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 2}))
    request = app.Request("llama3-8b-base", (), (), None, None, (f"model={tmp_path}",), tmp_path / "run")
    dry_run.run(request, as_json=False)
    said = capsys.readouterr().out
    assert "seed0/policy/grpo" in said
    assert said.rstrip().splitlines()[-1].startswith("nothing is predicted: ")
    assert "num_hidden_layers is missing" in said


def test_a_batch_that_the_processes_cannot_share(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    request = app.Request("llama3-8b-base", (), (), None, None, ("compute.processes=3",), tmp_path / "run")
    dry_run.run(request, as_json=False)
    said = capsys.readouterr().out
    assert "(!) seed0/rm, seed0/dpo: 3 devices cannot share batch_size 32 equally" in said
    assert "hours of training on 3x A100 80 GB" in said


def test_one_gpu(tmp_path: Path) -> None:
    """small-gpu names the machine that it ran on; it does not say what its data holds, so only policies have hours."""
    overrides = ("data=owner/pairs@" + "0" * 40, f"model={tmp_path}", "seeds=1")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    found, lines = outlined(*overrides, name="small-gpu")
    assert found.machine == "1xh200-141gb"
    assert lines["gvm"].fits
    assert lines["gvm"].hours is None
    assert lines["dvpo"].hours is not None
