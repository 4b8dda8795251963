"""/score_tokens and what surrounds it, over HTTP."""

import base64
import json
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from dvpo.data.templates import Encoded, encode
from dvpo.errors import StageError
from dvpo.objectives.td import AGGREGATES
from server.backends import ModelInfo

QUESTION, ANSWER = "what is the river of velor ?", "the river of velor is mild ."
MESSAGES = [{"role": "user", "content": QUESTION}]


def post(client: Any, *items: Any, status: int = 200, **fields: Any) -> Any:
    reply = client.post("/score_tokens", json={"items": list(items), **fields})
    assert reply.status_code == status, reply.text
    return reply.json()


def near(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, abs=1e-5)


def test_values_are_the_models_own_in_every_form_of_input(client: TestClient, served: Any) -> None:
    tokenizer = served.tokenizer
    chat = encode(tokenizer, MESSAGES, ANSWER)
    plain = Encoded(
        tokenizer(QUESTION, add_special_tokens=False)["input_ids"],
        [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
    )
    cut = Encoded(plain.prompt_ids, plain.response_ids[:-1])
    reply = post(
        client,
        {"messages": MESSAGES, "response": ANSWER},
        {"prompt": QUESTION, "response": ANSWER},
        {"prompt": QUESTION, "response": ANSWER, "append_eos": False},
        {"prompt_ids": plain.prompt_ids, "response_ids": plain.response_ids},
    )
    for item, text, values in zip(
        reply["items"], (chat, plain, cut, plain), served.direct(chat, plain, cut, plain), strict=True
    ):
        assert item["token_ids"] == text.response_ids
        near(item["q"], values[1:])
        near(item["v"], values[:-1])
        assert item["text"] == ANSWER
        assert item["prompt_tokens"] == len(text.prompt_ids)
        assert len(item["tokens"]) == len(item["offsets"]) == len(text.response_ids)
    total = [sum(len(getattr(t, n)) for t in (chat, plain, cut, plain)) for n in ("prompt_ids", "response_ids")]
    usage = reply["usage"]
    assert [usage["prompt_tokens"], usage["response_tokens"], usage["total_tokens"]] == [*total, sum(total)]


def test_v_is_q_of_the_token_before(client: TestClient, served: Any) -> None:
    item = post(client, {"messages": MESSAGES, "response": ANSWER})["items"][0]
    assert item["v"][1:] == item["q"][:-1]
    prompt = encode(served.tokenizer, MESSAGES, ANSWER).prompt_ids
    near(item["v"][:1], served.direct(Encoded(prompt[:-1], prompt[-1:]))[0][-1:])


def test_scores_agree_with_the_command_line(client: TestClient, served: Any) -> None:
    from reproduce.commands import score

    asked = score.Request("here", MESSAGES, ANSWER)
    theirs = score.score(str(served.folder), [asked])[0]
    ours = post(client, {"messages": MESSAGES, "response": ANSWER}, aggregate=list(AGGREGATES))["items"][0]
    assert ours["token_ids"] == theirs["token_ids"]
    near(ours["q"], theirs["q"])
    assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)


def test_bulk_form_and_choice_of_values(client: TestClient) -> None:
    item = {"prompt_ids": [5, 6], "response_ids": [7, 8, 9]}
    both = post(client, item)["items"][0]
    packed = post(client, item, encoding="base64")["items"][0]
    for name in ("q", "v"):
        assert np.frombuffer(base64.b64decode(packed[name]), "<f4").tolist() == pytest.approx(both[name], abs=1e-5)
        alone = post(client, item, **{"return": name})["items"][0]
        assert {"q", "v"} & set(alone) == {name}
    assert post(client, item, aggregate=[])["items"][0]["scores"] == {}
    assert post(client)["items"] == []


