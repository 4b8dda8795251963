"""Tables from a made-up run whose answers are known: nothing of the paper is left out, nothing is made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reproduce import paper, recipe, tables, verdicts
from reproduce.pipeline import Result
from reproduce.tables import Book, study
from reproduce.tables.benchmarks import published_model, published_other
from reproduce.tables.claims import HOLDS, NOT, PART, UNTESTED, UNTOLD, status
from reproduce.tables.cost import _number, savings
from reproduce.tables.rows import Direction, paper_difference
from reproduce.tables.values import size_directions, sizes

Make = Callable[..., Book]


def rows_of(book: Book, table: int) -> list[dict[str, Any]]:
    made = tables.TABLES[table](book)
    assert made is not None
    return made["rows"]


def find(rows: list[dict[str, Any]], method: str, metric: str) -> dict[str, Any]:
    (found,) = [r for r in rows if r["method"] == method and r["metric"].startswith(metric)]
    return found


@pytest.fixture(scope="module")
def empty() -> Book:
    """A run of the tiny recipe in which nothing is finished."""
    return Book(recipe.load("tiny"), {})


@pytest.fixture(scope="module")
def small() -> Book:
    """A run of the small recipe in which nothing is finished."""
    return Book(recipe.load("small"), {})


class TestEveryTable:
    @pytest.mark.parametrize("number", tables.TABLES)
    @pytest.mark.parametrize("name", ["book", "empty", "small"])
    def test_every_cell_of_the_paper_is_a_row(self, name: str, number: int, request: pytest.FixtureRequest) -> None:
        rows = rows_of(request.getfixturevalue(name), number)
        shown = {(r["model"], r["method"], r["metric"]): r["paper"] for r in rows}
        assert len(shown) == len(rows), "no row twice"
        for c in paper.cells(number):
            assert shown[c.model, c.method, c.metric] == c.value

    @pytest.mark.parametrize("number", tables.TABLES)
    @pytest.mark.parametrize("name", ["book", "empty", "small"])
    def test_rows_are_whole_and_say_what_they_are(self, name: str, number: int, request: pytest.FixtureRequest) -> None:
        known = {*verdicts.VERDICTS, "baseline"}
        for r in rows_of(request.getfixturevalue(name), number):
            assert {"model", "method", "metric", "paper", "measured", "ci95", "n", "seeds", "verdict"} <= set(r)
            assert r["verdict"] in known
            assert (r["measured"] is None) == (r["verdict"] == verdicts.NOT_RUN)
            if r["measured"] is None:
                assert r["ci95"] is r["n"] is r["seeds"] is None
            json.dumps(r, allow_nan=False)

    @pytest.mark.parametrize("number", tables.TABLES)
    def test_what_was_not_measured_has_no_number(self, number: int, empty: Book) -> None:
        measured = [r for r in rows_of(empty, number) if r["measured"] is not None]
        assert all(number == 6 and isinstance(r["measured"], str) for r in measured), "only the symbols are ours"

    def test_an_interval_holds_its_mean(self, book: Book) -> None:
        for table in tables.tables(book, None):
            for r in table["rows"]:
                if r["ci95"] is not None:
                    assert r["ci95"][0] <= r["measured"] <= r["ci95"][1]


class TestPolicies:
    def test_gold_scores_are_the_files(self, book: Book) -> None:
        found = find(rows_of(book, 1), "DVPO (GAE)", "gold score")
        lines = [
            json.loads(line)["gold"]
            for s in range(5)
            for line in (book.results[f"seed{s}/gold/dvpo-gae"].path / "gold.jsonl").read_text().splitlines()
        ]
        assert found["measured"] == pytest.approx(np.mean(lines), abs=1e-6)
        assert (found["n"], found["seeds"], found["paper"]) == (600, 5, None)
        assert found["verdict"] == verdicts.OTHER_SCALE

    @pytest.mark.parametrize(
        ("table", "method", "published", "expected", "verdict"),
        [
            (1, "DVPO (GAE) − SFT", 0.51, 0.3, verdicts.REPRODUCED),
            (1, "DVPO (GAE) − PPO", 0.4, 0.2, verdicts.REPRODUCED),
            (1, "GRPO − SFT", 0.24, -0.1, verdicts.DIFFERS),
            (2, "DVPO (A = Q) − DPO", 0.49, 0.1, verdicts.REPRODUCED),
            (2, "ReMax − SFT", 0.07, 0.0, verdicts.DIFFERS),  # a gain of 0.05 is ruled out
            (10, "DVPO (GAE), KL 0.05 − SFT", 0.82, 0.3, verdicts.REPRODUCED),
        ],
    )
    def test_gains(self, book: Book, table: int, method: str, published: float, expected: float, verdict: str) -> None:
        (found,) = [r for r in rows_of(book, table) if r["method"] == method]
        assert found["paper"] == published
        assert found["measured"] == pytest.approx(expected, abs=0.03)
        assert found["verdict"] == verdict

    def test_signs_that_the_paper_does_not_agree_on_are_no_direction(self, book: Book) -> None:
        """ReMax is above SFT in five cells of Table 1 and below in one (8.9 and 9.62 against 10.3 and 9.79)."""
        methods = {r["method"] for r in rows_of(book, 1)}
        assert "ReMax − SFT" not in methods
        assert "DVPO (official) − SFT" not in methods, "the paper has no such row"

    def test_few_seeds_are_not_judged(self, made_up: Make) -> None:
        rows = rows_of(made_up(2, False), 1)
        gains = [r for r in rows if r["metric"].startswith(("gain", "match"))]
        assert gains
        assert {r["verdict"] for r in gains} == {verdicts.OTHER_SCALE}

    def test_a_strength_of_kl_that_was_not_run_says_so(self, made_up: Make) -> None:
        book = made_up(3, False, lambda name: "-kl-" in name)
        rows = rows_of(book, 10)
        assert find(rows, "DVPO (GAE), KL 0.01", "gold score")["verdict"] == verdicts.NOT_RUN
        assert find(rows, "DVPO (GAE), KL 0.05", "gold score")["measured"] is not None

    def test_differences_of_the_paper(self) -> None:
        cells = paper.cells(1)
        dvpo, sft, remax = ([c for c in cells if c.method == m] for m in ("DVPO", "SFT", "ReMax"))
        assert paper_difference(dvpo, sft) == 0.51
        assert paper_difference(sft, dvpo) is None
        assert paper_difference(remax, sft) is None
        assert paper_difference(dvpo, []) is None


class TestValues:
    def test_accuracies_are_the_files(self, book: Book) -> None:
        won = []
        for s in range(5):
            lines = (book.results[f"seed{s}/accuracy/critic"].path / "pairs.jsonl").read_text().splitlines()
            won += [r["better"]["mean"] > r["worse"]["mean"] for r in map(json.loads, lines)]
        found = find(rows_of(book, 4), "A/C", "accuracy on held-out pairs")
        assert found["measured"] == pytest.approx(100 * np.mean(won), abs=1e-6)
        assert found["paper"] == 60.6
        assert find(rows_of(book, 4), "GVM − A/C", "gain")["verdict"] == verdicts.REPRODUCED

    def test_baselines_stand_beside(self, book: Book) -> None:
        """Every other better response has one token more, the others are equal: 0.75."""
        rows = rows_of(book, 4)
        assert find(rows, "longer wins", "accuracy")["measured"] == 75.0
        assert find(rows, "chance", "accuracy")["measured"] == 50.0

    def test_sizes_are_in_order(self, book: Book) -> None:
        assert [name.split(", ")[1].split(" (")[0] for name in sizes(book)] == ["small", "medium", "main"]
        assert [(d.left, d.right) for d in size_directions(book)] == [("medium", "small"), ("main", "medium")]
        assert size_directions(book)[0].paper == pytest.approx(68.05 - 63.61)

    def test_rewards_from_preferences_match(self, book: Book) -> None:
        found = find(rows_of(book, 9), "From Preference − From Reward", "match")
        assert (found["paper"], found["verdict"]) == (3.34, verdicts.REPRODUCED)

    def test_pairs_that_differ_are_not_paired(self, made_up: Make) -> None:
        from reproduce.tables.rows import paired_wins

        book = made_up(1, False)
        assert paired_wins(book, "accuracy/gvm", "accuracy/rm", "mean", "last") is not None
        path = book.results["seed0/accuracy/rm"].path / "pairs.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        assert paired_wins(Book(book.recipe, book.results), "accuracy/gvm", "accuracy/rm", "mean", "last") is None


class TestCost:
    def test_symbols_and_counts_of_table_6(self, book: Book) -> None:
        rows = rows_of(book, 6)
        symbols = [r for r in rows if r["model"] == "any"]
        assert len(symbols) == 24
        differing = [(r["method"], r["metric"]) for r in symbols if r["verdict"] == verdicts.DIFFERS]
        assert differing == [("GRPO", "C_back")], "our GRPO learns from all n responses"
        counted = {(r["method"], r["metric"].split(":")[0]): r for r in rows if r["model"] == book.size}
        assert [counted[m, "M_train"]["measured"] for m in ("DVPO", "PPO", "ReMax", "GRPO")] == [1, 2, 1, 1]
        assert [counted[m, "C_gene"]["measured"] for m in ("DVPO", "PPO", "ReMax", "GRPO")] == [1, 1, 2, 5]
        assert {r["verdict"] for key, r in counted.items() if key != ("GRPO", "C_back")} == {verdicts.REPRODUCED}

    @pytest.mark.parametrize(("form", "number"), [("-", 0), ("c_gene", 1), ("2*m_train", 2), ("n*c_gene", 5)])
    def test_forms_as_numbers(self, form: str, number: int) -> None:
        assert _number(form, 5) == number

    def test_changes_of_table_7(self, book: Book) -> None:
        """DVPO 1.0 s (0.9 to 1.1) of PPO's 2.0 (1.8 to 2.2): -50 %, from 0.9/2.2 - 1 to 1.1/1.8 - 1."""
        time = find(rows_of(book, 7), "DVPO against PPO", "gain: change of time")
        assert (time["measured"], time["paper"]) == (-50.0, -43.5)
        assert time["ci95"] == pytest.approx([-59.0909, -38.8889], abs=1e-3)
        assert time["verdict"] == verdicts.REPRODUCED
        memory = find(rows_of(book, 7), "DVPO against PPO", "gain: change of memory")
        assert (memory["measured"], memory["verdict"]) == (-50.0, verdicts.REPRODUCED)

    @pytest.mark.parametrize(
        ("rounds", "memory", "said"),
        [
            (2, 130.0, [verdicts.REPRODUCED, verdicts.DIFFERS]),
            (2, 98.0, [verdicts.REPRODUCED, verdicts.OTHER_SCALE]),
            (1, 50.0, [verdicts.OTHER_SCALE, verdicts.REPRODUCED]),  # one round has no spread
        ],
    )
    def test_time_and_memory_are_judged_apart(self, rounds: int, memory: float, said: list[str]) -> None:
        methods = {
            "dvpo-gae": {"seconds": 1.0, "seconds_range": [1.0, 1.0], "memory_mb": memory},
            "ppo": {"seconds": 2.0, "seconds_range": [2.0, 2.0], "memory_mb": 100.0},
        }
        manifest = {"settings": {"rounds": rounds}, "metrics": {"methods": methods}}
        made = Book(recipe.load("tiny"), {"seed0/cost": Result(Path(), manifest, "digest")})
        assert [row["verdict"] for row in savings(made)] == said

    def test_a_prediction_is_no_measurement(self, empty: Book) -> None:
        rows = [r for r in rows_of(empty, 7) if "predicted" in r]
        assert len(rows) == 16
        assert {r["measured"] for r in rows} == {None}
        assert {r["verdict"] for r in rows} == {verdicts.NOT_RUN}
        assert {r["method"] for r in rows if r["fitted"]} == {"PPO", "DVPO"}


