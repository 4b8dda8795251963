"""The `dvpo` command. Thin: what is heavy is imported by the command that needs it."""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import dvpo
from dvpo.errors import InputError, StageError
from reproduce.cli_bench import bench_app
from reproduce.cli_evaluate import evaluate_app
from reproduce.cli_options import SETTINGS, Base, Json, number

app = typer.Typer(
    help="Decoupled Value Policy Optimization: reproduce the paper, train and use value models.", **SETTINGS
)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of the installed command."""
    _prepare_output()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code: 0 done, 1 the work failed, 2 wrong usage or input."""
    debug = "--debug" in arguments
    # A global option is accepted after the command too: that is where it is added to a command that has just failed.
    arguments = ["--debug"] * debug + [a for a in arguments if a != "--debug"]
    code = 1
    try:
        result = app(arguments, prog_name="dvpo", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except SystemExit as end:  # typer's own answer to a broken pipe
        _drop_output()
        code = end.code if isinstance(end.code, int) else 1
    except InputError as error:
        code = _complain(str(error), 2, debug)
    except StageError as error:
        code = _complain(str(error), 1, debug)
    except typer.TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "dvpo")
        code = _complain(f"{error.format_message().rstrip('.')} (see '{path} --help')", 2, debug)
    except Exception as error:
        hint = "" if debug else " (run with --debug for the traceback)"
        code = _complain(f"{type(error).__name__}: {error}{hint}", 1, debug)
    if code == 130:  # what typer makes of an interrupt
        print("interrupted; run the same command to go on", file=sys.stderr)
    return code


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def _prepare_output() -> None:
    """What an output cannot show is escaped; a closed one (`>&-`) would be the number of the next file opened."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 for as long as the process lives
        else:
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Nobody reads standard output any more: what is still in its buffer must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dvpo {dvpo.__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries say.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if not debug:
        from reproduce.commands.common import quiet

        quiet()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run and what it lacks."""
    from reproduce.commands import doctor

    doctor.run(as_json)


