"""One client's connection, which may not be held for ever: the web server by itself waits without end for slow clients.

Give it to uvicorn as `http=Connection`. For a connection that is idle after a reply there is its `timeout_keep_alive`.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """HTTP/1.1 with a limit on the time that a client takes to send a request, and to read the reply."""

    receive_seconds = 60.0
    """For a whole request, from the opening of the connection or its first byte."""
    read_seconds = 60.0
    """For the next part of a reply (48 KiB at asyncio's default limits), and for the rest before the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receiving = _Limit(self.loop)
        self._reading = _Limit(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        self._receiving.start(self.receive_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        if self._answering() and not self.cycle.more_body:
            self._receiving.stop()
        elif not self._receiving.runs:
            self._receiving.start(self.receive_seconds, self.transport.abort)

    def on_response_complete(self) -> None:
        """A whole reply was handed over. The next request may have begun already."""
        self._receiving.stop()
        super().on_response_complete()
        if self._answering() and self.cycle.more_body:
            self._receiving.start(self.receive_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP. It may come after the headers of a request, whose answer must not follow this one."""
        if self._answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than the reply comes."""
        super().pause_writing()
        self._reading.start(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._reading.stop()

    def timeout_keep_alive_handler(self) -> None:
        """The client was idle for long."""
        super().timeout_keep_alive_handler()
        self._reading.start(self.read_seconds, self.transport.abort)

    def shutdown(self) -> None:
        """The server ends."""
        super().shutdown()
        if self.transport.is_closing():
            self._reading.start(self.read_seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self._receiving.stop()
        self._reading.stop()

    def _answering(self) -> bool:
        """Whether a request has come, at least its headers, that has not been answered."""
        return self.cycle is not None and not self.cycle.response_complete


class _Limit:
    """Calls a function when the time is over, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._timer is not None

    def start(self, seconds: float, function: Callable[[], None]) -> None:
        """From now on, whatever was before."""
        self.stop()
        self._timer = self._loop.call_later(seconds, function)

    def stop(self) -> None:
        """Nothing will be called."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
