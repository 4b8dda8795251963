"""The paper's judge of five points: its form, both ways of showing answers, and the table by hand."""

import json
import re
from pathlib import Path

import pytest

from dvpo.data.records import Example
from dvpo.evaluation.answers import Answer
from dvpo.evaluation.benchmark_data import Question, prompts_of
from dvpo.evaluation.judge import Reply
from dvpo.evaluation.win_rate import PROMPTS, Comparison, comparisons, points, requests, table

QUESTIONS = [Question(name, (f"prompt {name}",)) for name in "stuv"]
OURS = [Answer((f"ours {q.id}",)) for q in QUESTIONS]
THEIRS = [Answer((f"theirs {q.id}",)) for q in QUESTIONS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 4 Evaluation evidence: good", (4,)),
        ("**Score:** 3\nEvaluation evidence: 5 points", (3,)),
        ("Score: <2>", (2,)),
        ("score = 4.5", (4.5,)),
        ("Score: 5/5", (5,)),
        ("Score: 0", (0,)),
        ("Score (0-5): 4", (4,)),
        ("Score [0 to 5]: 3", (3,)),
        ("**Score (out of 5):** **4**/5", (4,)),
        ("Score: 4 out of 5", (4,)),
        ("Score: 4 (of 5)", (4,)),
        ("Score: [[4]]", (4,)),
        ("Score: (3.5/5)", (3.5,)),
        ("Score: 4. It is good.", (4,)),
        ("Score: 4 - good", (4,)),
        ("Score: 4\nOf 3 claims one is wrong.", (4,)),
        ("Score: 4\n- 1 point is missing for focus", (4,)),
        ("Score:\n**4**\nEvaluation evidence: good", (4,)),
        ("### __Total score__: 3", (3,)),
        ("Score\uff1a4", (4,)),
        ('{"score": 4, "evaluation evidence": "good"}', (4,)),
        ("To score 5 points an answer must be perfect. Score: 2", (2,)),
        ("Score: 0-5\nScore: 3", (3,)),
        ("Score: <total>\nScore: 3", (3,)),
        ("Score: (0-5) 4", None),
        ("Score: 3\u20134", None),
        ("Score: 3 or 4", None),
        ("Score: 4,5", None),
        ("Score: 1 + 1 + 1 + 0 + 0 = 3", None),
        ("Score:\n1. It is on the topic: 1\n2. It deals with a part: 1\nTotal: 2", None),
        ("Score: 4/10", None),
        ("Score: **4** out of 10", None),
        ("A score of 5 is rare.", None),
        ("Score: 6", None),
        ("Score: 45", None),
        ("Score: -1", None),
        ("Score: four", None),
        ("I give it 4.", None),
        ("Underscore: 4", None),
        ("", None),
    ],
)
def test_the_papers_form(text: str, expected: tuple[float, ...] | None) -> None:
    assert points(text) == expected


def test_two_scores_are_told_apart_by_their_letters() -> None:
    assert points("Score A: 4\nScore B: 2\nEvaluation evidence: ...", "AB") == (4, 2)
    assert points("Score B: 2\n**Score A**: 4", "AB") == (4, 2)
    assert points("Score A (0-5): 4\nScore B (0-5): 2", "AB") == (4, 2)
    assert points('{"Score A": 4, "Score B": 2}', "AB") == (4, 2)
    assert points("Score A: 4", "AB") is None
    assert points("Score A/B: 4/2", "AB") is None
    assert points("Score A: 4 Score B: 9", "AB") is None


def test_the_papers_own_judgments_are_read() -> None:
    """Tables 11 to 13 of the paper show three judgments: 3, 3 and 5."""
    paper = Path(__file__).parents[3] / "shared" / "paper" / "dvpo_paper.txt"
    if not paper.is_file():
        pytest.skip("the paper's text is not beside this checkout")
    shown = re.findall(r"^GPT4-as-Judge (Score:.*)", paper.read_text(encoding="utf-8"), re.MULTILINE)
    assert [points(text) for text in shown] == [(3,), (3,), (5,)]


def said(*texts: str) -> list[Reply]:
    return [Reply(text, finish="stop") for text in texts]


