"""The application: routes, the gate before them, and the page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.responses import FileResponse, HTMLResponse
from starlette.staticfiles import StaticFiles

import dvpo
from server import docs, errors
from server.engine import Engine
from server.errors import responses
from server.gate import Gate
from server.metrics import Metrics
from server.routes import rewards, score, status, vllm
from server.service import Service
from server.settings import Settings
from server.text import Codec

WEB = Path(__file__).parent / "web"
_ABOUT = """Token values of a frozen value model.

V(s_t) is the value before a token, Q(s_t, a_t) the value after it. Every reply names its request (`x-request-id`), and
a reply with values says how long it waited and ran (`x-queue-seconds`, `x-inference-seconds`).

    curl -H 'content-type: application/json' localhost:8000/score_tokens \\
      -d '{"items": [{"messages": [{"role": "user", "content": "What is 2 + 2?"}], "response": "It is 4."}]}'

A refusal is `{"error": {"message", "type", "param"}}`. 503 means that nothing was scored and the request is not at
fault: come again after `Retry-After`.
"""


def create_app(engine: Engine, codec: Codec, settings: Settings, metrics: Metrics) -> FastAPI:
    """The server around an engine, which it starts and stops.

    `app.state.gate.draining = True` makes it refuse new work.
    """
    service = Service(engine, codec, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()
        service.close()

    app = FastAPI(
        title="DVPO scoring server",
        description=_ABOUT,
        version=dvpo.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.gate = gate = Gate(settings, metrics)
    app.add_middleware(gate.around)
    errors.install(app)
    app.include_router(status.open_router)
    # For the documentation; the gate is what asks for the key.
    locked: dict[str, Any] = {"dependencies": [Depends(HTTPBearer(auto_error=False))], "responses": responses(401)}
    for module in (score, vllm, rewards, status):
        app.include_router(module.router, **(locked if settings.api_keys else {}))

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return HTMLResponse(docs.page(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        if not (WEB / "index.html").is_file():
            raise errors.ApiError(404, "the page is not installed; see /docs", "not_found")
        return FileResponse(WEB / "index.html")

    if WEB.is_dir():
        app.mount("/web", StaticFiles(directory=WEB), "web")
    return app
