"""The stage graph of the built-in world: the estimator study, the KL sweep and the third size, and when they run."""

import json

import pytest

from dvpo.config import ModelSize
from dvpo.errors import InputError
from reproduce import recipe
from reproduce.graph import Graph, build
from reproduce.graphs.common import Graph as Common
from reproduce.pipeline import Stage
from reproduce.recipe import AtlasRecipe

SWEPT = {f"seed0/{stage}/dvpo-gae-kl-{beta}" for stage in ("policy", "gold") for beta in ("0.01", "0.1")}


def sized(*overrides: str) -> set[str]:
    """The stages of the recipe's optional size."""
    loaded = recipe.load("tiny", overrides)
    assert isinstance(loaded, AtlasRecipe)
    (size,) = (name for name, size in loaded.other_sizes.items() if size.optional)
    return {f"seed0/{name}-{size}" for name in ("base", "sft", "gvm", "accuracy/gvm")}


def tiny(*overrides: str) -> Graph:
    return build(recipe.load("tiny", overrides), None)


def ids(graph: Graph, *wanted: str) -> set[str]:
    return {stage.id for stage in graph.order(set(wanted) or None)}


def content(stage: Stage) -> str:
    """What a stage's key is made of, its inputs by their own content."""
    inputs = {name: content(i) for name, i in stage.inputs.items() if isinstance(i, Stage)}
    return json.dumps([stage.kind, stage.settings, stage.seed, inputs], sort_keys=True)


def changed(stage: Stage, other: Stage) -> dict[str, tuple[object, object]]:
    """The settings of `train` that differ."""
    ours, theirs = stage.settings["train"], other.settings["train"]
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def test_an_optional_stage_runs_only_where_it_is_asked_for_or_needed() -> None:
    graph = Common()
    first = graph.add(Stage("first", "atlas", {}), "T1")
    second = graph.add(Stage("second", "base", {}, {"atlas": first}), optional=True)
    graph.add(Stage("third", "sft", {}, {"start": second}), "T2", optional=True)
    assert ids(graph) == {"first"}
    assert ids(graph, "T2") == {"first", "second", "third"}
    graph.add(Stage("fourth", "gold", {}, {"policy": second}))
    assert ids(graph) == {"first", "second", "fourth"}


def test_a_plain_run_leaves_the_optional_stages_out() -> None:
    graph = tiny()
    assert set(graph.stages) - ids(graph) == SWEPT | sized() == graph.optional
    assert "study" not in graph.leaves
    assert not any("@" in name or "-td" in name or "-tau" in name for name in graph.stages)
    assert ids(graph, "T10") & graph.optional == SWEPT
    assert ids(graph, "T8") & graph.optional == sized()


def test_the_study_is_in_the_graph_where_the_recipe_says_so() -> None:
    graph, plain = tiny("study=true"), tiny()
    assert not graph.optional
    assert ids(graph) == set(graph.stages) > set(plain.stages)
    estimators, variants = ("q", "gae", "official"), ("td0", "td1", "tau1", "scripted")
    expected = {f"{stage}/{e}@{v}" for stage in ("policy", "gold") for e in estimators for v in variants}
    expected |= {f"{stage}gvm-{v}" for stage in ("", "accuracy/", "credit/") for v in variants if v != "scripted"}
    expected |= {"credit/gvm-scripted"}
    assert {i.removeprefix("seed0/") for i in set(graph.stages) - set(plain.stages)} == expected
    read = {i.removeprefix("seed0/") for i in graph.leaves["study"]}
    assert {i for i in expected if not i.startswith("gvm")} <= read
    assert {"gold/sft", *(f"gold/dvpo-{e}" for e in estimators), "accuracy/gvm", "credit/gvm"} <= read


def test_the_study_changes_one_thing_at_a_time() -> None:
    stages = {i.removeprefix("seed0/"): s for i, s in tiny("study=true").stages.items()}
    gvm = stages["gvm"]
    assert changed(stages["gvm-td0"], gvm) == {"td_lambda": (0.0, gvm.settings["train"]["td_lambda"])}
    assert changed(stages["gvm-td1"], gvm) == {"td_lambda": (1.0, gvm.settings["train"]["td_lambda"])}
    assert changed(stages["gvm-tau1"], gvm) == {"trajectory_k": (1, 0), "max_prompt_tokens": (192, 64)}
    for estimator in ("q", "gae", "official"):
        plain = stages[f"policy/dvpo-{estimator}"]
        for variant in ("td0", "td1", "scripted"):
            policy = stages[f"policy/{estimator}@{variant}"]
            assert policy.settings == plain.settings
            assert policy.inputs["value"] is stages[f"gvm-{variant}"]
        policy = stages[f"policy/{estimator}@tau1"]
        ours, theirs = changed(policy, plain)["algorithm"]
        assert ours == {**theirs, "trajectory_k": 1}  # type: ignore[dict-item]
        assert list(changed(policy, plain)) == ["algorithm"]
    for kind in ("accuracy", "credit"):
        measured = stages[f"{kind}/gvm-tau1"].settings
        assert measured == stages[f"{kind}/gvm"].settings | {"trajectory_k": 1, "max_prompt_tokens": 192}


def test_what_the_study_shares_with_the_methods_is_computed_once() -> None:
    stages = tiny("study=true").stages
    for estimator in ("q", "gae"):
        for stage in ("policy", "gold"):
            ours, theirs = stages[f"seed0/{stage}/{estimator}@scripted"], f"seed0/{stage}/dvpo-{estimator}-scripted"
            assert content(ours) == content(stages[theirs])
    assert len({content(s) for s in stages.values()}) == len(stages) - 4


def test_table_10_changes_the_strength_of_kl_alone() -> None:
    stages = tiny().stages
    own = stages["seed0/policy/dvpo-gae"]
    for beta in (0.01, 0.1):
        other = stages[f"seed0/policy/dvpo-gae-kl-{beta}"]
        kl = own.settings["train"]["kl"]
        assert changed(other, own) == {"kl": ({**kl, "beta": beta}, kl)}
        assert other.inputs == own.inputs


def test_whether_a_size_is_optional_is_no_part_of_its_keys() -> None:
    graph, study = tiny(), tiny("study=true")
    (base,) = (name for name in sized() if name.startswith("seed0/base-"))
    assert set(graph.stages[base].settings["size"]) == set(ModelSize.model_fields)
    assert all(content(graph.stages[i]) == content(study.stages[i]) for i in graph.stages)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("study=true", "methods={dvpo-q: {algorithm: {name: dvpo}}}", "scripted=[]"), "study needs the methods dvpo"),
        (("methods={ppo: {algorithm: {name: remax}}}", "scripted=[]"), "kl_sweep needs the methods dvpo-gae"),
        (("methods.dvpo-gae.algorithm={name: remax}",), "dvpo-gae must be of the algorithm dvpo"),
    ],
)  # fmt: skip
def test_a_study_without_its_methods_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe.load("tiny", overrides)
