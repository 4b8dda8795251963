"""What every part of the command line shares."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""The same for every group of commands."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
Base = Annotated[Path | None, typer.Option(metavar="DIR", help="The base model of an adapter.")]


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


number = partial(typer.Option, callback=_finite)
"""An option that takes a finite number: infinity and NaN pass bounds."""
