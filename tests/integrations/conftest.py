"""The real scoring server, for the integrations to talk to."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from dvpo import models
from server.app import create_app
from server.backends.transformers import TransformersBackend
from server.engine import Engine
from server.metrics import Metrics
from server.settings import Settings
from server.text import Codec

KEY = "a-key-for-tests"


@contextmanager
def serve(folder: Path, api_keys: tuple[str, ...] = ()) -> Iterator[str]:
    """The scoring server with the value model of `folder`, in a thread. Yields its URL."""
    engine, codec = Engine(TransformersBackend(folder)), Codec(models.load_tokenizer(folder))
    app = create_app(engine, codec, Settings(api_keys=api_keys), Metrics())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    assert server.started
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def gvm_url(checkpoints: dict[tuple[str, str], Path]) -> Iterator[str]:
    """A server with the random llama GVM."""
    with serve(checkpoints["llama", "value"]) as url:
        yield url


@pytest.fixture(scope="session")
def guarded_url(checkpoints: dict[tuple[str, str], Path]) -> Iterator[tuple[str, str]]:
    """The same with an API key: (url, key)."""
    with serve(checkpoints["llama", "value"], (KEY,)) as url:
        yield url, KEY
