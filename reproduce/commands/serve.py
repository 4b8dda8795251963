"""`dvpo serve`: a checkpoint behind HTTP, until it is told to stop."""

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import dvpo
from dvpo.errors import InputError, StageError
from reproduce.bundles.adapters import laid_on

if TYPE_CHECKING:
    from server.backends import Backend

RELEASED = Path(dvpo.__file__).parents[1] / "artifacts" / "checkpoints" / "gvm-tiny"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "structlog")
_BACKENDS = ("transformers", "vllm")
_DTYPES = ("float32", "bfloat16")
_SPINS = ("GOMP_SPINCOUNT", "3000")
"""Threads that share a layer wait so many turns of a loop for each other before they give up their core, not 300,000.

If something else wants a core, the thread that it interrupts is not waited for by one that holds another: beside two
busy processes a text of 300 tokens took 0.7 instead of 2.3 s.
"""


@dataclass(frozen=True)
class Request:
    """What was typed; see `dvpo serve --help`."""

    gvm: Path | None
    base: Path | None
    backend: str
    dtype: str
    exact: bool
    tensor_parallel: int
    data_parallel: int
    host: str
    port: int
    api_key_file: Path | None
    no_api_key: bool
    reward: str
    cache_mb: int
    max_batch_tokens: int
    max_queue_tokens: int
    max_batch_seconds: float
    max_body_mb: int
    max_items: int


def run(request: Request) -> None:
    """Serves until SIGTERM or an interrupt; then what was taken is finished first.

    Raises:
        InputError: wrong options, no usable checkpoint, the port is taken, or the host would be open to others.
        StageError: the scoring worker died or hangs.
    """
    os.environ.setdefault(*_SPINS)  # it is read when torch is loaded
    from dvpo.objectives.td import AGGREGATES

    if lacking := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"the server needs {', '.join(lacking)}; install them with pip install 'dvpo[serve]'")
    _one_of("--backend", request.backend, _BACKENDS)
    _one_of("--dtype", request.dtype, _DTYPES)
    _one_of("--reward", request.reward, AGGREGATES)
    folder = _folder(request.gvm)
    keys = _keys(request)
    with _listen(request.host, request.port) as listener, laid_on(folder, request.base) as model:
        _serve(request, Path(model), keys, listener)


def _serve(request: Request, folder: Path, keys: tuple[str, ...], listener: socket.socket) -> None:
    import uvicorn

    from dvpo.models import load_tokenizer
    from server import logs
    from server.app import create_app
    from server.connection import Connection
    from server.engine import Engine
    from server.metrics import Metrics
    from server.settings import Settings
    from server.text import Codec

    logs.configure()
    metrics = Metrics()
    backend = _backend(request, folder)
    engine = Engine(
        backend,
        workers=backend.workers,
        batch_tokens=request.max_batch_tokens,
        queue_tokens=request.max_queue_tokens,
        batch_seconds=request.max_batch_seconds,
        on_batch=metrics.batch,
    )
    settings = Settings(keys, request.max_body_mb << 20, request.max_items, request.reward)
    app = create_app(engine, Codec(load_tokenizer(folder)), settings, metrics)

    class Server(uvicorn.Server):
        """Ends when told to and idle, at once when told again, or when the engine's worker died or hangs."""

        died = False
        said = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """A signal. The first lets the work end and refuses more; the library would raise it again afterwards.

            Nothing is logged here: the signal may have come while the log was being written, and its lock is held.
            """
            if app.state.gate.draining:
                self.should_exit = self.force_exit = True
            app.state.gate.draining = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Says what is served once requests and signals are heard."""
            await super().startup(sockets)
            info = backend.info
            logs.logger().info(
                "serving",
                url=_url(listener),
                gvm=str(request.gvm or RELEASED),
                form=info.form,
                backend=info.backend,
                dtype=info.dtype,
                max_tokens=info.max_tokens,
                weights_sha256=info.weights_sha256,
                api_key_needed=bool(keys),
            )

        async def on_tick(self, counter: int) -> bool:
            """Whether to end."""
            draining = app.state.gate.draining
            if draining and not self.said:
                self.said = True
                logs.logger().info("stopping", working=app.state.gate.working)
            self.died = not draining and not engine.stats().accepting
            return await super().on_tick(counter) or self.died or (draining and not app.state.gate.working)

    # Longer than the clients' pools keep an idle connection, so that they never send into one being closed.
    config = uvicorn.Config(
        app, http=Connection, log_config=None, access_log=False, server_header=False, timeout_keep_alive=75
    )
    server = Server(config)
    server.run(sockets=[listener])
    if server.died:
        raise StageError("the scoring worker died or hangs, so the server ended; see the log above, and start it again")
    logs.logger().info("stopped")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _backend(request: Request, folder: Path) -> "Backend":
    dtype: Any = request.dtype
    if request.backend == "vllm":
        if request.exact:
            raise InputError("--exact is of the transformers backend; leave it out, or leave --backend vllm out")
        from server.backends.vllm import VllmBackend

        return VllmBackend(
            folder, dtype=dtype, tensor_parallel=request.tensor_parallel, data_parallel=request.data_parallel
        )
    if (request.tensor_parallel, request.data_parallel) != (1, 1):
        raise InputError("--tensor-parallel and --data-parallel are of the vLLM backend; add --backend vllm")
    from server.backends.transformers import TransformersBackend

    return TransformersBackend(folder, dtype=dtype, exact=request.exact, cache_bytes=request.cache_mb << 20)


def _folder(given: Path | None) -> Path:
    folder = given or RELEASED
    if folder.is_dir():
        return folder
    if given is None:
        raise InputError("no model is released with this installation; name a value model with --gvm DIR")
    raise InputError(
        f"{given}: {'is a file, not a folder' if given.exists() else 'no such folder'}; give a value model"
    )


def _keys(request: Request) -> tuple[str, ...]:
    from server.security import VARIABLE, is_local, load_keys

    if request.no_api_key:
        if request.api_key_file is not None:
            raise InputError("--no-api-key stands beside --api-key-file; give one of them")
        return ()
    keys = load_keys(request.api_key_file, os.environ)
    if not keys and not is_local(request.host):
        raise InputError(
            f"--host {request.host} opens the server to others without an API key; give --api-key-file FILE or set "
            f"{VARIABLE}, or say --no-api-key"
        )
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the weights are loaded: a taken port is found at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host}: no such address on this machine ({error.strerror})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise InputError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port, or 0 for any free one"
        ) from error
    return listener


def _one_of(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise InputError(f"{option} {given}: choose from {', '.join(choices)}")
