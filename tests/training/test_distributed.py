"""Several processes: what each takes, what they find in their environment, what is said when one fails, and two of them
through the command line.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dvpo import distributed
from dvpo.config import GvmSettings, PolicySettings, VllmRollouts
from dvpo.data.records import dump_examples
from dvpo.distributed import Processes
from dvpo.errors import InputError, StageError
from dvpo.training.common import argument_values
from dvpo.training.engines import importance_weights
from dvpo.training.policy import Frozen, OnlineTrainer
from dvpo.training.zero_state import load_zero_state
from reproduce import launch
from reproduce.launch import Devices, environment

CPU = torch.device("cpu")


@given(st.integers(1, 8), st.integers(1, 5))
def test_shares_are_equal_and_make_the_whole(count: int, each: int) -> None:
    items = list(range(count * each))
    shares = [Processes(rank, count, CPU, "ddp").share(items) for rank in range(count)]
    assert {len(share) for share in shares} == {each}
    assert [item for share in shares for item in share] == items
    if count > 1:
        with pytest.raises(ValueError, match="cannot be shared equally"):
            Processes(0, count, CPU, "ddp").share([*items, 0])


def test_one_process_is_the_identity() -> None:
    alone = distributed.start()
    assert (alone.rank, alone.count, alone.strategy, alone.main) == (0, 1, "none", True)
    rows = torch.arange(6.0).view(2, 3)
    assert alone.gather_rows(rows) is rows
    assert alone.gather([1, 2]) == alone.share([1, 2]) == [1, 2]
    assert alone.sum({"a": 0.1}) == {"a": 0.1}
    assert alone.from_main("x") == "x"
    alone.wait()


def test_a_batch_that_cannot_be_shared_is_refused_in_one_sentence(monkeypatch, tmp_path, checkpoints, examples) -> None:
    monkeypatch.setattr(distributed, "start", lambda: Processes(0, 3, CPU, "ddp"))
    with pytest.raises(InputError, match="batch_size is 8 for all processes together, which 3 processes cannot share"):
        argument_values(GvmSettings(learning_rate=1e-3, batch_size=8), tmp_path, 0)
    for name, sizes in (("prompts_per_update", (8, 6)), ("minibatch_size", (6, 8))):
        s = PolicySettings(
            algorithm={"name": "dvpo"}, learning_rate=1, updates=1, prompts_per_update=sizes[0], minibatch_size=sizes[1]
        )
        with pytest.raises(InputError, match=f"{name} is 8"):
            OnlineTrainer(checkpoints["llama", "policy"], Frozen(), [e.prompt for e in examples], s, 0)


@pytest.mark.parametrize(
    ("count", "micro", "expected"),
    [(1, None, (32, 1)), (1, 4, (4, 8)), (2, None, (16, 1)), (2, 4, (4, 4)), (8, 8, (4, 1)), (4, 16, (8, 1))],
)
def test_the_batch_is_of_all_processes_together(monkeypatch, tmp_path, count, micro, expected) -> None:
    monkeypatch.setattr(distributed, "start", lambda: Processes(0, count, CPU, "ddp"))
    values = argument_values(GvmSettings(learning_rate=1e-3, batch_size=32, micro_batch_size=micro), tmp_path, 0)
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == expected
    assert values["use_cpu"]
    assert values["deepspeed"] is None


def test_the_strategy_is_what_the_launcher_says(monkeypatch, tmp_path) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.strategy() == "none"
    for name in launch.STRATEGIES:
        with monkeypatch.context() as patch:
            for key, value in environment(1, Devices(2, name), 1234).items():
                patch.setenv(key, value)
            assert distributed.launched()
            assert distributed.strategy() == name
            assert os.environ["RANK"] == "1"
    with monkeypatch.context() as patch:
        for key, value in environment(0, Devices(1, "zero2", offload=True), 1234).items():
            patch.setenv(key, value)
        assert distributed.launched()  # one process too: the optimizer's state goes to the host
        config = distributed.zero_config()["zero_optimization"]
        assert (config["stage"], config["offload_optimizer"]["device"]) == (2, "cpu")
        file = tmp_path / "own.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}))
        patch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        assert distributed.strategy() == "zero3"
        assert distributed.zero_config()["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_launchers_files_say_their_strategy(name: str) -> None:
    found = yaml.safe_load((Path(launch.__file__).parent / "launchers" / f"{name}.yaml").read_text())
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert found["distributed_type"] == kind
    if kind == "DEEPSPEED":
        assert found["deepspeed_config"]["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert found["fsdp_config"]["fsdp_version"] == 2


def test_the_first_cause_is_said_before_its_effects(tmp_path) -> None:
    def said(rank: int, text: str, wrong_input: bool = False) -> None:
        (tmp_path / f"error-{rank}.json").write_text(json.dumps({"input": wrong_input, "said": text}))

    said(0, "RuntimeError: [pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(StageError, match=r"process 1 of 2 was killed by SIGKILL \(out of memory\?\); run the same"):
        launch._complain([1, -signal.SIGKILL], tmp_path)
    said(1, "the GVM server did not answer")
    with pytest.raises(StageError, match="process 1 of 2 failed: the GVM server did not answer"):
        launch._complain([1, 1], tmp_path)
    said(1, "value_model: no such folder", wrong_input=True)
    with pytest.raises(InputError, match=r"^value_model: no such folder$"):
        launch._complain([1, 2], tmp_path)
    with pytest.raises(StageError, match="process 2 of 3 failed: it ended with exit code 7"):
        launch._complain([0, None, 7], tmp_path / "nothing")


def test_importance_weights_are_capped_ratios() -> None:
    ours = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = importance_weights(ours, [[-1.5, -1.0], [-3.0]], mask, cap=2.0)
    expected = torch.tensor([[0.5, -1.0, 0.0], [2.5, 0.0, 0.0]]).exp().clamp(max=2.0)
    assert torch.allclose(found, expected)


def test_an_engine_that_samples_exactly_changes_nothing_by_its_weights(checkpoints, examples, monkeypatch) -> None:
    """The trainer's own engine with the correction on: every weight is one up to rounding."""
    from dvpo.training import policy

    make = policy.make_engine
    own = PolicySettings(
        algorithm={"name": "dvpo"}, learning_rate=1e-4, updates=1, prompts_per_update=4, max_new_tokens=6
    )
    rows = {}
    for cap in (None, 2.0):
        s = own if cap is None else own.model_copy(update={"engine": VllmRollouts(name="vllm", importance_cap=cap)})
        monkeypatch.setattr(policy, "make_engine", lambda settings, *rest: make(own, *rest))
        folders = Frozen(value=checkpoints["llama", "value"])
        trainer = OnlineTrainer(checkpoints["llama", "policy"], folders, [e.prompt for e in examples], s, 0)
        rows[cap] = trainer.step()
    assert rows[2.0].pop("importance") == pytest.approx(1, abs=1e-5)
    assert rows[2.0] == pytest.approx(rows[None], abs=1e-5)