class TestBenchmarks:
    """Rows of benchmarks, from manifests that are made up here."""

    def book(self, stage: str, metrics: dict[str, Any]) -> Book:
        chosen = recipe.load("llama3-8b-base")
        return Book(chosen, {f"seed0/{stage}": Result(Path(), {"metrics": metrics}, "digest")})

    @pytest.mark.parametrize(
        ("more", "overrides", "verdict"),
        [
            ({}, (), verdicts.REPRODUCED),  # the paper has 5.01
            ({"score": 5.6, "ci95": [5.4, 5.8]}, (), verdicts.WITHIN),
            ({"score": 7.0, "ci95": [6.8, 7.2]}, (), verdicts.DIFFERS),
            ({"judge": "another"}, (), verdicts.OTHER_JUDGE),
            ({"part": "10 of 80"}, (), verdicts.OTHER_SCALE),
            ({}, ("gvm.td_lambda=0.5",), verdicts.OTHER_SCALE),
        ],
    )
    def test_model_judge_and_part(self, more: dict[str, Any], overrides: tuple[str, ...], verdict: str) -> None:
        whole = {"score": 5.0, "ci95": [4.8, 5.2], "judge": verdicts.PAPER_JUDGE, "n": 80, "part": None}
        book = self.book("mt-bench/dvpo-gae", whole | more)
        book.recipe = recipe.load("llama3-8b-base", overrides)
        (found,) = [r for r in rows_of(book, 1) if r["measured"] is not None]
        assert (found["method"], found["verdict"], found["measured"]) == ("DVPO", verdict, more.get("score", 5.0))
        assert found["model"] == ("Meta-Llama-3-8B" if overrides else "Llama3-8B-Base")
        assert ("part of it" in found["metric"]) == ("part" in more)
        assert not [r for r in rows_of(book, 2) if r["measured"] is not None], "it is the Base setting's"

    def test_a_raw_win_rate_is_not_the_papers_length_controlled_one(self) -> None:
        metrics = {"score": 11.3, "ci95": [10.0, 12.0], "judge": verdicts.PAPER_JUDGE, "n": 805, "part": None}
        book = self.book("alpaca-eval/ppo", metrics | {"length_controlled": False})
        (found,) = [r for r in rows_of(book, 1) if r["measured"] is not None]
        assert (found["metric"], found["paper"]) == ("AlpacaEval2, raw win rate", None)
        assert found["verdict"] == verdicts.OTHER_SCALE

    def test_sections_of_rewardbench(self) -> None:
        entry = {"accuracy": {"bellman": {"accuracy": 0.9, "ci95": [0.85, 0.95]}}, "pairs": 358, "of": 358}
        rows = rows_of(
            self.book("rewardbench/gvm", {"sections": {"Chat": entry, "Chat Hard": {**entry, "of": 456}}}), 3
        )
        hard, chat = [r for r in rows if r["measured"] is not None]
        assert (chat["model"], chat["metric"], chat["paper"], chat["measured"]) == ("Llama3-8B", "Chat", 88.3, 90.0)
        assert chat["verdict"] == verdicts.REPRODUCED
        assert (hard["metric"], hard["verdict"]) == ("Chat-Hard (part of it)", verdicts.OTHER_SCALE)

    @pytest.mark.parametrize(("name", "of"), [("llama3-8b-base", {1, 8}), ("llama3-8b-instruct", {2, 10})])
    def test_only_an_unchanged_recipe_of_the_paper_is_compared(self, name: str, of: set[int]) -> None:
        free = ("seeds=2", "compute.workers=2", "judge={model: x}", f"hub.revision={'a' * 40}")
        assert {n for n in tables.TABLES if published_model(Book(recipe.load(name, free), {}), n)} >= of
        changed = Book(recipe.load(name, ("policy.updates=3",)), {})
        assert not any(published_model(changed, n) for n in tables.TABLES)

    def test_a_folder_must_hold_the_papers_model(self, tmp_path: Path) -> None:
        chosen = recipe.load("llama3-8b-base", (f"model={tmp_path}",))
        assert published_model(Book(chosen, {}), 1) is None
        assert chosen.hub is not None  # type: ignore[union-attr]
        whole = dict(chosen.hub.config)  # type: ignore[union-attr]
        newer = {k: v for k, v in whole.items() if k != "rope_theta"}
        newer["rope_parameters"] = {"rope_theta": whole["rope_theta"], "rope_type": "default"}
        for config, expected in (
            (whole, "Llama3-8B-Base"),
            (newer, "Llama3-8B-Base"),
            ({**whole, "hidden_size": 2048}, None),
            ({"model_type": "llama"}, None),
        ):
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert published_model(Book(chosen, {}), 1) == expected

    def test_data_of_another_set_is_not_the_papers(self) -> None:
        book = Book(recipe.load("llama3-8b-base"), {})
        for hub, expected in (("openbmb/UltraFeedback@1", True), ("other/set@1", False), (None, False)):
            book.results = {"seed0/data": Result(Path(), {"settings": {"hub": hub}, "metrics": {}}, "digest")}
            assert (published_model(book, 1) is not None) == expected

    @pytest.mark.parametrize(
        ("given", "expected"),
        [(None, True), (f"Anthropic/hh-rlhf@{'a' * 40}", True), (f"x/hh@{'a' * 40}", False), ("/my/own/data", False)],
    )
    def test_other_data_is_the_papers_only_from_the_hub(self, given: str | None, expected: bool) -> None:
        chosen = recipe.load("llama3-8b-base", () if given is None else (f"other_data.hh-rlhf={given}",))
        assert published_other(Book(chosen, {}), "hh-rlhf") == expected

    def test_methods_with_one_name_in_the_paper_go_by_their_own(self) -> None:
        metrics = {"score": 5.0, "ci95": [4.8, 5.2], "judge": verdicts.PAPER_JUDGE, "n": 80, "part": None}
        book = self.book("mt-bench/dvpo-gae", metrics)
        book.results |= self.book("mt-bench/dvpo-q", metrics | {"score": 7.0}).results
        book.results |= self.book("mt-bench/ppo", metrics).results
        found = {r["method"]: r["measured"] for r in rows_of(book, 1) if r["measured"] is not None}
        assert found == {"DVPO (GAE)": 5.0, "DVPO (A = Q)": 7.0, "PPO": 5.0}


