import json
from pathlib import Path
from typing import Any

import pytest

from dvpo.evaluation.intervals import mean_over_seeds
from reproduce import recipe, tables, verdicts
from reproduce.pipeline import Result
from reproduce.tables import Book, policies
from reproduce.tables.book import differences
from reproduce.tables.claims import _credit, _directions, _stable
from reproduce.tables.extra import CREDIT
from reproduce.tables.rows import accuracy_row, baselines, row
from reproduce.tables.study import Stability
from reproduce.tables.values import scalar_tie


def made(metrics: dict[str, list[dict[str, Any]]], name: str = "llama3-8b-base") -> Book:
    """A book of stages by name, with a manifest's metrics per seed."""
    chosen = recipe.load(name, (f"seeds={max(map(len, metrics.values()))}",))
    results = {
        f"seed{s}/{stage}": Result(Path(), {"metrics": m}, "d")
        for stage, ms in metrics.items()
        for s, m in enumerate(ms)
    }
    return Book(chosen, results)


def test_seeds_of_one_data_set_share_its_prompts() -> None:
    values = [[float(i // 4 % 2) for i in range(40)]] * 3
    groups = [[i // 4 for i in range(40)]] * 3
    tiny, small = Book(recipe.load("tiny"), {}), Book(recipe.load("small"), {})
    for book, shared in ((tiny, False), (small, True)):
        found = row(book, "m", "x", "y", None, values, groups)["ci95"]
        assert found == pytest.approx(mean_over_seeds(values, groups, shared)[1], abs=1e-6)
    assert mean_over_seeds(values, groups, True) != mean_over_seeds(values, groups, False)


def test_accuracies_are_drawn_by_prompt(book: Book) -> None:
    values, groups = book.wins("accuracy/gvm", "mean")
    low, high = mean_over_seeds(values, groups)[1]
    assert accuracy_row(book, "accuracy/gvm", "m", "x", "y", "mean", None)["ci95"] == pytest.approx(
        [100 * low, 100 * high]
    )
    assert baselines(book, "accuracy/gvm")[1]["ci95"] == [50.0, 50.0]


def test_differences_are_of_one_shape() -> None:
    assert differences([[1, 2]], [[0, 5]]) == [[1, -3]]
    with pytest.raises(ValueError, match="zip"):
        differences([[1, 2]], [[1]])


def test_the_scalar_tie_is_gvm_less_scalar(book: Book) -> None:
    (tie,) = scalar_tie(book)
    gvm, rm = book.wins("accuracy/gvm", "mean")[0], book.wins("accuracy/rm", "last")[0]
    assert (tie.left, tie.right, tie.kind) == ("GVM", "ScalarRM", "tie")
    assert tie.values == differences(gvm, rm)


def test_table_2_bears_on_dpo_alone(book: Book) -> None:
    found = [d.claim for d in _directions(book)]
    first = [d.claim for d in policies.directions(book, 1)]
    assert [c for c in found if c.startswith(("improves", "matches"))] == [c for c in first if not c.startswith("dpo")]


@pytest.mark.parametrize(
    ("gvm", "rm", "verdict"),
    [
        ([0.7, 0.8], [0.5, 0.6], verdicts.REPRODUCED),
        ([0.7, 0.8], [0.6, 0.75], verdicts.OTHER_SCALE),
        ([0.45, 0.6], [0.3, 0.4], verdicts.OTHER_SCALE),  # not above chance
        ([0.5, 0.55], [0.6, 0.7], verdicts.DIFFERS),
        ([0.3, 0.45], [0.2, 0.4], verdicts.DIFFERS),  # below chance
    ],
)
def test_credit_is_judged_by_chance_and_the_scalar(
    monkeypatch, gvm: list[float], rm: list[float], verdict: str
) -> None:
    rows = [
        {"method": CREDIT[name], "metric": "AUROC", "measured": sum(ci95) / 2, "ci95": ci95, "seeds": 3}
        for name, ci95 in (("gvm", gvm), ("rm", rm))
    ]
    monkeypatch.setattr("reproduce.tables.extra.credit", lambda book: {"rows": rows})
    assert _credit(None)[0][0] == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(0, 10, verdicts.REPRODUCED), (10, 0, verdicts.DIFFERS), (1, 2, verdicts.OTHER_SCALE)],
)
def test_stability_is_judged_by_fishers_test(monkeypatch, ours: int, theirs: int, verdict: str) -> None:
    runs = [
        Stability(name, 10, ["x"] * collapsed, None, 0.0)
        for name, collapsed in (("DVPO (A = Q)", ours), ("PPO", theirs))
    ]
    monkeypatch.setattr("reproduce.tables.study.stability", lambda book: runs)
    assert [v for v, _ in _stable(None)] == [verdict]  # type: ignore[arg-type]


def test_a_benchmark_over_seeds() -> None:
    def of(score: float) -> dict[str, Any]:
        return {"score": score, "ci95": [score - 0.1, score + 0.1], "judge": None, "n": 80, "part": None}

    (found,) = [
        r for r in tables.TABLES[1](made({"mt-bench/dvpo-gae": [of(5.0), of(5.2), of(5.4)]}))["rows"] if r["measured"]
    ]
    half = 4.303 * 0.2 / 3**0.5
    assert (found["measured"], found["n"], found["seeds"]) == (5.2, 240, 3)
    assert found["ci95"] == pytest.approx([5.2 - half, 5.2 + half], abs=1e-3)


def test_sections_are_in_percent_and_whole_in_every_seed() -> None:
    def of(whole: int) -> dict[str, Any]:
        accuracy = {"bellman": {"accuracy": 0.9, "ci95": [0.85, 0.95]}}
        return {"sections": {"Chat": {"accuracy": accuracy, "pairs": 358, "of": whole}}}

    (whole,) = [r for r in tables.TABLES[3](made({"rewardbench/gvm": [of(358)]}))["rows"] if r["measured"]]
    assert whole["ci95"] == [85.0, 95.0]
    (part,) = [r for r in tables.TABLES[3](made({"rewardbench/gvm": [of(358), of(400)]}))["rows"] if r["measured"]]
    assert part["metric"] == "Chat (part of it)"


def test_an_accuracy_of_the_papers_model_is_judged(tmp_path: Path) -> None:
    pairs = [
        {"prompt": i, "better": {"mean": float(i % 20 > 0), "tokens": 1}, "worse": {"mean": 0.5, "tokens": 1}}
        for i in range(200)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    book = made({"in-domain/gvm": [{}]})
    book.results["seed0/in-domain/gvm"] = Result(tmp_path, {"metrics": {}}, "d")
    found = [r for r in tables.TABLES[4](book)["rows"] if r["method"] == "GVM" and r["measured"]]
    assert [(r["measured"], r["verdict"]) for r in found] == [(95.0, verdicts.DIFFERS)]
