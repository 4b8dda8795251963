"""Between the routes and the engine: texts on a thread of their own, work that ends when its client leaves."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastapi import Request

from dvpo.data.templates import Encoded
from server.backends import ModelInfo
from server.engine import Engine
from server.errors import ApiError, Json, refuse
from server.metrics import Metrics
from server.outcomes import Reply
from server.settings import Settings
from server.text import Codec

T = TypeVar("T")
_SLICE = 50_000
"""Characters that are tokenised before others get their turn; some tens of milliseconds."""


@dataclass(frozen=True)
class Work:
    """Scored texts with the time they took."""

    items: Sequence[Encoded]
    reply: Reply

    @property
    def prompt_tokens(self) -> int:
        """Of all texts."""
        return sum(len(item.prompt_ids) for item in self.items)

    @property
    def response_tokens(self) -> int:
        """Of all texts."""
        return sum(len(item.response_ids) for item in self.items)

    def answer(self, body: object) -> Json:
        """The reply, with the times in its headers."""
        headers = {
            "x-queue-seconds": f"{self.reply.queue_seconds:.6f}",
            "x-inference-seconds": f"{self.reply.inference_seconds:.6f}",
        }
        return Json(body, headers=headers)


class Service:
    """What the routes share."""

    def __init__(self, engine: Engine, codec: Codec, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.codec, self.settings, self.metrics = engine, codec, settings, metrics
        self._thread = ThreadPoolExecutor(1, "text")

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self.engine.info

    @property
    def reads_last_token(self) -> bool:
        """Whether the model was trained to score whole texts at their last token, whatever it is."""
        return self.info.form.startswith("sequence classifier")

    async def prepare(self, name: str, texts: Sequence[Sequence[str]], function: Callable[[int], T]) -> list[T]:
        """`function(i)` of every item, where `texts[i]` is what it tokenises.

        A text that is surely too long is refused at once: to tokenise it would take seconds. Raises ApiError.
        """
        for number, parts in enumerate(texts):
            count = sum(map(self.codec.at_least, parts))
            if count > self.info.max_tokens:
                where = f"{name}[{number}]"
                raise refuse(
                    f"{where}: the text has at least {count} tokens, but the model reads at most "
                    f"{self.info.max_tokens}; shorten it, nothing is cut for you",
                    where,
                )
        if not any(texts):  # token ids alone: the work is less than handing it over, and needs no tokenizer
            return [function(place) for place in range(len(texts))]
        return await self.each([sum(map(len, parts)) for parts in texts], function)

    async def each(self, sizes: Sequence[int], function: Callable[[int], T]) -> list[T]:
        """`function(i)` of every item of so many characters, in slices: others get their turn between them."""
        found: list[T] = []
        for places in _slices(sizes):
            found += await self.in_text_thread(partial(_each, function, places))
        return found

    async def in_text_thread(self, function: Callable[[], T]) -> T:
        """Runs what needs the tokenizer, or much time, away from the event loop; one call after another."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def check(self, name: str, items: Sequence[Encoded]) -> None:
        """Raises ApiError for a text with no prompt, or longer than the model reads, and says which."""
        for number, item in enumerate(items):
            where = f"{name}[{number}]"
            count = len(item.prompt_ids) + len(item.response_ids)
            if not item.prompt_ids:
                raise refuse(f"{where}: the prompt has no tokens; give at least one", where)
            if count > self.info.max_tokens:
                raise refuse(
                    f"{where}: the text has {count} tokens, but the model reads at most {self.info.max_tokens}; "
                    "shorten it, nothing is cut for you",
                    where,
                )

    def check_count(self, name: str, count: int) -> None:
        """Raises ApiError for more items than one request may have."""
        if count > self.settings.max_items:
            raise refuse(
                f"{name} has {count} items, but at most {self.settings.max_items} are taken at once; split it", name
            )

    async def score(self, request: Request, items: Sequence[Encoded]) -> Work:
        """Scores texts. When the client leaves first, what has not begun is dropped."""
        work = asyncio.ensure_future(self.engine.submit(items))
        watch = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(499, "the client left", "client_left")
            done = Work(items, work.result())
        finally:
            for task in (work, watch):
                task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await watch
        self.metrics.scored(done.reply, done.prompt_tokens, done.response_tokens)
        request.scope["dvpo.work"] = {
            "items": len(items),
            "prompt_tokens": done.prompt_tokens,
            "response_tokens": done.response_tokens,
            "queue_seconds": round(done.reply.queue_seconds, 6),
            "inference_seconds": round(done.reply.inference_seconds, 6),
        }
        return done

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _slices(sizes: Sequence[int]) -> Iterator[range]:
    """Consecutive places whose sizes are about `_SLICE` together."""
    start = total = 0
    for place, size in enumerate(sizes):
        total += size + 1
        if total >= _SLICE or place == len(sizes) - 1:
            yield range(start, place + 1)
            start, total = place + 1, 0


def _each(function: Callable[[int], T], places: range) -> list[T]:
    return [function(place) for place in places]


async def _gone(request: Request) -> None:
    """Returns when the client has left. The body has been read: only that can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
