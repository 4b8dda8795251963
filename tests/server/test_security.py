"""Who may ask."""

import base64
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from dvpo.errors import InputError
from server.security import allows, is_local, load_keys

KEYS = ("first-key", "second-key")
ROUTES = [
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("POST", "/score_tokens"),
    ("POST", "/pooling"),
    ("POST", "/classify"),
    ("POST", "/get_reward"),
    ("POST", "/reward"),
]


@pytest.fixture
def locked(build: Any) -> Any:
    with TestClient(build(api_keys=KEYS).app) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_asks_for_a_key(locked: TestClient, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer first-ke"}):
        reply = locked.request(method, path, headers=headers, content=b"{")
        assert reply.status_code == 401
        assert reply.headers.get_list("www-authenticate") == ["Bearer"]
        assert reply.json()["error"]["type"] == "unauthorized"
    for key in KEYS:
        assert locked.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code != 401
    assert locked.get("/health").status_code == 200


def test_a_browser_that_opens_a_page_is_asked_to_log_in(locked: TestClient) -> None:
    schemes = locked.get("/", headers={"accept": "text/html,*/*"}).headers.get_list("www-authenticate")
    assert schemes == ["Bearer", 'Basic realm="dvpo", charset="UTF-8"']


def test_every_route_is_tried_above(locked: TestClient) -> None:
    paths = locked.get("/openapi.json", headers={"authorization": "Bearer first-key"}).json()["paths"]
    assert set(paths) - {path for _, path in ROUTES} == {"/health"}


def test_without_keys_nobody_is_asked(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 200
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_a_browser_may_send_the_key_as_a_password(locked: TestClient) -> None:
    assert locked.get("/v1/models", auth=("anybody", "second-key")).status_code == 200
    assert locked.get("/v1/models", auth=("second-key", "wrong")).status_code == 401


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "first-key",
        "Basic",
        "Basic !!!",
        "Digest first-key",
        "Bearer first-key extra",
        "Basic " + base64.b64encode(b"no-colon").decode(),
        "Bearer first-keyé",
        "Bearer " + "x" * 10000,
    ],
)
def test_malformed_headers_open_nothing(header: str | None) -> None:
    assert not allows(KEYS, header)


def test_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    assert allows(KEYS, "Bearer first-key")
    assert compared == [b"first-key", b"second-key"]


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key \n  second-key\n")
    assert load_keys(file, {"DVPO_API_KEYS": "other"}) == KEYS
    assert load_keys(None, {"DVPO_API_KEYS": "first-key, second-key,"}) == KEYS
    assert load_keys(None, {}) == ()


@pytest.mark.parametrize("text", ["", "# nothing\n", "a key with spaces\n", "ключ\n"])
def test_unusable_keys_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match="keys"):
        load_keys(file, {})
    with pytest.raises(InputError, match="cannot be read"):
        load_keys(tmp_path / "absent", {})
    with pytest.raises(InputError, match="no API key"):
        load_keys(None, {"DVPO_API_KEYS": ""})


def test_local_addresses() -> None:
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "127.8.0.1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.0.4", "example.org")))
