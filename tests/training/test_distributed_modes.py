"""Every strategy on two CPU processes through the command line, against one process; a death and a change of number."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dvpo import models
from dvpo.data.records import dump_examples

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
ONLINE = {
    "algorithm": {"name": "dvpo"},
    "learning_rate": 1e-4,
    "updates": 3,
    "prompts_per_update": 8,
    "minibatch_size": 4,
    "epochs": 2,
    "max_new_tokens": 8,
    "save_updates": 1,
}
VALUE = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 2, "save_steps": 1, "log_steps": 1}
Train = Callable[..., "subprocess.CompletedProcess[str]"]


def command(kind: str, config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "reproduce.cli", "train", kind, "--config", str(config), "--out", str(out), *more]


def variables(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def on(strategy: str, count: int = 2) -> tuple[str, ...]:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return ("--processes", str(count), "--strategy", strategy)


@pytest.fixture(scope="module")
def start(checkpoints, tokenizer, tmp_path_factory) -> Path:
    """The random policy with an EOS that is likely: responses are ragged."""
    model = models.load(checkpoints["llama", "policy"], "policy")
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 7
    folder = tmp_path_factory.mktemp("start") / "policy"
    models.save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def config(start, checkpoints, examples, tmp_path_factory) -> Callable[..., Path]:
    """Writes a configuration: `config(kind, **settings)`. Data are `train`, or `long`: texts that training packs."""
    folder = tmp_path_factory.mktemp("configs")
    dump_examples(examples, folder / "train.jsonl")
    said = [e.prompt[0]["content"] for e in examples]
    long = [({"role": "user", "content": " ".join([text] * (15 + i))},) for i, text in enumerate(said)]
    dump_examples([replace(e, prompt=p) for e, p in zip(examples, long, strict=True)], folder / "long.jsonl")

    def write(kind: str, data: str = "train", **changes: Any) -> Path:
        file: dict[str, Any] = {"start": str(start), "data": str(folder / f"{data}.jsonl")}
        if kind == "policy":
            file["value_model"] = str(checkpoints["llama", "value"])
        file["settings"] = (ONLINE if kind == "policy" else VALUE) | changes
        path = folder / f"{kind}-{abs(hash(json.dumps(file)))}.yaml"
        path.write_text(yaml.safe_dump(file))
        return path

    return write


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a training, run once for each way of asking: `trained(kind, *options, **settings)`."""
    done: dict[Any, Path] = {}

    def train(kind: str, *options: str, **changes: Any) -> Path:
        key = (kind, options, json.dumps(changes))
        if key not in done:
            out = tmp_path_factory.mktemp(kind) / "out"
            ended = subprocess.run(
                command(kind, config(kind, **changes), out, *options),
                capture_output=True, text=True, timeout=900, env=variables(), check=False,
            )  # fmt: skip
            assert ended.returncode == 0, ended.stderr
            done[key] = out
        return done[key]

    return train


def losses(out: Path) -> list[float]:
    metrics = json.loads((out / "training.json").read_text())["metrics"]
    return metrics.get("policy_losses") or [loss for _, loss in metrics["losses"]]


def difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def same(one: Path, other: Path) -> None:
    """Up to float error: the loss of every step to 1e-5, the weights to a tenth of one step of AdamW."""
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    kind = "policy" if (one / "curves.json").exists() else "value"
    assert difference(one, other) < 0.1 * (ONLINE if kind == "policy" else VALUE)["learning_rate"]
    if kind == "policy":
        curves = [json.loads((folder / "curves.json").read_text()) for folder in (one, other)]
        for ours, theirs in zip(*curves, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-5)
    models.load(other, "policy" if kind == "policy" else "value")


