"""`dvpo evaluate mt-bench | arena-hard | win-rate`: benchmarks that a judge decides."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dvpo.errors import InputError
from dvpo.files import require_folder, require_place, write_json
from reproduce.commands.common import print_json, say, table_text

if TYPE_CHECKING:
    from dvpo.evaluation.answers import Answers
    from dvpo.evaluation.judge import Judge
    from dvpo.evaluation.judge_prompt import JudgePrompt
    from dvpo.evaluation.judged import Judged


@dataclass(frozen=True)
class Request:
    """What was typed; see the options of the same names."""

    model: str
    judge_model: str
    judge_url: str | None
    judge_prompt: Path | None
    judge_max_tokens: int | None
    rpm: float | None
    concurrency: int
    timeout: float
    retries: int
    price_in: float
    price_out: float
    archive: Path
    most: int | None
    max_new_tokens: int | None
    batch_size: int
    dtype: str
    seed: int
    dry_run: bool
    offline: bool
    out: Path | None
    as_json: bool
    benchmark_data: str = ""
    baseline: str = ""
    data: str = ""
    split: str | None = None
    together: bool = False
    temperature: float = 0.0


def mt_bench(r: Request) -> None:
    """MT-Bench of one policy."""
    from dvpo.evaluation import benchmark_data, judged
    from dvpo.evaluation import mt_bench as protocol

    questions = benchmark_data.load("mt_bench", r.benchmark_data, r.most)
    work = judged.mt_bench(
        questions,
        _answers(r, r.model, protocol.MAX_NEW_TOKENS),
        _judge(r),
        _prompt(r, protocol.PROMPT),
        r.judge_max_tokens or protocol.JUDGE_TOKENS,
    )
    _run(r, work, _mt_bench_text)


def arena_hard(r: Request) -> None:
    """Arena-Hard v0.1 of one policy against a baseline."""
    from dvpo.evaluation import arena_hard as protocol
    from dvpo.evaluation import benchmark_data, judged

    questions = benchmark_data.load("arena_hard", r.benchmark_data, r.most)
    work = judged.arena_hard(
        questions,
        _answers(r, r.model, protocol.MAX_NEW_TOKENS),
        _answers(r, r.baseline, protocol.MAX_NEW_TOKENS),
        _judge(r),
        _prompt(r, protocol.PROMPT),
        r.judge_max_tokens or protocol.JUDGE_TOKENS,
    )
    _run(r, work, _arena_hard_text)


def win_rate(r: Request) -> None:
    """The paper's win rate of one policy against another on held-out prompts."""
    from dvpo.data.formats import read
    from dvpo.evaluation import benchmark_data, judged
    from dvpo.evaluation import win_rate as protocol

    shown: Literal["alone", "together"] = "together" if r.together else "alone"
    work = judged.win_rate(
        benchmark_data.prompts_of(read(r.data, split=r.split).examples, "win rate", r.most),
        _answers(r, r.model, protocol.MAX_NEW_TOKENS),
        _answers(r, r.baseline, protocol.MAX_NEW_TOKENS),
        _judge(r),
        shown=shown,
        prompt=_prompt(r, protocol.PROMPTS[shown]),
        max_tokens=r.judge_max_tokens or protocol.JUDGE_TOKENS,
        temperature=r.temperature,
    )
    _run(r, work, _win_rate_text)


def _answers(r: Request, given: str, max_new_tokens: int) -> "Answers":
    from dvpo.evaluation import answers
    from dvpo.evaluation.archive import Archive

    if r.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype is {r.dtype}; give float32 or bfloat16")
    return answers.source(
        given,
        Archive(r.archive / "answers"),
        max_new_tokens=r.max_new_tokens or max_new_tokens,
        batch_size=r.batch_size,
        seed=r.seed,
        dtype=r.dtype,
        on_answer=_Counter(f"answers of {Path(given).name}"),
    )


def _judge(r: Request) -> "Judge":
    from dvpo.evaluation.archive import Archive
    from dvpo.evaluation.judge import Judge

    return Judge(
        r.judge_model,
        Archive(r.archive / "judgments"),
        url=r.judge_url,
        rpm=r.rpm,
        concurrency=r.concurrency,
        timeout=r.timeout,
        retries=r.retries,
        offline=r.offline,
        on_reply=_Counter("judgments"),
    )