@app.command()
def reproduce(
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="What to run; the default is what doctor picks.")
    ] = None,
    table: Annotated[list[int] | None, typer.Option(metavar="N", help="Only this table; may be repeated.")] = None,
    figure: Annotated[list[int] | None, typer.Option(metavar="N", help="Only this figure; may be repeated.")] = None,
    seeds: Annotated[int | None, typer.Option(metavar="K", min=1, help="How many seeds.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH|HUB_ID@REV", help="Your own preference data.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder; a second run goes on in it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every table and figure, also the optional ones.")] = False,
    study: Annotated[bool, typer.Option("--study", help="With the estimator study (built-in world).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and why; run nothing.")] = False,
    mix_commits: Annotated[
        bool, typer.Option("--mix-commits", help="In a container: go on with results of another commit's code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: all its stages, tables and figures.

    The tables stand beside the paper's numbers. What is done already is not run again; an interrupted run goes on
    from its checkpoints.
    """
    from reproduce import app as work
    from reproduce.commands.common import Progress, print_json

    overrides = (*(override or ()), *(("study=true",) if study else ()))
    request = work.Request(
        recipe, tuple(table or ()), tuple(figure or ()), seeds, data, overrides, out, mix_commits, everything
    )
    if dry_run:
        from reproduce.commands import dry_run as outline

        outline.run(request, as_json)
        return
    planned = work.plan_run(request)
    with contextlib.closing(Progress(len(planned))) as progress:
        document = work.reproduce(request, progress)
    if as_json:
        print_json({key: document[key] for key in ("tables", "figures", "report")})
    else:
        print("\n\n".join([*document["text"], f"report: {document['report']}"]))


@app.command()
def train(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="sft, rm, gvm, dpo or policy.")],
    config: Annotated[Path, typer.Option(metavar="FILE.yaml", help="What to train on and how; see above.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the checkpoint.")],
    processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Start so many processes of this machine.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="ddp (default), zero1, zero2, zero3 or fsdp2."),
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="ZeRO: the optimizer's state in main memory.")] = False,
) -> None:
    """Train one model by hand: sft, rm, gvm, dpo or policy.

    FILE.yaml holds start: DIR, data: PATH or owner/name@REV, settings: {learning_rate, batch_size, ...} and, where
    wanted, split:, seed: (0), pairs: {per_prompt, most}, reward_model: DIR and value_model: DIR.

    sft imitates the best responses of each prompt: those that no preference calls worse than another.

    An interrupted training goes on when the same command is run again.
    """
    from reproduce.commands import train

    train.run(kind, config, out, context.find_root().params["debug"], processes, strategy, offload)


@app.command()
def score(
    gvm: Annotated[str, typer.Option(metavar="DIR", help="A value model (or scalar reward model).")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the user said.")] = None,
    response: Annotated[str | None, typer.Option(metavar="TEXT", help="The whole answer.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE.jsonl",
            help='Rows {"prompt": text or messages, "response": text}; more fields may be there.',
        ),
    ] = None,
    aggregate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="mean, last, p1, p5, p10, p90, p95, p99 or bellman; may be repeated. All by default."
        ),
    ] = None,
    heatmap: Annotated[Path | None, typer.Option(metavar="FILE.html|.png", help="Draw the token values.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Score responses: every token's value, before and after it."""
    from reproduce.commands import score

    score.run(gvm, score.requests_from(prompt, response, file), aggregate or (), heatmap, as_json, base)


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="The recipe that is planned.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="Another model: llama-3-8b, ... or a folder with a config.json."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="By default the recipe's (of tiny and small 2-core-cpu), else 8xa100-80gb."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="So many of the cluster's devices.")] = None,
    memory: Annotated[float | None, number(metavar="GB", help="Another memory of each device, in GiB.")] = None,
    zero: Annotated[int | None, typer.Option(metavar="STAGE", min=0, max=3, help="Only this stage of ZeRO.")] = None,
    response_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="A typical response, for the times; else the limit.")
    ] = None,
    vllm_share: Annotated[
        float,
        number(metavar="SHARE", min=0, max=0.95, help="Generate with a vLLM that takes this of a device."),
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Predict memory and time of every stage: does it fit, how to spread it, what breaks first.

    Without a recipe, --model is planned with the paper's settings.
    """
    from reproduce.commands import plan

    plan.run(recipe, model, cluster, gpus, memory, zero, response_tokens, vllm_share, as_json)


@app.command()
def release(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a finished run.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR|FILE.tar", help="The new bundle; by default RUN_DIR/released/NAME.")
    ] = None,
    stage: Annotated[str, typer.Option(metavar="ID", help="The model's stage, or trained/NAME.")] = "seed0/gvm",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="By default the stage's and the recipe's.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME@REV", help="The model that training started from.")
    ] = None,
    base_licence: Annotated[str | None, typer.Option(metavar="SPDX", help="Its licence.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="KEY.pem", help="Sign with this private key.")] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle of a trained model: weights, card, manifest with every digest.

    The same run gives the same bytes.
    """
    from reproduce.commands import release

    release.release(run, out, stage, name, base, base_licence, key, as_json)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME|URL|DIR|FILE.tar|OWNER/NAME@REV", help="What to fetch.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder; by default checkpoints/NAME.")] = None,
    sha256: Annotated[str | None, typer.Option(metavar="DIGEST", help="The digest that it must have.")] = None,
    max_gb: Annotated[float, number(min=0, help="Refuse a larger bundle.")] = 20,
    public_key: Annotated[Path | None, typer.Option(metavar="KEY.pub", help="It must be signed with this.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a released checkpoint, and check it before it is used.

    The name of a released checkpoint goes before a folder of that name: write ./NAME for the folder. A pull that was
    cut goes on when the same command is run again.
    """
    from reproduce.commands import release

    release.pull(name, out, sha256, max_gb, public_key, as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle.")],
    metrics: Annotated[bool, typer.Option("--metrics", help="Measure its numbers again.")] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Evaluation data that is not in the bundle; may be repeated."),
    ] = None,
    base: Base = None,
    public_key: Annotated[Path | None, typer.Option(metavar="KEY.pub", help="It must be signed with this.")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte and tensor of a bundle, and its signature.

    Whatever differs is named, and the exit code is then 1.
    """
    from reproduce.commands import release

    release.verify(folder, metrics, data or (), base, public_key, as_json)


@app.command()
def serve(
    gvm: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A value model; the small released one by default.")
    ] = None,
    base: Base = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="transformers or vllm.")] = "transformers",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16.")] = "float32",
    exact: Annotated[
        bool, typer.Option("--exact", help="Score every text alone: equal to the last bit, and slower.")
    ] = False,
    tensor_parallel: Annotated[int, typer.Option(metavar="N", min=1, help="vLLM: GPUs that share one copy.")] = 1,
    data_parallel: Annotated[int, typer.Option(metavar="N", min=1, help="vLLM: copies of the model.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one a line; else those in DVPO_API_KEYS, with commas between."),
    ] = None,
    no_api_key: Annotated[bool, typer.Option("--no-api-key", help="Ask nobody for a key, on any host.")] = False,
    reward: Annotated[
        str, typer.Option(metavar="NAME", help="The aggregate that /get_reward and /reward answer with.")
    ] = "last",
    cache_mb: Annotated[int, typer.Option(metavar="MB", min=0, help="Memory for prompts that come again.")] = 1024,
    max_batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens computed in one batch.")] = 4096,
    max_queue_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens that may wait.")] = 262_144,
    max_batch_seconds: Annotated[
        float,
        number(metavar="S", min=1, help="A batch that takes longer means that the backend hangs."),
    ] = 300.0,
    max_body_mb: Annotated[int, typer.Option(metavar="MB", min=1, help="Of one request.")] = 16,
    max_items: Annotated[int, typer.Option(metavar="N", min=1, help="Texts in one request.")] = 1024,
) -> None:
    """Serve token values over HTTP, with a page for people; see /docs of the running server."""
    from reproduce.commands import serve

    request = serve.Request(
        gvm=gvm,
        base=base,
        backend=backend,
        dtype=dtype,
        exact=exact,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        host=host,
        port=port,
        api_key_file=api_key_file,
        no_api_key=no_api_key,
        reward=reward,
        cache_mb=cache_mb,
        max_batch_tokens=max_batch_tokens,
        max_queue_tokens=max_queue_tokens,
        max_batch_seconds=max_batch_seconds,
        max_body_mb=max_body_mb,
        max_items=max_items,
    )
    serve.run(request)


if __name__ == "__main__":
    main()