class TestClaims:
    def test_findings_follow_the_numbers(self, book: Book) -> None:
        found = {c.key: c for c in tables.claims(book)}
        states = {key: c.status for key, c in found.items()}
        assert states["improves dvpo-gae"] == states["matches dvpo-q"] == states["critic"] == HOLDS
        assert states["kl"] == PART, "two strengths do not differ from SFT in the made-up run"
        assert states["tau"] == NOT, "with tau, A = Q and GAE are below themselves"
        assert states["stable"] == UNTOLD
        assert all("+0.2" in e or "+0.3" in e for e in found["improves dvpo-gae"].evidence)

    def test_a_run_that_falls_the_other_way_says_so(self, made_up: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        turned = made_up(3, False)
        monkeypatch.setattr(Book, "gains", lambda self, a, b: [[y - x for x, y in zip(p, q, strict=True)]
                            for p, q in zip(self.gold(a), self.gold(b), strict=True)])  # fmt: skip
        found = {c.key: c.status for c in tables.claims(turned)}
        assert found["improves dvpo-gae"] == found["matches dvpo-gae"] == NOT

    def test_one_run_tells_nothing_about_training(self, made_up: Make) -> None:
        one = made_up(1)
        found = {c.key: c.status for c in tables.claims(one)}
        assert found["credit"] == found["tau"] == found["matches dvpo-gae"] == UNTOLD
        assert not [c for c in study.comparisons(one) if c.told]

    def test_what_was_not_tested_is_named(self, empty: Book) -> None:
        assert {c.status for c in tables.claims(empty)} == {UNTESTED}
        (said,) = tables.findings(empty)
        assert said.startswith("Not tested here: DVPO with A = Q improves")

    @pytest.mark.parametrize(
        ("found", "said"),
        [
            ([], UNTESTED),
            ([verdicts.REPRODUCED, verdicts.WITHIN], HOLDS),
            ([verdicts.REPRODUCED, verdicts.OTHER_SCALE], PART),
            ([verdicts.REPRODUCED, verdicts.DIFFERS], PART),
            ([verdicts.DIFFERS, verdicts.OTHER_SCALE], NOT),
            ([verdicts.OTHER_SCALE], UNTOLD),
        ],
    )
    def test_status(self, found: list[str], said: str) -> None:
        assert status(found) == said

    def test_a_direction_is_left_minus_right(self, book: Book) -> None:
        values = [[0.2, 0.4], [0.3, 0.1], [0.2, 0.3]]
        made = Direction("x", "T1", "A", "B", "m", 1.0, values).row(book)
        assert (made["method"], made["metric"], made["measured"]) == ("A − B", "gain: m", 0.25)
        assert made["verdict"] == verdicts.REPRODUCED