def _prompt(r: Request, own: "JudgePrompt") -> "JudgePrompt":
    return own if r.judge_prompt is None else own.read(r.judge_prompt)


class _Counter:
    """Progress on a terminal: one line that is written over."""

    def __init__(self, what: str):
        self.what = what

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r\x1b[K{self.what}: {done} of {total}", end=end, file=sys.stderr, flush=True)


def _run(r: Request, work: "Judged", text: Callable[[dict[str, Any]], str]) -> None:
    """Prints the estimate and, unless that is all that is wanted, the result."""
    require_place(r.out)
    require_folder(r.archive)
    if r.dry_run or not r.offline:
        estimate = _estimate(r, work)
        if r.dry_run:
            print_json(estimate) if r.as_json else print(_estimate_text(estimate))
            return
        say(_estimate_text(estimate))
    document = work.run()
    if r.out is not None:
        write_json(r.out, document)
    if r.as_json:
        print_json(document)
        return
    part = f" (a part: {document['part']})" if document["part"] else ""
    print(f"{document['benchmark']}{part}, judged by {document['judge']['model']}\n\n{text(document)}")
    for name, side in document["answers"].items():
        if side["cut"]:
            print(f"{side['cut']} answers of the {name} met the length limit")
    if document["failed"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in document["failures"].items())
        what = "judgments" if "judgments" in document else "questions"
        print(f"no verdict: {document['failed']} of {document[what]} {what} ({reasons})")
    for line in document["endpoint_said"]:
        print(f"the judge's endpoint said: {line}")
    if document.get("without_reference"):
        print(f"{document['without_reference']} judgments that should have had a reference answer had none")


def _estimate(r: Request, work: "Judged") -> dict[str, Any]:
    missing, judge = work.estimate()
    return {
        "benchmark": work.benchmark.name,
        "part": work.benchmark.part,
        "judge": r.judge_model,
        "answers_to_make": missing,
        "requests": judge.requests,
        "archived": judge.archived,
        "input_tokens": judge.input_tokens,
        "output_tokens_at_most": judge.output_tokens,
        "cost_at_most": judge.cost(r.price_in, r.price_out) if r.price_in or r.price_out else None,
    }


def _estimate_text(e: dict[str, Any]) -> str:
    answers = ", ".join(f"{count} of the {name}" for name, count in e["answers_to_make"].items())
    cost = "" if e["cost_at_most"] is None else f", at most {e['cost_at_most']:.2f} in your prices' currency"
    return (
        f"answers to make: {answers}\nrequests to {e['judge']}: {e['requests'] - e['archived']} "
        f"({e['archived']} more are archived), about {e['input_tokens']:,} tokens in and at most "
        f"{e['output_tokens_at_most']:,} out{cost}"
    )


def _mt_bench_text(document: dict[str, Any]) -> str:
    rows = [("both turns", document["score"]), ("turn 1", document["turn_1"]), ("turn 2", document["turn_2"])]
    rows += list(document["categories"].items())
    lines = [(name, _number(value, 2), "") for name, value in rows]
    lines[0] = (*lines[0][:2], _interval(document["ci95"], 2))
    return table_text(("", "rating", "95 % interval"), lines)


def _arena_hard_text(document: dict[str, Any]) -> str:
    lines = [
        (name, _number(document[key]["win_rate"], 1), _interval(document[key]["ci95"], 1))
        for name, key in (("Bradley-Terry", "bradley_terry"), ("plain mean", "mean"))
    ]
    return table_text(("", "win rate %", "95 % interval"), lines)


def _win_rate_text(document: dict[str, Any]) -> str:
    lines = [("win rate %", _number(document["win_rate"], 1), _interval(document["ci95"], 1))]
    lines += [(name, str(document[name]), "") for name in ("wins", "ties", "losses")]
    lines += [(f"points of the {side}", _number(value, 2), "") for side, value in document["points"].items()]
    return table_text(("", "value", "95 % interval"), lines)


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _interval(ends: list[float] | None, digits: int) -> str:
    return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
