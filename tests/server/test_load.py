"""Many clients at once: all protocols, sizes, bad input and clients that leave, against a real `dvpo serve`.

DVPO_LOAD_SECONDS sets the length of the long run (60 by default); it prints the p99 and the memory.
"""

import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from dvpo import models
from dvpo.data.templates import Encoded
from dvpo.objectives.td import aggregate
from dvpo.values import score_all

BAD: list[tuple[str, bytes]] = [
    ("/score_tokens", b'{"items": [{"prompt": "a"'),
    ("/score_tokens", b'{"items": [{"prompt": "a", "response": ""}]}'),
    ("/score_tokens", b'{"items": [{"prompt_ids": [1e9], "response_ids": [1]}]}'),
    ("/score_tokens", json.dumps({"items": [{"prompt_ids": [5] * 300, "response_ids": [5]}]}).encode()),
    ("/pooling", b'{"input": {"a": 1}}'),
    ("/classify", b'{"input": [[5], [999999]]}'),
    ("/get_reward", b'{"query": 5}'),
    ("/reward", b"[" * 5000),
]


@dataclass
class Text:
    """Token ids with the values that the model gives without a server."""

    encoded: Encoded
    values_S: list[float]

    @property
    def whole(self) -> list[int]:
        return self.encoded.prompt_ids + self.encoded.response_ids


@dataclass
class Tally:
    """What happened."""

    seconds: list[float] = field(default_factory=list)
    codes: collections.Counter[tuple[str, int]] = field(default_factory=collections.Counter)
    left: int = 0
    rss_mb: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def pool(checkpoints: Any) -> list[Text]:
    """Texts of many sizes; every sixth shares its prompt with others."""
    rng = random.Random(0)
    shared = [[rng.randrange(4, 170) for _ in range(60)] for _ in range(4)]
    texts = []
    for i in range(120):
        prompt = shared[i % 4] if i % 6 == 0 else [rng.randrange(4, 170) for _ in range(rng.choice([1, 5, 40, 120]))]
        texts.append(Encoded(prompt, [rng.randrange(4, 170) for _ in range(rng.choice([1, 7, 30, 100]))]))
    model = models.load(checkpoints["llama", "value"], "value")
    values = dict(score_all(model, texts, 0))
    return [Text(text, values[i].tolist()) for i, text in enumerate(texts)]


