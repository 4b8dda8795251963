"""What must not matter to `dvpo train gvm` and `dvpo train policy`: micro-batches, padding, and the order of a batch.

Every training is a run of the command line; what is compared are the weights that it wrote.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dvpo import models
from dvpo.data.records import Example
from reproduce import cli

Train = Callable[..., dict[str, torch.Tensor]]
GVM = {"learning_rate": 1e-3, "schedule": "constant", "batch_size": 8, "max_steps": 3, "save_steps": 1, "log_steps": 1}
POLICY = {
    "learning_rate": 2e-5,
    "updates": 2,
    "prompts_per_update": 8,
    "minibatch_size": 8,
    "epochs": 1,
    "max_new_tokens": 8,
}
DVPO = {"name": "dvpo", "estimator": "gae"}
PPO = {"name": "ppo", "critic_learning_rate": 2e-5}


def rows_of(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Scored responses. The scores do not cancel: Adam would turn the rounding of a gradient of 0 into whole steps."""
    return [
        {
            "prompt": list(e.prompt),
            "responses": [
                {"text": r.text, "policy": r.policy, "score": 1.0 + i + 7 * j} for j, r in enumerate(e.responses)
            ],
            "preferences": [[1, 0]],
            "origin": e.origin,
        }
        for i, e in enumerate(examples)
    ]


@pytest.fixture
def train(tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs a training by its command and returns the weights, without the seconds that a new process takes."""
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    runs = iter(range(100))

    def run(
        kind: str, start: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]] = (), **more: Any
    ) -> dict[str, torch.Tensor]:
        folder = tmp_path / str(next(runs))
        folder.mkdir()
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or rows_of(examples[:8])), encoding="utf-8")
        config = {"start": str(start), "data": str(data), "settings": settings, **more}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        assert cli.run(["train", kind, "--config", str(folder / "config.yaml"), "--out", str(folder / "out")]) == 0
        weights = load_file(folder / "out" / "model.safetensors")
        critic = folder / "out" / "critic" / "model.safetensors"
        return weights | ({f"critic {n}": w for n, w in load_file(critic).items()} if critic.exists() else {})

    return run


@pytest.fixture(scope="module")
def start(checkpoints, tokenizer, tmp_path_factory) -> Path:
    """The random policy with an EOS that is likely after some tokens and not after others: responses are ragged."""
    model = models.load(checkpoints["llama", "policy"], "policy")
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 7
    folder = tmp_path_factory.mktemp("start")
    models.save(model, tokenizer, folder)
    return folder


def moved(after: dict[str, torch.Tensor], folder: Path) -> float:
    """The largest change of a weight since the checkpoint in `folder`."""
    before = load_file(folder / "model.safetensors")
    return max(float((after[name] - before[name]).abs().max()) for name in before.keys() & after.keys())


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_eight_texts_at_once_are_one_text_eight_times_for_the_gvm(checkpoints, train) -> None:
    """Texts of different lengths: alone they have no padding."""
    folder = checkpoints["llama", "value"]
    weights = {
        micro: train("gvm", folder, {**GVM, "target": "score", "micro_batch_size": micro}) for micro in (8, 2, 1)
    }
    assert moved(weights[8], folder) > 1e-3
    assert difference(weights[8], weights[1]) <= 5e-6
    assert difference(weights[8], weights[2]) <= 5e-6


@pytest.mark.parametrize("algorithm", [DVPO, PPO], ids=["dvpo", "ppo"])
def test_eight_responses_at_once_are_one_response_eight_times_for_the_policy(
    checkpoints, start, train, algorithm
) -> None:
    frozen = {"dvpo": "value", "ppo": "reward"}[algorithm["name"]]
    model = {f"{frozen}_model": str(checkpoints["llama", frozen])}
    weights = {
        micro: train("policy", start, {**POLICY, "algorithm": algorithm, "micro_batch_size": micro}, **model)
        for micro in (8, 1)
    }
    assert moved(weights[8], start) > 1e-5
    assert any(name.startswith("critic ") for name in weights[8]) == (algorithm["name"] == "ppo")
    assert difference(weights[8], weights[1]) <= 1e-6


def test_the_order_of_the_data_does_not_matter_where_all_of_it_is_one_batch(checkpoints, examples, train) -> None:
    folder = checkpoints["llama", "value"]
    rows = rows_of(examples[:8])
    settings = {**GVM, "batch_size": 16, "target": "score"}
    one, other, fewer = (train("gvm", folder, settings, given) for given in (rows, rows[::-1], rows[:7] + rows[:1]))
    assert difference(one, other) <= 5e-6
    assert difference(one, fewer) > 1e-4  # other data would have been seen


def test_a_longer_text_in_the_batch_changes_no_value_of_the_others(checkpoints, examples, train) -> None:
    """gamma and lambda 1: every state regresses on its text's own reward. A second long prompt only pads the first."""
    folder = checkpoints["llama", "value"]
    rows = rows_of(examples[:4])
    long = {**rows[3], "prompt": [{"role": "user", "content": " ".join([rows[3]["prompt"][0]["content"]] * 4)}]}
    settings = {**GVM, "batch_size": 8, "target": "score", "td_lambda": 1.0}
    given = [*rows[:3], long]
    together = train("gvm", folder, {**settings, "micro_batch_size": 8}, given)
    alone = train("gvm", folder, {**settings, "micro_batch_size": 1}, given)
    assert difference(together, alone) <= 5e-6
    assert difference(together, train("gvm", folder, {**settings, "micro_batch_size": 8}, rows)) > 1e-4
