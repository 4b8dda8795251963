"""A judge on a real socket that does as it is told, misbehaviour included."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Script = Callable[[dict[str, Any], int], Any]


@dataclass
class FakeJudge:
    """`script(body, attempt)` says what to do with a request that came for the attempt-th time: a text to reply with,
    or {"status", "raw", "retry_after"}, {"raw", "type"}, {"message", "finish", "logprobs", "model"},
    {"silence": seconds}, {"close"}.
    """

    script: Script
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: FakeJudge

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        judge = self.judge
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with judge.lock:
            judge.bodies.append(body)
            judge.times.append(time.monotonic())
            judge.keys.append(self.headers.get("Authorization"))
            attempt = Counter(json.dumps(b, sort_keys=True) for b in judge.bodies)[json.dumps(body, sort_keys=True)]
            judge.busy += 1
            judge.most_busy = max(judge.most_busy, judge.busy)
        try:
            self.obey(judge.script(body, attempt))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with judge.lock:
                judge.busy -= 1

    def obey(self, order: Any) -> None:
        if isinstance(order, str):
            order = {"message": {"content": order}}
        if "silence" in order:
            self.judge.released.wait(order["silence"])
            self.close_connection = True
        elif "close" in order:
            self.close_connection = True
        elif "status" in order:
            headers = {"Retry-After": str(order["retry_after"])} if "retry_after" in order else {}
            body = order.get("raw", b'{"error": {"message": "no"}}')
            self.send(order["status"], body, "application/json", headers)
        elif "raw" in order:
            self.send(200, order["raw"], order["type"], {})
        else:
            choice = {
                "index": 0,
                "message": {"role": "assistant", **order["message"]},
                "finish_reason": order.get("finish", "stop"),
                "logprobs": order.get("logprobs"),
            }
            answer = {"id": "1", "object": "chat.completion", "created": 0, "choices": [choice]}
            answer["model"] = order.get("model", "fake-0613")
            self.send(200, json.dumps(answer).encode(), "application/json", {})

    def send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def fake_judge() -> Iterator[Callable[[Script], FakeJudge]]:
    """Starts servers that follow a script; all are stopped at the end."""
    started: list[tuple[ThreadingHTTPServer, FakeJudge]] = []

    def start(script: Script) -> FakeJudge:
        judge = FakeJudge(script)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"judge": judge}))
        server.daemon_threads = True
        judge.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        started.append((server, judge))
        return judge

    yield start
    for server, judge in started:
        judge.released.set()
        server.shutdown()
        server.server_close()
