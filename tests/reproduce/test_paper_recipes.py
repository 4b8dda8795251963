"""The paper's recipes: their models' true sizes, their settings, what they ask of the user, and their plans."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dvpo.errors import InputError
from reproduce import app, recipe
from reproduce.commands import dry_run
from reproduce.cost.stages import of_recipe, shape_of
from reproduce.graph import build
from reproduce.graphs.outline import outline
from reproduce.pipeline import plan
from reproduce.recipe import FOLDER, DataRecipe

PAPER = ("llama3.2-3b-base", "llama3-8b-base", "mistral-7b-instruct", "llama3-8b-instruct")
KNOWN = {
    "llama3.2-3b-base": 3_212_749_824,
    "llama3-8b-base": 8_030_261_248,
    "llama3-8b-instruct": 8_030_261_248,
    "mistral-7b-instruct": 7_241_732_096,
}
"""The totals that the hub shows for the models' own weights."""


def paper(name: str, *overrides: str) -> DataRecipe:
    loaded = recipe.load(name, overrides)
    assert isinstance(loaded, DataRecipe)
    return loaded


@pytest.mark.parametrize("name", PAPER)
def test_the_true_models_have_the_known_sizes(name: str) -> None:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    loaded = paper(name)
    hub = loaded.hub
    assert hub is not None
    config = AutoConfig.for_model(**hub.config)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
        config.num_labels = 1
        value, reward = (
            auto.from_config(config) for auto in (AutoModelForTokenClassification, AutoModelForSequenceClassification)
        )

    def count(model: Any) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(policy) == shape_of(loaded).parameters("policy") == KNOWN[name]
    untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert count(reward) == KNOWN[name] - untied + config.hidden_size
    assert count(value) == count(reward) + 1  # its head has a bias
    rope = config.rope_parameters
    assert rope["rope_theta"] == hub.config["rope_theta"]
    assert rope["rope_type"] == ("llama3" if name == "llama3.2-3b-base" else "default")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name: str) -> None:
    """Appendix C, with its batch sizes read as those of each of eight devices."""
    r = paper(name)
    base = name.endswith("base")
    assert (r.compute.processes, r.compute.strategy) == (8, "zero1" if "3b" in name else "zero3")
    if base:
        assert r.sft is not None
        assert (r.sft.learning_rate, r.sft.schedule, r.sft.warmup_steps) == (2e-5, "cosine", 2)
        assert (r.sft.batch_size, r.sft.epochs) == (16 * 8, 3)
        assert r.shares["rl"] == 0.2
    else:
        assert r.sft is None
        assert 10_000 / 63_967 < r.shares["rl"] < 0.2
    assert (r.rm.learning_rate, r.rm.schedule, r.rm.epochs, r.rm.batch_size) == (2e-5, "linear", 2, 4 * 8)
    assert (r.gvm.learning_rate, r.gvm.batch_size, r.gvm.gamma) == (2e-6, 32 * 8, 1)
    assert r.gvm.max_prompt_tokens + r.gvm.max_response_tokens == 1024
    assert r.rl_prompts == 10_000
    for method in r.methods:
        s = r.method(method)
        assert (s.learning_rate, s.max_new_tokens, s.epochs, s.gamma) == (2e-6, 1024, 4, 1)
        assert (s.prompts_per_update, s.minibatch_size, s.micro_batch_size) == (8 * 8, 2 * 2 * 8, 2)
        assert (s.kl.beta, s.kl.target) == (0.05, 0.1)
        for size in (s.prompts_per_update, s.minibatch_size):
            assert size % r.compute.processes == 0
    assert r.method("grpo").algorithm.group_size == 5  # type: ignore[union-attr]
    for offline in (r.sft, r.rm, r.gvm, r.dpo):
        assert offline is None or offline.batch_size % (8 * (offline.micro_batch_size or 1)) == 0


SOURCES = (
    r"Section|Appendix|Table|Figure|published code|\bours\b|config\.json|the paper names|model's (own|page)|config;"
)


