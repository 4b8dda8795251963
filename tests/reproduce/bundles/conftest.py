"""A small finished run, its bundles, and what the tests of them share."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dvpo import models
from dvpo.config import LoraSettings
from dvpo.data.records import dump_examples
from dvpo.files import list_files, sha256_file, sha256_json, sha256_tree, write_json
from reproduce import cli
from reproduce.bundles import sources
from reproduce.bundles.manifest import manifest_bytes
from reproduce.pipeline import Job, load_result, run_job

LIMITS = {"max_prompt_tokens": 64, "max_response_tokens": 64}
MEASURE = {"format": "split", "split": "test", "trajectory_k": 0, "subfolder": "", **LIMITS}


@dataclass
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    def differs(self, *words: str) -> None:
        """Asserts exit code 1, one line on standard error, and the words in what was said."""
        assert self.code == 1, self
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        assert all(word in self.out + self.err for word in words), self


@pytest.fixture
def dvpo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The command, in this process."""
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)

    def run(*arguments: str | Path) -> Outcome:
        code = cli.run([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


def publish(run: Path, stage: str, kind: str, source: Path, **inputs: str) -> str:
    """Puts a finished stage with the files of `source` into a run; returns the digest that its children name."""
    job = Job(stage, kind, {"learning_rate": 0.1}, 0, {}, inputs)
    folder = run / "stages" / job.folder
    shutil.copytree(source, folder)
    manifest = {
        "stage": kind,
        "id": stage,
        "key": job.key,
        "settings": job.settings,
        "inputs": inputs,
        "outputs": {p.relative_to(folder).as_posix(): sha256_file(p) for p in list_files(folder)},
        "metrics": {},
        "seeds": [0],
        "git_commit": "c" * 40,
        "versions": {"torch": torch.__version__},
        "device": {"cpu": "a processor", "cores": 2},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
    }
    write_json(folder / "manifest.json", manifest)
    return sha256_json(manifest["outputs"])


def measure(run: Path, stage: str, kind: str, chosen: dict[str, Any], **inputs: str) -> None:
    """Runs a real measuring stage of the run."""
    by_digest = {
        sha256_json(json.loads(p.read_text())["outputs"]): p.parent for p in (run / "stages").glob("*/manifest.json")
    }
    run_job(Job(stage, kind, chosen, 0, {k: by_digest[v] for k, v in inputs.items()}, inputs), run / "stages")


def finish(run: Path) -> None:
    """What `dvpo reproduce` writes last."""
    manifests = [json.loads(p.read_text()) for p in (run / "stages").glob("*/manifest.json")]
    write_json(run / "manifests.json", {m["id"]: m for m in manifests})
    write_json(run / "recipe.json", {"name": "micro"})


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any, atlas: Any, examples: Any) -> Path:
    """A finished run: world, base, SFT, preference data, GVM and policy, and their measurements."""
    root = tmp_path_factory.mktemp("run")
    world, data = root / "world", root / "data"
    write_json(world / "world.json", atlas.to_json())
    dump_examples(examples, world / "test.jsonl")
    dump_examples(examples, data / "test.jsonl")
    (data / "notes.txt").write_text("not read by any measurement")
    folder = root / "runs" / "micro"
    at = publish(folder, "seed0/atlas", "atlas", world)
    base = publish(folder, "seed0/base", "base", checkpoints["llama", "policy"], atlas=at)
    curves = root / "curves"
    shutil.copytree(checkpoints["llama", "policy"], curves)
    write_json(curves / "curves.json", [1, 2])
    sft = publish(folder, "seed0/sft", "sft", curves, start=base, data=at)
    covered = publish(folder, "seed0/coverage", "coverage", data, atlas=at, sft=sft)
    value = publish(folder, "seed0/gvm", "gvm", checkpoints["llama", "value"], start=sft, data=covered)
    pairwise = {**MEASURE, "per_prompt": 3, "most": None, "bf16": False}
    measure(folder, "seed0/accuracy/gvm", "pairwise", pairwise, model=value, data=covered)
    credit = {"split": "test", "per_prompt": 2, "subfolder": "", "trajectory_k": 0, **LIMITS}
    measure(folder, "seed0/credit/gvm", "credit", credit, model=value, data=covered, atlas=at)
    gold = {"split": "test", "max_new_tokens": 4, "temperature": 1.0}
    measure(folder, "seed0/gold/sft", "gold", gold, policy=sft, atlas=at)
    finish(folder)
    return folder


@pytest.fixture(scope="session")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GVM's bundle. Read only: take `bundle` to change one."""
    out = tmp_path_factory.mktemp("made") / "gvm-micro"
    assert cli.run(["release", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Makes key pairs by name: (private, public)."""
    pytest.importorskip("model_signing.signing", reason="signatures need the extra `sign`", exc_type=ImportError)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")

    def pair(name: str) -> tuple[Path, Path]:
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        if not private.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            pem = serialization.Encoding.PEM
            private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
            public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        return private, public

    return pair


@pytest.fixture(scope="session")
def signed(run: Path, keys: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, signed by `ours`. Read only."""
    out = tmp_path_factory.mktemp("signed") / "gvm-micro"
    assert cli.run(["release", str(run), "--out", str(out), "--key", str(keys("ours")[0])]) == 0
    return out


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to change."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def reseal() -> Callable[..., None]:
    """What someone who knows the format would do: changes a manifest and makes it list what is there now."""

    def change_it(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        content["files"] = {
            path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
            for path in list_files(folder)
            if path.name not in ("manifest.json", "bundle.sig")
        }
        change(content)
        (folder / "manifest.json").write_bytes(manifest_bytes(content))

    return change_it


@pytest.fixture
def flip() -> Callable[..., None]:
    """Changes bits of one byte of a file."""

    def change_it(path: Path, position: int, mask: int = 1) -> None:
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= mask
        path.write_bytes(data)

    return change_it


@pytest.fixture
def adapter(checkpoints: Any, examples: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A run with a LoRA value model on a base model from outside, measured on data from outside: (run, base)."""
    base = Path(shutil.copytree(checkpoints["llama", "policy"], tmp_path / "base"))
    model = models.load(base, "value", lora=LoraSettings(r=4), fresh_head=True)
    torch.nn.init.normal_(models.head(model.base_model.model).modules_to_save["default"].weight)
    models.save(model, models.load_tokenizer(base), tmp_path / "lora")
    dump_examples(examples, tmp_path / "data" / "test.jsonl")
    run, data = tmp_path / "run", sha256_tree(tmp_path / "data")
    value = publish(run, "seed0/gvm", "gvm", tmp_path / "lora", start=sha256_tree(base), data=data)
    folder = next((run / "stages").iterdir())
    chosen = {**MEASURE, "per_prompt": 3, "most": None, "bf16": False}
    inputs = {"model": folder, "data": tmp_path / "data"}
    digests = {"model": value, "data": data}
    run_job(Job("seed0/in-domain/gvm", "pairwise", chosen, 0, inputs, digests), run / "stages")
    assert load_result(folder) is not None
    finish(run)
    return run, base
