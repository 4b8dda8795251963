"""Requests: every table and figure at every recipe, several at once, all; what is written and under which command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo.errors import InputError
from reproduce import app, recipe

OFFLINE = ("small", "llama3-8b-base", "mistral-7b-instruct")


def request(name: str = "tiny", **more: Any) -> app.Request:
    given: dict[str, Any] = {"tables": (), "figures": (), "seeds": None, "data": None, "overrides": (), "out": None}
    return app.Request(recipe=name, **{**given, **more})


def silent(*_: Any) -> None:
    """A report of progress that nobody reads."""


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    """What a recipe of real data needs to be planned: a model's folder and a data folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    none = ("other_data={}",)
    return {"data": str(tmp_path / "data"), "overrides": (f"model={tmp_path / 'model'}", *none)}


class TestPrepare:
    @pytest.mark.parametrize("number", app.TABLES)
    def test_every_table_at_tiny(self, number: int) -> None:
        prepared = app.prepare(request(tables=(number,)))
        assert prepared.wanted == {f"T{number}"}
        assert bool(prepared.stages) == (number != 5), "Table 5 has nothing to run there"

    @pytest.mark.parametrize("number", app.TABLES)
    @pytest.mark.parametrize("name", OFFLINE)
    def test_every_table_of_real_data(self, name: str, number: int, folders: dict[str, Any]) -> None:
        assert app.prepare(request(name, tables=(number,), **folders)).wanted == {f"T{number}"}

    @pytest.mark.parametrize("number", app.FIGURES)
    @pytest.mark.parametrize("name", ["tiny", *OFFLINE])
    def test_every_figure(self, name: str, number: int, folders: dict[str, Any]) -> None:
        given = {} if name == "tiny" else folders
        assert app.prepare(request(name, figures=(number,), **given)).wanted == {f"F{number}"}

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"tables": (1, 11)}, "no results in Table 11; choose --table 1 to 10"),
            ({"figures": (1,)}, "no results in Figure 1; choose --figure 2 to 4"),
            ({"tables": (0,)}, "Table 0"),
        ],
    )
    def test_what_the_paper_does_not_have(self, more: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            app.prepare(request(**more))

    def test_table_2_reads_what_table_1_reads_where_it_has_no_stages_of_its_own(self) -> None:
        first, second = (app.prepare(request(tables=(n,))) for n in (1, 2))
        assert [s.id for s in first.stages] == [s.id for s in second.stages]

    def test_several_at_once_are_the_union(self) -> None:
        ids = [{s.id for s in app.prepare(request(**more)).stages} for more in (
            {"tables": (4,)}, {"figures": (3,)}, {"tables": (4,), "figures": (3,)})]  # fmt: skip
        assert ids[2] == ids[0] | ids[1]

    def test_all_has_what_a_plain_run_leaves_out(self) -> None:
        plain, whole = app.prepare(request()), app.prepare(request(everything=True, tables=(4,)))
        assert (plain.wanted, whole.wanted) == (None, None)
        left_out = {s.id for s in whole.stages} - {s.id for s in plain.stages}
        assert "seed0/gold/dvpo-gae-kl-0.01" in left_out
        assert {s.id for s in plain.stages} <= {s.id for s in whole.stages}

    def test_tables_that_measure_nothing_need_no_data(self) -> None:
        assert app.prepare(request("llama3-8b-base", tables=(6, 7))).stages == []
        with pytest.raises(InputError):
            app.prepare(request("small", tables=(4,)))


class TestReproduce:
    def test_a_table_without_stages_is_a_whole_report(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        document = app.reproduce(request("llama3-8b-base", tables=(6, 7), out=out), silent)
        assert [t["table"] for t in document["tables"]] == [6, 7]
        assert document["figures"] == []
        table = json.loads((out / "results" / "table_7.json").read_text())
        assert table["command"] == f"dvpo reproduce --recipe llama3-8b-base --out {out} --table 7"
        assert len([r for r in table["rows"] if r["verdict"] == "not run (tier)"]) == 20
        assert "Table 7: 20 of 20 rows" in (out / "report.md").read_text()
        names = {"report.html", "report.md", "report.json", "recipe.json", "manifests.json", "results"}
        assert {p.name for p in out.iterdir()} >= names
        report = json.loads((out / "report.json").read_text())
        assert report["run"]["cost"].startswith("0 stages")
        assert json.loads((out / "results" / "claims.json").read_text())

    def test_a_hub_model_without_a_revision_is_refused_before_anything_runs(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="without a revision"):
            app.reproduce(request("llama3-8b-base", tables=(1,), out=tmp_path / "run", overrides=(
                "judge={model: x}", "benchmarks.mt_bench=owner/name@" + "a" * 40)), silent)  # fmt: skip
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_every_table_and_figure_alone_after_a_run(self, tmp_path: Path) -> None:
        """The tiny recipe cut to seconds, with the study: run once, then each table and figure from what is there."""
        path = tmp_path / "micro.yaml"
        path.write_text(yaml.safe_dump(micro()))
        out = tmp_path / "run"
        whole = app.reproduce(request(str(path), out=out, everything=True), silent)
        assert {t["table"] for t in whole["tables"]} == {*range(1, 11), "study", "credit", "coverage"}
        assert {2, 3, 4} <= {f["figure"] for f in whole["figures"]}
        assert all(Path(file).is_file() for f in whole["figures"] for file in f["files"])
        study = json.loads((out / "results" / "study.json").read_text())
        assert len(study["comparisons"]) == 15
        done: list[str] = []
        for kind, numbers in (("tables", app.TABLES), ("figures", app.FIGURES)):
            for number in numbers:
                one = request(str(path), out=out, **{kind: (number,)})
                made = app.reproduce(one, lambda stage, what, seconds: done.append(what))
                assert [t["table"] for t in made["tables"]] == ([number] if kind == "tables" else [])
                if kind == "tables":
                    (before,) = [t for t in whole["tables"] if t["table"] == number]
                    assert made["tables"][0]["rows"] == before["rows"]
        assert set(done) == {"reused"}


def micro() -> dict[str, Any]:
    """The tiny recipe with all its stages, cut to seconds."""
    values = recipe.load("tiny").model_dump(mode="json")
    values |= {"name": "micro", "study": True, "cost_updates": 1, "cost_rounds": 1}
    values["atlas"] |= {"places": 6, "lessons": 150, "omissions": 50}
    values["atlas"]["prompts"] = {"base": 100, "sft": 60, "reward": 60, "rl": 60, "validation": 8, "test": 60}
    small = {"hidden": 16, "intermediate": 32, "layers": 1, "heads": 2, "positions": 512}
    values |= {"size": small, "other_sizes": {"small": small | {"hidden": 8}}}
    for stage in ("base", "sft", "rm", "gvm", "dpo"):
        values[stage] |= {"max_steps": 6, "save_steps": 6, "log_steps": 2, "batch_size": 8}
    short = {"updates": 3, "save_updates": 3, "prompts_per_update": 8, "minibatch_size": 4, "max_new_tokens": 8}
    values["policy"] |= short
    values["sampling"]["max_new_tokens"] = 8
    return values
