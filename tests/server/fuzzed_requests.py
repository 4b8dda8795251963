"""Requests that are nearly right: valid bodies with parts replaced, bytes damaged, wrong types, methods and paths."""

import asyncio
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALID: dict[str, list[Any]] = {
    "/score_tokens": [
        {"items": [{"prompt_ids": [5, 6], "response_ids": [7, 8, 2]}], "aggregate": ["mean", "p10"], "return": "both"},
        {"items": [{"messages": [{"role": "user", "content": "what is it ?"}], "response": "it is mild ."}]},
        {
            "items": [{"prompt": "what is it ?", "response": "it is", "response_tokens": ["it", " is"]}],
            "project": True,
        },
    ],
    "/pooling": [{"model": "gvm", "task": "token_classify", "input": [[5, 6, 7], [8, 9]], "encoding_format": "base64"}],
    "/classify": [{"model": "gvm", "input": "the river of velor is mild .", "activation": False}],
    "/get_reward": [{"query": ["the river is mild ."], "prompts": ["the river"], "labels": [""]}],
    "/reward": [{"prompt": "the river", "response": "is mild .", "label": None}],
}
READS = ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json", "/", "/web/main.js"]
STRANGE_PATHS = ["/%00", "/web/..%2fapp.py", "/score_tokens/", "//", "/" + "a" * 3000, "/?%ff", "/web/%ff%fe", "*"]
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    2**63,
    float("nan"),
    float("-inf"),
    "",
    "\u0000",
    "\ud83d",
    [],
    {},
]
JUNK += [[[]], ["a"], [1e9], {"a": {"b": []}}, "x" * 5000, [5] * 300, [[5]] * 1100, "\U0001f600" * 50]
BROKEN = [
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nx: \x00\r\n\r\n",
    b"POST /pooling HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    b"POST /pooling HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    b"POST /pooling HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every part of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        yield value, key
        yield from places(value[key])


def mutated(rng: random.Random, body: Any) -> Any:
    """The body with one to three parts replaced, removed, repeated, nested or added."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(body))
        if not found:
            return body
        container, key = rng.choice(found)
        how = rng.randrange(6)
        if how < 2:
            container[key] = copy.deepcopy(rng.choice(JUNK))
        elif how == 2:
            del container[key]
        elif how == 3:
            container[key] = [container[key]] * rng.choice([1, 2, 50])
        elif how == 4:
            for _ in range(rng.choice([1, 30, 150])):
                container[key] = [container[key]]
        elif isinstance(container, dict):
            container[rng.choice(["colour", "", "\u0000", "__class__", "x" * 1000])] = copy.deepcopy(rng.choice(JUNK))
    return body


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The bytes cut off, changed, with bad UTF-8, or something else altogether."""
    place = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:place],
            data[:place]
            + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x00", b"NaN", b"1e999"])
            + data[place:],
            data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            b"[" * rng.choice([100, 5000]),
            b'{"items": ' + b"9" * 5000 + b"}",
            data + data,
            rng.randbytes(200),
            b"",
        ]
    )


def fuzzed(rng: random.Random) -> tuple[str, bytes]:
    """(method, a whole request), whose framing is right: the connection can be used again."""
    path, bodies = rng.choice(list(VALID.items()))
    method, kind, headers = "POST", "application/json", ""
    data = json.dumps(mutated(rng, rng.choice(bodies))).encode()
    how = rng.random()
    if how < 0.3:
        data = damaged(rng, json.dumps(rng.choice(bodies)).encode())
    elif how < 0.4:
        kind = rng.choice(["", "text/plain", "application/json; charset=latin-1", "APPLICATION/JSON", "a/b;c", "\x7f"])
    elif how < 0.5:
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"])
        path = rng.choice([path, *READS])
    elif how < 0.6:
        path = rng.choice([*STRANGE_PATHS, f"{path}?a=%ff&{'b' * 100}", *READS])
    elif how < 0.65:
        headers = (
            rng.choice(["authorization: Bearer \xe9", "x-request-id: " + "a" * 500, "expect: 100-continue"]) + "\r\n"
        )
    if rng.random() < 0.1:
        frame = b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n" if data else b"0\r\n\r\n"
        headers += "transfer-encoding: chunked\r\n"
    else:
        frame = data
        headers += f"content-length: {len(data)}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-type: {kind}\r\n{headers}\r\n"
    return method, head.encode("latin-1") + frame


async def answer(reader: asyncio.StreamReader, method: str) -> tuple[int, dict[str, str], bytes]:
    """One reply. Raises IncompleteReadError where the server closed without a whole one."""
    while True:
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        status = int(first.split()[1])
        if status >= 200:
            break
    if method == "HEAD" or status == 304:
        return status, headers, b""
    if "content-length" in headers:
        return status, headers, await reader.readexactly(int(headers["content-length"]))
    return status, {**headers, "connection": "close"}, await reader.read()
