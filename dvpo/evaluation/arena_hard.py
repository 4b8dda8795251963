"""Arena-Hard v0.1: answers to 500 hard prompts against a baseline's, in two games with the places swapped.

The protocol is that of Li et al. 2024 (arXiv:2406.11939) as lmarena/arena-hard-auto has it. In the first game the
baseline is assistant A, in the second the policy is. The judge answers the prompt itself first, then compares, and
ends with one of [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]] (the maintained code also takes [[B=A]], [[A<B]],
[[A<<B]] and their mirrors); if no label is there it is asked once more to finish; several labels that differ are no
verdict. A strong verdict (>>) counts as three games. Answers and judgments are made at temperature 0 with at
most 4096 tokens; the published baseline is gpt-4-0314.

Two numbers come out of the games, each a win rate in percent:

- `bradley_terry`, as the code of v0.1: the logistic model over all games that have a verdict, its 95 % interval from
  drawing games. With one policy and one baseline its maximum is the weighted mean of the games (see
  `bradley_terry`), but more policies may be put into one fit.
- `mean`, as the maintained code: the plain mean over the games of those prompts both of whose games have a verdict.
  We draw whole prompts for its 95 % interval; the maintained code draws games, for a 90 % one.

What differs: the judge's prompt is our own, "[[A]]" and the like are no labels, and what has no verdict is counted,
with `bounds`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvpo.evaluation.answers import Answer
from dvpo.evaluation.benchmark_data import Question
from dvpo.evaluation.intervals import mean_with_interval
from dvpo.evaluation.judge import MISSING, Judge, Reply, Request, count_failures, why_no_verdict
from dvpo.evaluation.judge_prompt import JudgePrompt, chat

STRONG_WEIGHT = 3
MAX_NEW_TOKENS = 4096
JUDGE_TOKENS = 4096
RESAMPLES = 1000
_A_WINS = {"A>>B": 1.0, "B<<A": 1.0, "A>B": 1.0, "B<A": 1.0, "A=B": 0.5, "B=A": 0.5}
_A_WINS |= {"A<B": 0.0, "B>A": 0.0, "A<<B": 0.0, "B>>A": 0.0}
_LABEL = re.compile(rf"\[\[({'|'.join(_A_WINS)})\]\]")

Floats = NDArray[np.float64]

_SYSTEM = """
You compare the answers that two AI assistants gave to the same prompt, and decide which is better. Do not let the order
of the answers, their length or the assistants' names sway you.

First write your own answer to the prompt. Then hold both assistants' answers against yours: find and correct what is
wrong in them. Next consider whether they are helpful (do what the prompt asks, or ask back where it is unclear),
relevant (nothing beside the point) and concise. Only then, where it matters, consider creativity and what important
information an answer lacks.

After your explanation give exactly one of these labels as your final verdict:
[[A>>B]] assistant A is much better
[[A>B]] assistant A is slightly better
[[A=B]] they are about equally good
[[B>A]] assistant B is slightly better
[[B>>A]] assistant B is much better
Write the label with its brackets, as the last thing that you write.
"""
_USER = """
### The prompt
{question}

### Assistant A's answer
{answer_a}

### Assistant B's answer
{answer_b}
"""

PROMPT = JudgePrompt(
    parts={
        "game": chat(_SYSTEM, _USER),
        "again": ({"role": "user", "content": "Complete your comparison and end it with one of the five labels."},),
    },
    fields={"game": ("question", "answer_a", "answer_b"), "again": ()},
)


@dataclass(frozen=True)
class Game:
    """One game: who sat in which place, and the judge's label or the reason why there is none.

    policy_wins: 1, 0.5 or 0; weight: the games that it counts for.
    """

    question: str
    policy_is: str
    label: str | None
    failure: str | None
    policy_wins: float | None = None
    weight: int = 0


def requests(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    prompt: JudgePrompt,
    max_tokens: int,
) -> list[list[Request]]:
    """The two games of every question, the policy as B and then as A; none where an answer is missing."""
    return [
        [
            Request(
                prompt.messages("game", question=q.turns[0], answer_a=a.turns[0], answer_b=b.turns[0]),
                prompt.sha256,
                max_tokens,
            )
            for a, b in ((theirs, ours), (ours, theirs))
            if ours.failure is None and theirs.failure is None
        ]
        for q, ours, theirs in zip(questions, answers, baseline, strict=True)
    ]


def ask(judge: Judge, asked: Sequence[Request], prompt: JudgePrompt) -> list[Reply]:
    """The judge's replies; one without any label is asked once more to finish, and both texts are one reply."""
    replies = judge.ask(asked)
    open_ones = [i for i, r in enumerate(replies) if r.text is not None and _LABEL.search(r.text) is None]
    follow_ups = [
        Request(
            (
                *asked[i].messages,
                {"role": "assistant", "content": replies[i].text or ""},
                *prompt.messages("again"),
            ),
            prompt.sha256,
            asked[i].max_tokens,
        )
        for i in open_ones
    ]
    for i, more in zip(open_ones, judge.ask(follow_ups), strict=True):
        if more.text is not None:
            replies[i] = Reply(f"{replies[i].text}\n{more.text}", None, more.finish, None, more.model)
        elif more.failure == MISSING:
            replies[i] = more
    return replies


def label(text: str) -> str | None:
    """The judge's verdict; None where there is none, or several that differ."""
    found = set(_LABEL.findall(text))
    return found.pop() if len(found) == 1 else None


