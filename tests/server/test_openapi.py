"""Schemathesis over the whole OpenAPI: what it makes up must never bring a 5xx, and every reply is a declared one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
CHECKS += "response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth"
POSTS = {"/score_tokens", "/pooling", "/classify", "/get_reward", "/reward"}


def hammer(url: str, examples: int, *options: str) -> None:
    """Runs the command that anybody would run against the server."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--max-examples", str(examples), "--checks", CHECKS, "--continue-on-failure", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "9 selected / 9 total" in done.stdout


def keys(options: tuple[str, ...]) -> dict[str, Any]:
    return {"api_keys": ("a-key",)} if options else {}


@pytest.mark.parametrize("options", [(), ("-H", "Authorization: Bearer a-key")], ids=["no keys", "keys"])
def test_made_up_requests(build: Any, live: Any, options: tuple[str, ...], tmp_path: Path) -> None:
    hammer(live(build(**keys(options)).app), 5, "--generation-database", str(tmp_path), *options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-H", "Authorization: Bearer a-key")], ids=["no keys", "keys"])
def test_many_made_up_requests(build: Any, live: Any, options: tuple[str, ...], tmp_path: Path) -> None:
    hammer(live(build(**keys(options)).app), 300, "--generation-database", str(tmp_path), *options)


def test_without_a_key_the_whole_api_is_shut(build: Any, live: Any, tmp_path: Path) -> None:
    with TestClient(build(api_keys=("a-key",)).app) as client:
        schema = client.get("/openapi.json", headers={"authorization": "Bearer a-key"}).json()
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(schema))
    url = live(build(api_keys=("a-key",)).app)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file), "--url", url, "--no-color"]
    command += ["--max-examples", "5", "--checks", "not_a_server_error,status_code_conformance"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_document_says_what_happens(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path in POSTS:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "413", "415", "422", "503"} <= set(operation["responses"])
        for code, response in operation["responses"].items():
            schema = response["content"]["application/json"]["schema"]
            assert code == "200" or schema == {"$ref": "#/components/schemas/ErrorReply"}
        assert "Retry-After" in operation["responses"]["503"]["headers"]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        (example,) = document["components"]["schemas"][name]["examples"]
        assert client.post(path, json=example).status_code == 200, "the example works"
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_page_for_readers_needs_no_network_and_its_examples_work(client: TestClient) -> None:
    import html
    import re
    import shlex

    page = client.get("/docs").text
    assert "<script" not in page
    assert not re.search(r"(src|href)=.(https?:)?//", page)
    lines = [html.unescape(line) for line in re.findall(r"<pre>(curl .*?)</pre>", page, re.DOTALL)]
    posts = 0
    for line in lines:
        words = shlex.split(line)
        path = words[1].removeprefix("localhost:8000")
        if "-d" in words:
            posts += 1
            body = words[words.index("-d") + 1]
            reply = client.post(path, content=body, headers={"content-type": "application/json"})
        else:
            reply = client.get(path)
        assert reply.status_code == 200, line
    assert posts == len(POSTS)
    assert "no second one is added" in page.lower()


def test_the_key_is_declared(build: Any) -> None:
    with TestClient(build(api_keys=("a-key",)).app) as client:
        document = client.get("/openapi.json", headers={"authorization": "Bearer a-key"}).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path != "/health")
            assert ("401" in operation["responses"]) == (path != "/health")