def test_trajectory_goes_before_the_prompt_as_turns(client: TestClient, served: Any) -> None:
    pair = {"prompt": "what is the city of marn ?", "response": "velor ."}
    text = encode(served.tokenizer, MESSAGES, ANSWER, [([{"role": "user", "content": pair["prompt"]}], "velor .")])
    item = post(client, {"messages": MESSAGES, "response": ANSWER, "trajectory": [pair]})["items"][0]
    near(item["q"], served.direct(text)[0][1:])
    same = {"messages": [{"role": "user", "content": pair["prompt"]}], "response": "velor ."}
    again = post(client, {"messages": MESSAGES, "response": ANSWER, "trajectory": [same]})["items"][0]
    near(again["q"], item["q"])


def test_projection(client: TestClient) -> None:
    item = {"prompt": QUESTION, "response": ANSWER}
    own = post(client, item, tokenizer_sha256=None)["items"][0]
    there = {**item, "response_tokens": ["the ri", "ver of", ANSWER[12:], ""]}
    projected = post(client, there, project=True, tokenizer_sha256="another")["items"][0]
    assert projected["q"] == pytest.approx([own["q"][0], own["q"][2], own["q"][-2], own["q"][-1]], abs=1e-5)
    assert projected["v"] == pytest.approx([own["v"][0], *projected["q"][:-1]], abs=1e-5)
    assert (projected["tokens"], projected["token_ids"]) == (there["response_tokens"], None)
    spans = {**item, "response_offsets": projected["offsets"]}
    near(post(client, spans, project=True)["items"][0]["q"], projected["q"])
    assert projected["scores"] == pytest.approx(own["scores"], abs=1e-5)


def test_another_tokenizer_is_refused(client: TestClient, served: Any) -> None:
    item = {"prompt": QUESTION, "response": ANSWER}
    error = post(client, item, tokenizer_sha256="f" * 64, status=400)["error"]
    assert (error["type"], error["param"]) == ("tokenizer_mismatch", "tokenizer_sha256")
    post(client, item, tokenizer_sha256=served.backend.info.tokenizer_sha256)


def test_unusual_characters(build: Any, byte_folder: Any) -> None:
    with TestClient(build(byte_folder).app) as client:
        for answer in ("naïve 😀", "𓀀", "日本語 👩‍👩‍👧!", "\u0000\n", "e\u0301"):
            item = post(client, {"prompt": "hello", "response": answer})["items"][0]
            assert item["text"] == answer
            assert {i for s, e in item["offsets"] for i in range(s, e)} == set(range(len(answer)))
            again = post(client, {"prompt": "hello", "response_ids": item["token_ids"]})["items"][0]
            assert again == {**item, "cached_tokens": again["cached_tokens"], "q": again["q"], "v": again["v"]} | {
                "scores": again["scores"]
            }
            near(again["q"], item["q"])


def test_special_tokens_are_added_only_when_asked_and_once(build: Any, byte_folder: Any) -> None:
    with TestClient(build(byte_folder).app) as client:
        item = {"prompt": "hello", "response": "a"}
        plain = post(client, item)["items"][0]["prompt_tokens"]
        assert post(client, item, add_special_tokens=True)["items"][0]["prompt_tokens"] == plain + 1
        twice = {**item, "prompt": "<bos>hello"}
        assert post(client, twice, add_special_tokens=True)["items"][0]["prompt_tokens"] == plain + 1