@pytest.mark.parametrize("name", PAPER)
def test_every_line_says_where_it_comes_from(name: str) -> None:
    """In its own comment, in that of the group it is in, or in the line above it."""
    groups: list[tuple[int, bool]] = []
    above = False
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        text, _, comment = line.partition(" #") if not line.lstrip().startswith("#") else ("", "", line)
        said = re.search(SOURCES, comment) is not None
        if not text.strip():
            above = said or (above and bool(comment))
            continue
        indent = len(text) - len(text.lstrip())
        groups = [(depth, known) for depth, known in groups if depth < indent]
        inside = any(known for _, known in groups)
        group = text.rstrip().endswith(":")
        known = said or above or inside or group or text.split(":")[0] in ("world", "name", "extends")
        assert known, f"{name}: {line}"
        groups.append((indent, said or above or inside))
        above = False


def test_a_recipe_on_top_of_another(tmp_path: Path) -> None:
    base, instruct, mistral = (paper(n) for n in ("llama3-8b-base", "llama3-8b-instruct", "mistral-7b-instruct"))
    assert instruct.gvm == base.gvm == mistral.gvm
    assert instruct.hub is not None
    assert mistral.hub is not None
    assert instruct.hub.config["rope_theta"] == 500_000
    assert mistral.hub.config["rope_theta"] == 1_000_000
    assert (instruct.hub.gated, mistral.hub.chat_template) == (True, None)
    own = tmp_path / "own.yaml"
    own.write_text("extends: llama3-8b-base\nname: own\ngvm: {td_lambda: 0.0}\n")
    made = recipe.load(str(own))
    assert isinstance(made, DataRecipe)
    assert (made.gvm.td_lambda, made.gvm.learning_rate) == (0.0, 2e-6)
    own.write_text("extends: own.yaml\nname: own\n")
    with pytest.raises(InputError, match=r"own\.yaml is no built-in recipe"):
        recipe.load(str(own))


@pytest.mark.parametrize("name", PAPER)
def test_a_plan_needs_neither_data_nor_network(name: str, tmp_path: Path) -> None:
    r = paper(name, "judge={model: some-judge}", f"benchmarks.mt_bench={FOLDER}")
    graph = build(r, None)
    lines = plan(graph.order(None), tmp_path / "stages")
    assert {line.state for line in lines} == {"to run", "waits"}
    assert {line.id for line in lines if line.state == "to run"} == {"seed0/model", "seed0/data", "seed0/data-hh-rlhf"}
    table = "T1" if r.sft else "T2"
    assert {table, "T3", "T4", "T5", "T8", "T9", "F3", "F4"} <= set(graph.leaves)
    assert {i.removeprefix("seed0/mt-bench/") for i in graph.leaves[table]} == {
        "sft", "dpo", "dvpo-gae", "ppo", "remax", "grpo",
    }  # fmt: skip
    trained = [s for s in graph.stages.values() if s.kind in ("sft", "rm", "gvm", "dpo", "policy")]
    assert all(s.settings["compute"] == {"processes": 8, "strategy": r.compute.strategy} for s in trained)
    assert not list(tmp_path.iterdir())


def test_table_10_is_run_where_it_is_asked_for() -> None:
    graph = build(paper("llama3-8b-instruct", "judge={model: some-judge}", f"benchmarks.mt_bench={FOLDER}"), None)
    swept = {f"seed0/{p}/dvpo-gae-kl-{b}" for p in ("policy", "mt-bench") for b in ("0.01", "0.1")}
    assert swept == graph.optional - {"seed0/reward-scale"}
    assert swept <= {s.id for s in graph.order({"T10"})}
    assert not swept & {s.id for s in graph.order(None)}


def test_what_is_not_pinned_is_named_with_the_way_out() -> None:
    r = paper("mistral-7b-instruct")
    words = r"mistralai/Mistral-7B-Instruct-v0.2 without a revision.*--set hub.revision=COMMIT"
    with pytest.raises(InputError, match=words):
        recipe.require_pinned(r, None)
    commit = "a" * 40
    hh = f"other_data.hh-rlhf=Anthropic/hh-rlhf@{commit}"
    pinned = (f"hub.revision={commit}", hh, f"benchmarks.rewardbench=allenai/reward-bench@{commit}")
    for left_out, key in ((1, "other_data.hh-rlhf=Anthropic/hh-rlhf@COMMIT"), (2, "benchmarks.rewardbench=allenai")):
        some = paper("mistral-7b-instruct", *(p for i, p in enumerate(pinned) if i != left_out))
        with pytest.raises(InputError, match=key):
            recipe.require_pinned(some, None)
    recipe.require_pinned(paper("mistral-7b-instruct", *pinned), None)
    recipe.require_pinned(recipe.load("tiny"), None)


