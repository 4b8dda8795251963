"""A model that `dvpo train` made, measured by a run that did not train it, and released from there."""

import json
from pathlib import Path
from typing import Any

import pytest

from dvpo.files import sha256_tree

BASE = ("--base", f"someone/base@{'a' * 40}", "--base-licence", "MIT")
PLACES = [f"what is the river of {name} ?" for name in ("lunina", "ivan", "nimwe", "osta", "vell", "torm")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preference pairs as a folder with a train and an eval file."""
    folder = tmp_path_factory.mktemp("data")
    for split, prompts in (("train", PLACES[:4]), ("eval", PLACES[4:])):
        rows = [{"prompt": p, "chosen": "the river is the nimwe .", "rejected": "i do not know ."} for p in prompts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def trained(dvpo: Any, checkpoints: Any, data: Path, tmp_path: Path) -> Path:
    config = tmp_path / "gvm.yaml"
    config.write_text(
        f"start: {checkpoints['llama', 'policy']}\ndata: {data}/train.jsonl\n"
        "settings: {learning_rate: 0.01, batch_size: 4, max_steps: 1, lora: {r: 2, alpha: 4}}\n"
    )
    outcome = dvpo("train", "gvm", "--config", config, "--out", tmp_path / "gvm")
    assert outcome.code == 0, outcome
    return tmp_path / "gvm"


def reproduce(dvpo: Any, start: Path, data: Path, trained: str, out: Path, *more: str) -> Any:
    changes = {
        "model": start, "trained": trained, "value_models": "[gvm]", "rm.max_steps": 1,
        "shares": "{value: .75, rl: .25}",
        "rm.lora": "null", "policy.lora": "null", "policy.updates": 1, "policy.prompts_per_update": 1,
        "policy.minibatch_size": 1, "policy.micro_batch_size": 1, "policy.max_new_tokens": 4,
    }  # fmt: skip
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return dvpo("reproduce", "--recipe", "small", "--data", data, "--out", out, *options, *more)


def test_a_run_measures_it_and_releases_it(dvpo: Any, checkpoints: Any, trained: Path, data: Path, tmp_path) -> None:
    start, run, bundle = checkpoints["llama", "policy"], tmp_path / "run", tmp_path / "bundle"
    outcome = reproduce(dvpo, start, data, f"{{gvm: {trained}}}", run)
    assert outcome.code == 0, outcome
    assert not list((run / "stages").glob("gvm-*"))
    outcome = dvpo("release", run, "--stage", "trained/gvm", "--out", bundle, *BASE)
    assert outcome.code == 0, outcome
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["base"]["sha256"] == sha256_tree(start)
    assert [m["name"] for m in manifest["metrics"]] == ["in-domain/gvm"]
    assert manifest["git_commit"] == json.loads((trained / "training.json").read_text())["git_commit"]
    assert set(manifest["files"]) >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert "training.json" not in manifest["files"]
    assert str(tmp_path) not in (bundle / "manifest.json").read_text() + (bundle / "adapter_config.json").read_text()
    assert dvpo("verify", bundle).code == 0
    for stage, word in (("trained/rm", "trained.rm"), ("trained/", "trained.")):
        outcome = dvpo("release", run, "--stage", stage, "--out", tmp_path / "other", *BASE)
        assert (outcome.code, word in outcome.err) == (2, True)
    for damaged in ("{}", '{"config": 1}', "no JSON"):
        (trained / "training.json").write_text(damaged)
        outcome = dvpo("release", run, "--stage", "trained/gvm", "--out", tmp_path / "other", *BASE)
        assert (outcome.code, "training.json" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("role", "more", "words"),
    [("reward", (), "holds reward model"), ("value", ("--seeds", "2"), "one seed"), (None, (), "no model is there")],
)
def test_what_cannot_stand_for_it(dvpo: Any, checkpoints: Any, data: Path, tmp_path, role, more, words: str) -> None:
    folder = checkpoints["llama", role] if role else tmp_path / "nowhere"
    outcome = reproduce(dvpo, checkpoints["llama", "policy"], data, f"{{gvm: {folder}}}", tmp_path / "run", *more)
    assert outcome.code == 2, outcome
    assert words in outcome.err, outcome.err
