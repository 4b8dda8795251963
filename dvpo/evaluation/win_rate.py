"""The paper's own win rate: a judge gives each answer 0 to 5 points, and the answer with more points wins.

Appendix I of the paper: five criteria that add a point each, the form "Score: n  Evaluation evidence: ..." with an
explanation of at most 100 words, judge gpt-4o-2024-08-06, held-out prompts of UltraFeedback; its Figure 2 counts wins,
ties and losses of DVPO against each baseline. The criteria and the form here are the paper's, in our own words.

The paper's prompt shows the judge one answer, so the order of two answers, which it says is drawn at random, can make
no difference to a judge that keeps nothing between requests: `alone` scores each answer by itself, once. `together`
shows both in one request, in both orders, and each answer has the mean of its two scores; a judge that knows both
splits points more finely, and any preference for a place cancels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dvpo.data.records import Message
from dvpo.evaluation.answers import Answer
from dvpo.evaluation.benchmark_data import Question
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.evaluation.judge import Reply, Request, count_failures, why_no_verdict
from dvpo.evaluation.judge_prompt import JudgePrompt, chat

Shown = Literal["alone", "together"]
MAX_NEW_TOKENS = 1024
JUDGE_TOKENS = 512
MOST_POINTS = 5
_MARKS = r"[\s*_`\"']*"
_SCORE = r"""
    (?<![^\W_]) score {side} {marks} (?: [(\[] [^()\[\]\n]* [)\]] {marks} )?  # "Score (0-5)"
    [:=\uff1a] (?! [^\S\n]* \n\s* \d+ [.)] \s )  # no list of the criteria follows
    {marks} [<(\[]* {marks} (\d++ (?: \.\d++ )?+)
    (?! [ \t]* [-\u2013\u2014+] [ \t]* \d | [ \t]+ (?:to|or) [ \t]+ \d | ,\d )  # no range, sum or other spelling
    (?! [ \t*_]* \(? (?: / | (?:out[ ])? of[ ] ) \s* (?!5\b) \d )  # no other scale than that of five points
"""

_CRITERIA = """
Each criterion that an answer meets adds one point, from 0 to 5 in all:
1. It is on the topic and tells the user something about the question, though it may be incomplete or stray.
2. It deals with a substantial part of the question, though not with all of it, or without a direct answer.
3. It covers the basics of the question in a useful way, whoever seems to have written it and in whatever style.
4. It is plainly an AI assistant's answer to this very question: direct, complete, well ordered and helpful, with at
   most little to improve in clarity, brevity or focus.
5. It fits the user's question perfectly: nothing superfluous, expert knowledge, and insight that engages the reader.
Judge as an AI assistant would, with what you know of the world, and go through the criteria one after the other.
"""
_ALONE = (
    "You score an AI assistant's answer to a user's question."
    + _CRITERIA
    + """
Give the total first, then explain it in at most 100 words, in this form:
Score: <total>
Evaluation evidence: <explanation>
"""
)
_TOGETHER = (
    "You score two answers to a user's question, each for itself."
    + _CRITERIA
    + """
Give both totals first, then explain them in at most 100 words, in this form:
Score A: <total>
Score B: <total>
Evaluation evidence: <explanation>
"""
)

PROMPTS: dict[Shown, JudgePrompt] = {
    "alone": JudgePrompt(
        {"answer": chat(_ALONE, "<Question>: {question}\n<Answer>: {answer}")}, {"answer": ("question", "answer")}
    ),
    "together": JudgePrompt(
        {"pair": chat(_TOGETHER, "<Question>: {question}\n<Answer A>: {answer_a}\n<Answer B>: {answer_b}")},
        {"pair": ("question", "answer_a", "answer_b")},
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One question: the points of the policy's answer and of the baseline's, or the reasons why there are none."""

    question: str
    policy: float | None
    baseline: float | None
    failures: tuple[str, ...] = ()


def requests(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    prompt: JudgePrompt,
    max_tokens: int,
) -> list[list[Request]]:
    """Two judgments of every question: of both answers, or of both orders; none where an answer is missing."""
    asked: list[list[Request]] = []
    for q, ours, theirs in zip(questions, answers, baseline, strict=True):
        if ours.failure is not None or theirs.failure is not None:
            asked.append([])
            continue
        text = asked_of(q)
        a, b = ours.turns[0], theirs.turns[0]
        if "pair" in prompt.parts:
            shown = [prompt.messages("pair", question=text, answer_a=x, answer_b=y) for x, y in ((a, b), (b, a))]
        else:
            shown = [prompt.messages("answer", question=text, answer=x) for x in (a, b)]
        asked.append([Request(messages, prompt.sha256, max_tokens) for messages in shown])
    return asked


def asked_of(question: Question) -> str:
    """The question as the judge sees it; what was said before it stands above it, each message with its role."""
    if not question.context:
        return question.turns[0]
    talk: list[Message] = [*question.context, {"role": "user", "content": question.turns[0]}]
    return "\n\n".join(f"[{m['role']}] {m['content']}" for m in talk)


def points(text: str, sides: Sequence[str] = ("",)) -> tuple[float, ...] | None:
    """The score of each side ("A" and "B"; "" where there is one); None where one lacks or is not between 0 and 5.

    The first number after "score" and a colon or = counts, unless it is of a range, a sum, a list or another scale.
    """
    found = []
    for side in sides:
        pattern = _SCORE.format(side=rf"\s+{side}\b" if side else "", marks=_MARKS)
        match = re.search(pattern, text, re.IGNORECASE | re.VERBOSE)
        if match is None or float(match[1]) > MOST_POINTS:
            return None
        found.append(float(match[1]))
    return tuple(found)


def comparisons(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    replies: Sequence[Sequence[Reply]],
    shown: Shown,
) -> list[Comparison]:
    """Every question's points, read from the replies to `requests`."""
    found = []
    for q, ours, theirs, said in zip(questions, answers, baseline, replies, strict=True):
        missing = ours.failure or (theirs.failure and f"{theirs.failure} (baseline)")
        if missing:
            found.append(Comparison(q.id, None, None, (f"no answer: {missing}",)))
            continue
        scores = [None if r.text is None else points(r.text, ("",) if shown == "alone" else "AB") for r in said]
        failures = tuple(why_no_verdict(r) for r, s in zip(said, scores, strict=True) if s is None)
        first, second = scores
        if first is None or second is None:
            found.append(Comparison(q.id, None, None, failures))
        elif shown == "alone":
            found.append(Comparison(q.id, first[0], second[0]))
        else:
            found.append(Comparison(q.id, (first[0] + second[1]) / 2, (first[1] + second[0]) / 2))
    return found


def table(found: Sequence[Comparison]) -> dict[str, Any]:
    """The numbers of Figure 2.

    Returns:
        {"win_rate", "ci95", "wins", "ties", "losses", "points": {"policy", "baseline"}, "bounds", "questions",
        "failed", "failures": {reason: judgments}}. The win rate is in percent of the questions that have both scores, a
        tie counting half; None where none has. bounds: the rate had every failed question been lost, and won.
    """
    scored = [(c.policy, c.baseline) for c in found if c.policy is not None and c.baseline is not None]
    results = [(ours > theirs) + 0.5 * (ours == theirs) for ours, theirs in scored]
    rate, interval = mean_with_interval([100 * r for r in results]) if results else (None, None)
    failed = len(found) - len(scored)
    return {
        "win_rate": rate,
        "ci95": None if interval is None else list(interval),
        "wins": results.count(1),
        "ties": results.count(0.5),
        "losses": results.count(0),
        "points": {
            side: float(np.mean([pair[i] for pair in scored])) if scored else None
            for i, side in enumerate(("policy", "baseline"))
        },
        "bounds": [100 * (sum(results) + extra) / len(found) for extra in (0, failed)] if found else None,
        "questions": len(found),
        "failed": failed,
        "failures": count_failures([reason for c in found for reason in c.failures]),
    }
