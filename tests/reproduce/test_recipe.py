"""Recipes and graphs: what is refused, and that the keys of finished work do not drift."""

from pathlib import Path

import pytest

from dvpo.errors import InputError
from reproduce import recipe
from reproduce.graph import build
from reproduce.pipeline import plan


def test_built_in_recipes_load() -> None:
    assert {"small", "tiny"} < set(recipe.names())
    assert recipe.load("tiny").method("grpo").algorithm.group_size == 5
    assert recipe.load("tiny").method("dvpo-q").whiten is False
    assert recipe.load("tiny", ("seeds=3", "gvm.td_lambda=0.5")).gvm.td_lambda == 0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("foo=1",), "foo: unknown key"),
        (("gvm.td_lambda=2",), "gvm.td_lambda"),
        (("gvm.nothing=2",), "gvm.nothing: unknown key"),
        (("seeds",), "key=value"),
        (("name.x=1",), "name is a value"),
        (("methods.dvpo-q.algorithm.name=sarsa",), "sarsa"),
        (("gvm.save_steps=7",), "not a multiple"),
        (("scripted=[nothing]",), "unknown methods"),
        (("compute.processes=2",), "compute.processes: the built-in world's models are trained in one process"),
        (("seeds=[",), "not valid YAML"),
    ],
)
def test_bad_overrides(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe.load("tiny", overrides)


def test_bad_files(tmp_path: Path) -> None:
    for text, words in (("a: [", "not valid YAML"), ("- 1", "mapping"), ("world: moon", "world")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            recipe.load(str(tmp_path / "r.yaml"))
    for name in ("nothing", str(tmp_path / "none.yaml")):
        with pytest.raises(InputError):
            recipe.load(name)


def test_tables_need_only_their_stages(tmp_path: Path) -> None:
    graph = build(recipe.load("tiny", ("seeds=2",)), None)
    kinds = {stage.kind for stage in graph.order({"T8"})}
    assert kinds == {"atlas", "base", "sft", "coverage", "gvm", "pairwise"}
    first, *rest = plan(graph.order(None), tmp_path)
    assert first.state == "to run"
    assert {line.state for line in rest} == {"waits", "to run"}


def test_every_online_method_shares_all_but_its_advantage() -> None:
    tiny = recipe.load("tiny")
    shared = {"algorithm", "whiten"}
    settings = [tiny.method(name).model_dump(exclude=shared) for name in tiny.methods]
    assert all(s == settings[0] for s in settings)


@pytest.mark.parametrize(
    ("data", "overrides", "words"),
    [
        (None, (), "--set model"),
        (None, ("model=nowhere",), "no such checkpoint folder"),
        ("nowhere", ("model=.",), "no such file or folder"),
        (None, ("model=.",), "needs preference data"),
        (".", ("model=.", "other_data.hh=nowhere"), "other_data.hh"),
    ],
)
def test_small_names_what_it_needs(data: str | None, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(recipe.load("small", overrides), data)
