"""`dvpo serve` as people run it: the command, its refusals, its start, its end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dvpo import models
from dvpo.config import LoraSettings
from dvpo.data.templates import encode
from dvpo.values import score_all, unwrapped
from reproduce import cli
from reproduce.commands import serve as command

ITEM = {"prompt": "what is the river of velor ?", "response": "the river of velor is mild ."}


@dataclass
class Running:
    """A server process, its address and what it has logged so far."""

    process: "subprocess.Popen[str]"
    url: str
    lines: list[dict[str, Any]]

    def end(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(30)


@pytest.fixture
def serve(checkpoints: Any) -> Iterator[Callable[..., Running]]:
    """Starts `dvpo serve` on a free port and waits until it serves."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environment: str) -> Running:
        arguments = [sys.executable, "-m", "reproduce.cli", "serve", "--port", "0", *options]
        if "--gvm" not in options:
            arguments += ["--gvm", str(checkpoints["llama", "value"])]
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=settings)
        started.append(process)
        assert process.stderr
        lines = [json.loads(process.stderr.readline())]

        def read() -> None:
            assert process.stderr
            for line in process.stderr:
                lines.append(json.loads(line) if line.startswith("{") else {"event": line})

        threading.Thread(target=read, daemon=True).start()
        return Running(process, lines[0]["url"], lines)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_it_says_what_it_found_serves_and_stops(serve: Any) -> None:
    running = serve()
    first = running.lines[0]
    assert first["event"] == "serving"
    assert first["form"] == "token classifier LlamaForTokenClassification"
    assert first["max_tokens"] == 256
    reply = httpx.post(f"{running.url}/score_tokens", json={"items": [ITEM]}, timeout=30)
    assert reply.status_code == 200
    assert running.end() == 0
    assert [line["event"] for line in running.lines[-2:]] == ["stopping", "stopped"]
    (asked,) = (line for line in running.lines if line["event"] == "request")
    assert asked["request_id"] == reply.headers["x-request-id"]
    assert not [line for line in running.lines if "river" in json.dumps(line)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


@pytest.mark.slow
def test_a_reward_model_is_said_to_be_one(serve: Any, checkpoints: Any) -> None:
    running = serve("--gvm", str(checkpoints["gpt2", "reward"]))
    assert "sequence classifier GPT2ForSequenceClassification" in running.lines[0]["form"]
    assert running.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_an_adapter_is_served_on_a_folder_of_its_base(serve: Any, checkpoints: Any, tmp_path: Path) -> None:
    base = checkpoints["llama", "policy"]
    model = models.load(base, "value", lora=LoraSettings(r=2, alpha=4), fresh_head=True)
    torch.nn.init.normal_(models.head(unwrapped(model)).modules_to_save["default"].weight)
    adapter = tmp_path / "adapter"
    models.save(model, models.load_tokenizer(base), adapter)
    expected = models.load(adapter, "value")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/base"}))
    running = serve("--gvm", str(adapter), "--base", str(base))
    messages = [{"role": "user", "content": ITEM["prompt"]}]
    body = {"items": [{"messages": messages, "response": ITEM["response"]}]}
    reply = httpx.post(f"{running.url}/score_tokens", json=body, timeout=30).json()
    text = encode(models.load_tokenizer(base), messages, ITEM["response"])
    [(_, values)] = score_all(expected, [text], 0)
    assert reply["items"][0]["q"] == pytest.approx(values[1:].tolist(), abs=1e-5)
    assert running.end() == 0


def test_a_base_is_for_adapters(refused: Any, checkpoints: Any, tmp_path: Path) -> None:
    refused("--base", str(tmp_path), words="not an adapter")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("--gvm", str(tmp_path), "--base", str(tmp_path / "nowhere"), words="no such folder")


def test_keys_guard_a_server_that_others_reach(serve: Any) -> None:
    running = serve("--host", "0.0.0.0", DVPO_API_KEYS="one-key,two-key")
    assert running.lines[0]["api_key_needed"]
    url = running.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer two-key"}).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200
    running.end()
    assert "two-key" not in json.dumps(running.lines)


def test_a_stopping_server_finishes_what_it_took_and_refuses_more(serve: Any) -> None:
    running = serve("--max-batch-tokens", "64", "--exact")
    busy = {"items": [{"prompt_ids": [5] * 100, "response_ids": [6] * 150}] * 200}
    found: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: found.append(httpx.post(f"{running.url}/score_tokens", json=busy, timeout=120))
    )
    thread.start()
    until = time.monotonic() + 20
    while 'what="items"} 0.0' in httpx.get(f"{running.url}/metrics").text:
        assert time.monotonic() < until
    running.process.send_signal(signal.SIGTERM)
    while not [line for line in running.lines if line["event"] == "stopping"]:
        time.sleep(0.01)
    refused = httpx.post(f"{running.url}/score_tokens", json={"items": [ITEM]}, timeout=30)
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "stopping"
    assert httpx.get(f"{running.url}/ready").status_code == 503
    thread.join()
    assert len(found[0].json()["items"]) == 200
    assert running.process.wait(30) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(serve: Any) -> None:
    running = serve("--max-batch-tokens", "64", "--exact")
    busy = {"items": [{"prompt_ids": [5] * 100, "response_ids": [6] * 150}] * 1000}

    def ask() -> None:
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{running.url}/score_tokens", json=busy, timeout=120).raise_for_status()

    thread = threading.Thread(target=ask)
    thread.start()
    while 'what="items"} 0.0' in httpx.get(f"{running.url}/metrics").text:
        time.sleep(0.01)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(20)
    assert time.monotonic() - began < 5
    thread.join(20)


