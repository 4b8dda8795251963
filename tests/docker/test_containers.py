"""The containers for real: build, run to the end, kill, go on, serve. Needs a Docker engine and compose."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import docker
import pytest
import torch
import yaml
from docker.errors import DockerException

from dvpo import models
from dvpo.data.templates import encode
from dvpo.values import score_all
from reproduce import recipe

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" + "0" * 34
IMAGE = f"dvpo:test-{uuid.uuid4().hex[:8]}"
PROMPT, RESPONSE = "what is the river of velor ?", "the river of velor is marn ."
Compose = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the engine. With DVPO_START_ENGINE set, one and stand-in base images are made where possible."""
    starter = ROOT.parent / "shared" / "tools" / "docker-engine"
    if os.environ.get("DVPO_START_ENGINE") and starter.is_file():
        subprocess.run([starter, "up"], check=True)
        tag = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        assert tag
        subprocess.run([starter, "base", tag[1]], check=True)
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        pytest.skip(f"no Docker engine answers ({str(error)[:80]}); start one, then run make docker-test")
    yield client
    client.close()


@pytest.fixture(scope="module")
def path() -> str:
    """PATH with a Docker client first that can build: one with buildx, or one so old that it does not need it."""
    for client in (shutil.which("docker"), "/usr/bin/docker"):
        if client and Path(client).is_file():
            version = subprocess.run([client, "--version"], capture_output=True, text=True, check=True).stdout
            old = int(re.findall(r"version (\d+)", version)[0]) < 23
            if old or not subprocess.run([client, "buildx", "version"], capture_output=True).returncode:
                return f"{Path(client).parent}{os.pathsep}{os.environ['PATH']}"
    pytest.skip("no Docker client that can build is installed (docker with buildx)")


@pytest.fixture(scope="module")
def program(path: str) -> list[str]:
    """The compose command: the plugin or the older program."""
    for command in (["docker", "compose"], ["docker-compose"]):
        with contextlib.suppress(FileNotFoundError):
            asked = subprocess.run([*command, "version"], capture_output=True, env={**os.environ, "PATH": path})
            if not asked.returncode:
                return command
    pytest.skip("neither `docker compose` nor docker-compose is installed")


@pytest.fixture(scope="module")
def uid() -> int:
    """Who the containers run as: never root."""
    return os.getuid() or 4242


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, uid: int, checkpoints: Any) -> dict[str, Path]:
    """Folders of this machine for the runs and the artifacts: a small recipe and a value model."""
    root = tmp_path_factory.mktemp("data")
    found = {"RUNS": root / "runs", "ARTIFACTS": root / "artifacts"}
    for folder in found.values():
        folder.mkdir()
    (found["ARTIFACTS"] / "micro.yaml").write_text(micro())
    shutil.copytree(checkpoints["llama", "value"], found["ARTIFACTS"] / "gvm")
    if os.getuid() == 0:
        for path in (*found.values(), *found["ARTIFACTS"].rglob("*")):
            os.chown(path, uid, uid)
    return found


def micro() -> str:
    """The tiny recipe with all its stages, cut to seconds."""
    values = recipe.load("tiny").model_dump(mode="json")
    values["name"] = "micro"
    values["atlas"] |= {k: 60 for k in values["atlas"] if k in ("lessons", "omissions")} | {"places": 6}
    values["atlas"]["prompts"] = {k: 8 if k == "validation" else 60 for k in values["atlas"]["prompts"]}
    small = {"hidden": 16, "intermediate": 32, "layers": 1, "heads": 2, "positions": 256}
    values |= {"size": small, "other_sizes": {"small": small | {"hidden": 8}}, "cost_updates": 1, "cost_rounds": 1}
    for stage in ("base", "sft", "rm", "gvm", "dpo"):
        values[stage] |= {"max_steps": 12, "save_steps": 4, "log_steps": 2, "batch_size": 8}
    values["policy"] |= {"updates": 4, "save_updates": 1, "prompts_per_update": 8, "minibatch_size": 4}
    values["policy"]["max_new_tokens"] = values["sampling"]["max_new_tokens"] = 8
    return yaml.safe_dump(values)


@pytest.fixture(scope="module")
def compose(
    engine: docker.DockerClient, program: list[str], path: str, folders: dict[str, Path], uid: int
) -> Iterator[Compose]:
    """`docker compose ARGUMENTS` in a project of its own with an image of commit COMMIT; all is removed afterwards."""
    project = f"dvpotest{uuid.uuid4().hex[:8]}"
    environment = {
        **os.environ,
        "PATH": path,
        **{f"DVPO_{name}": str(folder) for name, folder in folders.items()},
        "COMPOSE_PROJECT_NAME": project,
        "DVPO_IMAGE": IMAGE,
        "DOCKER_BUILDKIT": "1",
        "COMPOSE_DOCKER_CLI_BUILD": "1",
        "DVPO_NETWORK": "host",
        "DVPO_COMMIT": COMMIT,
        "DVPO_RECIPE": "/data/artifacts/micro.yaml",
        "DVPO_GVM": "/data/artifacts/gvm",
        "DVPO_UID": str(uid),
        "DVPO_GID": str(uid),
        "DVPO_PORT": "18000",
        "DVPO_REPORT_PORT": "18080",
    }

    def run(*arguments: str, check: bool = True, **more: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [*program, *arguments],
            cwd=ROOT,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:]
        return done

    run("build", "reproduce")
    yield run
    run("down", "--volumes", "--timeout", "2", check=False)
    engine.images.remove(IMAGE, force=True)


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    """The first true answer. Fails after so many seconds, with the last error."""
    end, last = time.monotonic() + seconds, "no error"
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (OSError, AssertionError) as error:  # those of the engine are OSErrors too
            last = repr(error)
        time.sleep(0.3)
    pytest.fail(f"nothing after {seconds} seconds; at last {last}")


