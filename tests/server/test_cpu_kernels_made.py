"""How the kernels are compiled, kept and found."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.backends import cpu_kernels
from server.backends.cpu_kernels import compiled, kernels

FOUND = kernels()
needs_compiler = pytest.mark.skipif(
    FOUND is None or not any(map(shutil.which, cpu_kernels.COMPILERS)), reason="no C++ compiler, or no AVX-512"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the library; what this process has loaded stays loaded."""
    if os.statvfs(tmp_path).f_flag & os.ST_NOEXEC:
        pytest.skip("nothing can be loaded from the tests' folder")
    monkeypatch.setenv(cpu_kernels.KERNELS, str(tmp_path / "made"))
    kernels.cache_clear()
    yield tmp_path / "made"
    kernels.cache_clear()


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """The only compiler that is found is a script."""
    found = tmp_path / "bin" / "c++"
    found.parent.mkdir()
    found.write_text(f"#!/bin/sh\n{script}\n")
    found.chmod(0o755)
    monkeypatch.setenv("PATH", str(found.parent))


@needs_compiler
def test_the_library_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled()
    assert first.parent == folder and [path.name for path in folder.iterdir()] == [first.name]
    monkeypatch.setenv("PATH", "")  # nothing could compile it again
    assert compiled() == first
    assert kernels() is not None


@needs_compiler
def test_processes_that_compile_at_the_same_time_do_not_meet(folder: Path) -> None:
    command = [sys.executable, "-c", "from server.backends.cpu_kernels import kernels; assert kernels() is not None"]
    started = [subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    assert len(list(folder.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("script", "said"),
    [("printf 'bad fl\\344g' >&2; exit 1", "failed: bad fl"), ("exit 3", "failed"), ("exit 0", "No such file")],
)
def test_a_compiler_that_fails_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, script: str, said: str
) -> None:
    compiler(tmp_path, monkeypatch, script)
    assert kernels() is None
    assert said in "".join(capsys.readouterr()) and not list(folder.iterdir())


@needs_compiler
def test_no_compiler_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", "")
    assert kernels() is None
    assert "there is no C++ compiler" in "".join(capsys.readouterr()) and not list(folder.iterdir())


@needs_compiler
def test_a_folder_that_cannot_be_made_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cpu_kernels.KERNELS, str(tmp_path / "file" / "made"))
    assert kernels() is None
    assert "Not a directory" in "".join(capsys.readouterr())


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_made_again(folder: Path) -> None:
    compiled().write_bytes(b"torn")
    assert kernels() is not None
    assert compiled().stat().st_size > 4


@needs_compiler
def test_a_library_that_others_can_change_is_not_loaded(folder: Path, capsys: Any) -> None:
    compiled()
    folder.chmod(0o777)
    assert kernels() is None
    assert "can be changed by others; name a folder of your own in DVPO_KERNELS" in "".join(capsys.readouterr())


@needs_compiler
def test_a_user_without_a_home_has_no_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv(cpu_kernels.KERNELS)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    assert kernels() is None
    assert "home directory" in "".join(capsys.readouterr())


@needs_compiler
def test_the_folder_may_be_named_from_here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cpu_kernels.KERNELS, ".")
    assert compiled().is_absolute() and kernels() is not None


@pytest.mark.parametrize("name", ["avx512_f", "fma3"])
def test_a_cpu_without_the_vectors_has_no_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    others = {**dict.fromkeys(("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3"), True), name: False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: others)
    assert kernels() is None and not folder.exists()
