"""The floors of the design: no import runs upward, none in a circle, and `import dvpo` costs nothing."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dvpo

PACKAGE = Path(dvpo.__file__).parent
ROOT = PACKAGE.parent
FLOORS = [
    {"objectives", "data", "config", "files", "errors", "models", "batching", "distributed", "stopping", "memory"},
    {
        "values",
        "packed_row",
        "packed_one_call",
        "packed_attention",
        "packed_parts",
        "packed_values",
        "logprobs",
        "rollout",
    },
    {"training", "evaluation", "integrations"},
]
MOST_LINES = 420


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, source: str, is_package: bool) -> set[str]:
    """Every module that `source` names in an import, wherever it stands (functions and TYPE_CHECKING included)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if is_package else name.split(".")[:-1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            # `from package import module` is an import of that module.
            found.update(f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)
    return found


def all_imports() -> dict[str, set[str]]:
    return {n: imports_of(n, p.read_text(encoding="utf-8"), p.name == "__init__.py") for n, p in MODULES.items()}


def floor_of(module: str) -> int | None:
    """The floor of a module; None for the package itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return next(i for i, floor in enumerate(FLOORS) if parts[1] in floor)


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import a.b\nfrom dvpo import models\nfrom . import x\nfrom ..files import y\ndef f():\n    from c import d"
    )
    assert imports_of("dvpo.data.z", source, False) == {"a.b", "dvpo.models", "dvpo.data", "dvpo.files", "c"}


def test_every_module_has_a_floor() -> None:
    homeless = [m for m in MODULES if "." in m and not any(m.split(".")[1] in floor for floor in FLOORS)]
    assert not homeless, f"say in FLOORS where these belong: {homeless}"


def test_the_method_imports_neither_server_nor_reproduce() -> None:
    outside = {
        f"{name} -> {target}"
        for name, targets in all_imports().items()
        for target in targets
        if target.split(".")[0] in ("server", "reproduce", "tests")
    }
    assert not outside


def test_the_server_does_not_import_reproduce() -> None:
    folder = ROOT / "server"
    for path in folder.rglob("*.py") if folder.is_dir() else ():
        name = module_name(path)
        targets = imports_of(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        assert not [t for t in targets if t.split(".")[0] in ("reproduce", "tests")], name


def test_no_import_runs_upward() -> None:
    upward = []
    for name, targets in all_imports().items():
        for target in targets:
            if target.split(".")[0] != "dvpo":
                continue
            here, there = floor_of(name), floor_of(target)
            if here is not None and there is not None and there > here:
                upward.append(f"{name} -> {target}")
    assert not upward


def test_there_is_no_circle() -> None:
    graph = {name: {t for t in targets if t in MODULES and t != "dvpo"} for name, targets in all_imports().items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, dvpo; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_no_file_is_too_long() -> None:
    files = [p for folder in ("dvpo", "reproduce", "server") for p in (ROOT / folder).rglob("*.py")]
    assert files
    long = {
        str(p.relative_to(ROOT)): count
        for p in files
        if (count := len(p.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long
