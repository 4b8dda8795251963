"""The judge's client against a real socket: what it sends, archives, repeats, bounds, and how it fails."""

import dataclasses
import json
import math
import socket
from pathlib import Path

import pytest

from dvpo.errors import InputError, StageError
from dvpo.evaluation.alpaca_eval import first_preferred
from dvpo.evaluation.archive import Archive
from dvpo.evaluation.judge import MISSING, Judge, Reply, Request, count_failures, judge_identity, why_no_verdict
from dvpo.evaluation.judge_prompt import JudgePrompt, chat

pytest.importorskip("openai", reason="a judge needs dvpo[judge]")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("DVPO_JUDGE_API_KEY", "sk-secret")


def request(text: str = "Who won?", **changes) -> Request:
    return Request(({"role": "user", "content": text},), **{"prompt_sha256": "p" * 64, "max_tokens": 8, **changes})


def judge_at(url: str | None, folder: Path, **changes) -> Judge:
    return Judge("gpt-x", Archive(folder), url=url, **{"retries": 0, "timeout": 5, **changes})


def test_what_is_sent_and_what_comes_back(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: f"about {body['messages'][-1]['content']}")
    replies = judge_at(server.url, tmp_path).ask([request("one"), request("two", temperature=0.5)])
    assert [r.text for r in replies] == ["about one", "about two"]
    assert {(r.failure, r.finish, r.model) for r in replies} == {(None, "stop", "fake-0613")}
    sent = sorted(server.bodies, key=lambda b: b["temperature"])
    assert sent[1] == {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "two"}],
        "temperature": 0.5,
        "max_tokens": 8,
    }
    assert set(server.keys) == {"Bearer sk-secret"}
    assert not any("sk-secret" in p.read_text() for p in tmp_path.rglob("*.json"))


def test_equal_requests_are_asked_once_and_archived_ones_never_again(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: f"reply {attempt}")
    judge = judge_at(server.url, tmp_path)
    assert [r.text for r in judge.ask([request(), request()])] == ["reply 1", "reply 1"]
    assert judge.ask([request()])[0].text == "reply 1"
    assert len(server.bodies) == 1


def test_a_reply_does_not_depend_on_the_endpoint(fake_judge, tmp_path) -> None:
    first = fake_judge(lambda body, attempt: "kept")
    judge_at(first.url, tmp_path).ask([request()])
    other = fake_judge(lambda body, attempt: "other")
    assert judge_at(other.url, tmp_path).ask([request()])[0].text == "kept"
    assert other.bodies == []


def test_the_key_of_a_reply() -> None:
    same = Archive.key(request().asked("m"))
    assert same == Archive.key(request().asked("m"))
    others = [
        request("Who lost?").asked("m"),
        request().asked("n"),
        request(prompt_sha256="q" * 64).asked("m"),
        request(max_tokens=9).asked("m"),
        request(temperature=0.1).asked("m"),
        request(top_logprobs=5).asked("m"),
    ]
    assert len({same, *map(Archive.key, others)}) == 7


def test_a_server_that_stumbles_is_asked_again(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"status": 500} if attempt < 3 else "at last")
    assert judge_at(server.url, tmp_path, retries=2).ask([request()])[0].text == "at last"
    assert len(server.bodies) == 3
    assert server.times[2] - server.times[1] > server.times[1] - server.times[0] > 0.2


def test_retry_after_is_obeyed(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"status": 429, "retry_after": 2} if attempt == 1 else "at last")
    assert judge_at(server.url, tmp_path, retries=1).ask([request()])[0].text == "at last"
    assert server.times[1] - server.times[0] >= 1.9


BAD = {
    "HTTP 500": {"status": 500},
    "HTTP 429": {"status": 429},
    "HTTP 400": {"status": 400},
    "timed out": {"silence": 3},
    "connection lost": {"close": True},
    "refused": {"message": {"content": None, "refusal": "I will not judge this."}},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_failure_is_a_reply_that_is_asked_for_again(reason, fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: BAD[reason] if attempt == 1 else "at last")
    judge = judge_at(server.url, tmp_path, timeout=0.3)
    reply = judge.ask([request()])[0]
    assert (reply.text, reply.failure) == (None, reason)
    assert ("no" in (reply.detail or "")) == (reason == "HTTP 400")
    offline = judge_at(None, tmp_path, offline=True)
    assert offline.ask([request()])[0].failure == reason
    again = judge.ask([request()])[0]
    # A refusal is the judge's own answer: it stays.
    assert (again.failure or again.text) == ("refused" if reason == "refused" else "at last")


@pytest.mark.parametrize(
    "order",
    [
        {"raw": b"<html>busy</html>", "type": "text/html"},
        {"raw": b'{"choices": [', "type": "application/json"},
        {"raw": b'{"choices": []}', "type": "application/json"},
        {"raw": b"[1]", "type": "application/json"},
        {"raw": b"\xff\xfe\x00", "type": "application/json"},
        {"raw": b'{"choices": [{"message": {"content": 7}}]}', "type": "application/json"},
        {"raw": b'{"choices": {}}', "type": "application/json"},
        {"raw": b"[" * 100_000, "type": "application/json"},
        {"message": {"content": None}},
    ],
)
def test_garbage_is_a_malformed_response(order, fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: order)
    assert judge_at(server.url, tmp_path).ask([request()])[0].failure == "malformed response"


def test_broken_unicode_can_be_archived(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: "good \ud83d [[7]]")
    assert judge_at(server.url, tmp_path).ask([request()])[0].text == "good ? [[7]]"
    assert judge_at(None, tmp_path, offline=True).ask([request()])[0].text == "good ? [[7]]"


def test_broken_unicode_in_a_refused_request_can_be_archived(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"status": 400, "raw": b'"\\ud83d"'})
    asked, offline = judge_at(server.url, tmp_path), judge_at(None, tmp_path, offline=True)
    for judge in (asked, offline):
        assert judge.ask([request()])[0].detail == "Error code: 400 - ?"