ITEM = {"prompt": QUESTION, "response": ANSWER}
BAD = {
    "no items": ({}, "items is missing"),
    "not an object": ([], "JSON object"),
    "unknown field": ({"items": [], "colour": 1}, "unknown field colour"),
    "unknown field of an item": ({"items": [{**ITEM, "lora": 1}]}, "unknown field items[0].lora"),
    "no prompt": ({"items": [{"response": "a"}]}, "exactly one of prompt"),
    "two prompts": ({"items": [{**ITEM, "prompt_ids": [1]}]}, "exactly one of prompt"),
    "no response": ({"items": [{"prompt": "a"}]}, "exactly one of response"),
    "empty response": ({"items": [ITEM, {"prompt": "a", "response": ""}]}, "items[1]: the response is empty"),
    "empty response ids": ({"items": [{"prompt": "a", "response_ids": []}]}, "no tokens"),
    "empty prompt": ({"items": [{"prompt": "", "response": "a"}]}, "items[0]: the prompt has no tokens"),
    "empty messages": ({"items": [{"messages": [], "response": "a"}]}, "messages is empty"),
    "answered already": (
        {"items": [{"messages": [{"role": "assistant", "content": "a"}], "response": "a"}]},
        "ends with one of the assistant",
    ),
    "unknown role": ({"items": [{"messages": [{"role": "tool", "content": "a"}], "response": "a"}]}, "role: should be"),
    "text for an id": ({"items": [{"prompt_ids": [1, "2"], "response": "a"}]}, "prompt_ids[1]: should be"),
    "truth for an id": ({"items": [{"prompt_ids": [1, True], "response": "a"}]}, "prompt_ids[1]: should be"),
    "fraction for an id": ({"items": [{"prompt_ids": [1.0], "response": "a"}]}, "prompt_ids[0]: should be"),
    "negative id": ({"items": [{"prompt_ids": [-1], "response": "a"}]}, "greater than or equal to 0"),
    "unknown id": ({"items": [{"prompt_ids": [10**6], "response": "a"}]}, "1000000 is not a token id"),
    "huge id": ({"items": [{"prompt_ids": [10**30], "response": "a"}]}, "is not a token id"),
    "number for text": ({"items": [{"prompt": 1, "response": "a"}]}, "items[0].prompt: should be"),
    "too long": (
        {"items": [{"prompt_ids": [5] * 200, "response_ids": [5] * 57}]},
        "the text has 257 tokens, but the model reads at most 256",
    ),
    "unknown aggregate": ({"items": [ITEM], "aggregate": ["median"]}, "aggregate[0]: should be"),
    "aggregate no list": ({"items": [ITEM], "aggregate": "mean"}, "aggregate: should be"),
    "unknown return": ({"items": [ITEM], "return": "a"}, "return: should be"),
    "unknown encoding": ({"items": [ITEM], "encoding": "hex"}, "encoding: should be"),
    "trajectory of text": ({"items": [{**ITEM, "trajectory": [{"prompt": "a", "response": "b"}]}]}, "needs messages"),
    "offsets for nothing": ({"items": [{**ITEM, "response_offsets": [[0, 1]]}]}, "project: true"),
    "project without tokens": ({"items": [ITEM], "project": True}, "project needs text"),
    "project of ids": (
        {"items": [{"prompt": "a", "response_ids": [5], "response_offsets": [[0, 1]]}], "project": True},
        "project needs text",
    ),
    "offsets outside": ({"items": [{**ITEM, "response_offsets": [[0, 999]]}], "project": True}, "characters"),
    "half a span": ({"items": [{**ITEM, "response_offsets": [[0]]}], "project": True}, "at least 2 items"),
    "tokens of another text": ({"items": [{**ITEM, "response_tokens": ["x"]}], "project": True}, "joined"),
    "too many": ({"items": [ITEM] * 9}, "items has 9 items, but at most 8"),
}


@pytest.fixture
def strict(build: Any) -> Any:
    with TestClient(build(max_items=8, max_body_bytes=20_000).app) as client:
        yield client


