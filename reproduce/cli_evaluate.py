"""`dvpo evaluate ...`: the options; the work is in `reproduce.commands`."""

from pathlib import Path
from typing import Annotated

import typer

from reproduce.cli_options import SETTINGS, Base, Json, number

evaluate_app = typer.Typer(help="Measure a model.", **SETTINGS)

Answering = Annotated[
    str, typer.Option(metavar="DIR|FILE.jsonl", help="A policy's folder, or answers that are there already.")
]
Baseline = Annotated[str, typer.Option(metavar="DIR|FILE.jsonl", help="Whom it is compared with; the same forms.")]
BenchmarkData = Annotated[
    str, typer.Option(metavar="DIR|FILE.jsonl|HUB_ID@REV", help="The questions; see dvpo/evaluation/benchmark_data.py.")
]
JudgeModel = Annotated[str, typer.Option(metavar="NAME", help="The judge's name at its endpoint.")]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Any OpenAI-compatible endpoint, up to /v1. The key is read from DVPO_JUDGE_API_KEY or OPENAI_API_KEY.",
    ),
]
JudgePromptFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="Another text for the judge; see dvpo/evaluation/judge_prompt.py."),
]
JudgeMaxTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Of a judgment; the protocol's number by default.")
]
Rpm = Annotated[float | None, number(metavar="N", min=0.001, help="At most so many requests a minute.")]
Concurrency = Annotated[int, typer.Option(metavar="N", min=1, help="Requests at a time.")]
Timeout = Annotated[float, number(metavar="SECONDS", min=0.1, help="What one attempt may take.")]
Retries = Annotated[int, typer.Option(metavar="N", min=0, help="Attempts after one that failed.")]
PriceIn = Annotated[float, number(metavar="X", min=0, help="Price of a million tokens that the judge reads.")]
PriceOut = Annotated[float, number(metavar="X", min=0, help="Price of a million tokens that it writes.")]
ArchiveFolder = Annotated[
    Path, typer.Option(metavar="DIR", help="Keeps every answer and judgment; what is there is not asked again.")
]
Most = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="At most so many questions, at even distances; a part.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Of an answer; the protocol's number by default.")
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Answers made at a time.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="Of the policy: float32 or bfloat16.")]
AnswerSeed = Annotated[int, typer.Option(help="Of answers that are sampled.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would take and cost; ask nobody.")]
Offline = Annotated[bool, typer.Option("--offline", help="Replay the archive; say what it lacks.")]
OutFile = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the result there too.")]


@evaluate_app.command()
def pairwise(
    model: Annotated[str, typer.Option(metavar="DIR", help="A value model or scalar reward model.")],
    data: Annotated[str, typer.Option(metavar="PATH|HUB_ID@REV", help="Preference data.")],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="One split of the data.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Pairs with a longer prompt are left out.")] = 512,
    max_response_tokens: Annotated[int, typer.Option(min=1, help="Longer responses are cut.")] = 512,
    per_prompt: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="At most so many pairs of a prompt.")
    ] = None,
    most: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most so many pairs in all.")] = None,
    trajectory_k: Annotated[
        int, typer.Option(metavar="K", min=0, help="Put K other answers of the same policy before each prompt (tau).")
    ] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of all samples.")] = 0,
    base: Base = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the result there too.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how often the preferred response scores higher.

    Beside it stand chance and "longer response wins", each with a bootstrap interval over prompts.
    """
    from reproduce.commands import evaluate

    evaluate.pairwise(
        model,
        data,
        split=split,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        per_prompt=per_prompt,
        most=most,
        trajectory_k=trajectory_k,
        bf16=bf16,
        seed=seed,
        base=base,
        out=out,
        as_json=as_json,
    )


@evaluate_app.command()
def credit(
    model: Annotated[str, typer.Option(metavar="DIR", help="A value or reward model of the built-in world.")],
    data: Annotated[str, typer.Option(metavar="PATH", help="Answers about the world, such as a coverage stage's.")],
    world: Annotated[Path, typer.Option(metavar="WORLD.json", help="The world's facts, written by an atlas stage.")],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="One split of the data.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Answers to a longer prompt are left out.")] = 64,
    max_response_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are left out.")] = 64,
    per_prompt: Annotated[int, typer.Option(metavar="K", min=1, help="At most so many answers of a prompt.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the choice of answers.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the result there too.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how well token values point at the wrong words of answers about the built-in world."""
    from reproduce.commands import evaluate

    evaluate.credit(
        model,
        data,
        world,
        split=split,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        per_prompt=per_prompt,
        seed=seed,
        out=out,
        as_json=as_json,
    )


