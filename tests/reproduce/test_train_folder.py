"""`dvpo train` and its folder: what it goes on from, what it refuses to, and what a checkpoint needs to be read."""

import json
import shutil
from pathlib import Path

import pytest

from reproduce.cli import run

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"
PAIR = {"prompt": "what is the river of lunina ?", "chosen": "the nimwe .", "rejected": "the tarb ."}
SETTINGS = "learning_rate: 1.0e-2, batch_size: 2, save_steps: 1, log_steps: 1"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a policy, data and a configuration."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINTS / "sft-tiny", "start")
    Path("data.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    configure(SETTINGS)
    return tmp_path


def configure(settings: str) -> None:
    Path("c.yaml").write_text(f"start: start\ndata: data.jsonl\nsettings: {{{settings}}}")


def train(kind: str) -> int:
    return run(["train", kind, "--config", "c.yaml", "--out", "out"])


def mean_value(folder: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    assert run(["score", "--gvm", str(folder), "--prompt", PAIR["prompt"], "--response", "the nimwe .", "--json"]) == 0
    return float(json.loads(capsys.readouterr().out)["items"][0]["scores"]["mean"])


def test_an_adapter_finds_its_base_from_another_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(f"{SETTINGS}, lora: {{r: 2, alpha: 4}}")
    assert train("gvm") == 0
    value = mean_value(here / "out", capsys)
    other = here / "other"
    other.mkdir()
    shutil.copytree(CHECKPOINTS / "gvm-tiny", other / "start")  # a namesake that it must not take
    monkeypatch.chdir(other)
    assert mean_value(here / "out", capsys) == value


def test_a_base_that_is_gone_is_said_to_be_an_adapters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(f"{SETTINGS}, lora: {{r: 2, alpha: 4}}")
    assert train("gvm") == 0
    shutil.move("start", "moved")
    capsys.readouterr()
    assert run(["evaluate", "pairwise", "--model", "out", "--data", "data.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "out is an adapter" in said
    assert "--base" in said


def test_what_was_refused_begins_anew_once_it_is_mended(here: Path) -> None:
    configure(f"{SETTINGS}, max_prompt_tokens: 1")
    assert train("sft") == 2
    assert not Path(".out.part").exists()
    configure(SETTINGS)
    assert train("sft") == 0


def test_a_training_does_not_go_on_from_another_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvpo.models.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train("sft") == 130
    assert any(Path(".out.part/state").iterdir())
    shutil.copy(CHECKPOINTS / "gvm-tiny" / "tokenizer_config.json", "start/more.json")
    capsys.readouterr()
    assert train("sft") == 2
    assert "other settings, models or data" in capsys.readouterr().err
    Path("start/more.json").unlink()
    assert train("sft") == 0
    found = json.loads(Path("out/training.json").read_text())
    assert list(found["models_sha256"]) == ["start"]


def test_the_smallest_share_of_an_epoch_is_one_text(here: Path) -> None:
    configure(f"{SETTINGS}, epochs: 0.0000001")
    assert train("gvm") == 0


def test_texts_that_the_model_cannot_read_whole_are_left_out_and_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**PAIR, "chosen": "the nimwe . " * 100}
    Path("data.jsonl").write_text(f"{json.dumps(PAIR)}\n{json.dumps(long)}\n")
    model = str(CHECKPOINTS / "gvm-tiny")
    assert run(["evaluate", "pairwise", "--model", model, "--data", "data.jsonl", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["pairs"] == 1
    assert "1 of 2 pairs were left out: longer than the 256 tokens that the model reads" in document["notes"]


@pytest.mark.parametrize("command", ["evaluate", "score", "train"])
def test_the_row_that_a_template_refuses_is_named(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(CHECKPOINTS / "gvm-tiny", "strict")
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x {{ messages[0].content }}"
    )
    for folder in ("strict", "start"):
        Path(folder, "chat_template.jinja").write_text(template)
    turns = [{"role": "system", "content": "the"}, {"role": "user", "content": PAIR["prompt"]}]
    rows = [PAIR, {**PAIR, "prompt": turns}]
    if command == "score":
        rows = [{"prompt": row["prompt"], "response": "the nimwe ."} for row in rows]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = {
        "evaluate": lambda: run(["evaluate", "pairwise", "--model", "strict", "--data", "data.jsonl"]),
        "score": lambda: run(["score", "--gvm", "strict", "--input", "data.jsonl"]),
        "train": lambda: train("gvm"),
    }[command]()
    assert code == 2
    assert "data.jsonl:2: the chat template refuses the messages: no system" in capsys.readouterr().err
