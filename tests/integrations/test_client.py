"""The client against a server that misbehaves as told, and against the real one."""

import asyncio
import base64
import copy
import email.utils
import itertools
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from dvpo import models
from dvpo.data.records import Example
from dvpo.data.templates import Encoded, encode_prompt, encode_response
from dvpo.errors import InputError, StageError
from dvpo.integrations import client as module
from dvpo.integrations.client import GVMClient, item_of, retry_after, split
from dvpo.objectives.td import aggregate
from dvpo.values import collate, token_values

FINGERPRINT = "f" * 64
Act = Callable[["Handler"], None]
FINGERPRINT = "f" * 64


def encoded(values: list[float]) -> str:
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


def good_item(item: dict[str, Any]) -> dict[str, Any]:
    """h_t is a tenth of the response's t-th id, h_0 a tenth of the prompt's last; a text has the tokens 1, 2, 3."""
    ids = item.get("response_ids", [1, 2, 3])
    states = [i / 10 for i in (item.get("prompt_ids", [0])[-1], *ids)]
    return {
        "token_ids": ids,
        "offsets": [[i, i + 1] for i in range(len(ids))],
        "q": encoded(states[1:]),
        "v": encoded(states[:-1]),
        "scores": {"mean": float(np.mean(states[1:]))},
    }


def good_reply(body: dict[str, Any]) -> dict[str, Any]:
    return {"items": [good_item(i) for i in body["items"]], "provenance": {"tokenizer_sha256": FINGERPRINT}}


