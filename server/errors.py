"""One form for every refusal: {"error": {"message", "type", "param"}}, one sentence in `message`."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from dvpo.errors import InputError, StageError
from server.outcomes import Overloaded, Unavailable

STOPPING = "the server is stopping and takes no new work; try another server, or again later"


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="One sentence: what, where, and the way out.")
    type: str = Field(description="A short name of the kind of error, for programs.")
    param: str | None = Field(description="The field that is meant, if it is one.")


class ErrorReply(BaseModel):
    """The body of every reply that is not a success."""

    error: ErrorBody


class Json(Response):
    """JSON of plain Python values. Non-finite numbers never get here."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """UTF-8 JSON."""
        return to_json(content)


class ApiError(HTTPException):
    """A refusal with its status code, kind and field."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind, self.param = kind, param

    def response(self) -> Json:
        """The reply to send."""
        body = {"error": {"message": self.detail, "type": self.kind, "param": self.param}}
        return Json(body, self.status_code, dict(self.headers or {}))


def refuse(message: str, param: str | None = None) -> ApiError:
    """A 400: the request is wrong, and sending it again would not help."""
    return ApiError(400, message, "invalid_request", param)


def describe(errors: Sequence[Any]) -> tuple[str, str | None]:
    """(one sentence, the field's path) of the first validation error. Never quotes what was sent."""
    first = errors[0]
    path = ""
    for part in first["loc"][1:]:  # the first part is "body"
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    kind, message = first["type"], first["msg"]
    if kind == "missing":
        sentence = f"field {path} is missing" if path else "the body is empty; send a JSON object"
    elif kind == "extra_forbidden":
        sentence = f"unknown field {path}; see /docs for the fields"
    elif not path and kind in ("model_type", "model_attributes_type", "dict_type"):
        sentence = "the body should be a JSON object"
    else:
        message = message.removeprefix("Value error, ").removeprefix("Input ")
        sentence = f"{path}: {message}" if path else message
    return sentence, path or None


def as_api_error(error: Exception) -> ApiError | None:
    """The refusal that a known exception means; None for a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return refuse(*describe(error.errors()))
    if isinstance(error, InputError):
        return refuse(str(error))
    if isinstance(error, Overloaded):
        retry = {"retry-after": str(error.retry_after_seconds)}
        return ApiError(503, f"the server is busy: {error}", "overloaded", headers=retry)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), "unavailable", headers={"retry-after": "5"})
    if isinstance(error, StageError):
        # The engine has tried the text alone: to send it again would not help, so this is not a 5xx.
        return ApiError(422, str(error), "cannot_be_scored")
    if isinstance(error, StarletteHTTPException):
        kinds = {404: "not_found", 405: "method_not_allowed"}
        said = {404: "there is nothing at this path; see /docs", 405: "this path does not take this method; see /docs"}
        message = said.get(error.status_code, str(error.detail))
        return ApiError(
            error.status_code, message, kinds.get(error.status_code, "invalid_request"), None, dict(error.headers or {})
        )
    return None


def install(app: FastAPI) -> None:
    """Gives every refusal the one form."""

    async def answer(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        if known is None:
            raise error
        request.scope["dvpo.refused"] = known.kind
        return known.response()

    kinds = (RequestValidationError, InputError, StageError, Overloaded, Unavailable, StarletteHTTPException)
    for kind in kinds:
        app.add_exception_handler(kind, answer)


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for OpenAPI. 503 is the one declared 5xx."""
    said = {
        400: "The request is wrong: the message says what and where. Nothing is truncated.",
        401: "No API key, or a wrong one.",
        413: "The body is larger than the server takes.",
        415: "The body is not declared as application/json.",
        422: "A text that cannot be scored: its values are not finite.",
        503: "Not the request's fault: the queue is full, the server is stopping, or its model failed or hangs. "
        "Nothing was scored. `Retry-After` says when to come again.",
    }
    found: dict[int | str, dict[str, Any]] = {code: {"model": ErrorReply, "description": said[code]} for code in codes}
    if 503 in found:
        found[503]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
    return found
