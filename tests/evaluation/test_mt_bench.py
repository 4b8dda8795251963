"""MT-Bench: what the judge is shown, both rating patterns, and the table by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo.errors import InputError
from dvpo.evaluation.answers import Answer
from dvpo.evaluation.benchmark_data import Question, load
from dvpo.evaluation.judge import Reply
from dvpo.evaluation.mt_bench import PROMPT, Judgment, judgments, rating, requests, table, temperatures

MATH = Question("111", ("2+2?", "And 3+3?"), "math", ("four", "six"))
HALF = Question("103", ("Why?", "And why is that?"), "reasoning", ("Because.", ""))
LATE = Question("121", ("Code?", "More?"), "coding", ("", "print"))
PLAIN = Question("81", ("Write.", "Rewrite."), "writing", ("ignored", "ignored"))
BARE = Question("123", ("Code a page.", "Again."), "coding")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good. Rating: [[7]]", 7),
        ("Rating: [[7.5]] of 10", 7.5),
        ("[[3]] and later [[9]]", 3),
        ("Rating: [8]", 8),
        ("[1] is a citation, but [[6]]", 6),
        ("[1] says so. Rating: [[8/10]]", 8),
        ("Rating: [[ 7.5 / 10 ]]", 7.5),
        ("Rating: [8/10]", 8),
        ("[[4/5]]", None),
        ("[[0]]", 0),
        ("[[10]]", 10),
        ("[[11]]", None),
        ("[85]", None),
        ("7 out of 10", None),
        ("[[seven]]", None),
        ("[[-3]]", None),
        ("", None),
    ],
)
def test_both_rating_patterns(text: str, expected: float | None) -> None:
    assert rating(text) == expected


@given(st.text(alphabet="ab .\n", max_size=30), st.integers(0, 100))
def test_a_rating_is_found_in_any_prose(prose: str, tenths: int) -> None:
    assert rating(f"{prose}[[{tenths / 10}]]{prose}") == tenths / 10
    assert rating(f"{prose}[{tenths / 10}]{prose}") == tenths / 10


def test_a_category_has_its_temperature() -> None:
    categories = ("writing", "roleplay", "extraction", "math", "coding", "reasoning", "stem", "humanities")
    questions = [Question(c, ("a", "b"), c) for c in categories]
    assert temperatures(questions) == [0.7, 0.7, 0, 0, 0, 0, 0.1, 0.1]


def shown(question: Question) -> list[str]:
    ((first, second),) = requests([question], [Answer(("one", "two"))], PROMPT, 99)
    assert {first.prompt_sha256, second.prompt_sha256} == {PROMPT.sha256}
    assert (first.max_tokens, first.temperature) == (99, 0)
    return ["\n".join(m["content"] for m in r.messages) for r in (first, second)]


def test_the_first_turn_is_judged_alone_and_the_second_with_the_whole_talk() -> None:
    first, second = shown(PLAIN)
    assert "Write." in first
    assert "one" in first
    assert "Rewrite." not in first
    assert "two" not in first
    places = [second.index(piece) for piece in ("Write.", "\none\n", "Rewrite.", "\ntwo\n")]
    assert places == sorted(places)


def test_only_math_reasoning_and_coding_show_their_reference() -> None:
    first, second = shown(MATH)
    assert "four" in first
    assert "six" not in first
    assert "four" in second
    assert "six" in second
    assert not any("ignored" in text or "eference" in text for text in shown(PLAIN))
    assert not any("eference" in text for text in shown(BARE))


def test_an_empty_reference_is_not_shown_as_one() -> None:
    first, second = shown(HALF)
    assert "Because." in first
    assert "Because." in second
    assert "(none)" in second
    first, second = shown(LATE)
    assert "eference" not in first
    assert "print" in second


def test_the_table_by_hand() -> None:
    questions = [MATH, PLAIN, BARE, HALF]
    answers = [Answer(("a", "b")), Answer(("a", "b")), Answer((), "prompt too long"), Answer(("a", "b"))]
    replies = [
        [Reply("[[4]]", finish="stop"), Reply("[[5]]", finish="stop")],
        [Reply("Rating: [9]", finish="stop"), Reply("no number", finish="stop")],
        [],
        [Reply(None, "timed out"), Reply("Sorry, I cannot.", finish="stop")],
    ]
    assert [len(r) for r in requests(questions, answers, PROMPT, 9)] == [2, 2, 0, 2]
    found = judgments(questions, answers, replies)
    result = table(found)
    assert [(j.question, j.turn, j.rating, j.failure) for j in found] == [
        ("111", 1, 4, None),
        ("111", 2, 5, None),
        ("81", 1, 9, None),
        ("81", 2, None, "unparsable"),
        ("123", 1, None, "no answer: prompt too long"),
        ("123", 2, None, "no answer: prompt too long"),
        ("103", 1, None, "timed out"),
        ("103", 2, None, "refused"),
    ]
    assert result["score"] == 6  # (4 + 5 + 9) / 3
    assert (result["turn_1"], result["turn_2"]) == (6.5, 5)
    assert result["categories"] == {"writing": 9, "reasoning": None, "math": 4.5, "coding": None}
    assert result["bounds"] == [(18 + 5 * 1) / 8, (18 + 5 * 10) / 8]
    assert (result["judgments"], result["failed"]) == (8, 5)
    assert result["failures"] == {"no answer: prompt too long": 2, "unparsable": 1, "timed out": 1, "refused": 1}
    assert result["without_reference"] == 2  # both turns of the coding question


def test_both_turns_of_a_question_are_drawn_together() -> None:
    """Two questions with ratings 1, 1 and 9, 9: a draw's mean is 1, 5 or 9, never 3."""
    found = [Judgment(q, "writing", t, r, None, False) for q, r in (("a", 1.0), ("b", 9.0)) for t in (1, 2)]
    assert table(found)["ci95"] == [1, 9]