def with_tops(*tops: tuple[object, object], **changes: object) -> dict:
    """A reply "m" whose only token has these likeliest (token, log-probability)."""
    likeliest = [{"token": t, "bytes": None, "logprob": x} for t, x in tops]
    content = [{"token": "m", "bytes": None, "logprob": -0.25, "top_logprobs": likeliest}]
    return {"message": {"content": "m"}, "logprobs": {"content": content}, **changes}


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        *((with_tops(("m", x), ("M", -1.5)), {"logprobs": [{"M": -1.5}]}) for x in (None, 1e4, 0.01, "x", [], {})),
        *((with_tops(("m", x), ("M", -1.5)), {"logprobs": [{"M": -1.5}]}) for x in (-math.inf, math.inf, math.nan)),
        *((with_tops((t, -0.25), ("M", -1.5)), {"logprobs": [{"M": -1.5}]}) for t in (5, None, True, ["m"], {})),
        (with_tops(("m", 1e-6), ("M", -9999)), {"logprobs": [{"m": 0.0, "M": -9999.0}]}),
        (with_tops(("m", 0), ("M", -1)), {"logprobs": [{"m": 0.0, "M": -1.0}]}),
        (with_tops((HALF, -0.25), ("M", -1.5)), {"logprobs": [{"?": -0.25, "M": -1.5}]}),
        *((with_tops(finish=x), {"finish": None}) for x in (5, True, {}, {"a": 1}, [1])),
        *((with_tops(model=x), {"model": None}) for x in (5, True, {}, {"a": 1}, [1])),
        (with_tops(finish=f"stop{HALF}", model=f"fake{HALF}"), {"finish": "stop?", "model": "fake?"}),
    ],
)
def test_what_is_of_no_use_in_a_reply_is_left_out(order, expected, fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: order)
    asked, offline = judge_at(server.url, tmp_path), judge_at(None, tmp_path, offline=True)
    for judge in (asked, offline):
        reply = judge.ask([request(top_logprobs=5)])[0]
        assert (reply.text, reply.failure) == ("m", None)
        assert {name: getattr(reply, name) for name in expected} == expected
        assert set(judge_identity("m", "p", [reply])["reported_models"]) <= {"fake-0613", "fake?"}
        assert first_preferred(reply) > 0.7  # it wrote m, whatever is left of its probabilities


def test_a_filtered_reply_is_a_refusal_and_a_short_one_says_so(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"message": {"content": "I"}, "finish": body["messages"][0]["content"]})
    filtered, cut = judge_at(server.url, tmp_path).ask([request("content_filter"), request("length")])
    assert filtered.failure == "refused"
    assert (cut.text, cut.finish) == ("I", "length")


def test_log_probabilities_come_back_and_are_archived(fake_judge, tmp_path) -> None:
    token = {
        "token": "m",
        "bytes": None,
        "logprob": -0.25,
        "top_logprobs": [{"token": t, "bytes": None, "logprob": x} for t, x in (("m", -0.25), ("M", -1.5))],
    }
    server = fake_judge(lambda body, attempt: {"message": {"content": "m"}, "logprobs": {"content": [token]}})
    asked = request(top_logprobs=5)
    assert judge_at(server.url, tmp_path).ask([asked])[0].logprobs == [{"m": -0.25, "M": -1.5}]
    assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 5)
    assert judge_at(None, tmp_path, offline=True).ask([asked])[0].logprobs == [{"m": -0.25, "M": -1.5}]


def test_no_more_at_a_time_than_allowed(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"silence": 0.1})
    judge_at(server.url, tmp_path, concurrency=3).ask([request(str(i)) for i in range(9)])
    assert server.most_busy == 3