def games(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    replies: Sequence[Sequence[Reply]],
) -> list[Game]:
    """Both games of every question, read from the replies to `requests`."""
    played = []
    for q, ours, theirs, said in zip(questions, answers, baseline, replies, strict=True):
        missing = ours.failure or (theirs.failure and f"{theirs.failure} (baseline)")
        for place, seat in enumerate("BA"):
            if missing:
                played.append(Game(q.id, seat, None, f"no answer: {missing}"))
                continue
            verdict = None if said[place].text is None else label(said[place].text or "")
            if verdict is None:
                played.append(Game(q.id, seat, None, why_no_verdict(said[place])))
            else:
                wins = _A_WINS[verdict] if seat == "A" else 1 - _A_WINS[verdict]
                weight = STRONG_WEIGHT if ">>" in verdict or "<<" in verdict else 1
                played.append(Game(q.id, seat, verdict, None, wins, weight))
    return played


def bradley_terry(wins_M_M: Floats, rounds: int = 10_000, tolerance: float = 1e-12) -> Floats:
    """Strengths of M players by maximum likelihood, summing to 1: P(i beats j) = p_i / (p_i + p_j). [M].

    This is logistic regression on the difference of log-strengths, without intercept or penalty, solved by the
    minorisation-maximisation of Hunter 2004 (Annals of Statistics 32). Of two players it is w_12 / (w_12 + w_21).

    Args:
        wins_M_M: how often row beat column; a tie is half a win for each. Every player has played.
    """
    wins_M, played_M_M = wins_M_M.sum(1), wins_M_M + wins_M_M.T
    strength_M = np.full(len(wins_M), 1 / len(wins_M))
    for _ in range(rounds):
        pairs_M_M = strength_M[:, None] + strength_M[None, :]
        shares_M_M = np.divide(played_M_M, pairs_M_M, out=np.zeros_like(pairs_M_M), where=played_M_M > 0)
        new_M = wins_M / shares_M_M.sum(1)
        new_M /= new_M.sum()
        if np.abs(new_M - strength_M).max() < tolerance:
            return new_M
        strength_M = new_M
    return strength_M


def table(played: Sequence[Game]) -> dict[str, Any]:
    """The benchmark's numbers, win rates of the policy in percent (50 is the baseline's own).

    Returns:
        {"bradley_terry": {"win_rate", "ci95", "games"}, "mean": {"win_rate", "ci95", "questions"}, "bounds",
        "labels": {label: count, the policy as A}, "judgments", "failed", "failures": {reason: count}}. A rate is None
        where nothing was judged. bounds: the Bradley-Terry rate had every failed game been lost narrowly, and won.
    """
    judged = [g for g in played if g.policy_wins is not None]
    reasons = [g.failure for g in played if g.policy_wins is None]
    both = {q for q in {g.question for g in judged} if sum(g.question == q for g in judged) == 2}
    kept = [g for g in judged if g.question in both]
    rate, interval = _bradley_terry_rate(judged) if judged else (None, None)
    mean: dict[str, Any] = {"win_rate": None, "ci95": None, "questions": len(both)}
    if kept:
        places = {name: i for i, name in enumerate(dict.fromkeys(g.question for g in kept))}
        scores = [(g.policy_wins or 0.0, places[g.question]) for g in kept for _ in range(g.weight)]
        value, ends = mean_with_interval([100 * s for s, _ in scores], [place for _, place in scores])
        mean |= {"win_rate": value, "ci95": list(ends)}
    failed = len(reasons)
    won, weight = sum((g.policy_wins or 0.0) * g.weight for g in judged), sum(g.weight for g in judged)
    return {
        "bradley_terry": {"win_rate": rate, "ci95": interval, "games": len(judged)},
        "mean": mean,
        "bounds": [100 * (won + extra) / (weight + failed) for extra in (0, failed)] if played else None,
        "labels": _labels(judged),
        "judgments": len(played),
        "failed": failed,
        "failures": count_failures(reasons),
    }


def _bradley_terry_rate(judged: Sequence[Game]) -> tuple[float, list[float]]:
    """The policy's rate in percent against the baseline, and its interval over draws of the (weighted) games."""
    scores = np.array([g.policy_wins for g in judged for _ in range(g.weight)], dtype=np.float64)
    draws = np.random.default_rng(0).choice(scores, (RESAMPLES, scores.size))
    rates = [100 * bradley_terry(_wins(row))[0] for row in (scores, *draws)]
    low, high = np.percentile(rates[1:], [2.5, 97.5])
    return float(rates[0]), [float(low), float(high)]


def _wins(scores: Floats) -> Floats:
    """The games of a policy (row 0) and a baseline as a matrix of wins."""
    return np.array([[0.0, scores.sum()], [(1 - scores).sum(), 0.0]])


def _labels(judged: Sequence[Game]) -> dict[str, int]:
    """How often each of the five verdicts was given, as if the policy had been A in every game."""
    counts = dict.fromkeys(("A>>B", "A>B", "A=B", "B>A", "B>>A"), 0)
    for g in judged:
        sign = "=" if g.policy_wins == 0.5 else ">>" if g.weight == STRONG_WEIGHT else ">"
        counts[f"B{sign}A" if g.policy_wins == 0 else f"A{sign}B"] += 1
    return counts