class Handler(BaseHTTPRequestHandler):
    """Answers well, but for the acts in the server's script, one a request."""

    protocol_version = "HTTP/1.1"
    server: "Script"

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((time.monotonic(), self.path, dict(self.headers), self.body))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            act = self.server.acts.pop(0) if self.server.acts else None
        try:
            time.sleep(self.server.delay)
            act(self) if act else self.reply(200, good_reply(self.body))
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Script(ThreadingHTTPServer):
    """A server on a free port with a list of acts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts: list[Act | None] = []
        self.seen: list[tuple[float, str, dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.delay = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone away is a part of the tests


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def status(code: int, message: str, headers: dict[str, str] | None = None, param: str | None = None) -> Act:
    error = {"error": {"message": message, "type": "test", "param": param}}
    return lambda handler: handler.reply(code, error, headers)


def hang(seconds: float) -> Act:
    return lambda handler: time.sleep(seconds)


def cut(handler: Handler) -> None:
    """Ends the connection in the middle of a reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"items": [')
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()


def batch(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Responses of 1 to 4 tokens, all different."""
    return [[7, i] for i in range(count)], [list(range(i, i + 1 + i % 4)) for i in range(count)]


def test_values_and_scores_come_back_in_order(script: Script) -> None:
    prompts, responses = batch(11)
    scored = GVMClient(script.url, max_items=3, concurrency=4).score(prompts, responses)
    assert len(scored) == 11
    for prompt, response, values in zip(prompts, responses, scored, strict=True):
        expected = np.array([prompt[-1], *response], np.float32) / np.float32(10)
        np.testing.assert_array_equal(values.values_S, expected)
        np.testing.assert_array_equal(values.q_T, expected[1:])
        np.testing.assert_array_equal(values.v_T, expected[:-1])
        assert values.token_ids == response
        assert values.q_T.dtype == np.float32
        assert values.scores["mean"] == pytest.approx(float(expected[1:].mean()), abs=1e-6)
    assert [len(body["items"]) for *_, body in script.seen].count(3) == 3
    assert len(script.seen) == 4
    assert all(body["encoding"] == "base64" and body["return"] == "both" for *_, body in script.seen)


def test_an_empty_batch_asks_nothing(script: Script) -> None:
    assert GVMClient(script.url).score([], []) == []
    assert not script.seen


@pytest.mark.parametrize(
    ("prompt", "response", "sent"),
    [
        (np.array([1, 2]), torch.tensor([3]), {"prompt_ids": [1, 2], "response_ids": [3]}),
        ("a question", "an answer", {"prompt": "a question", "response": "an answer"}),
        (
            ({"role": "user", "content": "q"},),
            [4],
            {"messages": [{"role": "user", "content": "q"}], "response_ids": [4]},
        ),
    ],
)
def test_ids_text_and_messages_are_sent_as_such(script: Script, prompt: Any, response: Any, sent: Any) -> None:
    (values,) = GVMClient(script.url).score([prompt], [response], aggregate=["mean", "p10"])
    assert script.seen[0][3]["items"] == [sent]
    assert script.seen[0][3]["aggregate"] == ["mean", "p10"]
    assert len(values.q_T) == len(sent.get("response_ids", "123"))


def test_wrong_calls_are_refused_before_anything_is_sent(script: Script) -> None:
    client = GVMClient(script.url)
    with pytest.raises(InputError, match="2 prompts and 1 responses"):
        client.score([[1], [2]], [[3]])
    with pytest.raises(InputError, match="empty prompt or response"):
        client.score([[1]], [[]])
    with pytest.raises(InputError, match="no address"):
        GVMClient("localhost:8000")
    assert not script.seen


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30), st.integers(1, 7), st.integers(1, 100))
def test_requests_are_bounded_and_lose_nothing(sizes: list[tuple[int, int]], most: int, tokens: int) -> None:
    items = [item_of([0] * p, [i] * r) for i, (p, r) in enumerate(sizes)]
    parts = list(split(items, most, tokens))
    assert [item for part in parts for item in part] == items
    for part in parts:
        size = sum(len(i["prompt_ids"]) + len(i["response_ids"]) for i in part)
        assert 1 <= len(part) <= most
        assert size <= tokens or len(part) == 1


def test_requests_run_together_within_the_limit(script: Script) -> None:
    script.delay = 0.1
    GVMClient(script.url, max_items=1, concurrency=3).score(*batch(9))
    assert script.most_in_flight == 3


def test_overload_is_tried_again_and_the_servers_wish_is_honoured(script: Script) -> None:
    script.acts = [status(503, "queue full", {"Retry-After": "1"}), status(429, "slow down", {"Retry-After": "0"})]
    assert len(GVMClient(script.url).score([[1]], [[2]])) == 1
    first, second, third = (at for at, *_ in script.seen)
    assert second - first >= 1.0
    assert third - second < 1.0


def test_a_cut_connection_and_a_hanging_attempt_are_tried_again(script: Script) -> None:
    script.acts = [cut, hang(5), cut]
    start = time.monotonic()
    assert len(GVMClient(script.url, attempt_timeout=0.3).score([[1]], [[2]])) == 1
    assert len(script.seen) == 4
    assert time.monotonic() - start < 4


def test_a_refused_connection_is_tried_until_the_time_is_over() -> None:
    start = time.monotonic()
    with pytest.raises(StageError, match=r"within 1 s and \d attempts .*onnect"):
        GVMClient("http://127.0.0.1:9", timeout=1).score([[1]], [[2]])
    assert time.monotonic() - start < 2


def test_a_server_that_never_answers_costs_the_time_allowed_and_no_more(script: Script) -> None:
    script.acts = [hang(5)] * 20
    start = time.monotonic()
    with pytest.raises(StageError, match=r"within 1 s .*no answer"):
        GVMClient(script.url, timeout=1, max_items=1, concurrency=2).score(*batch(6))
    assert time.monotonic() - start < 2


def test_no_waiting_for_a_time_that_is_past_the_limit(script: Script) -> None:
    script.acts = [status(503, "restarting", {"Retry-After": "60"})]
    start = time.monotonic()
    with pytest.raises(StageError, match=r"503 restarting"):
        GVMClient(script.url, timeout=2).score([[1]], [[2]])
    assert time.monotonic() - start < 1
    assert len(script.seen) == 1


@pytest.mark.parametrize("code", [400, 401, 404, 413, 422])
def test_a_refusal_is_passed_on_at_once(script: Script, code: int) -> None:
    script.acts = [status(code, "item 0 has 99 tokens, the limit is 64", param="items[0].response_ids")] + [hang(5)] * 9
    start = time.monotonic()
    with pytest.raises(
        InputError, match=rf"{code} item 0 has 99 tokens, the limit is 64 \(field items\[0\].response_ids"
    ):
        GVMClient(script.url, max_items=1, concurrency=4).score(*batch(9))
    assert time.monotonic() - start < 2  # what hangs beside it is given up
    assert len(script.seen) <= 4


def test_a_failure_of_the_server_is_no_fault_of_the_input(script: Script) -> None:
    script.acts = [status(500, "the worker died")]
    with pytest.raises(StageError, match="500 the worker died"):
        GVMClient(script.url).score([[1]], [[2]])
    assert len(script.seen) == 1


def changed(**changes: Any) -> Act:
    """A good reply of one item with some fields changed."""
    return lambda h: h.reply(200, {**good_reply(h.body), "items": [{**good_item(h.body["items"][0]), **changes}]})


@pytest.mark.parametrize(
    "act",
    [
        lambda h: h.reply(200, b"<html>a proxy</html>"),
        lambda h: h.reply(200, {"items": []}),
        lambda h: h.reply(200, {**good_reply(h.body), "items": []}),
        changed(token_ids=[9, 9]),
        changed(q=encoded([0.5])),
        changed(q=encoded([0.5, float("nan")])),
        changed(v="no base64!"),
        changed(v=None),
        changed(offsets=[[0, 1]]),
    ],
)
def test_a_reply_that_cannot_be_right_is_an_error(script: Script, act: Act) -> None:
    script.acts = [act]
    with pytest.raises(StageError, match="reply"):
        GVMClient(script.url).score([[1]], [[2, 3]])


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        ("-3", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_both_forms_of_retry_after(header: str, low: float, high: float) -> None:
    asked = retry_after(httpx.Response(503, headers={"Retry-After": header}))
    assert asked is not None
    assert low <= asked <= high


def test_a_date_to_come_in_retry_after() -> None:
    date = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=1000), usegmt=True)
    asked = retry_after(httpx.Response(503, headers={"Retry-After": date}))
    assert asked is not None
    assert 900 < asked <= 1000


def test_no_retry_after_or_a_meaningless_one() -> None:
    assert retry_after(httpx.Response(503)) is None
    assert retry_after(httpx.Response(503, headers={"Retry-After": "soon"})) is None


def test_the_tokenizers_fingerprint_is_sent_and_compared(script: Script, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"another tokenizer \(fingerprint ffffffffffff\)"):
        GVMClient(script.url, tokenizer=tokenizer).score([[1]], [[2]])
    assert script.seen[0][3]["tokenizer_sha256"] == models.tokenizer_fingerprint(tokenizer)
    with pytest.raises(InputError, match="another tokenizer"):
        GVMClient(script.url).require_tokenizer(tokenizer)


def test_the_key_is_sent_as_a_bearer_token(script: Script) -> None:
    GVMClient(script.url + "/", api_key="abc").score([[1]], [[2]])
    (_, path, headers, _) = script.seen[0]
    assert headers["Authorization"] == "Bearer abc"
    assert path == "/score_tokens"


def test_a_client_may_be_sent_to_another_process_and_copied(script: Script) -> None:
    client = GVMClient(script.url, api_key="k", timeout=9)
    client.score([[7]], [[1, 2]])
    for other in (pickle.loads(pickle.dumps(client)), copy.deepcopy(client)):
        assert (other.url, other.timeout) == (client.url, 9)
        assert other.score([[7]], [[1, 2]])[0].scores == client.score([[7]], [[1, 2]])[0].scores


def test_both_calls_work_inside_a_running_loop(script: Script) -> None:
    async def both() -> tuple[Any, Any]:
        client = GVMClient(script.url)
        return client.score([[1]], [[2]]), await client.ascore([[1]], [[2]])

    first, second = asyncio.run(both())
    np.testing.assert_array_equal(first[0].q_T, second[0].q_T)


def test_the_real_server_gives_the_values_of_the_process(
    gvm_url: str,
    checkpoints: dict[tuple[str, str], Path],
    texts: list[Encoded],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    how = ("mean", "last", "p10", "bellman")
    client = GVMClient(gvm_url, tokenizer=tokenizer, max_items=5)
    scored = client.score([t.prompt_ids for t in texts], [t.response_ids for t in texts], how)
    packed = collate(texts, tokenizer.pad_token_id)
    with torch.no_grad():
        values_B_S = token_values(models.load(checkpoints["llama", "value"], "value").eval(), packed)
    for row, (text, values) in enumerate(zip(texts, scored, strict=True)):
        own_S = values_B_S[row][packed.mask_B_S[row]]
        np.testing.assert_allclose(values.values_S, own_S.numpy(), atol=1e-5)
        assert values.token_ids == text.response_ids
        for name in how:
            own = float(aggregate(own_S[None], torch.ones(1, len(own_S), dtype=torch.bool), name))
            assert values.scores[name] == pytest.approx(own, abs=1e-5)


def test_the_real_server_reads_messages_and_text_as_we_encode_them(
    gvm_url: str, examples: list[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts, answers = [e.prompt for e in examples], [e.responses[0].text for e in examples]
    client = GVMClient(gvm_url)
    by_text = client.score(prompts, answers)
    by_ids = client.score(
        [encode_prompt(tokenizer, p) for p in prompts], [encode_response(tokenizer, a) for a in answers]
    )
    for answer, a, b in zip(answers, by_text, by_ids, strict=True):
        np.testing.assert_allclose(a.values_S, b.values_S, atol=1e-5)
        assert a.token_ids == b.token_ids
        start, end = a.offsets[0]
        assert answer[start:end].strip() == tokenizer.decode(a.token_ids[:1]).strip()


def test_the_real_servers_refusals_reach_the_user(guarded_url: tuple[str, str], gvm_url: str) -> None:
    url, key = guarded_url
    assert len(GVMClient(url, api_key=key).score([[1]], [[2]])) == 1
    with pytest.raises(InputError, match="401"):
        GVMClient(url, api_key="wrong").score([[1]], [[2]])
    with pytest.raises(InputError, match="400"):
        GVMClient(gvm_url).score([[1]], [[2] * 5000])


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_what_passes_is_tried_again(script: Script, code: int) -> None:
    script.acts = [status(code, "later")]
    assert len(GVMClient(script.url).score([[1]], [[2]])) == 1
    assert len(script.seen) == 2


def test_pauses_grow(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
    script.acts = [status(503, "busy")] * 4
    GVMClient(script.url).score([[1]], [[2]])
    times = [at for at, *_ in script.seen]
    for n, (a, b) in enumerate(itertools.pairwise(times)):
        assert b - a >= 0.05 * 2**n


def test_a_value_before_a_token_is_finite_too(script: Script) -> None:
    script.acts = [changed(v=encoded([0.1, float("inf")]))]
    with pytest.raises(StageError, match="reply"):
        GVMClient(script.url).score([[1]], [[2, 3]])


def test_messages_count_with_their_text() -> None:
    items = [item_of([{"role": "user", "content": "x" * 60}], [1]) for _ in range(4)]
    assert [len(part) for part in split(items, 10, 200)] == [2, 2]


def test_an_error_that_is_no_json_is_quoted() -> None:
    assert module.sentence(httpx.Response(502, text="a gateway's page")) == "a gateway's page"