def get(path: str, port: int = 18000, body: Any = None, key: str | None = None) -> tuple[int, bytes]:
    """Status and body of a request to a published port."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class TestImage:
    def test_what_is_in_it(self, engine: docker.DockerClient, compose: Compose) -> None:
        image = engine.images.get(IMAGE)
        config = image.attrs["Config"]
        assert config["User"] == "10001:10001"
        assert config["Entrypoint"] == ["tini", "--"]
        assert "health.py" in str(config["Healthcheck"]["Test"])
        assert config["Labels"]["org.opencontainers.image.revision"] == COMMIT
        look = "cat /app/commit; ls -A /app; touch /app/x 2>&1; touch /data/runs/x && id -u; ls -A /root 2>&1 || true"
        said = engine.containers.run(IMAGE, ["sh", "-c", look], remove=True, user="4242:4242").decode()
        assert said.startswith(COMMIT)
        assert "Permission denied" in said
        assert "4242" in said
        names = set(said.split())
        assert ".git" not in names
        assert {"dvpo", "server", "reproduce", "packages.json"} <= names

    def test_the_servers_kernels_are_compiled_in_it(self, engine: docker.DockerClient, compose: Compose) -> None:
        """For whoever runs it, and where no compiler is."""
        code = "from server.backends.cpu_kernels import compiled, kernels; print(compiled(), kernels())"
        command = ["env", "PATH=/opt/venv/bin", "/opt/venv/bin/python", "-c", code]
        where = {"user": "4242:4242", "read_only": True, "tmpfs": {"/tmp": ""}}
        said = engine.containers.run(IMAGE, command, remove=True, **where).decode()
        assert said.startswith("/opt/kernels/cpu-")
        assert ("Kernels object" in said) == ("avx512dq" in Path("/proc/cpuinfo").read_text())

    def test_its_code_comes_after_its_packages(self, engine: docker.DockerClient, compose: Compose) -> None:
        steps = [layer["CreatedBy"] for layer in engine.images.get(IMAGE).history()][::-1]
        places = {
            word: next(i for i, s in enumerate(steps) if word in s) for word in ("/opt/venv /opt/venv", "/app /app")
        }
        assert places["/opt/venv /opt/venv"] < places["/app /app"]


class TestTests:
    def test_they_pass_in_it(self, compose: Compose) -> None:
        done = compose("up", "--no-build", "test")
        assert "exited with code 0" in done.stdout, done.stdout[-3000:]
        assert re.search(r"\d{4} passed", done.stdout)


class TestReproduce:
    def test_killed_and_up_again(
        self, engine: docker.DockerClient, compose: Compose, folders: dict[str, Path], uid: int
    ) -> None:
        run = folders["RUNS"] / "micro"
        compose("up", "-d", "reproduce")
        wait_for(lambda: len(list(run.glob("stages/*/manifest.json"))) >= 4, 240)
        engine.containers.get(compose("ps", "-q", "reproduce").stdout.strip()).kill("SIGKILL")
        before = {p: p.stat().st_mtime_ns for p in run.glob("stages/*/manifest.json")}
        assert not (run / "report.html").exists()
        done = compose("up", "--no-build", "reproduce")
        assert "were done before" in done.stdout
        assert "report: runs/micro/report.html" in done.stdout
        assert "exited with code 0" in done.stdout
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert (run / "results" / "table_1.json").is_file()
        assert {p.stat().st_uid for p in run.rglob("*")} == {uid}
        for path in run.glob("stages/*/manifest.json"):
            manifest = json.loads(path.read_text())
            assert manifest["git_commit"] == manifest["image"]["commit"] == COMMIT
            assert manifest["image"]["packages"]["torch"].startswith("2.")

    def test_another_commit_is_refused_unless_told(
        self, engine: docker.DockerClient, compose: Compose, folders: dict[str, Path], uid: int, tmp_path: Path
    ) -> None:
        other = tmp_path / "commit"
        other.write_text("d" * 40)
        tmp_path.chmod(0o755)
        binds = [f"{folders['RUNS']}:/data/runs", f"{folders['ARTIFACTS']}:/data/artifacts", f"{other}:/app/commit:ro"]
        command = ["dvpo", "reproduce", "--recipe", "/data/artifacts/micro.yaml", "--table", "8"]

        def run(*more: str) -> tuple[int, str]:
            made = engine.containers.run(IMAGE, [*command, *more], user=f"{uid}:{uid}", volumes=binds, detach=True)
            try:
                return made.wait(timeout=300)["StatusCode"], made.logs().decode()
            finally:
                made.remove(force=True)

        code, said = run()
        assert (code, COMMIT in said, "--mix-commits" in said) == (2, True, True), said
        assert run("--mix-commits")[0] == 0

    def test_told_to_stop_it_says_how_to_go_on(self, engine: docker.DockerClient, compose: Compose) -> None:
        name = f"dvpo-stop-{uuid.uuid4().hex[:8]}"
        long = ["dvpo", "reproduce", "--recipe", "tiny", "--out", "/tmp/stopped"]
        compose("run", "-d", "--name", name, "reproduce", *long)
        made = engine.containers.get(name)
        try:
            wait_for(lambda: "spawn_main" in str(made.top(ps_args="-efww")), 60)
            started = time.monotonic()
            made.stop(timeout=30)
            assert time.monotonic() - started < 15
            assert made.wait()["StatusCode"] == 130
            assert "run the same command to go on" in made.logs().decode()
        finally:
            made.remove(force=True)

    def test_the_report_is_served(self, compose: Compose) -> None:
        early = compose("run", "--rm", "report", check=False, DVPO_RECIPE="none")
        assert early.returncode == 1
        assert "no finished report" in early.stdout
        compose("up", "-d", "report")
        status, page = wait_for(lambda: get("/report.html", 18080), 30)
        assert status == 200
        assert b"<html" in page


class TestServer:
    def test_it_answers_is_killed_and_answers_again(
        self, engine: docker.DockerClient, compose: Compose, checkpoints: Any
    ) -> None:
        started = time.monotonic()
        compose("up", "-d", "server")
        wait_for(lambda: get("/health")[0] == 200, 60)
        assert time.monotonic() - started < 60
        first = self.ask()
        assert first["q"] == pytest.approx(direct(checkpoints["llama", "value"])[1:], abs=1e-4)
        assert first["v"] == pytest.approx(direct(checkpoints["llama", "value"])[:-1], abs=1e-4)
        made = engine.containers.get(compose("ps", "-q", "server").stdout.strip())
        assert made.attrs["HostConfig"]["ReadonlyRootfs"]
        assert made.attrs["HostConfig"]["PortBindings"]["8000/tcp"][0]["HostIp"] == "127.0.0.1"
        wait_for(lambda: engine.containers.get(made.id).attrs["State"]["Health"]["Status"] == "healthy", 60)
        made.kill("SIGKILL")
        made.wait()
        compose("up", "-d", "server")
        wait_for(lambda: get("/health")[0] == 200, 60)
        assert self.ask()["q"] == first["q"]
        made = engine.containers.get(compose("ps", "-q", "server").stdout.strip())
        started = time.monotonic()
        made.stop(timeout=30)
        assert time.monotonic() - started < 15
        assert made.wait()["StatusCode"] in (0, 143)

    def test_keys_are_asked_for(self, compose: Compose) -> None:
        compose("up", "-d", "server", DVPO_API_KEYS="open-sesame")
        wait_for(lambda: get("/health")[0] == 200, 60)
        assert get("/score_tokens", body={})[0] == 401
        assert self.ask("open-sesame")["q"]
        compose("stop", "server")

    def ask(self, key: str | None = None) -> dict[str, Any]:
        item = {"messages": [{"role": "user", "content": PROMPT}], "response": RESPONSE}
        status, answer = get("/score_tokens", body={"model": "gvm", "items": [item], "return": "both"}, key=key)
        assert status == 200, answer
        return json.loads(answer)["items"][0]


def direct(folder: Path) -> list[float]:
    """h_0..h_T of the same text in this process."""
    tokenizer = models.load_tokenizer(folder)
    model: Any = models.load(folder, "value").eval()
    text = encode(tokenizer, ({"role": "user", "content": PROMPT},), RESPONSE)
    with torch.no_grad():
        return dict(score_all(model, [text], tokenizer.pad_token_id))[0].tolist()


def test_digests_are_written_in(engine: docker.DockerClient, tmp_path: Path) -> None:
    """`container/pin.py` against a registry on this machine (an engine trusts localhost without TLS)."""
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json", "manifests": []}
    ).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Docker-Content-Digest", digest)
            self.send_header("Content-Type", "application/vnd.docker.distribution.manifest.list.v2+json")
            self.send_header("Content-Length", str(len(manifest)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(manifest)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = tmp_path / "Dockerfile"
    tag = f"localhost:{server.server_address[1]}/python:3.11"
    path.write_text(f"ARG PYTHON_IMAGE={tag}\nARG PYTHON_DIGEST=\nFROM ${{PYTHON_IMAGE}}\n")
    command = [sys.executable, ROOT / "container" / "pin.py", path]
    try:
        for _ in range(2):
            subprocess.run(command, check=True, capture_output=True)
            assert f"ARG PYTHON_DIGEST={digest}\n" in path.read_text()
    finally:
        server.shutdown()
        server.server_close()
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.startswith("error: ")) == (1, True)