def refused(reply: Any, status: int, *words: str) -> None:
    """One clear sentence in the one form."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param"}
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(("body", "words"), BAD.values(), ids=BAD)
def test_bad_requests(strict: Any, body: Any, words: str) -> None:
    refused(strict.post("/score_tokens", json=body), 400, words)
    post(strict, ITEM)


RAW = {
    "nothing": (b"", "empty"),
    "cut off": (b'{"items": [', "not valid JSON"),
    "NaN": (b'{"items": [{"prompt": "a", "response": NaN}]}', "not valid JSON"),
    "infinity": (b'{"items": [], "model": -Infinity}', "not valid JSON"),
    "half a surrogate pair": (b'{"items": [{"prompt": "a", "response": "\\ud83d"}]}', "not valid JSON"),
    "not UTF-8": (b'{"items": [{"prompt": "\xff", "response": "a"}]}', "not valid JSON"),
    "deep nesting": (b"[" * 9_000 + b"]" * 9_000, "recursion limit"),
    "number without end": (b'{"items": ' + b"9" * 9_000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize(("body", "words"), RAW.values(), ids=RAW)
@pytest.mark.parametrize("route", ["/score_tokens", "/pooling", "/classify", "/get_reward", "/reward"])
def test_bodies_that_are_no_json(strict: Any, route: str, body: bytes, words: str) -> None:
    refused(strict.post(route, content=body, headers={"content-type": "application/json"}), 400, words)


def test_other_content_types_are_refused(strict: Any) -> None:
    body = json.dumps({"items": [ITEM]})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        refused(strict.post("/score_tokens", content=body, headers={"content-type": kind}), 415, "application/json")
    good = {"content-type": "application/json; charset=utf-8"}
    assert strict.post("/score_tokens", content=body, headers=good).status_code == 200


def test_large_bodies_are_refused_before_they_are_read(build: Any, live: Any) -> None:
    url = live(build(max_body_bytes=20_000).app)
    read = 0

    def endless() -> Any:
        nonlocal read
        for _ in range(1_000_000):
            read += 8192
            yield b" " * 8192

    with httpx.Client(base_url=url) as client:
        big = client.post("/score_tokens", content=b" " * 20_001, headers={"content-type": "application/json"})
        refused(big, 413, "larger than 20000 bytes")
        try:
            reply = client.post("/score_tokens", content=endless(), headers={"content-type": "application/json"})
            refused(reply, 413, "larger than 20000 bytes")
        except httpx.WriteError:
            pass  # the server closed the connection while we were still sending
        assert read < 50_000_000
        assert client.get("/health").status_code == 200


def test_unknown_paths_and_methods(client: TestClient) -> None:
    refused(client.get("/nothing"), 404, "/docs")
    reply = client.get("/score_tokens")
    refused(reply, 405, "/docs")
    assert "POST" in reply.headers["allow"]


def test_replies_name_their_request_and_its_time(client: TestClient) -> None:
    reply = client.post("/score_tokens", json={"items": [ITEM]}, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    assert float(reply.headers["x-inference-seconds"]) > 0
    assert float(reply.headers["x-queue-seconds"]) >= 0
    first, second = (client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] for _ in range(2))
    assert first != second
    assert client.post("/score_tokens", json={}).headers["x-request-id"]


def test_provenance(client: TestClient, served: Any) -> None:
    import dvpo
    from dvpo.files import sha256_file

    provenance = post(client, ITEM)["provenance"]
    assert provenance["weights_sha256"] == sha256_file(served.folder / "model.safetensors")
    assert provenance["version"] == dvpo.__version__
    assert (provenance["dtype"], provenance["backend"]) == ("float32", "transformers")


def test_a_prompt_that_comes_again_is_counted_as_cached(client: TestClient) -> None:
    first, second = (post(client, {"prompt": QUESTION, "response": ANSWER})["items"][0] for _ in range(2))
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, first["prompt_tokens"])
    near(second["q"], first["q"])
    text = client.get("/metrics").text
    assert 'dvpo_prompt_cache_total{outcome="hit"} 1.0' in text
    assert f'dvpo_tokens_total{{kind="cached"}} {first["prompt_tokens"]}.0' in text


def test_numbers_for_prometheus(client: TestClient) -> None:
    post(client, ITEM)
    client.post("/score_tokens", json={})
    text = client.get("/metrics").text
    for line in (
        'dvpo_requests_total{code="200",route="/score_tokens"} 1.0',
        'dvpo_requests_total{code="400",route="/score_tokens"} 1.0',
        'dvpo_rejected_total{reason="invalid_request"} 1.0',
        "dvpo_queue_seconds_count 1.0",
        "dvpo_inference_seconds_count 1.0",
        "dvpo_batch_fill_count 1.0",
        'dvpo_waiting{what="tokens"} 0.0',
    ):
        assert line in text, line


@pytest.fixture
def restored_logs() -> Any:
    import logging

    import structlog

    before = logging.getLogger("uvicorn").handlers
    yield
    structlog.reset_defaults()
    logging.getLogger("uvicorn").handlers = before


@pytest.mark.usefixtures("restored_logs")
def test_logs_say_what_happened_and_no_texts(client: TestClient, capsys: Any) -> None:
    from server import logs

    logs.configure()
    client.post("/score_tokens", json={"items": [ITEM]}, headers={"x-request-id": "mine-2"})
    client.post("/score_tokens", json={"items": [{"prompt": "secretive", "response": ["mild"]}]})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    good, bad = lines
    assert (good["request_id"], good["route"], good["status"], good["items"]) == ("mine-2", "/score_tokens", 200, 1)
    assert (bad["status"], bad["reason"]) == (400, "invalid_request")
    assert not [word for word in (*QUESTION.split(), "mild", "secretive") if f" {word}" in json.dumps([good, bad])]


def test_a_text_far_too_long_is_refused_at_once(build: Any, byte_folder: Any) -> None:
    """To tokenise megabytes takes many seconds, in which nobody else's text would be."""
    long = "a b" * 1_000_000
    with TestClient(build(byte_folder).app) as client:
        post(client, {"prompt": "a", "response": "b"})
        began = time.monotonic()
        for route, body in (
            ("/score_tokens", {"items": [{"prompt": "a", "response": long}]}),
            ("/score_tokens", {"items": [{"messages": [{"role": "user", "content": long}], "response": "a"}]}),
            ("/pooling", {"input": [long]}),
            ("/get_reward", {"query": [long]}),
            ("/reward", {"prompt": long, "response": "a"}),
        ):
            refused(client.post(route, json=body), 400, "at least", "at most 256")
        assert time.monotonic() - began < 2


