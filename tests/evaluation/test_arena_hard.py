"""Arena-Hard: games, labels and weights by hand; Bradley-Terry against a closed form and a plain loop."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo.evaluation import arena_hard
from dvpo.evaluation.answers import Answer
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.arena_hard import PROMPT, Game, bradley_terry, games, label, requests, table
from dvpo.evaluation.benchmark_data import Question
from dvpo.evaluation.judge import Judge, Reply

QUESTIONS = [Question(name, (f"prompt {name}",)) for name in "stuv"]
OURS = [Answer((f"ours {q.id}",)) for q in QUESTIONS]
THEIRS = [Answer((f"theirs {q.id}",)) for q in QUESTIONS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My verdict: [[A>>B]]", "A>>B"),
        ("[[B>A]] ... so again [[B>A]]", "B>A"),
        ("[[A>B]] or rather [[A=B]]", None),
        ("[[A<<B]]", "A<<B"),
        ("[[A]]", None),
        ("The matrix [[A]] is right: [[B>A]]", "B>A"),
        ("A>>B", None),
        ("[A>B]", None),
        ("", None),
    ],
)
def test_labels(text: str, expected: str | None) -> None:
    assert label(text) == expected


def test_the_places_are_swapped_in_the_second_game() -> None:
    first, second = requests(QUESTIONS, OURS, THEIRS, PROMPT, 7)[1]
    for request, (a, b) in ((first, ("theirs t", "ours t")), (second, ("ours t", "theirs t"))):
        text = request.messages[-1]["content"]
        assert text.index("prompt t") < text.index("Assistant A") < text.index(a)
        assert text.index(a) < text.index("Assistant B") < text.index(b)
        assert (request.max_tokens, request.temperature) == (7, 0)


def said(*labels: str | None) -> list[Reply]:
    return [Reply("?" if x is None else f"so [[{x}]]", finish="stop") for x in labels]


def test_the_table_by_hand() -> None:
    # The policy is B in the first game of each prompt and A in the second.
    replies = [said("A>>B", "A>B"), said("B>A", "A=B"), said(None, "A>>B"), []]
    answers = [*OURS[:3], Answer((), "prompt too long")]
    played = games(QUESTIONS, answers, THEIRS, replies)
    assert [(g.policy_is, g.policy_wins, g.weight) for g in played] == [
        ("B", 0, 3),
        ("A", 1, 1),
        ("B", 1, 1),
        ("A", 0.5, 1),
        ("B", None, 0),
        ("A", 1, 3),
        ("B", None, 0),
        ("A", None, 0),
    ]
    result = table(played)
    # 0 three times, 1, 1, 0.5, 1 three times; without the third prompt, which has one game: 0 three times, 1, 1, 0.5.
    assert result["bradley_terry"]["win_rate"] == pytest.approx(100 * 5.5 / 9)
    assert result["bradley_terry"]["games"] == 5
    assert result["mean"]["win_rate"] == pytest.approx(100 * 2.5 / 6)
    assert result["mean"]["questions"] == 2
    assert result["labels"] == {"A>>B": 1, "A>B": 2, "A=B": 1, "B>A": 0, "B>>A": 1}
    assert result["bounds"] == [pytest.approx(100 * 5.5 / 12), pytest.approx(100 * 8.5 / 12)]
    assert (result["judgments"], result["failed"]) == (8, 3)
    assert result["failures"] == {"no answer: prompt too long": 2, "unparsable": 1}
    for part in ("bradley_terry", "mean"):
        low, high = result[part]["ci95"]
        assert low < result[part]["win_rate"] < high


def test_mirrored_labels_mean_the_same() -> None:
    pairs = [("A>>B", "B<<A"), ("A>B", "B<A"), ("A=B", "B=A"), ("B>A", "A<B"), ("B>>A", "A<<B")]
    for one, other in pairs:
        first, second = (games(QUESTIONS[:1], OURS[:1], THEIRS[:1], [said(x, x)]) for x in (one, other))
        assert [(g.policy_wins, g.weight) for g in first] == [(g.policy_wins, g.weight) for g in second]


def test_a_judge_that_always_prefers_one_place_is_even() -> None:
    replies = [said("A>>B", "A>>B") for _ in QUESTIONS]
    result = table(games(QUESTIONS, OURS, THEIRS, replies))
    assert result["bradley_terry"]["win_rate"] == result["mean"]["win_rate"] == 50


def test_a_missing_baseline_answer_is_said() -> None:
    played = games(QUESTIONS[:1], OURS[:1], [Answer((), "not in the file")], [[]])
    assert {g.failure for g in played} == {"no answer: not in the file (baseline)"}
    assert requests(QUESTIONS[:1], OURS[:1], [Answer((), "not in the file")], PROMPT, 9) == [[]]


def test_nothing_judged_is_no_number() -> None:
    result = table([Game("s", "A", None, "timed out")])
    assert result["bradley_terry"] == {"win_rate": None, "ci95": None, "games": 0}
    assert result["mean"]["win_rate"] is None
    assert result["bounds"] == [0, 100]
    json.dumps(result, allow_nan=False)


def test_all_won_is_one_hundred() -> None:
    result = table(games(QUESTIONS, OURS, THEIRS, [said("B>>A", "A>>B") for _ in QUESTIONS]))
    assert result["bradley_terry"] == {"win_rate": 100, "ci95": [100, 100], "games": 8}


@given(st.floats(0.5, 1000), st.floats(0.5, 1000))
def test_two_players_have_a_closed_form(ours: float, theirs: float) -> None:
    found = bradley_terry(np.array([[0, ours], [theirs, 0]]))
    assert found == pytest.approx([ours / (ours + theirs), theirs / (ours + theirs)])


def ascended(wins: list[list[float]], rounds: int = 20_000) -> list[float]:
    """Bradley-Terry by plain gradient ascent on log-strengths, one game after the other."""
    size = len(wins)
    log_strength = [0.0] * size
    total = sum(map(sum, wins))
    for _ in range(rounds):
        slope = [0.0] * size
        for i in range(size):
            for j in range(size):
                if wins[i][j]:
                    beaten = 1 / (1 + math.exp(log_strength[i] - log_strength[j]))
                    slope[i] += wins[i][j] * beaten
                    slope[j] -= wins[i][j] * beaten
        log_strength = [x + 4 * s / total for x, s in zip(log_strength, slope, strict=True)]
    strength = [math.exp(x) for x in log_strength]
    return [s / sum(strength) for s in strength]


@pytest.mark.parametrize("seed", range(3))
def test_many_players_agree_with_a_plain_loop(seed: int) -> None:
    rng = random.Random(seed)
    wins = [[0.0 if i == j else rng.randrange(1, 12) / 2 for j in range(4)] for i in range(4)]
    assert bradley_terry(np.array(wins)) == pytest.approx(ascended(wins, 3000), abs=1e-6)


def test_policies_that_met_only_the_baseline_do_not_move_each_other() -> None:
    """The benchmark's own picture: each policy's rate is its own share of games."""
    wins = np.array([[0, 30, 10.5], [10, 0, 0], [29.5, 0, 0]])
    strength = bradley_terry(wins)
    assert strength[1] / (strength[0] + strength[1]) == pytest.approx(0.25)
    assert strength[2] / (strength[0] + strength[2]) == pytest.approx(29.5 / 40)


def test_the_interval_has_the_width_of_a_binomial() -> None:
    played = [Game(str(i), "A", "A>B", None, float(i % 2), 1) for i in range(400)]
    low, high = table(played)["bradley_terry"]["ci95"]
    assert (low, high) == (pytest.approx(50 - 4.9, abs=0.7), pytest.approx(50 + 4.9, abs=0.7))


def test_whole_prompts_are_drawn_for_the_mean() -> None:
    """Two prompts whose games agree: a draw's mean is 0, 50 or 100."""
    played = [Game(q, seat, "A>B", None, wins, 1) for q, wins in (("s", 0.0), ("t", 1.0)) for seat in "BA"]
    assert table(played)["mean"]["ci95"] == [0, 100]


def test_a_reply_without_a_label_is_asked_once_to_finish(fake_judge, tmp_path) -> None:
    def script(body, attempt):
        last = body["messages"][-1]["content"]
        if last == PROMPT.parts["again"][0]["content"]:
            return "[[A>B]]" if "ours s" in body["messages"][1]["content"] else "no idea"
        return "[[A>B]] [[B>A]]" if "prompt u" in last else "Let me think."

    server = fake_judge(script)
    judge = Judge("gpt-x", Archive(tmp_path), url=server.url)
    asked = requests(QUESTIONS[:3], OURS[:3], THEIRS[:3], PROMPT, 7)
    replies = arena_hard.ask(judge, [pair[0] for pair in asked], PROMPT)
    assert [r.text for r in replies] == ["Let me think.\n[[A>B]]", "Let me think.\nno idea", "[[A>B]] [[B>A]]"]
    assert len(server.bodies) == 5  # a contradiction is not asked about again
    assert [m["role"] for m in server.bodies[-1]["messages"]] == ["system", "user", "assistant", "user"]
    again = arena_hard.ask(Judge("gpt-x", Archive(tmp_path), offline=True), [pair[0] for pair in asked], PROMPT)
    assert [r.text for r in again] == [r.text for r in replies]
