"""The routes. Bodies are read by `JsonRoute`: declared JSON, strictly parsed, never more than the limit."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.errors import ApiError
from server.service import Service


class _JsonRequest(Request):
    async def body(self) -> bytes:
        """The bytes. The framework would call it a bad request when the client leaves before all of them have come."""
        try:
            return await super().body()
        except ClientDisconnect as error:
            raise ApiError(499, "the client left", "client_left") from error

    async def json(self) -> Any:
        """The body. Refused: NaN, half surrogate pairs, deep nesting, numbers of thousands of digits."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from error


class JsonRoute(APIRoute):
    """A route whose body is JSON and says so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps the handler of the framework."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(
                    415, "the body is not declared as JSON; send content-type: application/json", "media_type"
                )
            return await handle(_JsonRequest(request.scope, request.receive))

        return strictly


def service_of(request: Request) -> Service:
    """The running server's parts."""
    service: Service = request.app.state.service
    return service