def test_a_request_of_many_long_texts_is_whole(build: Any, byte_folder: Any) -> None:
    """It is prepared in slices."""
    items = [{"prompt": f"{i}", "response": "hello world " * (1 + i % 8)} for i in range(600)]
    with TestClient(build(byte_folder).app) as client:
        found = post(client, *items)["items"]
    assert [item["text"] for item in found] == [item["response"] for item in items]


def eventually(condition: Any, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def in_thread(call: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


BODIES = {
    "/score_tokens": {"items": [{"prompt_ids": [5] * 20, "response_ids": [6] * 20}]},
    "/pooling": {"input": [5] * 40},
    "/classify": {"input": [5] * 40},
    "/get_reward": {"query": ["river " * 40]},
    "/reward": {"prompt": "river " * 20, "response": "velor " * 20},
}


def test_a_full_queue_is_503_on_every_protocol(build: Any) -> None:
    served = build(queue_tokens=60)
    with TestClient(served.app) as client:
        served.backend.open.clear()
        threads = [in_thread(lambda: client.post("/pooling", json=BODIES["/pooling"]))]
        eventually(lambda: served.backend.seen)
        threads.append(in_thread(lambda: client.post("/pooling", json=BODIES["/pooling"])))
        eventually(lambda: served.engine.stats().waiting_items)
        for route, body in BODIES.items():
            reply = client.post(route, json=body)
            refused(reply, 503, "busy")
            assert int(reply.headers["retry-after"]) >= 1
        too_much = {"items": [{"prompt_ids": [5] * 20, "response_ids": [6] * 20}] * 2}
        refused(client.post("/score_tokens", json=too_much), 400, "at most 60 are taken at once")
        served.backend.open.set()
        for thread, found in threads:
            thread.join()
            assert found[0].status_code == 200
        assert 'dvpo_rejected_total{reason="overloaded"} 5.0' in client.get("/metrics").text


def test_what_a_client_left_behind_is_not_scored(build: Any, live: Any) -> None:
    served = build()
    url = live(served.app)
    served.backend.open.clear()
    with httpx.Client(base_url=url, timeout=30) as first:
        thread, found = in_thread(lambda: first.post("/pooling", json={"input": [5, 5, 5]}))
        eventually(lambda: served.backend.seen)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/score_tokens", json={"items": [ITEM]}, timeout=0.3)
        eventually(lambda: served.engine.stats().waiting_items == 0)
        served.backend.open.set()
        thread.join()
        assert found[0].status_code == 200
        assert len(served.backend.seen) == 1, "only the text of the client that stayed"
        eventually(lambda: 'code="499",route="/score_tokens"} 1.0' in httpx.get(f"{url}/metrics").text)
        eventually(lambda: served.app.state.gate.working == 0)


def test_a_client_that_leaves_in_the_middle_of_its_request_sent_no_bad_one(build: Any, live: Any) -> None:
    served = build()
    url = live(served.app)
    head = b"POST /score_tokens HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as connection:
        connection.sendall(head + b'{"items":')
    eventually(lambda: 'code="499",route="/score_tokens"} 1.0' in httpx.get(f"{url}/metrics").text)
    assert "invalid_request" not in httpx.get(f"{url}/metrics").text


def test_stopping_finishes_what_was_taken_and_refuses_the_rest(build: Any) -> None:
    served = build()
    with TestClient(served.app) as client:
        served.backend.open.clear()
        thread, found = in_thread(lambda: client.post("/score_tokens", json={"items": [ITEM]}))
        eventually(lambda: served.backend.seen)
        served.app.state.gate.draining = True
        reply = client.post("/score_tokens", json={"items": [ITEM]})
        refused(reply, 503, "stopping")
        assert reply.headers["retry-after"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        served.backend.open.set()
        thread.join()
        assert found[0].status_code == 200


def test_a_text_that_cannot_be_scored_is_422(client: TestClient, served: Any) -> None:
    served.backend.error = StageError("text 0 has a value that is not finite")
    refused(client.post("/score_tokens", json={"items": [ITEM]}), 422, "not finite")
    served.backend.error = None
    post(client, ITEM)


def test_a_dead_worker_is_said_and_hangs_nobody(client: TestClient, served: Any) -> None:
    served.backend.error = KeyboardInterrupt("killed")
    refused(client.post("/score_tokens", json={"items": [ITEM]}), 503, "worker died")
    refused(client.post("/score_tokens", json={"items": [ITEM]}), 503, "worker died")
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_ready_and_models(client: TestClient, served: Any) -> None:
    info: ModelInfo = served.backend.info
    assert client.get("/ready").json() == {"status": "ready"}
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["form"], model["max_model_len"]) == ("gvm", info.form, 256)


def test_the_page_is_mounted(client: TestClient) -> None:
    from server.app import WEB

    assert client.get("/").status_code == (200 if (WEB / "index.html").is_file() else 404)
    assert client.get("/web/../app.py").status_code == 404
    assert client.get("/web/%2e%2e/app.py").status_code == 404


def test_requests_in_parallel_are_answered_with_their_own_values(build: Any, live: Any) -> None:
    served = build()
    url = live(served.app)
    texts = [Encoded([5 + i % 7, 6], [7 + j % 9 for j in range(1 + i % 11)]) for i in range(40)]
    wanted = served.direct(*texts)
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        item = {"prompt_ids": texts[i].prompt_ids, "response_ids": texts[i].response_ids}
        found[i] = httpx.post(f"{url}/score_tokens", json={"items": [item]}, timeout=60).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, values in enumerate(wanted):
        near(found[i]["items"][0]["q"], values[1:])
