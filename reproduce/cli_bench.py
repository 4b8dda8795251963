"""`dvpo bench ...`: the options; the work is in `reproduce.commands`."""

from pathlib import Path
from typing import Annotated

import typer

from reproduce.cli_options import SETTINGS, Json

Rounds = Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Counted rounds.")]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="float32, or bfloat16 autocast over float32 weights.")
]

bench_app = typer.Typer(help="Measure speed, side by side in one run.", **SETTINGS)


@bench_app.command("server")
def bench_server(
    gvm: Annotated[Path, typer.Option(metavar="DIR", help="A value model.")],
    against: Annotated[str, typer.Option(metavar="NAME", help="bare (a padded forward pass) or vllm.")] = "bare",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16.")] = "float32",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make texts of this file; of random tokens by default.")
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="So many send at once; may be repeated; else 16 and 4."),
    ] = None,
    rounds: Rounds = 5,
    as_json: Json = False,
) -> None:
    """Measure the scoring server's tokens per second beside a bare forward pass, or beside vLLM's server.

    vllm: the environment variable DVPO_VLLM_PYTHON names a Python that has vLLM.
    """
    from reproduce.commands import bench

    bench.server(gvm, against, dtype, text, clients or (), rounds, as_json)


@bench_app.command("gvm")
def bench_gvm(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A policy to start from.")],
    data: Annotated[str, typer.Option(metavar="PATH", help="Preference data.")],
    against: Annotated[str | None, typer.Option(metavar="NAME", help="trl: its RewardTrainer.")] = None,
    dtype: Dtype = "bfloat16",
    batch_pairs: Annotated[int, typer.Option(metavar="N", min=2, help="Pairs in an optimiser step.")] = 4,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Measure tokens per second and peak memory of training a value model.

    With --against trl: beside a reward model's training with TRL's RewardTrainer on the same texts.
    """
    from reproduce.commands import bench

    bench.gvm(model, data, against, dtype, batch_pairs, rounds, as_json)


@bench_app.command("policy")
def bench_policy(
    start: Annotated[Path, typer.Option(metavar="DIR", help="A policy to start from.")],
    gvm: Annotated[Path, typer.Option(metavar="DIR", help="A value model.")],
    reward: Annotated[Path, typer.Option(metavar="DIR", help="A scalar reward model.")],
    prompts: Annotated[str, typer.Option(metavar="PATH", help="Data whose prompts are answered.")],
    against: Annotated[str | None, typer.Option(metavar="NAME", help="trl: its GRPOTrainer.")] = None,
    dtype: Dtype = "bfloat16",
    prompts_per_update: Annotated[int, typer.Option(metavar="N", min=2, help="Prompts of an update.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest response.")] = 48,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Measure seconds per update and peak memory of DVPO, PPO, ReMax and GRPO, with the time of every phase.

    With --against trl: of our GRPO beside TRL's GRPOTrainer instead.
    """
    from reproduce.commands import bench

    bench.policy(start, gvm, reward, prompts, against, dtype, prompts_per_update, max_new_tokens, rounds, as_json)


@bench_app.command("growth")
def bench_growth(rounds: Rounds = 3, as_json: Json = False) -> None:
    """Measure how the cost of an update grows with the model, the response and the batch, on small random models."""
    from reproduce.commands import bench

    bench.growth(rounds, as_json)


@bench_app.command("draw")
def bench_draw(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of results, as --json prints them.")],
) -> None:
    """Draw one page, DIR/bench.html, of the results in a folder."""
    from reproduce.commands import bench

    bench.draw(folder)
