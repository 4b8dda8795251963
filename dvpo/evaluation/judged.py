"""A judged benchmark from end to end: answers, judgments, numbers, and one document that says how they came about."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dvpo.errors import StageError
from dvpo.evaluation import arena_hard as arena
from dvpo.evaluation import mt_bench as mt
from dvpo.evaluation import win_rate as win
from dvpo.evaluation.answers import Answer, Answers
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.benchmark_data import Benchmark
from dvpo.evaluation.judge import (
    CHARACTERS_PER_TOKEN,
    MISSING,
    Estimate,
    Judge,
    Reply,
    Request,
    count_failures,
    judge_identity,
)
from dvpo.evaluation.judge_prompt import JudgePrompt
from dvpo.files import sha256_json


@dataclass(frozen=True)
class Judged:
    """A benchmark with those who answer and the one who judges.

    sides: who answers, by the name in the document: "model" and, where two are compared, "baseline".
    requests: from the sides' answers to the judge's requests of every question.
    ask: the judge's replies to a list of requests.
    read: from the sides' answers and the replies of every question to the judgments. table: their numbers.
    """

    benchmark: Benchmark
    sides: dict[str, Answers]
    temperatures: list[float]
    judge: Judge
    prompt: JudgePrompt
    max_tokens: int
    requests: Callable[..., list[list[Request]]]
    ask: Callable[[Sequence[Request]], list[Reply]]
    read: Callable[..., Sequence[Any]]
    table: Callable[[Any], dict[str, Any]]

    def estimate(self) -> tuple[dict[str, int], Estimate]:
        """What `run` would take: answers to make, per side, and the judge's part with answers of the longest length."""
        sides, missing = [], {}
        for name, side in self.sides.items():
            answers = side.to(self.benchmark.questions, self.temperatures, archived_only=True)
            missing[name] = sum(a.failure == MISSING for a in answers)
            sides.append([self._placeholder(name, a) for a in answers])
        asked = self.requests(self.benchmark.questions, *sides)
        return missing, self.judge.estimate([r for requests in asked for r in requests])

    def _placeholder(self, name: str, answer: Answer) -> Answer:
        if answer.failure != MISSING:
            return answer
        length = self.sides[name].identity["max_new_tokens"] * CHARACTERS_PER_TOKEN
        text = (name * length)[:length]
        return Answer(tuple(text for _ in range(max(len(q.turns) for q in self.benchmark.questions))))

    def run(self) -> dict[str, Any]:
        """Answers and judges what is not archived yet, and gives the document.

        Raises:
            StageError: offline, and something is not in the archive; or nobody answers at the judge's endpoint.
        """
        questions, offline = self.benchmark.questions, self.judge.offline
        sides = [s.to(questions, self.temperatures, archived_only=offline) for s in self.sides.values()]
        asked = self.requests(questions, *sides)
        flat = self.ask([r for requests in asked for r in requests])
        answers_missing = sum(a.failure == MISSING for answers in sides for a in answers)
        if offline and (answers_missing or any(r.failure == MISSING for r in flat)):
            raise StageError(
                f"the archive lacks {answers_missing} of {len(questions) * len(sides)} answers and "
                f"{sum(r.failure == MISSING for r in flat)} of {len(flat)} judgments of these answers; run the same "
                "command without --offline"
            )
        rest = iter(flat)
        found = self.read(questions, *sides, [[next(rest) for _ in requests] for requests in asked])
        return self._document(sides, asked, flat, found)

    def _document(
        self,
        sides: Sequence[Sequence[Answer]],
        asked: Sequence[Sequence[Request]],
        replies: Sequence[Reply],
        found: Sequence[Any],
    ) -> dict[str, Any]:
        judge = judge_identity(self.judge.model, self.prompt.sha256, replies) | {"max_tokens": self.max_tokens}
        identity = {
            "benchmark": self.benchmark.name,
            "part": self.benchmark.part,
            "questions_sha256": self.benchmark.sha256,
            **{name: side.identity for name, side in self.sides.items()},
            "judge": {key: judge[key] for key in ("model", "prompt_sha256", "max_tokens")},
        }
        return {
            **identity,
            "identity_sha256": sha256_json(identity),
            "judge": judge,
            **self.table(found),
            "endpoint_said": sorted({r.detail for r in replies if r.detail is not None})[:3],
            "answers": {
                name: {"cut": sum(a.cut for a in answers), "failures": count_failures([a.failure for a in answers])}
                for name, answers in zip(self.sides, sides, strict=True)
            },
            "rows": [asdict(row) for row in found],
            "records": {
                q.id: [Archive.key(r.asked(self.judge.model)) for r in requests]
                for q, requests in zip(self.benchmark.questions, asked, strict=True)
            },
        }


def mt_bench(
    benchmark: Benchmark,
    model: Answers,
    judge: Judge,
    prompt: JudgePrompt = mt.PROMPT,
    max_tokens: int = mt.JUDGE_TOKENS,
) -> Judged:
    """See `dvpo.evaluation.mt_bench`."""
    return Judged(
        benchmark=benchmark,
        sides={"model": model},
        temperatures=mt.temperatures(benchmark.questions),
        judge=judge,
        prompt=prompt,
        max_tokens=max_tokens,
        requests=partial(mt.requests, prompt=prompt, max_tokens=max_tokens),
        ask=judge.ask,
        read=mt.judgments,
        table=mt.table,
    )


def arena_hard(
    benchmark: Benchmark,
    model: Answers,
    baseline: Answers,
    judge: Judge,
    prompt: JudgePrompt = arena.PROMPT,
    max_tokens: int = arena.JUDGE_TOKENS,
) -> Judged:
    """See `dvpo.evaluation.arena_hard`."""
    return Judged(
        benchmark=benchmark,
        sides={"model": model, "baseline": baseline},
        temperatures=[0.0] * len(benchmark.questions),
        judge=judge,
        prompt=prompt,
        max_tokens=max_tokens,
        requests=partial(arena.requests, prompt=prompt, max_tokens=max_tokens),
        ask=partial(arena.ask, judge, prompt=prompt),
        read=arena.games,
        table=arena.table,
    )


def win_rate(
    benchmark: Benchmark,
    model: Answers,
    baseline: Answers,
    judge: Judge,
    *,
    shown: win.Shown = "alone",
    prompt: JudgePrompt | None = None,
    max_tokens: int = win.JUDGE_TOKENS,
    temperature: float = 0.0,
) -> Judged:
    """See `dvpo.evaluation.win_rate`. The paper does not say at which temperature it sampled the answers."""
    prompt = prompt or win.PROMPTS[shown]
    return Judged(
        benchmark=benchmark,
        sides={"model": model, "baseline": baseline},
        temperatures=[temperature] * len(benchmark.questions),
        judge=judge,
        prompt=prompt,
        max_tokens=max_tokens,
        requests=partial(win.requests, prompt=prompt, max_tokens=max_tokens),
        ask=judge.ask,
        read=partial(win.comparisons, shown=shown),
        table=win.table,
    )
