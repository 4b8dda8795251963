"""Wrong input to every command: exit code 2, one sentence that names the place, no traceback, nothing half-written."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reproduce import recipe
from reproduce.cli import run

ARTIFACTS = Path(__file__).parents[2] / "artifacts"
GVM = ARTIFACTS / "checkpoints" / "gvm-tiny"
SFT = ARTIFACTS / "checkpoints" / "sft-tiny"
WRONG = "{nonsense: [1]}"
PAIR = {"prompt": "what is the river of lunina ?", "chosen": "the nimwe .", "rejected": "the tarb ."}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str, notes: bool = False) -> str:
    """The one sentence of a command that must be refused, after notes on the data."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    # The library's bar is off in the command itself, which sets that before the library is there.
    lines = [line for line in captured.err.splitlines() if line.strip() and not line.startswith("Loading weights")]
    assert captured.out == ""
    lines = lines[-1:] if notes else lines
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err and len(lines[0]) < 600
    for word in words:
        assert word in lines[0]
    return lines[0]


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """The paths of a recipe's keys that hold a plain value or a list."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path


def groups(values: Any, path: str = "") -> Iterator[str]:
    """The paths of a recipe's keys that hold other keys."""
    if isinstance(values, dict):
        for key, value in values.items():
            if isinstance(value, dict) and "." not in key:
                yield f"{path}.{key}" if path else key
                yield from groups(value, f"{path}.{key}" if path else key)


TINY = recipe._values("tiny")
FREE = ("atlas.prompts", "other_sizes", "methods")
"""Their keys are names, not settings."""


