"""What the benchmark measures: servers in processes of their own, and a bare forward pass in this one."""

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from dvpo.data.templates import Encoded
from dvpo.errors import StageError

Dtype = Literal["float32", "bfloat16"]
Values = NDArray[np.float32]
_START_SECONDS = 600
_STOP_SECONDS = 30
_BARE_ROWS = 16


@dataclass(frozen=True)
class Workload:
    """Requests, each a list of texts, that a number of clients send one after another."""

    name: str
    clients: int
    requests: list[list[Encoded]]

    @property
    def texts(self) -> list[Encoded]:
        """All texts, in order."""
        return [text for request in self.requests for text in request]

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of every text, shared or not."""
        return sum(len(t.prompt_ids) + len(t.response_ids) for t in self.texts)


@dataclass(frozen=True)
class Outcome:
    """Seconds that a workload took, the value at every response token, by text in order, and the seconds that each
    request waited for its reply (none where there are no requests, in a bare pass).
    """

    seconds: float
    values: list[Values]
    waits: list[float] = field(default_factory=list)


class Target(ABC):
    """Something that scores a workload."""

    @abstractmethod
    def run(self, workload: Workload) -> Outcome:
        """Scores it, once."""


class Bare(Target):
    """The same model's forward pass in this process: sorted by length, padded, 16 texts at a time."""

    def __init__(self, folder: Path, dtype: Dtype) -> None:
        import torch

        from dvpo.models import load_tokenizer
        from server.loading import load

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load(folder, getattr(torch, dtype)).model.to(self._device)
        self._pad_id: Any = load_tokenizer(folder).pad_token_id

    def run(self, workload: Workload) -> Outcome:
        """See Target."""
        import torch

        from dvpo.values import collate, token_values

        texts = workload.texts
        values: list[Values] = [np.empty(0, np.float32)] * len(texts)
        began = time.monotonic()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt_ids) + len(texts[i].response_ids))
        for start in range(0, len(order), _BARE_ROWS):
            chosen = order[start : start + _BARE_ROWS]
            with torch.inference_mode():
                batch = collate([texts[i] for i in chosen], self._pad_id).to(self._device)
                values_B_S = token_values(self._model, batch).cpu().numpy()
            for row, i in enumerate(chosen):
                values[i] = values_B_S[row, 1 : len(texts[i].response_ids) + 1]
        return Outcome(time.monotonic() - began, values)


class Server(Target):
    """A server process, held still except while it is asked: some poll while they are idle."""

    ready_path = "/health"

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
        self._process = process
        self._url = url
        self._log = log

    @abstractmethod
    def request(self, texts: Sequence[Encoded]) -> tuple[str, dict[str, Any]]:
        """Path and body of one request."""

    @abstractmethod
    def read(self, reply: dict[str, Any], texts: Sequence[Encoded]) -> list[Values]:
        """The value at every response token, from a reply."""

    def wait_until_ready(self) -> None:
        """Returns when the server answers, then holds it still. Raises StageError where it never does."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(self._url + self.ready_path, timeout=5, trust_env=False).status_code == 200:
                    self._signal(signal.SIGSTOP)
                    return
            time.sleep(0.5)
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise StageError(f"a server did not start: {lines[-1][-300:]}")

    def run(self, workload: Workload) -> Outcome:
        """See Target."""
        self._signal(signal.SIGCONT)
        try:
            return asyncio.run(self._send(workload))
        finally:
            self._signal(signal.SIGSTOP)

    async def _send(self, workload: Workload) -> Outcome:
        replies: list[dict[str, Any]] = [{}] * len(workload.requests)
        waits: list[float] = []
        todo = iter(range(len(workload.requests)))
        async with httpx.AsyncClient(base_url=self._url, timeout=600, trust_env=False) as client:

            async def one_client() -> None:
                for index in todo:
                    path, body = self.request(workload.requests[index])
                    sent = time.monotonic()
                    response = await client.post(path, json=body)
                    if response.status_code != 200:
                        raise StageError(f"{path} answered {response.status_code}: {response.text[:200]}")
                    waits.append(time.monotonic() - sent)
                    replies[index] = response.json()

            began = time.monotonic()
            await asyncio.gather(*(one_client() for _ in range(workload.clients)))
            seconds = time.monotonic() - began
        pairs = zip(replies, workload.requests, strict=True)
        return Outcome(seconds, [values for reply, texts in pairs for values in self.read(reply, texts)], waits)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Ends the server's process and those it started."""
        with suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self._signal(signal.SIGKILL)
        self._process.wait()


class Ours(Server):
    """`dvpo serve`, asked at /score_tokens."""

    ready_path = "/ready"

    def request(self, texts: Sequence[Encoded]) -> tuple[str, dict[str, Any]]:
        """See Server."""
        items = [{"prompt_ids": t.prompt_ids, "response_ids": t.response_ids} for t in texts]
        return "/score_tokens", {"items": items, "return": "q", "encoding": "base64"}

    def read(self, reply: dict[str, Any], texts: Sequence[Encoded]) -> list[Values]:
        """See Server."""
        return [np.frombuffer(base64.b64decode(item["q"]), "<f4") for item in reply["items"]]


class Vllm(Server):
    """`vllm serve`, asked at /pooling for token_classify."""

    def request(self, texts: Sequence[Encoded]) -> tuple[str, dict[str, Any]]:
        """See Server."""
        ids = [t.prompt_ids + t.response_ids for t in texts]
        return "/pooling", {"model": "gvm", "task": "token_classify", "input": ids, "encoding_format": "base64"}

    def read(self, reply: dict[str, Any], texts: Sequence[Encoded]) -> list[Values]:
        """See Server."""
        rows = sorted(reply["data"], key=lambda row: row["index"])
        whole = [np.frombuffer(base64.b64decode(row["data"]), "<f4") for row in rows]
        return [values[len(text.prompt_ids) :] for values, text in zip(whole, texts, strict=True)]


@contextmanager
def ours(serve: Sequence[str], folder: Path, dtype: Dtype) -> Iterator[Server]:
    """Our server; `serve` is the command that starts it, to which options are added."""
    port = str(_free_port())
    command = [*serve, "--gvm", str(folder), "--dtype", dtype, "--port", port]
    with _running(Ours, command, port) as server:
        yield server


@contextmanager
def vllm(python: str, folder: Path, dtype: Dtype) -> Iterator[Server]:
    """vLLM's server, told to use every core: by itself it leaves one of them to its scheduler."""
    port = str(_free_port())
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "gvm"]
    command += ["--runner", "pooling", "--dtype", dtype, "--port", port, "--host", "127.0.0.1"]
    command += ["--pooler-config", '{"task": "token_classify", "use_activation": false}']
    settings = {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
    with _running(Vllm, command, port, settings) as server:
        yield server


S = TypeVar("S", bound=Server)


@contextmanager
def _running(kind: type[S], command: list[str], port: str, settings: dict[str, str] | None = None) -> Iterator[S]:
    """A server from its start to its end. What is already in the environment goes before `settings`.

    SIGTERM ends the server too: it is held still, in a group of its own, and nobody else would.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            with open(log, "wb") as output:
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**(settings or {}), **os.environ},
                    start_new_session=True,
                )
            server = kind(process, f"http://127.0.0.1:{port}", log)
            try:
                server.wait_until_ready()
                yield server
            finally:
                server.end()
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