def test_alone_each_answer_is_scored_once() -> None:
    asked = requests(QUESTIONS[:1], OURS[:1], THEIRS[:1], PROMPTS["alone"], 9)[0]
    first, second = (r.messages[-1]["content"] for r in asked)
    assert "ours s" in first
    assert "theirs s" not in first
    assert "theirs s" in second
    assert "ours s" not in second
    assert all("prompt s" in text for text in (first, second))


def test_the_table_by_hand() -> None:
    replies = [said("Score: 4", "Score: 2"), said("Score: 3", "Score: 3"), said("Score: 1", "Score: 5")]
    replies.append([*said("no number"), Reply(None, "timed out")])
    result = table(comparisons(QUESTIONS, OURS, THEIRS, replies, "alone"))
    assert (result["wins"], result["ties"], result["losses"]) == (1, 1, 1)
    assert result["win_rate"] == 50
    assert result["points"] == {"policy": pytest.approx(8 / 3), "baseline": pytest.approx(10 / 3)}
    assert result["bounds"] == [100 * 1.5 / 4, 100 * 2.5 / 4]
    assert (result["questions"], result["failed"]) == (4, 1)
    assert result["failures"] == {"unparsable": 1, "timed out": 1}


def test_together_both_orders_are_averaged() -> None:
    asked = requests(QUESTIONS[:1], OURS[:1], THEIRS[:1], PROMPTS["together"], 9)[0]
    first, second = (r.messages[-1]["content"] for r in asked)
    assert first.index("ours s") < first.index("theirs s")
    assert second.index("theirs s") < second.index("ours s")
    # First order: ours 4, theirs 3. Second order: theirs 5, ours 2.
    (found,) = comparisons(
        QUESTIONS[:1], OURS[:1], THEIRS[:1], [said("Score A: 4 Score B: 3", "Score A: 5 Score B: 2")], "together"
    )
    assert (found.policy, found.baseline) == (3, 4)


def test_a_judge_that_always_prefers_one_place_ties() -> None:
    replies = [said("Score A: 5 Score B: 1", "Score A: 5 Score B: 1") for _ in QUESTIONS]
    assert table(comparisons(QUESTIONS, OURS, THEIRS, replies, "together"))["ties"] == 4


def test_swapping_the_sides_mirrors_the_rate() -> None:
    replies = [said(f"Score: {a}", f"Score: {b}") for a, b in ((5, 1), (2, 2), (4, 3), (0, 1))]
    there = table(comparisons(QUESTIONS, OURS, THEIRS, replies, "alone"))
    back = table(comparisons(QUESTIONS, THEIRS, OURS, [r[::-1] for r in replies], "alone"))
    assert back["win_rate"] == 100 - there["win_rate"]
    assert (back["wins"], back["losses"]) == (there["losses"], there["wins"])


def test_a_missing_answer_and_no_score_at_all_are_said() -> None:
    (found,) = comparisons(QUESTIONS[:1], OURS[:1], [Answer((), "prompt too long")], [[]], "alone")
    assert found.failures == ("no answer: prompt too long (baseline)",)
    result = table([Comparison("s", None, None, ("refused", "refused"))])
    assert (result["win_rate"], result["ci95"], result["points"]) == (None, None, {"policy": None, "baseline": None})
    assert result["bounds"] == [0, 100]
    json.dumps(result, allow_nan=False)


def test_prompts_of_data_are_questions_once_with_what_was_said_before() -> None:
    talk = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    )
    plain = ({"role": "user", "content": "Why?"},)
    made = prompts_of([Example(p, (), (), f"f:{i}") for i, p in enumerate((talk, plain, plain))], "win rate")
    assert [(q.turns, len(q.context)) for q in made.questions] == [(("Why?",), 2), (("Why?",), 0)]
    assert made.part is None
    asked = requests(made.questions, OURS[:2], THEIRS[:2], PROMPTS["alone"], 9)
    assert "[assistant] Hello" in asked[0][0].messages[-1]["content"]
    assert "[user]" not in asked[1][0].messages[-1]["content"]