@evaluate_app.command("mt-bench")
def mt_bench(
    model: Answering,
    benchmark_data: BenchmarkData,
    judge_model: JudgeModel,
    judge_url: JudgeUrl = None,
    judge_prompt: JudgePromptFile = None,
    judge_max_tokens: JudgeMaxTokens = None,
    rpm: Rpm = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120,
    retries: Retries = 6,
    price_in: PriceIn = 0,
    price_out: PriceOut = 0,
    archive: ArchiveFolder = Path("judged"),
    most: Most = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    seed: AnswerSeed = 0,
    dry_run: DryRun = False,
    offline: Offline = False,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Rate answers to MT-Bench's eighty questions of two turns, from 1 to 10.

    What a judge is asked once is archived: an interrupted run goes on, and --offline replays a finished one.
    """
    typed = dict(locals())  # every option, by its name
    from reproduce.commands import evaluate_judged

    evaluate_judged.mt_bench(evaluate_judged.Request(**typed))


@evaluate_app.command("arena-hard")
def arena_hard(
    model: Answering,
    baseline: Baseline,
    benchmark_data: BenchmarkData,
    judge_model: JudgeModel,
    judge_url: JudgeUrl = None,
    judge_prompt: JudgePromptFile = None,
    judge_max_tokens: JudgeMaxTokens = None,
    rpm: Rpm = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120,
    retries: Retries = 6,
    price_in: PriceIn = 0,
    price_out: PriceOut = 0,
    archive: ArchiveFolder = Path("judged"),
    most: Most = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    seed: AnswerSeed = 0,
    dry_run: DryRun = False,
    offline: Offline = False,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Compare answers to Arena-Hard's prompts with a baseline's, in two games with the places swapped.

    The published numbers are against gpt-4-0314's answers, which come with the benchmark: --baseline gpt-4-0314.jsonl.
    """
    typed = dict(locals())  # every option, by its name
    from reproduce.commands import evaluate_judged

    evaluate_judged.arena_hard(evaluate_judged.Request(**typed))


@evaluate_app.command("win-rate")
def win_rate(
    model: Answering,
    baseline: Baseline,
    data: Annotated[str, typer.Option(metavar="PATH|HUB_ID@REV", help="Held-out prompts: preference data will do.")],
    judge_model: JudgeModel,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="One split of the data.")] = None,
    together: Annotated[
        bool,
        typer.Option("--together", help="Show both answers in one request, in both orders; the paper's shows one."),
    ] = False,
    temperature: Annotated[float, number(min=0, help="Of the answers; 0 takes the likeliest token.")] = 0,
    judge_url: JudgeUrl = None,
    judge_prompt: JudgePromptFile = None,
    judge_max_tokens: JudgeMaxTokens = None,
    rpm: Rpm = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120,
    retries: Retries = 6,
    price_in: PriceIn = 0,
    price_out: PriceOut = 0,
    archive: ArchiveFolder = Path("judged"),
    most: Most = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    seed: AnswerSeed = 0,
    dry_run: DryRun = False,
    offline: Offline = False,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Count wins, ties and losses against another policy under the paper's judge of five points."""
    typed = dict(locals())  # every option, by its name
    from reproduce.commands import evaluate_judged

    evaluate_judged.win_rate(evaluate_judged.Request(**typed))


@evaluate_app.command("alpaca-eval")
def alpaca_eval(
    model: Answering,
    baseline: Baseline,
    benchmark_data: BenchmarkData,
    judge_model: JudgeModel,
    gamed: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB_ID@REV", help="df_gamed.csv of tatsu-lab/alpaca_eval, for the length-controlled win rate."
        ),
    ] = None,
    temperature: Annotated[float, number(min=0, help="Of the answers; 0 takes the likeliest token.")] = 0.7,
    judge_url: JudgeUrl = None,
    judge_prompt: JudgePromptFile = None,
    judge_max_tokens: JudgeMaxTokens = None,
    rpm: Rpm = None,
    concurrency: Concurrency = 4,
    timeout: Timeout = 120,
    retries: Retries = 6,
    price_in: PriceIn = 0,
    price_out: PriceOut = 0,
    archive: ArchiveFolder = Path("judged"),
    most: Most = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    seed: AnswerSeed = 0,
    dry_run: DryRun = False,
    offline: Offline = False,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Compare outputs for AlpacaEval's instructions with a baseline's: raw and length-controlled win rate.

    The published numbers are against gpt-4-1106-preview's outputs, which come with the benchmark.
    """
    typed = dict(locals())  # every option, by its name
    from reproduce.commands import evaluate_judged, evaluate_rewards

    del typed["gamed"]
    evaluate_rewards.alpaca_eval(evaluate_judged.Request(**typed), gamed)


@evaluate_app.command("rewardbench")
def rewardbench(
    model: Annotated[str, typer.Option(metavar="DIR", help="A value model or scalar reward model.")],
    data: Annotated[str, typer.Option(metavar="PATH|HUB_ID@REV", help="RewardBench, or some of its subsets.")],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="One split of the data.")] = None,
    base: Base = None,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on RewardBench's subsets and sections, under every aggregate. A tie is a loss."""
    from reproduce.commands import evaluate_rewards

    evaluate_rewards.rewardbench(model, data, split=split, base=base, out=out, as_json=as_json)