@pytest.mark.slow
def test_a_dead_worker_ends_the_server(checkpoints: Any) -> None:
    """Whoever runs it starts it again; a server that answers nothing any more would only look alive."""
    code = (
        "import sys; from server.backends import transformers; from reproduce import cli\n"
        "def die(*_, **__): raise SystemExit('killed')\n"
        "transformers.TransformersBackend.score = die\n"
        "sys.exit(cli.run(['serve', '--port', '0', '--gvm', sys.argv[1]]))"
    )
    folder = str(checkpoints["llama", "value"])
    with subprocess.Popen([sys.executable, "-c", code, folder], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = next(json.loads(line)["url"] for line in process.stderr if line.startswith("{"))
        reply = httpx.post(f"{url}/score_tokens", json={"items": [ITEM]}, timeout=30)
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "unavailable")
        assert process.wait(30) == 1
        assert process.stderr.read().splitlines()[-1].startswith("error: the scoring worker died")


@pytest.fixture
def refused(capsys: Any, monkeypatch: pytest.MonkeyPatch, checkpoints: Any) -> Callable[..., None]:
    """Checks that a command line ends with code 2 and one line that has the words."""
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    monkeypatch.setattr(command, "_serve", lambda *_: pytest.fail("it went on to serve"))

    def check(*arguments: str, words: str) -> None:
        gvm = () if "--gvm" in arguments else ("--gvm", str(checkpoints["llama", "value"]))
        assert cli.run(["serve", *gvm, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err

    return check


def test_wrong_command_lines(refused: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused("--gvm", str(tmp_path / "absent"), words="no such folder")
    refused("--gvm", str(file), words="is a file")
    refused("--backend", "tgi", words="choose from transformers, vllm")
    refused("--dtype", "int8", words="choose from float32, bfloat16")
    refused("--reward", "median", words="choose from mean")
    refused("--api-key-file", str(file), words="no API key")
    refused("--api-key-file", str(tmp_path / "absent"), words="cannot be read")
    refused("--api-key-file", str(file), "--no-api-key", words="give one of them")
    refused("--host", "192.0.2.1", "--no-api-key", words="cannot be listened on")
    refused("--port", "70000", words="--port")


def test_missing_packages_are_named_with_the_way_to_get_them(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_PACKAGES", ("fastapi", "no_such_package"))
    refused(words="no_such_package; install them with pip install 'dvpo[serve]'")


def test_a_server_open_to_others_needs_a_key_or_a_plain_word(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVPO_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        refused("--host", host, words="--no-api-key")


def test_a_taken_port_is_said_at_once(refused: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("--port", str(port), words=f"127.0.0.1:{port} cannot be listened on")


def test_without_a_name_the_released_model_is_meant(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    monkeypatch.setattr(command, "RELEASED", tmp_path / "absent")
    assert cli.run(["serve"]) == 2
    assert "--gvm DIR" in capsys.readouterr().err
    served: list[Path] = []
    monkeypatch.setattr(command, "RELEASED", tmp_path)
    monkeypatch.setattr(command, "_serve", lambda _, folder, *rest: served.append(folder))
    assert cli.run(["serve", "--port", "0"]) == 0
    assert served == [tmp_path]


def test_options_of_the_other_backend_are_refused(
    checkpoints: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    gvm = ("--gvm", str(checkpoints["llama", "value"]), "--port", "0")
    for options in (("--backend", "vllm", "--exact"), ("--tensor-parallel", "2")):
        assert cli.run(["serve", *gvm, *options]) == 2
        assert "backend" in capsys.readouterr().err


def test_a_broken_weights_file_is_a_clear_end(
    tmp_path: Path, checkpoints: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reproduce.commands.common.quiet", lambda: None)
    monkeypatch.setattr("server.logs.configure", lambda: None)
    folder = tmp_path / "gvm"
    shutil.copytree(checkpoints["llama", "value"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.run(["serve", "--port", "0", "--gvm", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err.splitlines()[-1]


def test_threads_are_told_not_to_hold_their_cores_before_torch_is_loaded() -> None:
    code = """if True:
        import os, sys
        from reproduce.commands import serve
        assert "torch" not in sys.modules
        serve.importlib.util.find_spec = lambda name: None
        try:
            serve.run(None)
        except serve.InputError:
            print(os.environ["GOMP_SPINCOUNT"])
    """
    for given, expected in ({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        plain = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == expected, done.stderr
