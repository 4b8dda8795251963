"""A value model behind a scoring server: the training is the one with the folder, and what is wrong is said at once."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from dvpo import models
from dvpo.config import PolicySettings
from dvpo.data.atlas import Atlas, build_tokenizer
from dvpo.errors import InputError, StageError
from dvpo.training.policy import Frozen, OnlineTrainer
from server.app import create_app
from server.backends.transformers import TransformersBackend
from server.engine import Engine
from server.metrics import Metrics
from server.settings import Settings
from server.text import Codec

KEY = "a-key-for-tests"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The scoring server with the value model of `folder`, in a thread. Yields its URL."""
    app = create_app(
        Engine(TransformersBackend(folder)), Codec(models.load_tokenizer(folder)), Settings(api_keys=(KEY,)), Metrics()
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    assert server.started
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def settings(url: str | None = None, **changes: object) -> PolicySettings:
    base = {"learning_rate": 1e-3, "updates": 2, "prompts_per_update": 4, "epochs": 2, "max_new_tokens": 8}
    return PolicySettings(**{**base, "algorithm": {"name": "dvpo", "value_url": url}, **changes})


def test_values_from_a_server_train_as_those_of_the_folder(checkpoints, examples, tmp_path, monkeypatch) -> None:
    prompts = [e.prompt for e in examples]
    start, frozen = checkpoints["llama", "policy"], Frozen(value=checkpoints["llama", "value"])
    near = OnlineTrainer(start, frozen, prompts, settings(), 0).train(tmp_path / "near")
    with serve(checkpoints["llama", "value"]) as url:
        with pytest.raises(InputError, match="key"):
            OnlineTrainer(start, Frozen(), prompts, settings(url), 0)
        monkeypatch.setenv("DVPO_API_KEY", KEY)
        far = OnlineTrainer(start, Frozen(), prompts, settings(url), 0).train(tmp_path / "far")
    assert len(far) == len(near) == 2
    for ours, theirs in zip(near, far, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)


def test_a_server_with_another_tokenizer_is_refused(checkpoints, examples, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DVPO_API_KEY", KEY)
    foreign = tmp_path / "foreign"
    models.save(models.load(checkpoints["llama", "value"], "value"), build_tokenizer(Atlas.build(1)), foreign)
    with serve(foreign) as url, pytest.raises(InputError, match=r"your tokenizer .* is not this model's"):
        OnlineTrainer(checkpoints["llama", "policy"], Frozen(), [e.prompt for e in examples], settings(url), 0)


def test_a_server_that_is_away_is_said_before_the_first_rollout(checkpoints, examples, monkeypatch) -> None:
    monkeypatch.setattr("dvpo.training.frozen.PATIENCE", 0.5)
    with pytest.raises(StageError, match=r"http://127.0.0.1:9 did not score the request within 0.5 s"):
        OnlineTrainer(
            checkpoints["llama", "policy"],
            Frozen(),
            [e.prompt for e in examples],
            settings("http://127.0.0.1:9"),
            0,
        )