def test_no_rating_at_all_is_said_and_not_a_number() -> None:
    result = table([Judgment("a", "writing", t, None, "unparsable", False) for t in (1, 2)])
    assert (result["score"], result["ci95"], result["categories"]) == (None, None, {"writing": None})
    assert result["bounds"] == [1, 10]
    json.dumps(result, allow_nan=False)


def rows(n: int, **changes) -> list[dict]:
    categories = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
    return [
        {"question_id": 81 + i, "category": categories[i * 8 // n], "turns": [f"q{i}", f"r{i}"], **changes}
        for i in range(n)
    ]


def write(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_part_is_named_as_a_part_and_has_every_category(tmp_path) -> None:
    write(tmp_path / "mt_bench_questions.jsonl", rows(80))
    whole, part = load("mt_bench", tmp_path), load("mt_bench", tmp_path, most=8)
    assert (whole.name, whole.part) == ("MT-Bench", None)
    assert part.part == "8 of 80 questions"
    assert len({q.category for q in part.questions}) == 8
    assert whole.sha256 != part.sha256
    write(tmp_path / "mt_bench_questions.jsonl", rows(79))
    assert load("mt_bench", tmp_path).part == "79 of 80 questions"


def test_reference_answers_beside_the_questions_are_used(tmp_path) -> None:
    write(tmp_path / "mt_bench_questions.jsonl", rows(8, reference=["short", "hint"]))
    write(
        tmp_path / "mt_bench_reference_answers.jsonl",
        [{"question_id": 84, "choices": [{"turns": ["long", "answer"]}]}],
    )
    references = {q.id: q.reference for q in load("mt_bench", tmp_path).questions}
    assert references["84"] == ("long", "answer")
    assert references["85"] == ("short", "hint")


def test_the_forms_of_other_sources_are_read(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [{"prompt_id": 1, "category": "stem", "prompt": ["a", "b"], "reference": []}])
    assert load("mt_bench", path).questions == (Question("1", ("a", "b"), "stem"),)
    write(path, [{"uid": "u", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "a"}]}])
    assert load("arena_hard", path).questions == (Question("u", ("a",), "c"),)
    write(path, [{"instruction": "a", "dataset": "koala"}, {"instruction": "b", "dataset": "koala"}])
    assert [q.id for q in load("alpaca_eval", path).questions] == ["1", "2"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "no questions"),
        (rows(2, question_id=81), "2 questions of the id 81"),
        (rows(1, turns=["one"]), "question 81 has 1 turns and MT-Bench 2"),
        (rows(1, category="sport"), "category sport"),
        (rows(1, turns=["a", ""]), 'questions.jsonl:1: field "turns"'),
        (rows(81), "more than the 80"),
    ],
)
def test_malformed_questions_are_refused(lines, says, tmp_path) -> None:
    write(tmp_path / "mt_bench_questions.jsonl", lines)
    with pytest.raises(InputError) as error:
        load("mt_bench", tmp_path)
    assert says in str(error.value)


def test_a_folder_needs_exactly_one_file_of_questions(tmp_path) -> None:
    with pytest.raises(InputError, match="has none for the questions of Arena-Hard"):
        load("arena_hard", tmp_path)
    for name in ("mt_bench_a.jsonl", "mt_bench_b.jsonl"):
        write(tmp_path / name, rows(1))
    with pytest.raises(InputError, match=r"mt_bench_a.jsonl, mt_bench_b.jsonl"):
        load("mt_bench", tmp_path)
