"""A backend that raises or hangs: everybody who waits gets one clear answer, and `/ready` says what is the matter."""

import asyncio
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from dvpo.data.templates import Encoded
from server import engine as engine_module
from server.engine import Engine
from server.outcomes import Unavailable

BODIES = {
    "/score_tokens": {"items": [{"prompt_ids": [5, 6], "response_ids": [7, 8]}]},
    "/pooling": {"input": [5, 6, 7]},
    "/classify": {"input": [5, 6, 7]},
    "/get_reward": {"query": ["the river of velor is mild ."]},
    "/reward": {"prompt": "the river of", "response": "velor is mild ."},
}


def refused(reply: Any, *words: str) -> None:
    assert reply.status_code == 503, reply.text
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "unavailable"
    for word in words:
        assert word in reply.json()["error"]["message"]


def test_a_model_that_fails_is_no_fault_of_the_text_and_recovers(client: TestClient, served: Any) -> None:
    served.backend.error = RuntimeError("no kernel image for: the river of velor")
    for path, body in BODIES.items():
        reply = client.post(path, json=body)
        refused(reply, "the model failed (RuntimeError)")
        assert "river" not in reply.text
    refused(client.get("/ready"), "failed")
    assert client.get("/health").status_code == 200
    served.backend.error = None
    for path, body in BODIES.items():
        assert client.post(path, json=body).status_code == 200
    assert client.get("/ready").status_code == 200


def test_after_some_seconds_without_work_it_is_ready_to_be_tried(
    client: TestClient, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends nothing to a server that is not ready would otherwise never learn that it recovered."""
    served.backend.error = RuntimeError("told to")
    client.post("/pooling", json=BODIES["/pooling"])
    assert client.get("/ready").status_code == 503
    monkeypatch.setattr(engine_module, "_DOUBT_SECONDS", 0.0)
    assert client.get("/ready").status_code == 200


def test_a_hanging_backend_is_given_up(served: Any) -> None:
    served.backend.open.clear()

    async def work() -> None:
        engine = Engine(served.backend, batch_seconds=0.3)
        engine.start()
        async with asyncio.timeout(20):
            runs = asyncio.ensure_future(engine.submit([Encoded([5], [6])]))
            await asyncio.sleep(0.05)
            waits = asyncio.ensure_future(engine.submit([Encoded([5], [7])]))
            for task in (runs, waits):
                with pytest.raises(Unavailable, match=r"hangs \(a batch took over 0.3 s\); restart the server"):
                    await task
            with pytest.raises(Unavailable, match="hangs"):
                await engine.submit([Encoded([5], [6])])
            assert not engine.stats().accepting and engine.stats().waiting_tokens == 0
            served.backend.open.set()  # the batch ends after all, too late
            await asyncio.sleep(0.1)
            await engine.stop()

    asyncio.run(work())


def test_the_limit_is_of_one_batch(served: Any) -> None:
    async def work() -> None:
        engine = Engine(served.backend, batch_seconds=0.5)
        engine.start()
        for i in range(3):
            served.backend.open.clear()
            threading.Timer(0.25, served.backend.open.set).start()
            assert len((await engine.submit([Encoded([5], [6 + i])])).scored) == 1
        await asyncio.sleep(0.6)
        assert engine.stats().accepting
        await engine.stop()

    asyncio.run(work())


def test_a_server_whose_backend_hangs_answers_and_ends(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "_batch_seconds", 0.3)
    served.backend.open.clear()
    with TestClient(served.app) as client:
        refused(client.post("/score_tokens", json=BODIES["/score_tokens"]), "hangs", "restart")
        refused(client.post("/reward", json=BODIES["/reward"]), "hangs")
        refused(client.get("/ready"), "hangs")
        assert client.get("/health").status_code == 200
    served.backend.open.set()
