"""`dvpo release` from outside: what is in a bundle, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dvpo import models
from dvpo.files import list_files, sha256_file, sha256_tree
from reproduce.bundles.pull import REGISTRY
from reproduce.bundles.release import tolerance_of

ROOT = Path(__file__).parents[3]


class TestRelease:
    def test_the_same_run_gives_the_same_bytes(self, dvpo: Any, run: Path, made: Path, tmp_path: Path) -> None:
        assert dvpo("release", run, "--out", tmp_path / "again").code == 0
        assert sha256_tree(tmp_path / "again") == sha256_tree(made)

    def test_a_bundle_is_a_checkpoint_with_its_evidence(self, made: Path) -> None:
        manifest = json.loads((made / "manifest.json").read_text())
        on_disk = {p.relative_to(made).as_posix() for p in list_files(made)}
        assert on_disk == {*manifest["files"], "manifest.json"}
        assert {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= on_disk
        assert "evaluation/coverage/test.jsonl" in on_disk
        assert "evaluation/coverage/notes.txt" not in on_disk
        assert [s["id"] for s in manifest["stages"]] == [
            f"seed0/{s}" for s in ("atlas", "base", "sft", "coverage", "gvm")
        ]
        assert {m["name"] for m in manifest["metrics"]} == {"accuracy/gvm", "credit/gvm"}
        assert manifest["base"] is None
        assert manifest["data"].keys() == {"seed0/atlas", "seed0/coverage"}
        assert models.load(made, "value").config.num_labels == 1
        card = (made / "README.md").read_text()
        mean = manifest["metrics"][0]["values"]["accuracy"]["mean"]["accuracy"]
        assert f"| accuracy, mean | {mean:.3f} |" in card
        assert "longer wins" in card
        assert str(made) not in card

    def test_a_policy_leaves_its_curves_behind(self, dvpo: Any, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "policy"
        assert dvpo("release", run, "--stage", "seed0/sft", "--out", out).code == 0
        assert not (out / "curves.json").exists()
        assert dvpo("verify", out, "--metrics").code == 0

    def test_the_default_place_is_in_the_run(self, dvpo: Any, run: Path) -> None:
        outcome = dvpo("release", run, "--json")
        document = json.loads(outcome.out)
        assert document["bundle"] == str(run / "released" / "gvm-micro")
        assert dvpo("verify", document["bundle"]).code == 0
        again = dvpo("release", run)
        assert again.code == 2
        assert "--out" in again.err
        shutil.rmtree(run / "released")

    def test_a_damaged_stage_is_not_released(self, dvpo: Any, run: Path, tmp_path: Path, flip: Any) -> None:
        copy = Path(shutil.copytree(run, tmp_path / "run"))
        flip(next((copy / "stages").glob("gvm-*/model.safetensors")), -9)
        dvpo("release", copy, "--out", tmp_path / "out").differs("not those of its manifest")
        assert not list(tmp_path.glob("*out*"))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--stage", "seed0/none"], ["no model 'seed0/none'", "seed0/gvm"]),
            (["--stage", "seed0/accuracy/gvm"], ["no model"]),
            (["--base", "a/b@1", "--base-licence", "mit"], ["random weights"]),
            (["--base", "a/b@1"], ["--base-licence"]),
            (["--base", "a/b", "--base-licence", "mit"], ["owner/name@REVISION"]),
            (["--name", "../x"], ["--name"]),
        ],
    )
    def test_wrong_requests(self, dvpo: Any, run: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
        outcome = dvpo("release", run, "--out", tmp_path / "out", *arguments)
        assert outcome.code == 2, outcome
        assert all(word in outcome.err for word in words), outcome
        assert list(tmp_path.iterdir()) == []

    def test_an_unfinished_run(self, dvpo: Any, tmp_path: Path) -> None:
        outcome = dvpo("release", tmp_path)
        assert (outcome.code, "no finished run" in outcome.err) == (2, True)


class TestAdapter:
    def test_an_adapter_names_its_base(self, dvpo: Any, adapter: tuple[Path, Path], tmp_path: Path, flip: Any) -> None:
        run, base = adapter
        out = tmp_path / "out"
        assert dvpo("release", run, "--out", out).code == 2
        named = ["--base", "owner/model@abc123", "--base-licence", "apache-2.0"]
        assert dvpo("release", run, "--out", out, *named).code == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["base"]["id"], manifest["base"]["revision"]) == ("owner/model", "abc123")
        assert manifest["base"]["files"]["model.safetensors"] == sha256_file(base / "model.safetensors")
        assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in list_files(out))
        assert "apache-2.0" in (out / "README.md").read_text()
        assert dvpo("verify", out).code == 0
        asked = dvpo("verify", out, "--metrics", "--data", tmp_path / "data")
        assert (asked.code, "--base" in asked.err) == (2, True)
        again = dvpo("verify", out, "--metrics", "--data", tmp_path / "data", "--base", base)
        assert again.code == 0, again
        scored = dvpo("score", "--gvm", out, "--base", base, "--prompt", "a", "--response", "b", "--json")
        assert (scored.code, len(json.loads(scored.out)["items"])) == (0, 1)
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
        judged = dvpo("evaluate", "pairwise", "--model", out, "--base", base, "--data", pairs, "--json")
        assert (judged.code, json.loads(judged.out)["pairs"]) == (0, 1)
        pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "subset": "llmbar-natural"}) + "\n")
        benched = dvpo("evaluate", "rewardbench", "--model", out, "--base", base, "--data", pairs, "--json")
        assert (benched.code, json.loads(benched.out)["pairs"]) == (0, 1)
        whole = dvpo("score", "--gvm", base, "--base", base, "--prompt", "a", "--response", "b")
        assert (whole.code, "leave --base out" in whole.err) == (2, True)
        flip(base / "model.safetensors", -5)
        assert dvpo("verify", out, "--metrics", "--data", tmp_path / "data", "--base", base).code == 2
        refused = dvpo("release", run, "--out", tmp_path / "other", *named)
        assert (refused.code, "base model" in refused.err) == (2, True)

    @pytest.mark.parametrize(
        ("part", "word"), [(".lora_B.", ".lora_B.weight is missing"), ("score.weight", "no weight")]
    )
    def test_half_an_adapter_is_named(
        self, dvpo: Any, adapter: tuple[Path, Path], tmp_path: Path, part: str, word: str, reseal: Any
    ) -> None:
        out = tmp_path / "out"
        assert dvpo("release", adapter[0], "--out", out, "--base", "o/m@1", "--base-licence", "mit").code == 0
        tensors = load_file(out / "adapter_model.safetensors")
        gone = next(name for name in tensors if part in name)
        tensors.pop(gone)
        save_file(tensors, out / "adapter_model.safetensors")
        reseal(out)
        dvpo("verify", out).differs(word)

    def test_another_base_is_named(self, dvpo: Any, adapter: tuple[Path, Path], tmp_path: Path, reseal: Any) -> None:
        out = tmp_path / "out"
        assert dvpo("release", adapter[0], "--out", out, "--base", "o/m@1", "--base-licence", "mit").code == 0
        reseal(out, lambda content: content["base"].update(id="good/model"))
        dvpo("verify", out).differs("adapter_config.json", "o/m", "good/model")


REGISTERED = {n: e for n, e in json.loads(REGISTRY.read_text()).items() if e["source"]}


def test_every_checkpoint_in_the_repository_is_registered() -> None:
    there = {p.parent.relative_to(ROOT).as_posix(): p for p in ROOT.glob("artifacts/checkpoints/*/manifest.json")}
    assert {e["source"] for e in REGISTERED.values()} == set(there)
    for entry in REGISTERED.values():
        assert json.loads(there[entry["source"]].read_text())["sha256"] == entry["sha256"]


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [("pairwise", {"bf16": False}, 0.01), ("credit", {}, 0.01), ("pairwise", {"bf16": True}, 0.03), ("gold", {}, 0.02)],
)
def test_bfloat16_may_differ_more_elsewhere(kind: str, settings: dict[str, Any], expected: float) -> None:
    assert tolerance_of(kind, settings) == expected


@pytest.mark.parametrize("name", ["gvm-smollm2", "gvm-tiny"])
def test_released_metrics_have_todays_tolerance(name: str) -> None:
    metrics = json.loads((ROOT / REGISTERED[name]["source"] / "manifest.json").read_text())["metrics"]
    assert metrics and all(m["tolerance"] == tolerance_of(m["kind"], m["settings"]) for m in metrics)


@pytest.mark.skipif(not REGISTERED, reason="no checkpoint is registered as released yet")
@pytest.mark.parametrize("name", REGISTERED)
def test_what_is_released_here_is_sound(dvpo: Any, name: str, tmp_path: Path) -> None:
    assert dvpo("verify", ROOT / REGISTERED[name]["source"]).code == 0
    assert dvpo("pull", name, "--out", tmp_path / "out").code == 0
