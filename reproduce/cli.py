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

_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    help="Decoupled Value Policy Optimization: reproduce the paper, train and use value models.", **_SETTINGS
)
evaluate_app = typer.Typer(help="Measure a value model.", **_SETTINGS)
app.add_typer(evaluate_app, name="evaluate")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]


def main() -> None:
    """Entry point of the installed command."""
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and why; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: all its stages, tables and figures.

    The tables stand beside the paper's numbers. What is done already is not run again; an interrupted run goes on
    from its checkpoints.
    """
    from reproduce import app as work
    from reproduce.commands.common import Progress, print_json, table_text

    request = work.Request(recipe, tuple(table or ()), tuple(figure or ()), seeds, data, tuple(override or ()), out)
    planned = work.plan_run(request)
    if dry_run:
        rows = [(line.id, line.state, line.why) for line in planned]
        if as_json:
            print_json([dict(zip(("id", "state", "why"), row, strict=True)) for row in rows])
        else:
            print(table_text(("stage", "state", "why"), rows, left=(0, 1, 2)))
        return
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
) -> None:
    """Train one model by hand: sft, rm, gvm, dpo or policy.

    FILE.yaml holds start: DIR, data: PATH or owner/name@REV, settings: {learning_rate, batch_size, ...} and, where
    wanted, split:, seed: (0), pairs: {per_prompt, most}, reward_model: DIR and value_model: DIR.

    sft imitates the best responses of each prompt: those that no preference calls worse than another.

    An interrupted training goes on when the same command is run again.
    """
    from reproduce.commands import train

    train.run(kind, config, out, debug=context.find_root().params["debug"])


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
    as_json: Json = False,
) -> None:
    """Score responses: every token's value, before and after it."""
    from reproduce.commands import score

    score.run(gvm, score.requests_from(prompt, response, file), aggregate or (), heatmap, as_json)


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
    seed: Annotated[int, typer.Option(help="Of the two samples.")] = 0,
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
        seed=seed,
        out=out,
        as_json=as_json,
    )


if __name__ == "__main__":
    main()
