"""What every request passes: its id, the key, the limits on its body, the end of work, one log line and the numbers.

Pure ASGI, outside everything else, so that a refused request costs next to nothing.
"""

import re
import time
import uuid
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import STOPPING, ApiError
from server.logs import frames_of, logger
from server.metrics import Metrics
from server.security import allows
from server.settings import Settings

_REQUEST_ID = re.compile(r"[!-~]{1,128}", re.ASCII)
_OPEN = ("/health",)


class Gate:
    """The outermost layer. `draining` set means: finish what was taken, refuse what comes."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._app: ASGIApp
        self.draining = False
        self.working = 0
        self._body_bytes = 0

    def around(self, app: ASGIApp) -> "Gate":
        """This gate before `app`: what the framework builds its layers with, when it first needs them."""
        self._app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or another ASGI event, which passes unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = _Exchange(request_id, send)
        self.working += 1
        bodies = _Body(self, receive)
        try:
            self._admit(scope, headers)
            await self._app(scope, bodies, exchange)
        except ApiError as refusal:
            scope["dvpo.refused"] = refusal.kind
            reply = refusal.response()
            if refusal.status_code == 401:
                reply.headers.append("www-authenticate", "Bearer")
                if "text/html" in headers.get("accept", ""):
                    # Only where a browser opens a page: it would cover the page's own question for the key. In a
                    # header line of its own, for browsers do not read two schemes in one.
                    reply.headers.append("www-authenticate", 'Basic realm="dvpo", charset="UTF-8"')
            await reply(scope, receive, exchange)
        except Exception as error:
            scope["dvpo.refused"] = "internal_error"
            logger().error("bug", request_id=request_id, error=type(error).__name__, frames=frames_of(error))
            if exchange.status is None:
                failure = ApiError(500, f"the server failed; tell its operator the id {request_id}", "internal_error")
                await failure.response()(scope, receive, exchange)
        finally:
            self.working -= 1
            self._body_bytes -= bodies.taken
            self._report(scope, exchange)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] not in _OPEN and not allows(self._settings.api_keys, headers.get("authorization")):
            raise ApiError(401, "no valid API key; send Authorization: Bearer KEY", "unauthorized")
        if scope["method"] == "POST" and self.draining:
            raise ApiError(503, STOPPING, "stopping", headers={"retry-after": "5", "connection": "close"})
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            self._check_size(int(length) if len(length) < 19 else 1 << 62)

    def _check_size(self, size: int) -> None:
        if size > self._settings.max_body_bytes:
            raise ApiError(
                413,
                f"the body is larger than {self._settings.max_body_bytes} bytes; send fewer items at once",
                "too_large",
                headers={"connection": "close"},
            )

    def take(self, before: int, size: int) -> None:
        """Counts `size` more bytes of a body that had `before`. Raises ApiError where that is too much."""
        self._check_size(before + size)
        if self._body_bytes + size > self._settings.body_bytes_in_flight:
            retry = {"retry-after": "1", "connection": "close"}
            raise ApiError(503, "the server is busy reading; try again in 1 s", "overloaded", None, retry)
        self._body_bytes += size

    def _report(self, scope: Scope, exchange: "_Exchange") -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = exchange.status or 499  # the client left before there was an answer
        self._metrics.requests.labels(route, str(status)).inc()
        if reason := scope.get("dvpo.refused"):
            self._metrics.rejected.labels(reason).inc()
        with suppress(OSError, ValueError):  # a log that nobody reads any more fails no request
            logger().info(
                "request",
                request_id=exchange.request_id,
                method=scope["method"],
                route=route,
                status=status,
                seconds=round(time.monotonic() - exchange.began, 6),
                **({"reason": reason} if reason else {}),
                **scope.get("dvpo.work", {}),
            )


class _Body:
    """The request's body as it comes in, counted before anybody keeps it."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self._gate, self._receive, self.taken = gate, receive, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b"")) if message["type"] == "http.request" else 0
        self._gate.take(self.taken, size)
        self.taken += size
        return message


class _Exchange:
    """The reply as it goes out: notes its status and adds the request's id."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id, self._send = request_id, send
        self.status: int | None = None
        self.began = time.monotonic()

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)
