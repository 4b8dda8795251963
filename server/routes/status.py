"""Whether the server lives and takes work, what it serves, and its numbers."""

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from server.errors import ApiError, Json, responses
from server.routes import service_of

router = APIRouter(tags=["status"])
open_router = APIRouter(tags=["status"])
"""Without a key."""
_BORN = int(time.time())


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The weights are loaded and work is taken."""

    status: Literal["ready"] = "ready"


class Model(BaseModel):
    """What is served. `form` says which kind of checkpoint was found."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    form: str
    dtype: str
    backend: str
    weights_sha256: str
    tokenizer_sha256: str


class Models(BaseModel):
    """The one model."""

    object: Literal["list"] = "list"
    data: list[Model]


@open_router.get("/health", summary="Is the process alive", response_model=Alive)
async def health() -> Response:
    """Always 200; the only route without a key."""
    return Json(Alive().model_dump())


@router.get(
    "/ready", summary="Are the weights loaded and is work taken", response_model=Ready, responses=responses(503)
)
async def ready(request: Request) -> Response:
    """503 while the server stops, after its worker died or hung, and for 10 s after its model failed on a text."""
    stats = service_of(request).engine.stats()
    retry = {"retry-after": "5"}
    if request.app.state.gate.draining or not stats.accepting:
        message = "the server takes no work; it is stopping, or its worker died or hangs"
        raise ApiError(503, message, "unavailable", headers=retry)
    if stats.failing:
        raise ApiError(503, "the model failed on the last text that it was given", "unavailable", headers=retry)
    return Json(Ready().model_dump())


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """The text form of Prometheus."""
    service = service_of(request)
    return Response(service.metrics.text(service.engine), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models", summary="What is served", response_model=Models)
async def models(request: Request) -> Response:
    """In the form of OpenAI, with more fields."""
    info = service_of(request).info
    model = Model(
        id=info.name,
        created=_BORN,
        owned_by="dvpo",
        max_model_len=info.max_tokens,
        form=info.form,
        dtype=info.dtype,
        backend=info.backend,
        weights_sha256=info.weights_sha256,
        tokenizer_sha256=info.tokenizer_sha256,
    )
    return Json(Models(data=[model]).model_dump())
