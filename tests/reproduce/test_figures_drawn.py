"""What Figures 2 to 4 are drawn from, and that each is there at every recipe, drawn or saying that it was not run."""

import json
from pathlib import Path
from typing import Any

import pytest

from reproduce import drawn, recipe, verdicts
from reproduce.pipeline import Result
from reproduce.tables import Book, pictures


@pytest.mark.parametrize("name", ["tiny", "small", "llama3-8b-base"])
def test_figures_2_to_4_are_there_where_nothing_was_run(name: str, tmp_path: Path) -> None:
    made = drawn.figures(Book(recipe.load(name), {}), tmp_path, {"F2", "F3", "F4"})
    assert [f["figure"] for f in made] == [2, 3, 4]
    for figure in made:
        assert figure["files"] == []
        assert figure["caption"].startswith("Not run")
        assert {r["verdict"] for r in figure["rows"]} == {verdicts.NOT_RUN}
        assert {r["measured"] for r in figure["rows"]} == {None}


def test_only_what_is_wanted_is_drawn(book: Book, tmp_path: Path) -> None:
    (figure,) = drawn.figures(book, tmp_path, {"F2", "T5"})
    assert figure["figure"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure_2.png", "figure_2.svg"]


def test_win_rates_are_the_files(book: Book) -> None:
    def gold(name: str) -> list[float]:
        paths = [book.results[f"seed{s}/gold/{name}"].path / "gold.jsonl" for s in range(5)]
        return [json.loads(line)["gold"] for path in paths for line in path.read_text().splitlines()]

    ours, sft = gold("dvpo-q"), gold("sft")
    expected = 100 * sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, sft, strict=True)) / len(ours)
    rows = {r["method"]: r for r in pictures.win_rows(book)}
    found = rows["DVPO (A = Q) against SFT"]
    assert found["measured"] == pytest.approx(expected, abs=1e-4)
    assert (found["paper"], found["verdict"], found["n"]) == (None, verdicts.REPRODUCED, 600)
    assert rows["DVPO (A = Q) against PPO"]["verdict"] == verdicts.OTHER_SCALE, "the paper says nothing in numbers"


def test_ties_are_half(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Book, "gains", lambda *_: [[0.0, 0.1, -0.1, 0.0]])
    assert pictures.outcomes(book, "dvpo-q", "sft") == [[0.5, 1.0, 0.0, 0.5]]


def test_smoothing_by_hand() -> None:
    assert pictures.smoothed([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


def test_peaks_are_shares_of_the_run(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    log = [{"update": i + 1, "gold": float(g)} for i, g in enumerate([0, 9, 0, 0, 0, 0, 0, 0, 0, 0])]
    monkeypatch.setattr(Book, "curves", lambda self, name: [log] if name == "ppo" else [])
    assert pictures.peaks(book) == {"ppo": [0.2]}  # means of five: the highest is at the second update
    assert pictures.peak_direction(book) == []


def test_the_tokens_that_the_paper_names(tmp_path: Path) -> None:
    """Real tokenizers put a space before a word; "not" is looked for in the first answer, the others in the second."""
    shown = [
        {"label": "1", "tokens": [" is", " not", "."], "q": [0.9, 0.25, 0.0]},
        {"label": "2", "tokens": [" is", " an", "."], "q": [-0.5, -0.25, 0.0]},
    ]
    (tmp_path / "tokens.json").write_text(json.dumps(shown))
    book = Book(recipe.load("small"), {"seed0/token-values": Result(tmp_path, {}, "digest")})
    rows: list[dict[str, Any]] = pictures.token_rows(book)
    assert [(r["paper"], r["measured"]) for r in rows] == [(0.2099, 0.25), (-0.6177, -0.5), (-0.4766, -0.25)]
    assert {r["verdict"] for r in rows} == {verdicts.OTHER_SCALE}


@pytest.mark.slow
def test_every_figure_of_a_whole_run_is_written_twice(book: Book, tmp_path: Path) -> None:
    for figure in drawn.figures(book, tmp_path, None):
        assert sorted(Path(f).suffix for f in figure["files"]) == [".png", ".svg"]
        assert all(Path(f).stat().st_size > 1000 for f in figure["files"])
