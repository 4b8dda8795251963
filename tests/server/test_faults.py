"""The server under a fault plan: fuzzed requests, slow and vanishing clients, 256 clients at once, a backend that
raises and hangs, SIGTERM under load. `pytest -s -m torture tests/server/test_faults.py` prints one JSON report.

DVPO_FAULTS_REQUESTS (10000) and DVPO_FAULTS_SECONDS (60) set its size, DVPO_FAULTS_SEED (0) its chance,
DVPO_FAULTS_REPORT a file for the report.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.values import score_all

pytestmark = pytest.mark.torture
REQUESTS = int(os.environ.get("DVPO_FAULTS_REQUESTS", 10_000))
SECONDS = float(os.environ.get("DVPO_FAULTS_SECONDS", 60))
SEED = int(os.environ.get("DVPO_FAULTS_SEED", 0))
GVM = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "gvm-tiny"


def beside(name: str) -> Any:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(f"faults_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzzing, load = beside("fuzzed_requests"), beside("test_load")


@dataclass
class Running:
    """A server process, and what it logged beside requests."""

    process: "subprocess.Popen[str]"
    port: int
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def os_process(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def count(self, event: str) -> int:
        return sum(e["event"] == event for e in self.events)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts a command that logs its url in its first line of JSON."""
    started: list[subprocess.Popen[str]] = []

    def begin(*command: str) -> Running:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stderr
        first = json.loads(next(line for line in process.stderr if line.startswith("{")))
        running = Running(process, int(first["url"].rpartition(":")[2]))

        def read() -> None:
            assert process.stderr
            for line in process.stderr:
                event = json.loads(line) if line.startswith("{") else {"event": line}
                if event["event"] != "request":
                    running.events.append(event)

        threading.Thread(target=read, daemon=True).start()
        return running

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def serve(start: Any, *options: str, port: int = 0) -> Running:
    running: Running = start("-m", "reproduce.cli", "serve", "--gvm", str(GVM), "--port", str(port), *options)
    return running


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"seed": SEED, "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    yield found
    text = json.dumps({**found, "load_after": os.getloadavg()[0]}, indent=2)
    print(f"\n{text}")
    if file := os.environ.get("DVPO_FAULTS_REPORT"):
        Path(file).write_text(text + "\n")


@pytest.fixture(scope="module")
def pool() -> list[Any]:
    """Texts with the values that the model gives without a server; every fourth shares its prompt with others."""
    rng = random.Random(SEED)
    shared = [[rng.randrange(4, 160) for _ in range(60)] for _ in range(4)]
    texts = []
    for i in range(120):
        prompt = shared[i % 3] if i % 4 == 0 else [rng.randrange(4, 160) for _ in range(rng.choice([1, 5, 40, 120]))]
        texts.append(Encoded(prompt, [rng.randrange(4, 160) for _ in range(rng.choice([1, 7, 30, 100]))]))
    values = dict(score_all(models.load(GVM, "value"), texts, 0))
    return [load.Text(text, values[i].tolist()) for i, text in enumerate(texts)]


def body_of(*texts: Any) -> dict[str, Any]:
    return {"items": [{"prompt_ids": t.encoded.prompt_ids, "response_ids": t.encoded.response_ids} for t in texts]}


def require_right(reply: dict[str, Any], *texts: Any) -> None:
    for item, text in zip(reply["items"], texts, strict=True):
        assert np.abs(np.asarray(item["q"]) - np.asarray(text.values_S[1:])).max() < 1e-4


def told(reply: httpx.Response, *texts: Any) -> str:
    """What the reply is: 200 with the right values, or a declared 503 of a kind."""
    if reply.status_code == 200:
        if texts:
            require_right(reply.json(), *texts)
        return "200"
    assert reply.status_code == 503, reply.text
    assert int(reply.headers["retry-after"]) >= 1
    return f"503 {reply.json()['error']['type']}"


async def fuzz(port: int, rng: random.Random, count: int, until: float, pool: list[Any], codes: Counter[str]) -> None:
    """Sends requests over one connection after another; now and then one that is right, whose values are compared."""
    writer: asyncio.StreamWriter | None = None
    for number in range(count):
        if time.monotonic() > until:
            return
        if writer is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        text = rng.choice(pool)
        right, broken = number % 20 == 19, number % 20 == 9
        if right:
            data = json.dumps(body_of(text)).encode()
            head = HEAD.replace(b"5000", b"%d" % len(data))
            method, raw = "POST", head + b"\r\n" + data
        else:
            method, raw = ("GET", rng.choice(fuzzing.BROKEN)) if broken else fuzzing.fuzzed(rng)
        writer.write(raw)
        try:
            async with asyncio.timeout(120):
                status, headers, body = await fuzzing.answer(reader, method)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if not broken:
                raise AssertionError(raw[:2000]) from error
            codes["closed"] += 1
            writer = None
            continue
        codes[str(status)] += 1
        codes["right requests"] += right
        assert status < 500 or (status == 503 and "retry-after" in headers), (status, body[:500], raw[:2000])
        if right:
            assert status == 200, body
            require_right(json.loads(body), text)
        elif status >= 400 and not broken and body and headers.get("content-type") == "application/json":
            assert set(json.loads(body)["error"]) == {"message", "type", "param"}
        if broken or headers.get("connection") == "close":
            writer.close()
            writer = None


