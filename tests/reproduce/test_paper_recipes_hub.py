"""The stage that fetches a model: from the hub's cache, from a hub that asks for a licence, and where there is none."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NAME, COMMIT = "owner/tiny", "0123456789abcdef0123456789abcdef01234567"
STAGE = """
import sys
from pathlib import Path
from dvpo.errors import InputError
from reproduce.pipeline import Context
from reproduce.stages.data import checkpoint

out = Path(sys.argv[1])
settings = {"id": "NAME", "revision": "COMMIT", "chat_template": "{{ messages }}"}
try:
    checkpoint(Context(settings, 0, {}, out, out))
except InputError as error:
    print(error)
    sys.exit(2)
"""


def run(out: Path, cache: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The stage in a process of its own: the library reads the environment once."""
    out.mkdir()
    code = STAGE.replace("NAME", NAME).replace("COMMIT", COMMIT)
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", code, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def cached(cache: Path, *files: str) -> None:
    """The hub's cache with a snapshot of these files."""
    snapshot = cache / "hub" / "models--owner--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_text("{}")


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A hub that answers every request with the status and the error code that the test names."""
    status, code = request.param

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_cached_revision_becomes_a_checkpoint_folder(tmp_path: Path) -> None:
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    cached(tmp_path / "cache", *files, "README.md")
    done = run(tmp_path / "out", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*files, "chat_template.jinja"}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_weights_in_another_format_are_refused(tmp_path: Path) -> None:
    cached(tmp_path / "cache", "config.json", "pytorch_model.bin")
    done = run(tmp_path / "out", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert f"{NAME}@{COMMIT} has no .safetensors weights" in done.stdout


@pytest.mark.parametrize("hub", [(403, "GatedRepo"), (401, "RepoNotFound")], indirect=True)
def test_a_model_behind_a_licence_ends_with_one_sentence(hub: str, tmp_path: Path) -> None:
    done = run(tmp_path / "out", tmp_path / "cache", HF_ENDPOINT=hub)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1), done.stdout
    assert done.stdout.startswith(f"{NAME}@{COMMIT} is ")
    assert "hf auth login" in done.stdout


def test_without_the_network_the_way_out_is_a_folder(tmp_path: Path) -> None:
    done = run(tmp_path / "out", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert "--set model=FOLDER" in done.stdout
