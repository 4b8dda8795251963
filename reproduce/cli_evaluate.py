"""`dvpo evaluate ...`: the options; the work is in `reproduce.commands`."""

from pathlib import Path
from typing import Annotated

import typer

from reproduce.cli_options import SETTINGS, Json

evaluate_app = typer.Typer(help="Measure a model.", **SETTINGS)


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