@pytest.mark.parametrize("kind", ["gvm", "policy"])
def test_one_row_at_a_time_is_the_whole_batch(trained, kind: str) -> None:
    same(trained(kind), trained(kind, micro_batch_size=1))


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_the_value_model_is_that_of_one_process(trained, strategy: str) -> None:
    same(trained("gvm"), trained("gvm", *on(strategy)))


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_long_texts_are_packed_as_in_one_process(trained, strategy: str) -> None:
    same(trained("gvm", data="long"), trained("gvm", *on(strategy), data="long"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_policy_is_that_of_one_process(trained, strategy: str) -> None:
    same(trained("policy"), trained("policy", *on(strategy)))


def test_frozen_models_in_parts_say_the_same(trained) -> None:
    same(trained("policy"), trained("policy", *on("ddp"), frozen="sharded"))


@pytest.mark.parametrize("kind", ["sft", "rm", "dpo"])
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_the_other_trainers_are_those_of_one_process(trained, kind: str, strategy: str) -> None:
    # Whole batches: on several processes TRL's trainers fill an epoch's last batch up with texts from its beginning.
    whole = {"batch_size": 4, "epochs": 1}
    one, two = trained(kind, **whole), trained(kind, *on(strategy), **whole)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    # AdamW moves a weight whose gradient is rounding by as much as any other.
    assert difference(one, two) < 0.5 * VALUE["learning_rate"]


def test_an_adapter_under_zero3(trained) -> None:
    one, two = (
        load_file(trained("policy", *options, lora={"r": 4, "alpha": 8}) / "adapter_model.safetensors")
        for options in ((), on("zero3"))
    )
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def started(kind: str, file: Path, out: Path, options: tuple[str, ...]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(kind, file, out, *options), text=True, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(there: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    """What `there` finds, as soon as it finds something."""
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None:
        if found := there():
            return found
        time.sleep(0.05)
    raise AssertionError(f"the training ended or did not begin: {process.stderr and process.stderr.read()}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_run(config, tmp_path, victim: int) -> None:
    file, out = config("policy", updates=500), tmp_path / "out"
    process = started("policy", file, out, on("ddp"))
    wait_for((tmp_path / ".out.part" / "state" / "online.pt").exists, process)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
    ranks[victim].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith(f"error: process {victim} of 2 was killed by SIGKILL")
    assert not ranks[1 - victim].is_running()
    assert not out.exists()


def checkpointed(kind: str, part: Path) -> Callable[[], Any]:
    """Whether a first whole checkpoint is there."""
    if kind == "policy":
        return (part / "state" / "online.pt").exists
    return lambda: list((part / "state").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("policy", ("zero3", 2), ("ddp", 1)),
        ("policy", ("ddp", 1), ("zero2", 2)),
        ("policy", ("fsdp2", 2), ("zero3", 2)),
        ("gvm", ("zero3", 2), ("ddp", 1)),
        ("gvm", ("ddp", 1), ("zero2", 2)),
        ("gvm", ("ddp", 2), ("ddp", 4)),
    ],
)
def test_a_checkpoint_goes_on_under_another_strategy_and_number(
    config, tmp_path, kind: str, before: tuple[str, int], after: tuple[str, int]
) -> None:
    """What was interrupted under one and went on under the other is what one process makes without interruption."""
    changes: dict[str, Any] = {"updates": 8} if kind == "policy" else {"epochs": 8}
    file, part = config(kind, **changes), tmp_path / ".out.part"
    process = started(kind, file, tmp_path / "out", on(*before))
    wait_for(checkpointed(kind, part), process)
    process.kill()
    process.communicate()
    went_on = subprocess.run(
        command(kind, file, tmp_path / "out", *on(*after)), capture_output=True, text=True, env=variables(), check=False
    )
    assert went_on.returncode == 0, went_on.stderr
    whole = subprocess.run(command(kind, file, tmp_path / "whole"), capture_output=True, env=variables(), check=False)
    assert whole.returncode == 0
    same(tmp_path / "whole", tmp_path / "out")


def test_accelerates_own_launcher_is_served_too(trained, config, tmp_path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    import reproduce

    file = Path(reproduce.__file__).parent / "launchers" / "zero3.yaml"
    ended = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2",
         "--main_process_port", "0", *command("policy", config("policy"), tmp_path / "out")[1:]],
        capture_output=True, text=True, env=variables(), check=False, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    same(trained("policy"), tmp_path / "out")


def test_options_of_the_launcher_are_refused_under_another(config, tmp_path) -> None:
    ended = subprocess.run(
        command("gvm", config("gvm"), tmp_path / "out", *on("ddp")),
        capture_output=True, text=True, check=False, timeout=600,
        env=variables(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511",
                      ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"),
    )  # fmt: skip
    assert ended.returncode == 2
    assert "a launcher has started this process" in ended.stderr


def test_bf16_under_zero3_keeps_its_float32_weights_over_a_checkpoint(trained, tmp_path) -> None:
    """The policy that is saved is in bfloat16; its loss stays near that of float32."""
    one, two = trained("policy"), trained("policy", *on("zero3"), bf16=True)
    assert {value.dtype for value in load_file(two / "model.safetensors").values()} == {torch.bfloat16}
    assert losses(two) == pytest.approx(losses(one), abs=0.1)
