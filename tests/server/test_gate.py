import asyncio
from typing import Any

import pytest

from server import gate as module
from server.gate import Gate
from server.metrics import Metrics
from server.settings import Settings


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def ask(gate: Gate, *parts: bytes, **headers: str) -> list[Any]:
    """What the gate sends for one POST whose body comes in parts."""
    sent: list[Any] = []
    coming = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    named = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/score_tokens", "headers": named}

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await gate(scope, receive, send)
    return sent


def made(app: Any = reads_all, **settings: Any) -> Gate:
    return Gate(Settings(**settings), Metrics()).around(app)


def status(sent: list[Any]) -> int:
    (start,) = [m for m in sent if m["type"] == "http.response.start"]
    return start["status"]


@pytest.mark.parametrize(("length", "code"), [("²", 200), ("9" * 5000, 413), ("10", 200), ("11", 413), ("-1", 200)])
def test_a_length_that_is_no_number_or_a_huge_one(length: str, code: int) -> None:
    assert status(asyncio.run(ask(made(max_body_bytes=10), b"", content_length=length))) == code


def test_a_body_in_parts_is_counted_whole_and_may_be_as_large_as_allowed() -> None:
    gate = made(max_body_bytes=10)
    assert status(asyncio.run(ask(gate, b"x" * 6, b"x" * 4))) == 200
    assert status(asyncio.run(ask(gate, b"x" * 6, b"x" * 5))) == 413


def test_bodies_in_flight_are_counted_together_and_given_back() -> None:
    async def work() -> None:
        go = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        gate = made(slow, max_body_bytes=10)  # 160 in flight
        held = [asyncio.ensure_future(ask(gate, b"x" * 10)) for _ in range(16)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert status(await ask(gate, b"x")) == 503
        go.set()
        assert {status(sent) for sent in await asyncio.gather(*held)} == {200}
        for _ in range(20):
            assert status(await ask(gate, b"x" * 10)) == 200

    asyncio.run(work())


def test_a_reply_that_has_begun_is_not_begun_again() -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    assert status(asyncio.run(ask(made(breaks), b""))) == 200


def test_a_closed_log_fails_no_request_and_browsers_guess_no_types(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def info(self, *_: Any, **__: Any) -> None:
            raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(module, "logger", Closed)
    (start, _) = asyncio.run(ask(made(), b""))
    assert (b"x-content-type-options", b"nosniff") in start["headers"]
