"""Clients that send or read too slowly lose their connection; all others keep theirs."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from server.connection import Connection

BODY = b'{"items": [{"prompt_ids": [5, 6], "response_ids": [7]}]}'
HEAD = b"POST /score_tokens HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
GET = b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n"


class Hasty(Connection):
    """The limits of the server, in tenths of a second."""

    receive_seconds = 0.6
    read_seconds = 0.6


@pytest.fixture
def running(served: Any) -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(served.app, port=0, log_config=None, access_log=False, http=Hasty)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive(), "no client holds the server up"


@pytest.fixture
def port(running: uvicorn.Server) -> int:
    found: int = running.servers[0].sockets[0].getsockname()[1]
    return found


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    return client


def closed_after(client: socket.socket) -> float:
    """Seconds until the server ends the connection, without a word."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1000) == b""
    return time.monotonic() - began


def drip(client: socket.socket) -> None:
    for byte in HEAD * 20:
        client.sendall(bytes([byte]))
        time.sleep(0.02)


def read_to_the_end(client: socket.socket) -> None:
    while client.recv(65536):
        pass


@pytest.mark.parametrize(
    "sent", [b"", HEAD, HEAD + b"content-length: 60\r\n\r\n{"], ids=["nothing", "half the headers", "half the body"]
)
def test_half_a_request_ends(port: int, sent: bytes) -> None:
    with connect(port) as client:
        client.sendall(sent)
        assert closed_after(client) > 0.3


def test_a_byte_at_a_time_ends_though_something_comes_always(port: int) -> None:
    with connect(port) as client:
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip(client)
        assert 0.3 < time.monotonic() - began < 15


def test_a_request_that_waits_long_for_its_values_is_answered(port: int, served: Any) -> None:
    served.backend.open.clear()
    threading.Timer(1.5, served.backend.open.set).start()
    assert httpx.post(f"http://127.0.0.1:{port}/pooling", json={"input": [5, 6]}, timeout=20).status_code == 200


def test_an_idle_connection_is_kept_between_requests(port: int) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.connect()
    client.auto_open = 0  # a lost connection is an error
    for _ in range(2):
        client.request("POST", "/score_tokens", BODY, {"content-type": "application/json"})
        reply = client.getresponse()
        assert reply.status == 200
        assert reply.read()
        time.sleep(1)
    client.close()


def test_the_second_of_two_requests_sent_at_once_has_its_limit_too(port: int) -> None:
    with connect(port) as client:
        client.sendall(GET + HEAD + b"content-length: 60\r\n\r\n{")
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            read_to_the_end(client)
        assert time.monotonic() - began > 0.3


def test_who_reads_nothing_is_cut_off(running: uvicorn.Server, port: int) -> None:
    with connect(port, receive_buffer=4096) as client:
        client.sendall(GET * 400)  # far more replies than the kernel's buffers hold
        until = time.monotonic() + 60
        while not running.server_state.connections:
            time.sleep(0.01)
        while running.server_state.connections:
            assert time.monotonic() < until
            assert (
                httpx.get(f"http://127.0.0.1:{port}/health", headers={"connection": "close"}, timeout=20).status_code
                == 200
            )
            time.sleep(0.05)


def test_what_is_no_http_after_the_headers_is_answered_once(
    running: uvicorn.Server, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(port) as client:  # the wrong type is refused before the body, which is broken, is read
        client.sendall(b"POST /pooling HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
        said = b"".join(iter(lambda: client.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1") == 1
    out, err = capsys.readouterr()
    assert "bug" not in out + err and "LocalProtocolError" not in out + err