@pytest.mark.parametrize("path", [p for p in leaves(TINY) if p not in ("world", "gvm_pairs.per_prompt")])
def test_a_value_of_the_wrong_type_is_named(path, capsys, tmp_path) -> None:
    arguments = ["reproduce", "--recipe", "tiny", "--dry-run", "--out", str(tmp_path / "out"), "--set"]
    refused([*arguments, f"{path}={WRONG}"], capsys, "recipe tiny", path.split(".")[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [p for p in groups(TINY) if p not in FREE])
def test_an_unknown_key_is_named(path, capsys) -> None:
    arguments = ["reproduce", "--recipe", "tiny", "--dry-run", "--set", f"{path}.learnign_rate=1"]
    refused(arguments, capsys, "recipe tiny", "learnign_rate", "unknown key")


OUT_OF_RANGE = [
    "seeds=0", "compute.workers=0", "atlas.places=1", "atlas.margin=-1", "size.hidden=0", "base.learning_rate=0",
    "base.batch_size=0", "base.decay=2", "sft.epochs=0", "sft.batch_size=-3", "rm.max_grad_norm=0", "gvm.gamma=0",
    "gvm.td_lambda=1.5", "gvm.trajectory_k=-1", "dpo.beta=0", "sampling.temperature=0", "measure.most=0",
    "policy.clip=0", "policy.temperature=-1", "policy.kl.beta=-0.1", "policy.epochs=0", "own_samples=0",
    "gvm.learning_rate=.nan", "gvm.learning_rate=.inf", "policy.lam=2", "gvm.save_steps=7", "gvm.micro_batch_size=5",
    "gvm.target=length", "policy.kl.form=sideways", "scripted=[nobody]", "methods.ppo.algorithm.name=sarsa",
]  # fmt: skip


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(override, capsys) -> None:
    key = override.partition("=")[0].split(".")[-1]
    said = refused(["reproduce", "--recipe", "tiny", "--dry-run", "--set", override], capsys, "recipe tiny")
    assert key in said or override.partition("=")[0].split(".")[0] in said


ROWS: dict[str, list[Any]] = {
    "a number": [3], "a string": ["text"], "null": [None], "a list": [[1, 2]], "no field": [{}],
    "unknown fields": [{"question": "a", "answer": "b"}], "no rejected": [{"prompt": "a", "chosen": "b"}],
    "no chosen": [{"prompt": "a", "rejected": "b"}], "prompt is a number": [{**PAIR, "prompt": 3}],
    "prompt is null": [{**PAIR, "prompt": None}], "prompt is empty": [{**PAIR, "prompt": ""}],
    "prompt is a list of numbers": [{**PAIR, "prompt": [1]}], "no role": [{**PAIR, "prompt": [{"content": "a"}]}],
    "unknown role": [{**PAIR, "prompt": [{"role": "tool", "content": "a"}]}],
    "content is a number": [{**PAIR, "prompt": [{"role": "user", "content": 1}]}],
    "chosen is a number": [{**PAIR, "chosen": 1}], "chosen is a dict": [{**PAIR, "chosen": {"a": 1}}],
    "rejected is null": [{**PAIR, "rejected": None}], "all ties": [{**PAIR, "chosen": "x", "rejected": "x"}],
    "only empty responses": [{**PAIR, "chosen": "", "rejected": ""}],
    "completions is no list": [{"prompt": "a", "completions": "b"}],
    "a completion is text": [{"prompt": "a", "completions": ["b"]}],
    "a completion without response": [{"prompt": "a", "completions": [{"model": "m", "score": 1}]}],
    "a score is text": [{"prompt": "a", "completions": [{"model": "m", "response": "b", "score": "high"}]}],
    "a score is NaN": [{"prompt": "a", "completions": [{"model": "m", "response": "b", "score": float("nan")}]}],
    "a score is infinite": [{"prompt": "a", "completions": [{"model": "m", "response": "b", "score": float("inf")}]}],
    "the model is a number": [{"prompt": "a", "completions": [{"model": 1, "response": "b", "score": 1.0}]}],
    "one completion": [{"prompt": "a", "completions": [{"model": "m", "response": "b", "score": 1.0}]}],
    "bare prompts": [{"prompt": "a"}], "a transcript of no turns": [{"chosen": "a", "rejected": "b"}],
    "transcripts of other prompts": [{
        "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}],
    "the second row": [PAIR, {"prompt": "a", "chosen": 5, "rejected": "b"}],
}  # fmt: skip


def evaluate(data: Path) -> list[str]:
    return ["evaluate", "pairwise", "--model", str(GVM), "--data", str(data)]


@pytest.mark.parametrize("name", ROWS)
def test_a_malformed_row_is_named(name, capsys, tmp_path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    said = refused(evaluate(file), capsys)
    if name == "the second row":
        assert "pairs.jsonl:2" in said


FILES: dict[str, tuple[str, bytes]] = {
    "empty": ("a.jsonl", b""), "blank lines": ("a.jsonl", b"\n \n\n"), "not JSON": ("a.jsonl", b"prompt, chosen\n"),
    "cut off": ("a.jsonl", b'{"prompt": "a", "cho'), "not UTF-8": ("a.jsonl", b'{"prompt": "\xff\xfe"}\n'),
    "UTF-16": ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16")), "binary": ("a.jsonl", bytes(range(256)) * 50),
    "an enormous line": ("a.jsonl", b'{"prompt": "' + b"a" * 20_000_000), "deep": ("a.jsonl", b"[" * 100_000),
    "a huge number": ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n"),
    "no gzip": ("a.jsonl.gz", b"plain text"), "half a gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:20]),
    "no parquet": ("a.parquet", b"plain text"), "half a parquet": ("a.parquet", b"PAR1" + bytes(40)),
    "an unknown ending": ("a.csv", b"prompt,chosen,rejected\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_named(name, capsys, tmp_path) -> None:
    file = tmp_path / FILES[name][0]
    file.write_bytes(FILES[name][1])
    refused(evaluate(file), capsys, file.name)


def test_an_empty_folder_and_one_without_the_split_are_named(capsys, tmp_path) -> None:
    refused(evaluate(tmp_path), capsys, tmp_path.name)
    (tmp_path / "test.jsonl").write_text(json.dumps(PAIR))
    refused([*evaluate(tmp_path), "--split", "train"], capsys, "train")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the released value model, to be damaged."""
    return Path(shutil.copytree(GVM, tmp_path / "gvm"))


def _truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    "no config": lambda f: (f / "config.json").unlink(),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "an unknown architecture": lambda f: _edit_config(f, model_type="moon", architectures=["MoonModel"]),
    "a policy": lambda f: _edit_config(f, architectures=["LlamaForCausalLM"]),
    "no weights": lambda f: next(f.glob("*.safetensors")).unlink(),
    "truncated weights": _truncate,
    "weights that are text": lambda f: next(f.glob("*.safetensors")).write_text("weights"),
    "another width than the weights": lambda f: _edit_config(f, hidden_size=48),
    "no tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
    "a broken tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(name, capsys, checkpoint) -> None:
    DAMAGE[name](checkpoint)
    refused(["score", "--gvm", str(checkpoint), "--prompt", "a", "--response", "b"], capsys, "gvm")


TRAIN: dict[str, str] = {
    "empty": "", "no YAML": "start: [", "a list": "- start", "no start": "data: D\nsettings: {}",
    "no settings": "start: S\ndata: D", "an unknown key": "start: S\ndata: D\nlearning: 1\nsettings: S1",
    "start is nowhere": "start: /nowhere\ndata: D\nsettings: S1",
    "data is nowhere": "start: S\ndata: /nowhere.jsonl\nsettings: S1",
    "an unknown setting": "start: S\ndata: D\nsettings: {learning_rate: 1.0e-3, batch_size: 2, speed: 3}",
    "a rate below zero": "start: S\ndata: D\nsettings: {learning_rate: -1, batch_size: 2}",
    "a rate that is text": "start: S\ndata: D\nsettings: {learning_rate: fast, batch_size: 2}",
    "no batch size": "start: S\ndata: D\nsettings: {learning_rate: 1.0e-3}",
    "a reward model that is not read": "start: S\ndata: D\nreward_model: S\nsettings: S1",
    "the seed is text": "start: S\ndata: D\nseed: one\nsettings: S1",
    "a seed below zero": "start: S\ndata: D\nseed: -1\nsettings: S1",
    "a seed too large": "start: S\ndata: D\nseed: 99999999999999999999999\nsettings: S1",
    "prompts over the limit": "start: S\ndata: D\nsettings: {learning_rate: 0.1, batch_size: 2, max_prompt_tokens: 1}",
    "data without a name": "start: S\ndata: ''\nsettings: S1",
    "no pairs": "start: S\ndata: D\npairs: {most: 0}\nsettings: S1",
    "no such split": "start: S\ndata: D\nsplit: moon\nsettings: S1",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAIN)
def test_a_wrong_configuration_of_a_training_is_named(name, capsys, tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(PAIR))
    text = TRAIN[name].replace(": S1", ": {learning_rate: 1.0e-3, batch_size: 2}")
    text = text.replace(": S\n", f": {SFT}\n").replace(": D\n", f": {folder}\n")
    config = tmp_path / "config.yaml"
    config.write_text(text)
    notes = "over the limit" in name  # of what was read
    refused(["train", "gvm", "--config", str(config), "--out", str(tmp_path / "out")], capsys, notes=notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "data"]


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no such command": (["trian"], "trian"), "an unknown option": (["reproduce", "--fast"], "--fast"),
    "no such recipe": (["reproduce", "--recipe", "huge"], "huge"),
    "no such recipe file": (["reproduce", "--recipe", "mine.yaml"], "mine.yaml"),
    "a table the paper has not": (["reproduce", "--recipe", "tiny", "--table", "11"], "11"),
    "a figure the paper has not": (["reproduce", "--recipe", "tiny", "--figure", "9"], "9"),
    "a table that is text": (["reproduce", "--table", "one"], "--table"),
    "no seed": (["reproduce", "--recipe", "tiny", "--seeds", "0"], "seeds"),
    "no value": (["reproduce", "--recipe", "tiny", "--set", "seeds"], "key=value"),
    "no key": (["reproduce", "--recipe", "tiny", "--set", "=3"], "key=value"),
    "below a value": (["reproduce", "--recipe", "tiny", "--set", "seeds.more=3"], "seeds"),
    "a value that is no YAML": (["reproduce", "--recipe", "tiny", "--set", "seeds=["], "YAML"),
    "data of its own": (["reproduce", "--recipe", "tiny", "--data", "x"], "data"),
    "data that is nowhere": (
        ["reproduce", "--recipe", "small", "--set", f"model={SFT}", "--data", "/nowhere"], "/nowhere"),
    "a model that is nowhere": (["reproduce", "--recipe", "small", "--set", "model=/nowhere"], "/nowhere"),
    "an unknown training": (["train", "ppo", "--config", "c.yaml", "--out", "o"], "ppo"),
    "a configuration that is nowhere": (["train", "gvm", "--config", "/no.yaml", "--out", "o"], "/no.yaml"),
    "a prompt without a response": (["score", "--gvm", str(GVM), "--prompt", "a"], "response"),
    "nothing to score": (["score", "--gvm", str(GVM)], "prompt"),
    "both forms": (["score", "--gvm", str(GVM), "--prompt", "a", "--response", "b", "--input", "f.jsonl"], "input"),
    "an input that is nowhere": (["score", "--gvm", str(GVM), "--input", "/no.jsonl"], "/no.jsonl"),
    "an unknown aggregate": (
        ["score", "--gvm", str(GVM), "--prompt", "a", "--response", "b", "--aggregate", "p50"], "p50"),
    "an unknown picture": (
        ["score", "--gvm", str(GVM), "--prompt", "a", "--response", "b", "--heatmap", "a.gif"], "a.gif"),
    "a value model that is nowhere": (["score", "--gvm", "/nowhere", "--prompt", "a", "--response", "b"], "/nowhere"),
    "a world that is nowhere": (
        ["evaluate", "credit", "--model", str(GVM), "--data", str(ARTIFACTS), "--world", "/no.json"], "/no.json"),
    "a policy that is measured as a value model": (
        ["evaluate", "pairwise", "--model", str(SFT), "--data", str(ARTIFACTS)], ""),
    "an unknown backend": (["serve", "--gvm", str(GVM), "--backend", "tpu"], "tpu"),
    "an unknown precision": (["serve", "--gvm", str(GVM), "--dtype", "int3"], "int3"),
    "a port too high": (["serve", "--gvm", str(GVM), "--port", "70000"], "port"),
    "an open host without a key": (["serve", "--gvm", str(GVM), "--host", "0.0.0.0"], "key"),
    "a key file that is nowhere": (["serve", "--gvm", str(GVM), "--api-key-file", "/no.keys"], "/no.keys"),
    "serving what is nowhere": (["serve", "--gvm", "/nowhere"], "/nowhere"),
    "an unknown peer": (["bench", "server", "--gvm", str(GVM), "--against", "moon"], "moon"),
    "an unknown benchmark of speed": (["bench", "kettle"], "kettle"),
    "a plan of no recipe": (["plan", "--recipe", "huge"], "huge"),
    "a plan for no cluster": (["plan", "--recipe", "tiny", "--cluster", "moon"], "moon"),
    "a release of nothing": (["release", "/nowhere"], "/nowhere"),
    "a pull of nothing": (["pull", "/nowhere"], "/nowhere"),
    "a digest that is none": (["pull", str(GVM), "--sha256", "abc"], "sha256"),
    "a check of nothing": (["verify", "/nowhere"], "/nowhere"),
}  # fmt: skip


PLACES = {
    "pairwise": ["evaluate", "pairwise", "--model", str(GVM), "--data", "d.jsonl", "--out"],
    "score": ["score", "--gvm", str(GVM), "--prompt", "a", "--response", "b", "--heatmap"],
    "train": ["train", "gvm", "--config", "c.yaml", "--out"],
    "reproduce": ["reproduce", "--recipe", "tiny", "--table", "6", "--out"],
}
"""Commands whose last argument is where the result is to stand."""


@pytest.mark.parametrize("name", PLACES)
def test_a_place_where_nothing_can_stand_is_refused_before_the_work(name, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text(json.dumps(PAIR))
    Path("c.yaml").write_text(f"start: {SFT}\ndata: d.jsonl\nsettings: {{learning_rate: 1.0e-3, batch_size: 2}}")
    Path("file.html").write_text("")
    Path("folder.html").mkdir()
    Path("link.html").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    refused([*PLACES[name], "file.html/x.html"], capsys, "file.html")
    if name in ("pairwise", "score"):
        refused([*PLACES[name], "folder.html"], capsys, "folder.html")
    else:
        refused([*PLACES[name], "link.html"], capsys, "link.html")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_is_refused(name, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, word = COMMANDS[name]
    refused(arguments, capsys, word)
    assert not list(tmp_path.iterdir())


def test_the_table_is_long_enough() -> None:
    tables = (list(leaves(TINY)), list(groups(TINY)), OUT_OF_RANGE, ROWS, FILES, DAMAGE, TRAIN, COMMANDS)
    assert sum(map(len, tables)) >= 150
