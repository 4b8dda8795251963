"""`dvpo plan`: what a user asks and what comes back."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo.config import DpoSettings, PolicySettings
from reproduce import cli, recipe
from reproduce.cost import hardware, memory, shapes, stages, table7
from reproduce.cost.planner import Stage, Wish, job_of, limit, plan, setup_of

GIB = 2**30


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `dvpo plan` in this process and returns (exit code, standard output, standard error)."""
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.run(["plan", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


def dvpo(**changes: Any) -> Stage:
    values = {"learning_rate": 1e-6, "updates": 100, "prompts_per_update": 64, "minibatch_size": 32, "bf16": True,
              "micro_batch_size": 2, "frozen_dtype": "bfloat16", "algorithm": {"name": "dvpo"}, **changes}  # fmt: skip
    settings = PolicySettings.model_validate(values)
    return Stage("dvpo", settings.algorithm.name, shapes.SHAPES["llama-3-8b"], settings, settings.updates)


A100 = hardware.CLUSTERS["8xa100-80gb"]


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_planned(ask: Any, name: str) -> None:
    code, out, err = ask("--recipe", name, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    names = [row["stage"] for row in document["stages"]]
    assert {"rm", "gvm"} < set(names)
    assert len(names) == len(set(names))
    assert document["fits"] is True
    for row in document["stages"]:
        assert 0 < row["peak"]["gib"] <= row["limit_gib"]
        assert row["peak"]["gib"] == max(row["memory_gib"].values())
        assert sum(row["peak"]["parts_gib"].values()) == pytest.approx(row["peak"]["gib"], abs=0.1)
        assert 0 < row["seconds_per_update"][0] < row["seconds_per_update"][1]
        assert row["largest_micro_batch"] >= row["micro_batch"] >= 1
        assert row["least_zero"] <= row["zero"]
        assert row["breaks_first"]["part"] in row["peak"]["parts_gib"]


def test_the_recipes_own_machine_and_stage_of_zero(ask: Any) -> None:
    for name, zero in (("llama3.2-3b-base", 1), ("llama3-8b-base", 3)):
        document = json.loads(ask("--recipe", name, "--json")[1])
        assert document["cluster"]["name"] == "8xa100-80gb"
        assert {row["zero"] for row in document["stages"]} == {zero}
        methods = {row["stage"]: row for row in document["stages"]}
        assert methods["ppo"]["peak"]["gib"] > methods["dvpo-gae"]["peak"]["gib"]
        assert methods["ppo"]["updates"] == recipe.load(name).method("ppo").updates


def test_as_many_devices_as_the_recipe_has_processes(ask: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: llama3-8b-base\nname: own\ncompute: {processes: 4}\n")
    cluster = json.loads(ask("--recipe", own, "--json")[1])["cluster"]
    assert (cluster["name"], cluster["per_node"], cluster["nodes"]) == ("4x A100 80 GB", 4, 1)
    assert json.loads(ask("--recipe", own, "--gpus", "2", "--json")[1])["cluster"]["per_node"] == 2
    assert json.loads(ask("--recipe", own, "--cluster", "8xh100-80gb", "--json")[1])["cluster"]["per_node"] == 8
    own.write_text("extends: llama3-8b-base\nname: own\ncompute: {processes: 9}\n")
    assert ask("--recipe", own)[::2] == (
        2,
        "error: 9 devices of 8xa100-80gb are not a whole number on each of 2 nodes; take 8\n",
    )


def test_the_small_recipes_machines(ask: Any) -> None:
    for name, machine in (("small", "2-core-cpu"), ("small-gpu", "1xh200-141gb"), ("tiny", "2-core-cpu")):
        assert json.loads(ask("--recipe", name, "--json")[1])["cluster"]["name"] == machine


@pytest.mark.parametrize(
    "arguments",
    [("llama-3-8b", "--gpus", "1", "--zero", "3"), ("llama-3.2-3b", "--cluster", "1xa10g-24gb", "--zero", "2")],
)
def test_a_stage_of_zero_on_one_gpu(ask: Any, arguments: tuple[str, ...]) -> None:
    """States in the host's memory fit where nothing fits without ZeRO."""
    code, out, err = ask("--model", *arguments)
    assert (code, err) == (0, "")
    assert "offloaded" in out
    assert "a lower stage" not in out
    for row in json.loads(ask("--model", *arguments, "--json")[1])["stages"]:
        assert (row["least_zero"] is None) is not row["fits"]


def test_a_batch_that_the_devices_cannot_share(ask: Any) -> None:
    """The paper's batch of 4 on 8 devices; 16 and 32 on three."""
    eight, three = ask("--model", "llama-3-8b")[1], ask("--model", "llama-3-8b", "--gpus", "3")[1]
    assert "rm: 8 devices cannot share batch_size 4 equally, which training refuses" in eight
    assert eight.count("cannot share") == 1
    assert "sft, dpo: 3 devices cannot share batch_size 16" in three
    assert "gvm: 3 devices cannot share batch_size 32" in three


def test_text(ask: Any) -> None:
    code, out, err = ask("--model", "llama-3-8b")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("llama-3-8b, 8,030 M parameters, on 8xa100-80gb: 8 of A100 80 GB")
    assert [line.split()[0] for line in lines[2:10]] == ["sft", "rm", "gvm", "dpo", "dvpo", "ppo", "remax", "grpo"]
    assert "would break first, in 'learn policy'" in out
    assert lines[-2].startswith("in all: ")


def test_what_does_not_fit_is_said_with_the_way_out(ask: Any) -> None:
    code, out, err = ask("--model", "llama-3-8b", "--gpus", "1", "--memory", "24")
    assert (code, err) == (0, "")
    assert "too large by its optimizer" in out
    assert "of 24 GB device would do" in out
    document = json.loads(ask("--model", "llama-3-8b", "--gpus", "1", "--memory", "24", "--json")[1])
    assert document["fits"] is False
    assert not any(row["fits"] for row in document["stages"])


def test_an_own_model_and_cluster(ask: Any, tmp_path: Path) -> None:
    shape = shapes.SHAPES["smollm2-135m"]
    fields = {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    own = json.loads(ask("--model", tmp_path, "--gpus", "2", "--memory", "16", "--json")[1])
    known = json.loads(ask("--model", "smollm2-135m", "--gpus", "2", "--memory", "16", "--json")[1])
    assert own["stages"] == known["stages"]
    assert own["cluster"]["device"]["memory"] == 16 * GIB


def test_a_recipe_with_another_model(ask: Any) -> None:
    document = json.loads(ask("--recipe", "small", "--model", "mistral-7b", "--cluster", "8xh100-80gb", "--json")[1])
    assert document["model"]["name"] == "mistral-7b"
    assert document["cluster"]["name"] == "8xh100-80gb"


def test_shorter_answers_take_less_time_and_the_same_memory(ask: Any) -> None:
    whole, short = (
        json.loads(ask("--model", "llama-3-8b", "--json", *more)[1])["stages"][4]
        for more in ((), ("--response-tokens", "100"))
    )
    assert short["seconds_per_update"][1] < whole["seconds_per_update"][1] / 2
    assert short["memory_gib"] == whole["memory_gib"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--recipe", "--model")),
        (("--recipe", "huge"), ("there is no recipe 'huge'", "tiny")),
        (("--recipe", "tiny", "--cluster", "moon"), ("there is no cluster 'moon'", "8xa100-80gb")),
        (("--model", "gpt-9"), ("no such model", "llama-3-8b")),
        (("--model", "llama-3-8b", "--memory", "-1"), ("--memory -1",)),
        (("--model", "llama-3-8b", "--gpus", "0"), ("gpus",)),
        (("--model", "llama-3-8b", "--zero", "4"), ("zero",)),
    ],
)
def test_refusals(ask: Any, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


class TestChoice:
    def test_the_first_way_that_fits(self) -> None:
        """Less memory on each card asks for more sparing ways, in their order."""
        found = [
            plan(dvpo(), hardware.find("8xa100-80gb", memory_gb=size), Wish()) for size in (200, 100, 78, 60, 40, 32)
        ]
        order = [(r["zero"], r["checkpointing"], r["frozen"] == "sharded", r["offload"]) for r in found]
        assert order == sorted(order)
        assert order[0] == (1, False, False, False)
        assert [r["fits"] for r in found] == sorted((r["fits"] for r in found), reverse=True)

    def test_at_the_boundary(self) -> None:
        stage, cluster = dvpo(), A100
        setup = setup_of(stage, cluster, 1, True, Wish(zero=1))
        phases = memory.phases(job_of(stage, cluster), stage.shape, setup, cluster, table7.constants().slack)
        need = memory.peak(phases)[1] + hardware.RESERVED

        def resident(size: float) -> bool:
            found = plan(stage, hardware.find("8xa100-80gb", memory_gb=size / GIB), Wish(zero=1))
            return found["fits"] and found["frozen"] == "resident" and found["micro_batch"] == 2

        assert resident(need + 1e6)
        assert not resident(need - 1e6)

    def test_the_largest_pass_is_the_largest(self) -> None:
        stage = dvpo(gradient_checkpointing=True)
        found = plan(stage, hardware.find("8xa100-80gb", memory_gb=74), Wish(zero=1))
        setup = replace(setup_of(stage, A100, 1, True, Wish()), frozen=found["frozen"])

        def peak(micro: int) -> float:
            job = replace(job_of(stage, A100), micro=micro)
            return memory.peak(memory.phases(job, stage.shape, setup, A100))[1]

        most = found["largest_micro_batch"]
        assert peak(most) <= found["limit_gib"] * GIB * 1.001
        assert most == 8 or peak(most + 1) > found["limit_gib"] * GIB

    def test_how_many_cards_are_needed(self) -> None:
        one = hardware.find("8xa100-80gb", 1, 48)
        needed = plan(dvpo(), one, Wish())["devices_needed"]
        assert needed > 1
        assert plan(dvpo(), hardware.find("8xa100-80gb", needed, 48), Wish())["fits"]
        assert not plan(dvpo(), hardware.find("8xa100-80gb", needed // 2, 48), Wish())["fits"]

    def test_batches_are_shared_by_the_devices(self) -> None:
        job = job_of(dvpo(algorithm={"name": "grpo", "group_size": 5}, micro_batch_size=None), A100)
        assert (job.batch, job.step, job.micro, job.responses) == (8, 4, 20, 40)
        assert (job.passes, job.steps) == (2, 2)

    def test_what_is_shared_online_is_responses(self) -> None:
        """As the trainers have it: 16 prompts are 80 responses to five processes, but 16 to others than GRPO."""
        five = hardware.find("8xa100-80gb", 5)
        group = dvpo(algorithm={"name": "grpo", "group_size": 5}, prompts_per_update=16, minibatch_size=8)
        assert plan(group, five, Wish())["uneven"] is None
        said = plan(dvpo(prompts_per_update=16, minibatch_size=10), five, Wish())["uneven"]
        assert said.startswith("5 devices cannot share prompts_per_update 16 equally")

    def test_its_own_settings_alone(self) -> None:
        """What does not fit as it is does not fit, whatever else would."""
        tight = hardware.find("8xa100-80gb", memory_gb=60)
        own, free = (plan(dvpo(), tight, Wish(zero=3, own=fixed)) for fixed in (True, False))
        assert (own["fits"], free["fits"]) == (False, True)
        assert (own["checkpointing"], own["frozen"], own["micro_batch"], own["offload"]) == (
            False,
            "resident",
            2,
            False,
        )
        assert own["peak"]["gib"] > free["peak"]["gib"]

    def test_dpos_reference_is_sharded_under_zero_3_alone(self) -> None:
        settings = DpoSettings(learning_rate=1e-6, batch_size=16, bf16=True)
        stage = Stage("dpo", "dpo", shapes.SHAPES["llama-3-8b"], settings)
        for zero, frozen in ((0, "resident"), (2, "resident"), (3, "sharded")):
            assert plan(stage, hardware.find("8xa100-80gb", memory_gb=24), Wish(zero))["frozen"] == frozen

    def test_a_value_model_behind_a_url_takes_no_memory(self) -> None:
        remote = dvpo(algorithm={"name": "dvpo", "value_url": "http://127.0.0.1:1"})
        here, there = (plan(s, A100, Wish(zero=1))["peak"]["parts_gib"] for s in (dvpo(), remote))
        value = 2 * shapes.SHAPES["llama-3-8b"].parameters("value") / GIB
        assert here["frozen models"] - there["frozen models"] == pytest.approx(value, abs=0.02)

    def test_a_small_machine_keeps_no_reserve(self) -> None:
        assert limit(hardware.find("8xa100-80gb", 1, 4)) == 4 * GIB
        assert limit(A100) == A100.device.memory - hardware.RESERVED


class TestStages:
    def test_updates_of_the_paper_recipe(self) -> None:
        """By the prompts, the responses and the untied pairs that the recipe expects of its data."""
        loaded = recipe.load("llama3-8b-base")
        assert loaded.expected is not None and loaded.expected.prompts == 63_967
        found = {s.name: s for s in stages.of_recipe(loaded, None)}
        valued, pairs = 63_967 * loaded.shares["value"], min(5.3, loaded.pairs.per_prompt or 6)
        assert found["rm"].updates == math.ceil(int(valued * pairs) * 2 / 32)
        assert found["gvm"].updates == math.ceil(int(valued * min(4, 2 * pairs)) * 2 / 256)
        assert found["sft"].updates == math.ceil(int(63_967 * loaded.shares["sft"]) * 3 / 128)
        assert found["dvpo-gae"].updates == loaded.method("dvpo-gae").updates

    def test_models_that_were_trained_elsewhere_are_not_planned(self) -> None:
        every, fewer = (
            [stage.name for stage in stages.of_recipe(recipe.load("small", overrides), None)]
            for overrides in ((), ("trained={rm: elsewhere, gvm: elsewhere}", "seeds=1"))
        )
        assert [name for name in every if name not in ("rm", "gvm")] == fewer != every

    def test_a_recipe_that_trains_nothing_is_refused(self, ask: Any, tmp_path: Path) -> None:
        text = (recipe.FOLDER / "small.yaml").read_text()
        values = {**yaml.safe_load(text), "seeds": 1, "methods": {}, "kl_sweep": [], "sft": None, "dpo": None}
        values |= {"optional_methods": [], "value_models": ["gvm"], "trained": {"rm": "elsewhere", "gvm": "elsewhere"}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        code, out, err = ask("--recipe", tmp_path / "r.yaml")
        assert (code, out) == (2, "") and "trains nothing" in err and err.count("\n") == 1

    def test_the_shape_is_that_of_the_recipe(self) -> None:
        for name, known in (("llama3-8b-base", "llama-3-8b"), ("llama3.2-3b-base", "llama-3.2-3b")):
            found = stages.of_recipe(recipe.load(name), None)[0].shape
            assert replace(found, name=known, head_size=None, source="") == replace(shapes.SHAPES[known], source="")

    def test_what_is_optional_is_not_counted(self, ask: Any) -> None:
        document = json.loads(ask("--recipe", "small", "--json")[1])
        counted = [row["hours"][1] for row in document["stages"] if not row["optional"]]
        assert len(counted) < len(document["stages"])
        assert document["hours"][1] == pytest.approx(sum(counted), abs=0.01)