def test_the_rate_limit_holds_for_repeated_attempts_too(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"status": 429, "retry_after": 0.01} if attempt == 1 else "ok")
    judge = judge_at(server.url, tmp_path, concurrency=4, rpm=600, retries=1)
    assert {r.text for r in judge.ask([request(str(i)) for i in range(5)])} == {"ok"}
    assert len(server.times) == 10
    assert server.times[-1] - server.times[0] >= 0.9 - 0.05


def test_nobody_there_stops_the_work_and_keeps_what_was_done(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: "kept")
    judge_at(server.url, tmp_path).ask([request("one")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(StageError, match="nobody answers"):
        judge_at(nowhere, tmp_path).ask([request("one"), request("two")])
    one, two = judge_at(None, tmp_path, offline=True).ask([request("one"), request("two")])
    assert (one.text, two.failure) == ("kept", MISSING)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_is_the_users_to_mend(status, fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: {"status": status})
    with pytest.raises(InputError, match=f"HTTP {status} to model gpt-x") as error:
        judge_at(server.url, tmp_path).ask([request(str(i)) for i in range(3)])
    assert "sk-secret" not in str(error.value)


def test_without_a_key_only_a_named_endpoint_is_asked(fake_judge, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("DVPO_JUDGE_API_KEY")
    with pytest.raises(InputError, match="DVPO_JUDGE_API_KEY or OPENAI_API_KEY"):
        judge_at(None, tmp_path).ask([request()])
    server = fake_judge(lambda body, attempt: "free")
    assert judge_at(server.url, tmp_path).ask([request()])[0].text == "free"


def test_the_estimate_counts_what_is_left(fake_judge, tmp_path) -> None:
    server = fake_judge(lambda body, attempt: "ok")
    judge = judge_at(server.url, tmp_path)
    judge.ask([request("done")])
    found = judge.estimate([request("done"), request("x" * 10), request("y" * 30, max_tokens=100), request("x" * 10)])
    assert dataclasses.astuple(found) == (3, 1, 10, 108)
    assert found.cost(price_in=2, price_out=10) == pytest.approx((10 * 2 + 108 * 10) / 1e6)


def test_a_damaged_or_misplaced_record_is_named(tmp_path) -> None:
    archive = Archive(tmp_path)
    key = archive.put({"q": 1}, {"reply": 2})
    assert archive.get(key) == {"asked": {"q": 1}, "reply": 2}
    archive.path(key).write_text(json.dumps({"asked": {"q": 2}, "reply": 3}))
    with pytest.raises(StageError, match="not of what its name says"):
        archive.get(key)
    archive.path(key).write_text('{"asked"')
    with pytest.raises(StageError, match="cannot be read"):
        archive.get(key)


def test_why_there_is_no_verdict() -> None:
    replies = [
        Reply(None, "timed out"),
        Reply("I'm sorry, but I cannot rate this.", finish="stop"),
        Reply("As an AI language model, ...", finish="stop"),
        Reply("I can’t help with that", finish="length"),
        Reply("The answer is good", finish="length"),
        Reply("The assistant says sorry", finish="stop"),
        Reply("", finish="stop"),
    ]
    reasons = ["timed out", "refused", "refused", "refused", "cut off", "unparsable", "unparsable"]
    assert [why_no_verdict(r) for r in replies] == reasons
    assert count_failures([*reasons, None]) == {"refused": 3, "unparsable": 2, "timed out": 1, "cut off": 1}


PROMPT = JudgePrompt({"turn": chat("Be fair.", "{question} / {answer} / {other}")}, {"turn": ("question", "answer")})


def test_fields_are_filled_once_and_braces_in_texts_stay() -> None:
    system, user = PROMPT.messages("turn", question="a {answer}?", answer="{question} \\1 {0}")
    assert system == {"role": "system", "content": "Be fair."}
    assert user["content"] == "a {answer}? / {question} \\1 {0} / {other}"


def test_another_prompt_comes_from_a_file(tmp_path) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text('turn:\n- {role: user, content: "{answer} to {question}"}\n')
    other = PROMPT.read(path)
    assert other.messages("turn", question="q", answer="a") == ({"role": "user", "content": "a to q"},)
    assert other.sha256 != PROMPT.sha256
    path.write_text(path.read_text() + "\n# a comment\n")
    assert PROMPT.read(path).sha256 == other.sha256


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("turns: []", "exactly the parts turn"),
        ("just text", "exactly the parts turn"),
        ("turn: text", "a list of messages"),
        ("turn: [{role: judge, content: x}]", "a list of messages"),
        ('turn: [{role: user, content: "{question} only"}]', "lacks the field {answer}"),
        ("turn: [", "no judge's prompt could be read"),
    ],
)
def test_a_malformed_prompt_is_refused(text, says, tmp_path) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"prompt\.yaml") as error:
        PROMPT.read(path)
    assert says in str(error.value)
