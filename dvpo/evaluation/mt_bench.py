"""MT-Bench: eighty questions of two turns, each answer rated from 1 to 10 by a judge (single-answer grading).

The protocol is that of Zheng et al. 2023 (arXiv:2306.05685) as FastChat's fastchat/llm_judge has it: the temperature of
an answer goes by its category; math, reasoning and coding are judged beside a reference answer; the second turn is
judged with the whole talk before the judge; the judge answers at temperature 0 with at most 2048 tokens; its rating is
the first [[n]], else the first [n]; what has no rating is left out of the mean over both turns.

What differs: the judge's prompt is our own; white space and "/10" may stand in the brackets ("[[8/10]]"); a number
outside 0 to 10 is no rating; what has none is counted, and `bounds` says what it could have changed. FastChat's
references are GPT-4's answers; where only the question file's own short ones are at hand, those are shown.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvpo.evaluation.answers import Answer
from dvpo.evaluation.benchmark_data import MT_BENCH_CATEGORIES, Question
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.evaluation.judge import Reply, Request, count_failures, why_no_verdict
from dvpo.evaluation.judge_prompt import JudgePrompt, chat

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the answers, by category; 0 for the others."""
WITH_REFERENCE = ("math", "reasoning", "coding")
MAX_NEW_TOKENS = 1024
JUDGE_TOKENS = 2048
LOWEST, HIGHEST = 1, 10
_NUMBER = r"\s*(\d+\.?\d*)\s*(?:/\s*10\s*)?"
_PATTERNS = (re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]"))

_SYSTEM = """
You grade answers of an AI assistant. Be impartial: neither the length of an answer nor its tone earns points by itself.
Look at how helpful, relevant, accurate, thorough and creative the answer is, and at how deep it goes.
"""
_HOW = """
Explain your assessment in a few sentences first. Then end with your rating from 1 (useless) to 10 (excellent) in
double square brackets, as in [[7]].
"""
_REFERENCE = "A reference answer is given. Look for what the assistant got wrong by comparing with it."
_TALK = """
### The user's first message
{question_1}

### The assistant's first answer
{answer_1}

### The user's second message
{question_2}

### The assistant's second answer
{answer_2}

Rate the assistant's second answer only; what came before it is its context.
"""
_TURN = """
### The user's message
{question_1}

### The assistant's answer
{answer_1}

Rate the assistant's answer.
"""
_FIRST, _BOTH = ("question_1", "answer_1"), ("question_1", "answer_1", "question_2", "answer_2")

PROMPT = JudgePrompt(
    parts={
        "turn_1": chat(_SYSTEM, _TURN + _HOW),
        "turn_2": chat(_SYSTEM, _TALK + _HOW),
        "turn_1_reference": chat(_SYSTEM + _REFERENCE, "### Reference answer\n{reference_1}\n" + _TURN + _HOW),
        "turn_2_reference": chat(
            _SYSTEM + _REFERENCE,
            "### Reference answer to the first message\n{reference_1}\n\n"
            "### Reference answer to the second message\n{reference_2}\n" + _TALK + _HOW,
        ),
    },
    fields={
        "turn_1": _FIRST,
        "turn_2": _BOTH,
        "turn_1_reference": (*_FIRST, "reference_1"),
        "turn_2_reference": (*_BOTH, "reference_1", "reference_2"),
    },
)


@dataclass(frozen=True)
class Judgment:
    """What became of one turn of one answer: a rating, or the reason why there is none."""

    question: str
    category: str
    turn: int
    rating: float | None
    failure: str | None
    with_reference: bool


def temperatures(questions: Sequence[Question]) -> list[float]:
    """At which temperature each question is answered."""
    return [TEMPERATURES.get(q.category, 0.0) for q in questions]


def requests(
    questions: Sequence[Question], answers: Sequence[Answer], prompt: JudgePrompt, max_tokens: int
) -> list[list[Request]]:
    """The two judgments of every question; none where there is no answer."""
    return [
        [
            Request(prompt.messages(_part(q, turn), **_values(q, a)), prompt.sha256, max_tokens)
            for turn in (1, 2)
            if a.failure is None
        ]
        for q, a in zip(questions, answers, strict=True)
    ]


def _part(question: Question, turn: int) -> str:
    shown = question.category in WITH_REFERENCE and any(question.reference[:turn])
    return f"turn_{turn}_reference" if shown else f"turn_{turn}"


def _values(question: Question, answer: Answer) -> dict[str, str]:
    values = {}
    for i in (0, 1):
        values[f"question_{i + 1}"], values[f"answer_{i + 1}"] = question.turns[i], answer.turns[i]
        values[f"reference_{i + 1}"] = dict(enumerate(question.reference)).get(i) or "(none)"
    return values


def rating(text: str) -> float | None:
    """The judge's number, from 0 to 10; None where there is none."""
    for pattern in _PATTERNS:
        if found := pattern.search(text):
            value = float(found[1])
            return value if value <= HIGHEST else None
    return None


def judgments(
    questions: Sequence[Question], answers: Sequence[Answer], replies: Sequence[Sequence[Reply]]
) -> list[Judgment]:
    """Both turns of every question, read from the replies to `requests`."""
    found = []
    for q, answer, said in zip(questions, answers, replies, strict=True):
        for turn in (1, 2):
            value, why = None, f"no answer: {answer.failure}"
            if answer.failure is None:
                reply = said[turn - 1]
                value = None if reply.text is None else rating(reply.text)
                why = why_no_verdict(reply)
            shown = _part(q, turn).endswith("reference")
            found.append(Judgment(q.id, q.category, turn, value, why if value is None else None, shown))
    return found


def table(found: Sequence[Judgment]) -> dict[str, Any]:
    """The benchmark's numbers.

    Returns:
        {"score", "ci95", "turn_1", "turn_2", "categories": {name: score}, "bounds", "judgments", "failed",
        "failures": {reason: count}, "without_reference"}. Scores are means over the judgments that have a rating, None
        where none has; the interval draws whole questions; bounds: the score had every failed judgment been a 1, and a
        10; without_reference: judgments of math, reasoning and coding that had no reference answer.
    """
    rated = [(j, j.rating) for j in found if j.rating is not None]
    score, interval = None, None
    if rated:
        places = {name: i for i, name in enumerate(dict.fromkeys(j.question for j in found))}
        score, interval = mean_with_interval([r for _, r in rated], [places[j.question] for j, _ in rated])
    reasons = [j.failure for j in found if j.rating is None]
    return {
        "score": score,
        "ci95": None if interval is None else list(interval),
        "turn_1": _mean([r for j, r in rated if j.turn == 1]),
        "turn_2": _mean([r for j, r in rated if j.turn == 2]),
        "categories": {
            name: _mean([r for j, r in rated if j.category == name])
            for name in MT_BENCH_CATEGORIES
            if any(j.category == name for j in found)
        },
        "bounds": [_mean([worst if j.rating is None else j.rating for j in found]) for worst in (LOWEST, HIGHEST)],
        "judgments": len(found),
        "failed": len(reasons),
        "failures": count_failures(reasons),
        "without_reference": sum(j.category in WITH_REFERENCE and not j.with_reference for j in found),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