@pytest.fixture
def server(checkpoints: Any) -> Iterator[tuple[str, psutil.Process]]:
    """A `dvpo serve` with a queue that a burst fills."""
    arguments = [sys.executable, "-m", "reproduce.cli", "serve", "--port", "0", "--max-queue-tokens", "4000"]
    arguments += ["--gvm", str(checkpoints["llama", "value"]), "--cache-mb", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    url = json.loads(process.stderr.readline())["url"]
    drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
    yield url, psutil.Process(process.pid)
    process.terminate()
    assert process.wait(60) == 0, "it ends in order"
    drain.wait(10)


def same(found: Any, wanted: Any) -> None:
    assert np.abs(np.asarray(found) - np.asarray(wanted)).max() < 1e-4


async def score_tokens(client: httpx.AsyncClient, rng: random.Random, pool: list[Text]) -> httpx.Response:
    texts = rng.sample(pool, rng.choice([1, 1, 3, 8]))
    packed = rng.random() < 0.3
    items = [{"prompt_ids": t.encoded.prompt_ids, "response_ids": t.encoded.response_ids} for t in texts]
    body = {"items": items, "aggregate": ["mean", "p10"], "encoding": "base64" if packed else "list"}
    reply = await client.post("/score_tokens", json=body)
    if reply.status_code == 200:
        for item, text in zip(reply.json()["items"], texts, strict=True):
            q = np.frombuffer(base64.b64decode(item["q"]), "<f4") if packed else item["q"]
            same(q, text.values_S[1:])
            assert item["token_ids"] == text.encoded.response_ids
            values_1_S = torch.tensor([text.values_S])
            same(
                item["scores"]["p10"],
                float(aggregate(values_1_S, torch.ones_like(values_1_S, dtype=torch.bool), "p10")),
            )
    return reply


async def pooling(client: httpx.AsyncClient, rng: random.Random, pool: list[Text]) -> httpx.Response:
    texts = rng.sample(pool, 2)
    reply = await client.post("/pooling", json={"input": [t.whole for t in texts]})
    if reply.status_code == 200:
        for data, text in zip(reply.json()["data"], texts, strict=True):
            same(np.ravel(data["data"])[-len(text.values_S) :], text.values_S)
    return reply


async def classify(client: httpx.AsyncClient, rng: random.Random, pool: list[Text]) -> httpx.Response:
    text = rng.choice(pool)
    reply = await client.post("/classify", json={"model": "gvm", "input": text.whole, "activation": False})
    if reply.status_code == 200:
        same(reply.json()["data"][-1]["probs"][-1], text.values_S[-1])
    return reply


async def misbehave(client: httpx.AsyncClient, rng: random.Random, pool: list[Text]) -> httpx.Response:
    route, body = rng.choice(BAD)
    reply = await client.post(route, content=body, headers={"content-type": "application/json"})
    assert 400 <= reply.status_code < 500, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param"}
    return reply


async def leave(client: httpx.AsyncClient, rng: random.Random, pool: list[Text]) -> httpx.Response | None:
    texts = rng.sample(pool, 8)
    items = [{"prompt_ids": t.encoded.prompt_ids, "response_ids": t.encoded.response_ids} for t in texts]
    with contextlib.suppress(httpx.ReadTimeout):
        return await client.post("/score_tokens", json={"items": items}, timeout=httpx.Timeout(30, read=0.0005))
    return None


async def words(client: httpx.AsyncClient, rng: random.Random, pool: list[Text]) -> httpx.Response:
    """Text protocols; their values are compared with each other, all of them with the model elsewhere."""
    prompt, answer = "what is the river of velor ?", " ".join(["the river of velor is mild ."] * rng.randint(1, 12))
    one = await client.post("/reward", json={"prompt": prompt, "response": answer, "label": None})
    two = await client.post("/get_reward", json={"query": [f"{prompt} {answer}"], "prompts": [prompt], "labels": [""]})
    if one.status_code == two.status_code == 200:
        same(one.json(), two.json()["rewards"][0])
    return one if one.status_code != 200 else two


ACTS = [score_tokens] * 4 + [pooling, classify, words, misbehave, leave]


async def one_client(url: str, seed: int, until: float, pool: list[Text], tally: Tally) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            act = rng.choice(ACTS)
            began = time.monotonic()
            reply = await act(client, rng, pool)
            if reply is None:
                tally.left += 1
                continue
            tally.codes[act.__name__, reply.status_code] += 1
            if reply.status_code == 200:
                tally.seconds.append(time.monotonic() - began)
            elif reply.status_code == 503:
                assert int(reply.headers["retry-after"]) >= 1
                await asyncio.sleep(rng.random())
            else:
                assert act is misbehave, (act.__name__, reply.status_code, reply.text)


async def watch(process: psutil.Process, until: float, tally: Tally) -> None:
    while time.monotonic() < until:
        tally.rss_mb.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(0.25)


async def run(url: str, process: psutil.Process, pool: list[Text], clients: int, seconds: float) -> Tally:
    tally = Tally()
    until = time.monotonic() + seconds
    jobs = [one_client(url, seed, until, pool, tally) for seed in range(clients)]
    await asyncio.gather(watch(process, until, tally), *jobs)
    async with httpx.AsyncClient(base_url=url) as client:  # all is done: nothing is left in the server
        for _ in range(100):
            if 'dvpo_waiting{what="items"} 0.0' in (await client.get("/metrics")).text:
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("texts are left in the queue")
        assert (await client.get("/ready")).status_code == 200
    return tally


def test_a_short_burst(server: Any, pool: list[Text]) -> None:
    url, process = server
    tally = asyncio.run(run(url, process, pool, clients=16, seconds=3))
    assert len(tally.seconds) > 20
    assert tally.left


@pytest.mark.slow
def test_a_minute_of_64_clients(server: Any, pool: list[Text]) -> None:
    url, process = server
    seconds = float(os.environ.get("DVPO_LOAD_SECONDS", "60"))
    tally = asyncio.run(run(url, process, pool, clients=64, seconds=seconds))
    times, rss = np.array(tally.seconds), np.array(tally.rss_mb)
    early, late = np.median(rss[len(rss) // 4 : len(rss) // 2]), np.median(rss[-len(rss) // 4 :])
    print(
        f"\n{len(times)} replies with values in {seconds:.0f} s, all right; p50 {np.quantile(times, 0.5):.3f} s, "
        f"p99 {np.quantile(times, 0.99):.3f} s; {tally.left} clients left; "
        f"{sum(n for (_, code), n in tally.codes.items() if code == 503)} refused with 503; "
        f"resident memory {early:.0f} MB early, {late:.0f} MB late"
    )
    assert len(times) > 10 * seconds
    assert late < early * 1.05 + 10
