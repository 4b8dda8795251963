"""The estimator study: over-optimisation, collapse and comparisons on curves whose answers are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reproduce import tables
from reproduce.tables import Book, page, study
from reproduce.tables.paired import Paired, holm
from reproduce.tables.study import Comparison, collapse, drift, fisher

Log = list[dict[str, float]]


def log(gold: list[float], value: list[float] | None = None, length: list[float] | None = None) -> Log:
    value, length = value or [0.1 * i for i in range(len(gold))], length or [10.0] * len(gold)
    names = ("gold", "value", "length")
    return [dict(zip(names, row, strict=True), kl=0.1) for row in zip(gold, value, length, strict=True)]


def wave(*thirds: float) -> list[float]:
    return [v for third in thirds for v in [third] * 5]


class TestDrift:
    def test_thirds_and_changes_by_hand(self) -> None:
        found = drift("x", [log(wave(0.0, 0.4, 0.2)), log(wave(0.2, 0.6, 0.3)), log(wave(0.1, 0.5, 0.2))], 0.05)
        assert found.gold == pytest.approx([0.1, 0.5, 0.7 / 3])
        half = 4.303 * 0.05774 / 3**0.5  # Student's t: the changes are -0.2, -0.3 and -0.3
        assert found.gold_change == pytest.approx((-0.8 / 3 - half, -0.8 / 3 + half), abs=1e-4)
        assert found.reading == "visible"

    @pytest.mark.parametrize(
        ("last", "value", "reading"),
        [
            ((0.6, 0.62, 0.64), wave(0, 1, 2), "absent"),  # it rises
            ((0.5, 0.6, 0.7), wave(0, 1, 2), "cannot be told"),  # by too little for seeds so far apart
            ((0.46, 0.47, 0.48), wave(0, 1, 2), "visible"),  # it falls by little, but in every seed
            ((0.49, 0.495, 0.505), wave(0, 1, 2), "absent"),  # a fall above the margin is ruled out
            ((0.1, 0.1, 0.2), wave(0, 1, 0.5), "cannot be told"),  # it falls, and the value with it
            ((0.1, 0.9, 0.4), wave(0, 1, 2), "cannot be told"),  # the seeds do not agree
        ],
    )
    def test_readings(self, last: tuple[float, ...], value: list[float], reading: str) -> None:
        curves = [log(wave(0.3, 0.5, end), value) for end in last]
        assert drift("x", curves, 0.05).reading == reading

    def test_two_seeds_are_too_few(self) -> None:
        curves = [log(wave(0.3, 0.5, 0.0))] * 2
        assert drift("x", curves, 0.05).reading.startswith("cannot be told (fewer than 3")


class TestCollapse:
    @pytest.mark.parametrize(
        ("gold", "length", "why"),
        [
            (wave(0.5, 0.5, 0.31), None, None),
            (wave(0.5, 0.9, 0.29), None, "gold +0.50 to +0.29"),  # from the first updates, not from the peak
            (wave(0.5, 0.5, 0.5), wave(20, 20, 5.1), None),
            (wave(0.5, 0.5, 0.5), wave(20, 20, 4.9), "length 20.0 to 4.9"),
            (wave(0.5, 0.5, 0.5), wave(10, 10, 41), "length 10.0 to 41.0"),
        ],
    )
    def test_definition(self, gold: list[float], length: list[float] | None, why: str | None) -> None:
        assert collapse(log(gold, None, length)) == why

    def test_the_definition_is_in_the_words(self) -> None:
        assert f"more than {study.FALL}" in study.COLLAPSE
        assert f"first {study.ENDS} updates" in study.COLLAPSE

    def test_fisher_by_hand(self) -> None:
        """3 of 3 against 0 of 3: 1 of 20 tables, and the mirrored one: 0.1. 1 of 2 against 1 of 2: all as likely."""
        assert fisher(3, 3, 0, 3) == pytest.approx(0.1)
        assert fisher(0, 3, 3, 3) == pytest.approx(0.1)
        assert fisher(1, 2, 1, 2) == pytest.approx(1.0)
        assert fisher(0, 5, 0, 5) == 1.0
        assert fisher(5, 5, 0, 5) == pytest.approx(2 / 252)


class TestStudy:
    def test_comparisons_are_told_as_they_were_made(self, book: Book) -> None:
        found = {(c.left, c.right): c for c in study.comparisons(book)}
        assert len(found) == 3 + 4 * 3
        own = study.VARIANTS[""]
        gae_q = found[f"A = Q, {own}", f"GAE, {own}"]
        assert gae_q.told and gae_q.test.mean == pytest.approx(-0.15, abs=0.03)
        assert gae_q.sentence().startswith(f"A = Q, {own} is below GAE, {own}: -0.1")
        same = found[f"official, {study.VARIANTS['td0']}", f"official, {own}"]
        assert not same.told
        assert "cannot be told from" in same.sentence()
        assert all(c.bootstrap >= c.test.p_bootstrap and c.flip >= c.test.p_flip for c in found.values())

    def test_over_optimisation_and_collapse_are_found(self, book: Book) -> None:
        readings = {d.name: d.reading for d in study.drifts(book)}
        assert readings.pop(study.label("gae", "td0")) == "visible"
        assert readings.pop(study.label("official", "td1")) == "visible"
        assert set(readings.values()) == {"absent"}
        collapsed = {s.name: len(s.collapsed) for s in study.stability(book) if s.collapsed}
        assert collapsed == {study.label("official", "td1"): 5}
        assert {s.runs for s in study.stability(book)} == {5}

    @pytest.mark.slow
    def test_the_page_and_its_document(self, book: Book, tmp_path: Path) -> None:
        section = page.study_section(book, tmp_path)
        assert section is not None
        assert [s.title for s in section.sheets] == [
            "Paired comparisons of gold score",
            "Over-optimisation",
            "Stability",
        ]
        for sheet in section.sheets:
            assert all(len(row) == len(sheet.head) for row in sheet.rows)
        text = " ".join(section.paragraphs)
        assert "Over-optimisation: visible for GAE, GVM of TD lambda 0; official, GVM of TD lambda 1." in text
        assert "5 of 105 runs collapsed: official, GVM of TD lambda 1 (5 of 5)." in text
        assert "With 5 seeds it cannot be below 0.0625" in section.sheets[0].note
        assert {Path(f).suffix for figure in section.figures for f in figure["files"]} == {".svg", ".png"}
        document = json.loads(json.dumps(page.study_document(book), allow_nan=False))
        assert len(document["comparisons"]) == 15
        assert document["stability"]["definition"] == study.COLLAPSE

    def test_without_the_study_there_is_no_page(self, made_up: Callable[..., Book], tmp_path: Path) -> None:
        plain = made_up(1, False)
        assert page.study_section(plain, tmp_path) is None
        assert study.table(plain) is None
        made: Any = tables.make(plain.recipe, plain.results, {"T5"}, tmp_path)
        assert (made.sections, made.study) == ([], None)

    def test_a_study_in_part_is_shown_in_part(self, made_up: Callable[..., Book]) -> None:
        some = made_up(3, True, lambda name: "@" in name and "gae@td0" not in name)
        assert [c.left for c in study.comparisons(some)][3:] == [study.label("gae", "td0")]


@pytest.mark.parametrize(
    ("ci95", "bootstrap", "flip", "told"),
    [
        ((0.1, 0.3), 0.04, 0.04, True),
        ((0.1, 0.3), 0.06, 0.01, False),
        ((0.1, 0.3), 0.01, 0.06, False),
        ((-0.1, 0.3), 0.01, 0.01, False),
        ((0.0, 0.3), 0.01, 0.01, False),
        ((-0.3, -0.1), 0.01, 0.01, True),
    ],
)
def test_told_apart_takes_both_tests_and_the_interval(ci95, bootstrap: float, flip: float, told: bool) -> None:
    assert Comparison("a", "b", Paired(3, 0.1, ci95, 0.01, 0.01, 0.01), bootstrap, flip).told == told


def test_a_collapse_is_between_means_of_updates_not_between_two() -> None:
    gold = [0.9] + [0.5] * 13 + [0.4]
    assert collapse([{"gold": g, "length": 10.0} for g in gold]) is None


def test_comparisons_are_one_family(book: Book) -> None:
    found = study.comparisons(book)
    assert [c.bootstrap for c in found] == holm([c.test.p_bootstrap for c in found])
    assert [c.flip for c in found] == holm([c.test.p_flip for c in found])


def test_stability_by_hand(book: Book) -> None:
    ppo = next(s for s in study.stability(book) if s.name == "PPO")
    ends = [np.mean([r["gold"] for r in log[-study.ENDS :]]) for log in book.curves("ppo")]
    assert ppo.spread == pytest.approx(np.std(ends, ddof=1))
    assert ppo.largest_kl == pytest.approx(0.29)