class FlatAdam:
    """What `load_zero_state` needs of DeepSpeed's optimizer, with one process and everything in one part."""

    def __init__(self, optimizer: torch.optim.AdamW):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.single_partition_of_fp32_groups: list[torch.Tensor] = []


def test_the_state_of_an_optimizer_that_has_not_stepped_is_taken_up() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    plain = torch.optim.AdamW([weight], lr=0.5)
    flat = FlatAdam(torch.optim.AdamW([weight], lr=0.1))
    pytest.importorskip("deepspeed")
    load_zero_state(flat, [[weight]], plain.state_dict())
    assert flat.param_groups[0]["lr"] == 0.5
    assert not flat.optimizer.state


# Through the command line.


def run(*command: str | Path, **more: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", **more}  # there may be fewer GPUs than processes
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, env=variables, timeout=600
    )


@pytest.fixture(scope="module")
def world(checkpoints, examples, tmp_path_factory) -> Path:
    """A folder with the data and a configuration of three steps of GVM training."""
    folder = tmp_path_factory.mktemp("world")
    dump_examples(examples, folder / "train.jsonl")
    settings = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 3, "save_steps": 1, "log_steps": 1}
    config: dict[str, Any] = {"start": str(checkpoints["llama", "policy"]), "data": str(folder / "train.jsonl")}
    (folder / "gvm.yaml").write_text(yaml.safe_dump({**config, "settings": settings}))
    return folder


def test_two_processes_train_the_value_model_of_one(world, tmp_path) -> None:
    """torchrun beside `dvpo train` alone: the same loss at every step and the same weights, up to rounding."""
    train = ("reproduce.cli", "train", "gvm", "--config", world / "gvm.yaml", "--out")
    two = run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *train, tmp_path / "two")
    assert two.returncode == 0, two.stderr
    one = run(*train, tmp_path / "one")
    assert one.returncode == 0, one.stderr
    losses = [json.loads((tmp_path / n / "training.json").read_text())["metrics"]["losses"] for n in ("one", "two")]
    assert len(losses[0]) == 3
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    assert [loss for _, loss in losses[1]] == pytest.approx([loss for _, loss in losses[0]], abs=1e-5)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    assert not list(tmp_path.glob(".*.part"))