def test_fuzzed_requests(start: Any, pool: list[Any], report: dict[str, Any]) -> None:
    running, codes, began = serve(start), Counter[str](), time.monotonic()

    async def all_of_them() -> None:
        chances = [random.Random(SEED * 100 + i) for i in range(8)]
        await asyncio.gather(*(fuzz(running.port, c, REQUESTS // 8, began + 150, pool, codes) for c in chances))

    asyncio.run(all_of_them())
    right = codes.pop("right requests")
    report["fuzz"] = {
        "requests": codes.total(),
        "planned": REQUESTS,
        "right_ones_among_them": right,
        "seconds": round(time.monotonic() - began, 1),
        "by_status": dict(sorted(codes.items())),
        "bugs_logged": running.count("bug"),
    }
    assert httpx.get(f"{running.url}/ready").status_code == 200
    assert not running.count("bug"), running.events
    assert codes.total() >= min(REQUESTS // 8 * 8, 800)
    assert running.end() == 0


HEAD = b"POST /score_tokens HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n"


def connect(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    return client


def test_slow_clients(start: Any, pool: list[Any], report: dict[str, Any]) -> None:
    running, seconds = serve(start), min(20.0, SECONDS)
    httpx.post(f"{running.url}/score_tokens", json=body_of(*pool), timeout=120).raise_for_status()
    before, rng, took = running.os_process.num_fds(), random.Random(SEED), []
    dripping = [connect(running.port) for _ in range(60)]
    for client in dripping[30:]:
        client.sendall(HEAD + b"\r\n")
    silent = [connect(running.port) for _ in range(40)]
    deaf = [connect(running.port) for _ in range(20)]
    for client in deaf:
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n" * 400)
    most, until, vanished, step = 0, time.monotonic() + seconds, 0, 0
    with httpx.Client(base_url=running.url, timeout=60) as good:
        while time.monotonic() < until:
            for i, client in enumerate(dripping):
                with contextlib.suppress(ConnectionError):
                    client.sendall(HEAD[step % 90 :][:1] if i < 30 else b" ")
            for sent in (b"", HEAD, HEAD + b"\r\n{", HEAD + b"\r\n" + b" " * 5000):
                with connect(running.port) as client:  # it resets the connection, as one that crashed
                    client.sendall(sent)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                vanished += 1
            text, began = rng.choice(pool), time.monotonic()
            reply = good.post("/score_tokens", json=body_of(text))
            took.append(time.monotonic() - began)
            require_right(reply.raise_for_status().json(), text)
            most, step = max(most, running.os_process.num_fds()), step + 1
            time.sleep(0.05)
    for client in (*dripping, *silent, *deaf):
        client.close()
    until = time.monotonic() + 30
    while running.os_process.num_fds() > before + 1 and time.monotonic() < until:
        time.sleep(0.1)
    report["slow_clients"] = {
        "slow": len(dripping),
        "silent": len(silent),
        "reading_nothing": len(deaf),
        "vanished": vanished,
        "others_answered": len(took),
        "p50_seconds": round(float(np.quantile(took, 0.5)), 4),
        "p99_seconds": round(float(np.quantile(took, 0.99)), 4),
        "descriptors": {"before": before, "most": most, "after": running.os_process.num_fds()},
    }
    assert running.os_process.num_fds() <= before + 1
    assert max(took) < 20
    assert not running.count("bug"), running.events
    assert running.end() == 0


def test_256_clients(start: Any, pool: list[Any], report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "AsyncClient", partial(httpx.AsyncClient, verify=False))  # 256 times no certificates
    running = serve(start, "--max-queue-tokens", "30000", "--cache-mb", "16")
    process = running.os_process
    asyncio.run(load.run(running.url, process, pool, clients=4, seconds=3))  # what is loaded once is loaded
    before, began = process.memory_info().rss / 2**20, time.monotonic()

    async def bounded() -> Any:
        async with asyncio.timeout(SECONDS + 180):
            return await load.run(running.url, process, pool, clients=256, seconds=SECONDS)

    tally = asyncio.run(bounded())
    metrics = httpx.get(f"{running.url}/metrics").text
    rejected = dict(re.findall(r'dvpo_rejected_total\{reason="(\w+)"\} (\d+)', metrics))
    after, rss = process.memory_info().rss / 2**20, np.array(tally.rss_mb)
    early, late = np.median(rss[len(rss) // 4 : len(rss) // 2]), np.median(rss[-len(rss) // 4 :])
    report["clients_256"] = {
        "seconds": round(time.monotonic() - began, 1),
        "right_replies": len(tally.seconds),
        "clients_that_left": tally.left,
        "p50_seconds": round(float(np.quantile(tally.seconds, 0.5)), 3),
        "p99_seconds": round(float(np.quantile(tally.seconds, 0.99)), 3),
        "rejected": {reason: int(number) for reason, number in rejected.items()},
        "by_status": dict(sorted(Counter(str(code) for (_, code), n in tally.codes.items() for _ in range(n)).items())),
        "resident_mb": {"before": round(before), "early": round(early), "late": round(late), "after": round(after)},
    }
    assert len(tally.seconds) > 256
    assert late < early * 1.1 + 20
    assert not running.count("bug"), running.events
    assert running.end() == 0


def test_a_backend_that_raises_or_hangs(start: Any, pool: list[Any], report: dict[str, Any], tmp_path: Path) -> None:
    mode = tmp_path / "mode"
    mode.write_text("fine")
    running = start(str(Path(__file__).with_name("faulty_server.py")), str(GVM), str(mode))
    found = report.setdefault("backend", {})

    async def ask(client: httpx.AsyncClient, i: int) -> str:
        path, bodies = list(fuzzing.VALID.items())[i % 5]
        text = pool[i % len(pool)]
        body = body_of(text) if path == "/score_tokens" else bodies[0]
        texts = [text] if path == "/score_tokens" else []
        return told(await client.post(path, json=body), *texts)

    async def together(name: str) -> Counter[str]:
        mode.write_text(name)
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
            answers = Counter(await asyncio.gather(*(ask(client, i) for i in range(64))))
            ready = (await client.get("/ready")).status_code
            assert (await client.get("/health")).status_code == 200
        found[name] = {"answers": dict(answers), "ready": ready, "seconds": round(time.monotonic() - began, 2)}
        return answers

    assert asyncio.run(together("raise")) == {"503 unavailable": 64}
    assert found["raise"]["ready"] == 503
    assert asyncio.run(together("fine")) == {"200": 64}
    assert found["fine"]["ready"] == 200
    assert asyncio.run(together("sometimes"))["200"] > 0
    assert asyncio.run(together("hang")) == {"503 unavailable": 64}
    assert found["hang"]["ready"] == 503
    assert running.count("gave_up") == 1
    began = time.monotonic()
    running.end()
    found["end_after_hang_seconds"] = round(time.monotonic() - began, 2)
    assert not running.count("bug"), running.events


def test_stop_and_start_under_load(start: Any, pool: list[Any], report: dict[str, Any]) -> None:
    running = serve(start, "--exact", "--max-batch-tokens", "512")
    port, late, texts = running.port, Counter[str](), pool[:15]

    async def one(client: httpx.AsyncClient) -> str:
        return told(await client.post("/score_tokens", json=body_of(*texts)), *texts)

    async def during() -> Counter[str]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as client:
            asked = [asyncio.ensure_future(one(client)) for _ in range(64)]
            waiting = 0.0
            async with asyncio.timeout(60):
                while waiting < 40 * len(texts) and not any(task.done() for task in asked):
                    waiting = float(re.findall(r'what="items"\} ([\d.]+)', (await client.get("/metrics")).text)[0])
            running.process.send_signal(signal.SIGTERM)
            while not all(task.done() for task in asked):
                async with httpx.AsyncClient(base_url=running.url, timeout=60, verify=False) as newcomer:
                    try:
                        late[told(await newcomer.post("/score_tokens", json=body_of(pool[0])), pool[0])] += 1
                    except httpx.TransportError as error:
                        late[type(error).__name__] += 1
                await asyncio.sleep(0.2)
            return Counter(await asyncio.gather(*asked))

    answers = asyncio.run(during())
    assert running.process.wait(60) == 0
    began = time.monotonic()
    again = serve(start, port=port)
    reply = httpx.post(f"{again.url}/score_tokens", json=body_of(pool[0]), timeout=30).raise_for_status()
    require_right(reply.json(), pool[0])
    report["restart"] = {
        "in_flight": dict(answers),
        "later": dict(late),
        "same_port_answers_after_seconds": round(time.monotonic() - began, 2),
    }
    assert answers.total() == 64
    assert answers["200"] >= 40
    assert set(late) <= {"503 stopping", "ConnectError", "ReadError", "RemoteProtocolError", "200"}
    assert not running.count("bug"), running.events
    assert again.end() == 0
