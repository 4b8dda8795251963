"""Stages that run the benchmarks. A stage's archive of answers and judgments is a part of its results.

The judge's name, the questions and what is judged belong to the stage's key. An interrupted stage asks nothing twice.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvpo.errors import StageError
from dvpo.evaluation import alpaca_eval as alpaca
from dvpo.evaluation import arena_hard as arena
from dvpo.evaluation import benchmark_data, judged
from dvpo.evaluation import mt_bench as mt
from dvpo.evaluation.answers import Answers, source
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.benchmark_data import Benchmark
from dvpo.evaluation.judge import Judge
from dvpo.evaluation.judged import Judged
from dvpo.files import atomic_write, write_json
from reproduce.pipeline import Context


def rewardbench(ctx: Context) -> dict[str, Any]:
    """RewardBench of a value or reward model. Inputs: model, and data unless it is of the hub. Settings: hub, bf16."""
    from dvpo.evaluation.rewardbench import evaluate_rewardbench, read_pairs

    data = read_pairs(_source(ctx, "data"))
    found = evaluate_rewardbench(ctx.inputs["model"], data.pairs, ctx.settings["bf16"])
    with atomic_write(ctx.out / "pairs.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in found.pop("rows")), encoding="utf-8")
    write_json(ctx.out / "rewardbench.json", found)
    return {**found, "data_digest": data.digest, "said": data.notes}


def mt_bench(ctx: Context) -> dict[str, Any]:
    """MT-Bench of a policy. Inputs: policy, and questions unless they are of the hub. Settings: see `_questions`."""
    work = judged.mt_bench(_questions(ctx, "mt_bench"), _answers(ctx, "policy", mt.MAX_NEW_TOKENS), _judge(ctx))
    return _judged(ctx, work, lambda document: (document["score"], document["ci95"]))


def arena_hard(ctx: Context) -> dict[str, Any]:
    """Arena-Hard of a policy. Inputs: policy, baseline (answers), and questions. Settings: see `_questions`."""
    work = judged.arena_hard(
        _questions(ctx, "arena_hard"),
        _answers(ctx, "policy", arena.MAX_NEW_TOKENS),
        _answers(ctx, "baseline", arena.MAX_NEW_TOKENS),
        _judge(ctx),
    )
    return _judged(ctx, work, lambda d: (d["bradley_terry"]["win_rate"], d["bradley_terry"]["ci95"]))


def alpaca_eval(ctx: Context) -> dict[str, Any]:
    """AlpacaEval 2 of a policy. Inputs: policy, baseline (answers), questions; gamed for the length-controlled rate.

    Settings: see `_questions`. The score is the length-controlled win rate where there is one, else the raw one.
    """
    whole = benchmark_data.load("alpaca_eval", _source(ctx, "questions"))
    work = alpaca.alpaca_eval(
        _questions(ctx, "alpaca_eval"),
        _answers(ctx, "policy", alpaca.MAX_NEW_TOKENS),
        _answers(ctx, "baseline", alpaca.MAX_NEW_TOKENS),
        _judge(ctx),
        places=alpaca.places_in(whole),
        gamed=_gamed(ctx),
    )
    return _judged(ctx, work, _alpaca_score)


Score = tuple[float | None, list[float] | None]
"""A benchmark's number and its 95 % interval; None where nothing has a verdict."""


def _alpaca_score(document: dict[str, Any]) -> Score:
    found = document["length_controlled"]
    if found["win_rate"] is None:
        return document["win_rate"], document["ci95"]
    return found["win_rate"], found["ci95"]


def _judged(ctx: Context, work: Judged, score: Callable[[dict[str, Any]], Score]) -> dict[str, Any]:
    """Runs the benchmark and keeps its document and archive. Raises StageError where no question has a verdict."""
    document = work.run()
    value, interval = score(document)
    if value is None or interval is None:
        raise StageError(f"{ctx.settings['judge']['model']} gave no verdict at all: {document['failures']}")
    write_json(ctx.out / "benchmark.json", document)
    shutil.copytree(_archive(ctx), ctx.out / "archive")
    controlled = document.get("length_controlled", {}).get("win_rate") is not None
    return {
        "score": value,
        "ci95": interval,
        "n": len(work.benchmark.questions),
        "part": work.benchmark.part,
        "judge": work.judge.model,
        "failed": document["failed"],
        "failures": document["failures"],
        "bounds": document["bounds"],
        "identity_sha256": document["identity_sha256"],
        **({"length_controlled": controlled} if "length_controlled" in document else {}),
    }


def _questions(ctx: Context, name: str) -> Benchmark:
    """Settings: most; hub {input: owner/name@REV} for what is no input; judge {model, url, ...}; of the answers
    max_new_tokens (None: the protocol's own) and bf16.
    """
    return benchmark_data.load(name, _source(ctx, "questions"), ctx.settings["most"])


def _source(ctx: Context, name: str) -> str | Path:
    return ctx.inputs.get(name) or ctx.settings["hub"][name]


def _gamed(ctx: Context) -> Path | None:
    known = "gamed" in ctx.inputs or "gamed" in ctx.settings["hub"]
    return alpaca.gamed_file(str(_source(ctx, "gamed"))) if known else None


def _answers(ctx: Context, name: str, max_new_tokens: int) -> Answers:
    given = str(_source(ctx, name))
    dtype = "bfloat16" if ctx.settings["bf16"] else "float32"
    archive = Archive(_archive(ctx) / "answers")
    most = ctx.settings["max_new_tokens"] or max_new_tokens
    return source(given, archive, max_new_tokens=most, seed=ctx.seed, dtype=dtype)


def _judge(ctx: Context) -> Judge:
    s = ctx.settings["judge"]
    return Judge(
        s["model"],
        Archive(_archive(ctx) / "judgments"),
        url=s["url"],
        rpm=s["requests_per_minute"],
        concurrency=s["concurrency"],
    )


def _archive(ctx: Context) -> Path:
    return ctx.state / "archive"
