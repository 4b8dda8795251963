"""`dvpo verify` from outside: every kind of change is found and named."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dvpo import models
from dvpo.files import list_files, sha256_file, sha256_tree, write_json
from reproduce.bundles import signing, verify
from reproduce.bundles.manifest import KEY, Metric, manifest_bytes
from reproduce.stages import KINDS


def linked(path: Path) -> None:
    """Puts the same content behind a link."""
    path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(path.parent.parent / f"moved-{path.name}")


def swapped(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def replaced(path: Path, old: str, new: str) -> None:
    """Other text, and a line end that does not belong there."""
    path.write_text(path.read_text().replace(old, new, 1) + "\n")


def configured(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file."""
    write_json(path, {**json.loads(path.read_text()), **keys})


def indexed(bundle: Path, weights: str) -> None:
    """Names `weights` as the file of every tensor; the bundle's own are left under another name."""
    tensors = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").rename(bundle / "decoy.safetensors")
    write_json(bundle / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, weights)})
    save_file({k: torch.full_like(v, float("nan")) for k, v in tensors.items()}, bundle / weights, {"format": "pt"})


class TestVerify:
    def test_a_sound_bundle(self, dvpo: Any, made: Path) -> None:
        outcome = dvpo("verify", made, "--json")
        assert outcome.code == 0
        assert json.loads(outcome.out)["differences"] == []

    def test_its_numbers_are_measured_again(self, dvpo: Any, made: Path) -> None:
        outcome = dvpo("verify", made, "--metrics", "--json")
        assert outcome.code == 0, outcome
        rows = {m["name"]: m for m in json.loads(outcome.out)["metrics"]}
        assert rows["accuracy/gvm accuracy.mean.accuracy"]["within"]
        assert rows["credit/gvm auroc"]["recorded"] == rows["credit/gvm auroc"]["measured"]

    def test_one_flipped_byte_in_any_file_is_named(self, dvpo: Any, bundle: Path, flip: Any) -> None:
        rng = random.Random(0)
        for path in list_files(bundle):
            kept = path.read_bytes()
            flip(path, rng.randrange(len(kept)), 1 << rng.randrange(8))
            dvpo("verify", bundle).differs(path.name)
            path.write_bytes(kept)
        assert dvpo("verify", bundle).code == 0

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
    def test_one_flipped_bit_anywhere_in_the_manifest(
        self, dvpo: Any, bundle: Path, position: int, bit: int, flip: Any
    ) -> None:
        path = bundle / "manifest.json"
        kept = path.read_bytes()
        flip(path, position, 1 << bit)
        try:
            dvpo("verify", bundle).differs("manifest.json")
        finally:
            path.write_bytes(kept)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda b: (b / "config.json").unlink(), "config.json: missing"),
            (lambda b: (b / "manifest.json").unlink(), "manifest.json: missing"),
            (lambda b: (b / "model.bin").write_bytes(b"x"), "model.bin: not in the manifest"),
            (
                lambda b: (b / "evaluation" / "more.jsonl").write_text("{}"),
                "evaluation/more.jsonl: not in the manifest",
            ),
            (lambda b: (b / "empty").mkdir(), "empty: a folder"),
            (lambda b: os.mkfifo(b / "pipe"), "pipe: not a regular file"),
            (lambda b: (b / "bundle.sig").write_text("{}"), "bundle.sig: not in the manifest"),
            (lambda b: linked(b / "config.json"), "config.json: a symbolic link"),
            (lambda b: linked(b / "evaluation"), "evaluation: a symbolic link"),
            (lambda b: linked(b / "manifest.json"), "manifest.json: missing"),
            (lambda b: swapped(b / "config.json", b / "tokenizer_config.json"), "config.json: "),
            (lambda b: os.truncate(b / "model.safetensors", 100), "model.safetensors: 100 bytes"),
            (lambda b: (b / "manifest.json").write_text("[" * 100_000), "no manifest of a bundle"),
            (lambda b: replaced(b / "manifest.json", "0.01", "NaN"), "no manifest of a bundle"),
            (lambda b: replaced(b / "manifest.json", "gvm-micro", "gvm-micro"), "manifest.json: it was changed"),
            (lambda b: replaced(b / "manifest.json", "a processor", "\\ud800"), "no manifest of a bundle"),
            (lambda b: (b / "manifest.json").write_bytes(b" " * 5_000_000), "5000000 bytes"),
        ],
    )
    def test_a_changed_folder(self, dvpo: Any, bundle: Path, change: Callable[[Path], Any], word: str) -> None:
        change(bundle)
        dvpo("verify", bundle).differs(word)

    def test_no_folder(self, dvpo: Any, tmp_path: Path) -> None:
        assert dvpo("verify", tmp_path / "none").code == 2
        dvpo("verify", tmp_path).differs("manifest.json")

    @pytest.mark.parametrize(
        "name",
        [
            "../evil.json",
            "/etc/evil.json",
            "a/../../evil.json",
            "a//b.json",
            "./a.json",
            ".hidden.json",
            "a\\b.json",
            "a\n.json",
            "",
            "a/b/c/d/e.json",
            "x" * 300 + ".json",
            "ünï.json",
            "model.bin",
            "model.pt",
            "model.pkl",
            "code.py",
            "manifest.json",
            "CONFIG.json",
            "config.json/more.json",
            "Config.json/more.json",
            "manifest.json/more.json",
            "evaluation/model.safetensors",
        ],
    )
    def test_a_manifest_with_a_bad_name(self, dvpo: Any, bundle: Path, name: str, reseal: Any) -> None:
        reseal(bundle, lambda c: c["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
        dvpo("verify", bundle).differs("manifest.json", "plain path" if not name.isascii() else "")
        dvpo("pull", bundle, "--out", bundle.parent / "out").differs("manifest.json")
        assert not (bundle.parent / "out").exists()

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.pop("metrics"),
            lambda c: c.update(surprise=1),
            lambda c: c.update(format=2),
            lambda c: c.update(name="../x"),
            lambda c: c["files"]["config.json"].update(size=-1),
            lambda c: c["files"]["config.json"].update(sha256="abc"),
            lambda c: c.update(signed_by="0" * 64),
            lambda c: c["metrics"][0].update(kind="anything"),
            lambda c: c["metrics"][0]["settings"].update(subfolder="evaluation/m"),
            lambda c: c["metrics"][0]["settings"].update(split="../test"),
            lambda c: c["metrics"][0]["settings"].update(split=["/etc/test"]),
            lambda c: c["metrics"][0]["inputs"]["data"].update(folder="/etc"),
            lambda c: c["metrics"][0]["inputs"]["data"].update(folder="../data"),
        ],
    )
    def test_a_manifest_of_another_form(
        self, dvpo: Any, bundle: Path, change: Callable[[dict[str, Any]], Any], reseal: Any
    ) -> None:
        reseal(bundle, change)
        dvpo("verify", bundle).differs("manifest.json")

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda t: t.pop("model.norm.weight"), "model.norm.weight: a tensor that the config asks for is missing"),
            (lambda t: t.update(extra=torch.zeros(1)), "model.safetensors:extra: the config has no such tensor"),
            (lambda t: t.update({"score.bias": torch.zeros(2)}), "model.safetensors:score.bias: its shape is [2]"),
            (lambda t: t["score.weight"].fill_(float("nan")), "model.safetensors:score.weight: it has numbers"),
        ],
    )
    def test_tensors_that_do_not_fit_the_config(
        self, dvpo: Any, bundle: Path, change: Callable[[dict[str, torch.Tensor]], Any], word: str, reseal: Any
    ) -> None:
        path = bundle / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        reseal(bundle)
        dvpo("verify", bundle).differs(word)

    def test_weights_that_are_no_safetensors(self, dvpo: Any, bundle: Path, reseal: Any) -> None:
        (bundle / "model.safetensors").write_bytes(b"\x80\x04\x95 a pickle")
        reseal(bundle)
        dvpo("verify", bundle).differs("cannot be read")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_a_config_that_names_code(self, dvpo: Any, bundle: Path, name: str, reseal: Any) -> None:
        config = json.loads((bundle / name).read_text())
        write_json(bundle / name, {**config, "auto_map": {"AutoConfig": "evil.Config"}})
        reseal(bundle)
        dvpo("verify", bundle).differs("auto_map")

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda b: indexed(b, "evaluation/evil.safetensors"), "evaluation/evil.safetensors"),
            (lambda b: indexed(b, "../evil.safetensors"), "index.json: it names '../evil.safetensors'"),
            (lambda b: indexed(b, "evil.safetensors"), "decoy.safetensors: "),
            (lambda b: indexed(b, "model.safetensors"), "index.json: beside model.safetensors"),
            (lambda b: write_json(b / "model.safetensors.index.json", {"weight_map": [5]}), "index.json: "),
            (lambda b: write_json(b / "model.safetensors.index.json", {"weight_map": {"a": 5}}), "index.json: "),
            (lambda b: (b / "model.safetensors").rename(b / "other.safetensors"), "other.safetensors: "),
            (lambda b: configured(b / "config.json", transformers_weights="a.safetensors"), "transformers_weights"),
            (lambda b: write_json(b / "adapter_config.json", {"task_type": "TOKEN_CLS"}), "adapter_config.json: "),
        ],
    )
    def test_weights_other_than_those_that_load(
        self, dvpo: Any, bundle: Path, change: Callable[[Path], Any], word: str, reseal: Any
    ) -> None:
        change(bundle)
        reseal(bundle)
        dvpo("verify", bundle).differs(word)

    def test_weights_in_several_files(self, dvpo: Any, bundle: Path, reseal: Any) -> None:
        model = models.load(bundle, "value")
        (bundle / "model.safetensors").unlink()
        model.save_pretrained(bundle, max_shard_size="50KB")
        reseal(bundle)
        assert dvpo("verify", bundle).code == 0
        (bundle / "model.safetensors.index.json").unlink()
        reseal(bundle)
        dvpo("verify", bundle).differs("model-00001-of-")

    @pytest.mark.parametrize(
        ("name", "text", "word"),
        [
            ("more.json", "5", "more.json: "),
            ("more.json", "[" * 100_000, "more.json: "),
            ("config.json", "[]", "config.json: "),
        ],
    )
    def test_json_that_is_no_object(
        self, dvpo: Any, bundle: Path, name: str, text: str, word: str, reseal: Any
    ) -> None:
        (bundle / name).write_text(text)
        reseal(bundle)
        dvpo("verify", bundle).differs(word, "no JSON object")

    @pytest.mark.parametrize(
        "keys",
        [
            {"architectures": 5},
            {"architectures": [5]},
            {"hidden_size": -4},
            {"hidden_size": "wide"},
            {"num_attention_heads": 0},
            {"vocab_size": 10**30},
            {"model_type": []},
            {"num_hidden_layers": 10**12},
            {"text_config": {"num_hidden_layers": 10**12}},
        ],
    )
    def test_a_config_of_no_model(self, dvpo: Any, bundle: Path, keys: dict[str, Any], reseal: Any) -> None:
        configured(bundle / "config.json", **keys)
        reseal(bundle)
        dvpo("verify", bundle).differs("config.json: ")
        dvpo("pull", bundle, "--out", bundle.parent / "out").differs("config.json: ")

    def test_a_name_that_is_no_text(self, dvpo: Any, bundle: Path) -> None:
        (bundle / os.fsdecode(b"\xff\n\x1b[1mmore.json")).write_text("{}")
        outcome = dvpo("verify", bundle)
        outcome.differs("\\udcff\\n\\x1b[1mmore.json: not in the manifest")
        assert outcome.out.count("\n") == 1

    @pytest.mark.parametrize("settings", [{"per_prompt": "many"}, {"format": "split", "split": None}, {"subfolder": 0}])
    def test_a_metric_that_cannot_be_measured_is_named(
        self, dvpo: Any, bundle: Path, settings: dict[str, Any], reseal: Any
    ) -> None:
        reseal(bundle, lambda c: c["metrics"][0]["settings"].update(settings))
        dvpo("verify", bundle, "--metrics").differs("accuracy/gvm cannot be measured")

    def test_two_metrics_of_one_name(self, dvpo: Any, bundle: Path, reseal: Any) -> None:
        def twice(content: dict[str, Any]) -> None:
            first = content["metrics"][0]
            more = {**first, "inputs": {"data": {**first["inputs"]["data"], "folder": "evaluation/none"}}}
            content["metrics"].insert(0, more)

        reseal(bundle, twice)
        dvpo("verify", bundle, "--metrics").differs("cannot be measured", "evaluation/none")

    def test_an_edited_metric_is_named(self, dvpo: Any, bundle: Path, reseal: Any) -> None:
        def better(content: dict[str, Any]) -> None:
            content["metrics"][0]["values"]["accuracy"]["mean"]["accuracy"] += 0.05

        reseal(bundle, better)
        assert dvpo("verify", bundle).code == 0
        dvpo("verify", bundle, "--metrics").differs("accuracy/gvm accuracy.mean.accuracy: ")

    def test_data_from_elsewhere_is_found_by_its_digest(self, dvpo: Any, bundle: Path, flip: Any) -> None:
        data = bundle.parent / "data"
        shutil.move(bundle / "evaluation" / "coverage", data)
        digest = sha256_tree(data)

        def outside(content: dict[str, Any]) -> None:
            for metric in content["metrics"]:
                metric["inputs"]["data"] = {"sha256": digest, "folder": None}
            content["files"].pop("evaluation/coverage/test.jsonl")

        content = json.loads((bundle / "manifest.json").read_text())
        outside(content)
        (bundle / "manifest.json").write_bytes(manifest_bytes(content))
        asked = dvpo("verify", bundle, "--metrics")
        assert (asked.code, digest in asked.err, "--data" in asked.err) == (2, True, True)
        assert dvpo("verify", bundle, "--metrics", "--data", data).code == 0
        flip(data / "test.jsonl", 40)
        assert dvpo("verify", bundle, "--metrics", "--data", data).code == 2

    def test_signed_by_another_key_than_the_manifest_names(
        self, dvpo: Any, made: Path, tmp_path: Path, keys: Any
    ) -> None:
        copy = Path(shutil.copytree(made, tmp_path / "copy"))
        shutil.copy(keys("theirs")[1], copy / KEY)
        content = json.loads((copy / "manifest.json").read_text())
        content["files"][KEY] = {"sha256": sha256_file(copy / KEY), "size": (copy / KEY).stat().st_size}
        content["signed_by"] = sha256_file(keys("ours")[1])
        (copy / "manifest.json").write_bytes(manifest_bytes(content))
        signing.sign(copy, keys("theirs")[0])
        dvpo("verify", copy).differs("not the key that the manifest names")

    def test_another_role(self, dvpo: Any, bundle: Path, reseal: Any) -> None:
        reseal(bundle, lambda c: c.update(role="reward"))
        dvpo("verify", bundle).differs("a value model, the manifest says reward")

    def test_a_metric_made_worse_is_named_too(self, dvpo: Any, bundle: Path, reseal: Any) -> None:
        def worse(content: dict[str, Any]) -> None:
            content["metrics"][0]["values"]["accuracy"]["mean"]["accuracy"] -= 0.05

        reseal(bundle, worse)
        dvpo("verify", bundle, "--metrics").differs("accuracy/gvm accuracy.mean.accuracy: ")

    def test_a_metric_is_measured_with_its_seed(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(type(KINDS["gold"]), "function", lambda self: lambda ctx: {"seed": ctx.seed})
        metric = Metric(
            name="g", kind="gold", key="0" * 64, settings={}, seed=7, inputs={}, values={"seed": 7}, tolerance=0
        )
        assert [m.measured for m in verify._again(metric, {}, tmp_path / "work")] == [7]


class TestSignature:
    def test_what_is_no_key(self, dvpo: Any, run: Path, keys: Any, tmp_path: Path) -> None:
        for key, word in [
            ("absent.pem", "absent.pem"),
            (__file__, "PEM private key"),
            (keys("ours")[1], "PEM private"),
        ]:
            outcome = dvpo("release", run, "--out", tmp_path / "out", "--key", key)
            assert (outcome.code, word in outcome.err) == (2, True), outcome
        assert list(tmp_path.iterdir()) == []

    def test_a_signed_bundle(self, dvpo: Any, signed: Path, keys: Any) -> None:
        assert dvpo("verify", signed).code == 0
        assert dvpo("verify", signed, "--public-key", keys("ours")[1]).code == 0
        dvpo("verify", signed, "--public-key", keys("theirs")[1]).differs("bundle.sig", "another key")
        assert dvpo("verify", signed, "--public-key", signed / "none").code == 2

    def test_an_unsigned_bundle_is_not_taken_for_a_signed_one(self, dvpo: Any, made: Path, keys: Any) -> None:
        outcome = dvpo("verify", made, "--public-key", keys("ours")[1])
        assert (outcome.code, "not signed" in outcome.err) == (2, True)

    def test_one_flipped_bit_in_any_signed_file(self, dvpo: Any, signed: Path, tmp_path: Path, flip: Any) -> None:
        copy = Path(shutil.copytree(signed, tmp_path / "copy"))
        rng = random.Random(1)
        path = copy / "bundle.sig"
        kept = path.read_bytes()
        end = kept.index(b'"sig":') + 6
        # Every character of the signature itself: its last ones hold bits that base64 does not use.
        for position in [*range(end, min(end + 110, len(kept))), *(rng.randrange(len(kept)) for _ in range(60))]:
            flip(path, position, 1 << rng.randrange(8))
            dvpo("verify", copy).differs("bundle.sig")
            path.write_bytes(kept)
        flip(copy / "signing-key.pub", 60)
        dvpo("verify", copy).differs("signing-key.pub")

    def test_a_signature_of_something_else(self, dvpo: Any, signed: Path, run: Path, keys: Any, tmp_path: Path) -> None:
        other = tmp_path / "other"
        assert dvpo("release", run, "--stage", "seed0/sft", "--out", other, "--key", keys("ours")[0]).code == 0
        copy = Path(shutil.copytree(signed, tmp_path / "copy"))
        shutil.copy(other / "bundle.sig", copy / "bundle.sig")
        dvpo("verify", copy).differs("bundle.sig", "does not sign this bundle")
        (copy / "bundle.sig").unlink()
        dvpo("verify", copy).differs("bundle.sig: missing")

    def test_a_resealed_manifest_does_not_pass(self, dvpo: Any, signed: Path, tmp_path: Path, reseal: Any) -> None:
        copy = Path(shutil.copytree(signed, tmp_path / "copy"))
        (copy / "README.md").write_text("the best model there is")
        reseal(copy)
        dvpo("verify", copy).differs("bundle.sig")