def test_the_outline_says_what_a_run_takes() -> None:
    r = paper("llama3-8b-instruct", "judge={model: some-judge}", f"benchmarks.mt_bench={FOLDER}")
    graph = build(r, None)
    found = outline(r, graph.order(None))
    lines = {line.id.removeprefix("seed0/"): line for line in found.lines}
    assert [line.id for line in found.lines] == [s.id for s in graph.order(None)]
    trained = {i: lines[i] for i in ("rm", "gvm", "gvm-from-rm", "dpo", *(f"policy/{m}" for m in r.methods))}
    for line in trained.values():
        assert line.memory is not None
        assert line.hours is not None
        assert line.fits == (line.memory[0] <= line.memory[1])
        assert 0 < line.hours[0] < line.hours[1]
        assert "8 processes" in line.command
        assert "zero3" in line.command
    assert all(line.hours is None for i, line in lines.items() if i not in trained)
    assert lines["in-domain/gvm"].command == "evaluation:pairwise in the run's own process"
    # 8.03 thousand million parameters, 7.50 without the vocabulary's head: 2 bytes each as fetched, 4 as written, and
    # PPO keeps its critic. Of a trainer's state, 12 bytes each, there are two for a moment; PPO's has the critic's too.
    assert [lines[i].disk for i in ("model", "dpo", "gvm", "policy/ppo")] == [16.06, 32.12, 30.02, 62.14]
    assert found.disk == (pytest.approx(16.06 + 4 * 32.12 + 3 * 30.02 + 62.14, abs=0.1), pytest.approx(372.84))
    without = outline(r, [s for s in graph.order(None) if s.id != "seed0/policy/ppo"])
    assert without.disk is not None
    assert without.disk[1] == pytest.approx(2 * 12 * 8.03, abs=0.1)
    assert lines["policy/dvpo-gae"].settings["train"] == r.method("dvpo-gae").model_dump(mode="json")


def test_the_steps_follow_from_what_the_data_holds() -> None:
    """63,967 prompts; of 80 % of them two pairs each in batches of 32, and their 4 answers for the GVM; two epochs."""
    updates = {stage.name: stage.updates for stage in of_recipe(paper("llama3-8b-instruct"), None)}
    assert updates["rm"] == -(-63_967 * 0.8 * 2 * 2 // 32)
    assert updates["gvm"] == -(-63_967 * 0.8 * 4 * 2 // 256)
    assert updates["ppo"] == 1250
    base = {stage.name: stage.updates for stage in of_recipe(paper("llama3-8b-base"), None)}
    assert base["sft"] == -(-63_967 * 0.4 * 3 // 128)


def test_a_recipe_without_a_machine_has_an_outline_without_numbers() -> None:
    tiny = recipe.load("tiny")
    found = outline(tiny, build(tiny, None).order(None))
    assert (found.hours, found.disk) == (None, None)
    assert all(line.memory is line.hours is line.disk is None for line in found.lines)


def test_the_dry_run_prints_all_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    request = app.Request("llama3-8b-base", (), (), None, None, (), tmp_path / "run")
    dry_run.run(request, as_json=False)
    said = capsys.readouterr().out
    for words in ("learning_rate: 2.0e-06", "seed0/policy/grpo", "8 processes", "hours of training on 8xa100-80gb"):
        assert words in said
    dry_run.run(request, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["id"] == "seed0/model"
    assert rows[0]["settings"]["revision"] == "TO-BE-PINNED"
    assert next(r for r in rows if r["id"] == "seed0/gvm")["memory_gib"]["fits"]
    assert not list(tmp_path.iterdir())
