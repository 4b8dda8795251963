"""`dvpo bench ...`: the options; the work is in `reproduce.commands`."""

from pathlib import Path
from typing import Annotated

import typer

from reproduce.cli_options import SETTINGS, Json

bench_app = typer.Typer(help="Measure speed, side by side in one run.", **SETTINGS)


@bench_app.command("server")
def bench_server(
    gvm: Annotated[Path, typer.Option(metavar="DIR", help="A value model.")],
    against: Annotated[str, typer.Option(metavar="NAME", help="bare (a padded forward pass) or vllm.")] = "bare",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16.")] = "float32",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make texts of this file; of random tokens by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Counted rounds.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure the scoring server's tokens per second beside a bare forward pass, or beside vLLM's server.

    vllm: the environment variable DVPO_VLLM_PYTHON names a Python that has vLLM.
    """
    from reproduce.commands import bench

    bench.server(gvm, against, dtype, text, rounds, as_json)
