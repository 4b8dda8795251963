"""Batches the texts of all clients and runs them on worker threads.

All state but the backend lives on the event loop, so there are no locks. A worker thread takes one batch at a time.
A batch that takes too long means that the backend hangs: a thread cannot be ended, so the engine gives up for good.

A batch has as many tokens as the budget allows, or a free worker's fair share of what waits if that is less: no worker
is left without while another has a long batch, and the only one that is free takes all. Where all that waits fits into
one batch and nothing runs, that batch has the machine for itself until it is done. A moment's wait for requests that
are expected makes batches larger; a lone client never waits.
"""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dvpo.data.templates import Encoded
from dvpo.errors import InputError, StageError
from server.backends import Backend, ModelInfo, Scored
from server.batching import Request, Waiting, choose, cost_of, length_of
from server.logs import frames_of, logger
from server.outcomes import BatchReport, Overloaded, Reply, Stats, Unavailable

_DOUBT_SECONDS = 10.0
"""For how long the engine counts as failing after the model failed on a text, unless it scores another before."""
_FAIR_SHARE = 384
"""Tokens: what waits is spread evenly over so many free workers that each gets about this or more."""
_PATIENCE, _MOST_PATIENCE = 0.02, 0.05
"""A free worker waits for the requests that are missing from what the engine had at once lately: for so much of the
time that the waiting texts will take, and so many seconds at most. Larger batches are faster, and divide well.
"""
_MOST_MISSING = 2
"""While a batch runs, a free worker waits for so many at most: more would not come in time."""
_WORTH_WAITING = 64
"""Tokens of a prompt: a text waits for a batch that computes a prompt of so many, instead of computing it again."""


@dataclass(eq=False)
class _Running:
    """A batch in a worker thread, and what gives it up when it takes too long."""

    entries: list[Waiting]
    alone: bool
    watchdog: asyncio.TimerHandle


class Engine:
    """Scores texts for many clients at once. Used on one event loop, between `start` and `stop`."""

    def __init__(
        self,
        backend: Backend,
        *,
        workers: int = 1,
        batch_tokens: int = 4096,
        queue_tokens: int = 262_144,
        batch_seconds: float = 300.0,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """Prepares the engine; nothing runs before `start`.

        Args:
            workers: batches that run at the same time, each in a thread; more than one needs a backend that allows it.
            batch_tokens: tokens computed in one batch, a prompt shared by several texts counted once. A longer text
                is run by itself.
            queue_tokens: tokens that may wait; bounds memory and waiting time.
            batch_seconds: a batch that takes longer means that the backend hangs. Far above what the slowest takes.
            on_batch: called on the event loop after every batch.
        """
        self._backend = backend
        self._workers = workers
        self._batch_tokens = batch_tokens
        self._queue_tokens = queue_tokens
        self._batch_seconds = batch_seconds
        self._on_batch = on_batch
        self._waiting: dict[Waiting, None] = {}  # in the order of arrival
        self._waiting_tokens = 0
        self._running: dict[int, _Running] = {}  # by worker
        self._computed: set[bytes] = set()  # prompts of waiting texts that a batch has computed and the backend keeps
        self._gathering: asyncio.TimerHandle | None = None
        self._open = 0  # requests that are not answered
        self._most_open = 0  # lately
        self._rate = 0.0
        self._stopping = False
        self._death: str | None = None
        self._hangs = False
        self._failed_at = -math.inf
        self._inboxes: list[queue.SimpleQueue[tuple[list[Encoded], bool] | None]] = [
            queue.SimpleQueue() for _ in range(workers)
        ]
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        return self._backend.info

    def stats(self) -> Stats:
        """What waits and runs now."""
        return Stats(
            len(self._waiting),
            self._waiting_tokens,
            sum(len(batch.entries) for batch in self._running.values()),
            self._rate,
            not self._stopping and self._death is None and bool(self._threads),
            time.monotonic() - self._failed_at < _DOUBT_SECONDS,
        )

    def start(self) -> None:
        """Starts the worker threads. Call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for number in range(self._workers):
            thread = threading.Thread(target=self._work, args=(number,), name=f"scoring-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    async def submit(self, items: Sequence[Encoded]) -> Reply:
        """Scores texts; returns when all are done. If the awaiting task is cancelled, what still waits is dropped.

        Raises:
            InputError: a text is empty or longer than the model reads, or all are more than the queue ever takes.
            Overloaded: the queue has no room now; nothing was taken.
            Unavailable: the engine is stopping, its worker died or hangs, or the model failed on a text.
            StageError: a text could not be scored; the message names its place among `items`.
        """
        self._check(items)
        if not items:
            return Reply([], 0.0, 0.0)
        began = time.monotonic()
        self._open += 1
        self._most_open = max(self._most_open, self._open)
        request = Request([None] * len(items), asyncio.get_running_loop().create_future())
        for position, item in enumerate(items):
            entry = Waiting(item, request, position, length_of(item), repr(item.prompt_ids).encode())
            self._waiting[entry] = None
            self._waiting_tokens += entry.tokens
        self._begin_soon()
        try:
            await request.done
        except asyncio.CancelledError:
            self._drop(request)
            raise
        finally:
            self._open -= 1
        scored = [result for result in request.results if result is not None]
        total = time.monotonic() - began
        return Reply(scored, max(0.0, total - request.inference_seconds), request.inference_seconds)

    async def stop(self) -> None:
        """Refuses new work, finishes what was taken, ends the workers and closes a backend that does not hang."""
        self._stopping = True
        await self._idle.wait()
        if self._threads and not self._hangs:
            for inbox in self._inboxes:
                inbox.put(None)
            for thread in self._threads:
                await asyncio.to_thread(thread.join)
            self._threads = []
            self._backend.close()

    def _check(self, items: Sequence[Encoded]) -> None:
        if self._death is not None:
            raise Unavailable(self._death)
        if self._stopping or not self._threads:
            raise Unavailable("the server is stopping" if self._stopping else "the engine was not started")
        tokens = 0
        for position, item in enumerate(items):
            length = length_of(item)
            tokens += length
            if not item.prompt_ids:
                raise InputError(f"item {position}: the prompt has no tokens, so there is no value before the answer")
            if length > self.info.max_tokens:
                raise InputError(
                    f"item {position}: prompt and response are {length} tokens, but the model reads at most "
                    f"{self.info.max_tokens}; shorten the text"
                )
        if tokens > self._queue_tokens:
            raise InputError(
                f"the request has {tokens} tokens, but at most {self._queue_tokens} are taken at once; split it"
            )
        if self._waiting_tokens + tokens > self._queue_tokens:
            seconds = self._waiting_tokens / self._rate if self._rate else 1.0
            raise Overloaded(self._waiting_tokens, min(60, int(seconds) + 1))

    def _drop(self, request: Request) -> None:
        for entry in [e for e in self._waiting if e.request is request]:
            self._remove(entry)
        self._note_idle()

    def _remove(self, entry: Waiting) -> None:
        del self._waiting[entry]
        self._waiting_tokens -= entry.tokens

    def _note_idle(self) -> None:
        if self._waiting or self._running:
            self._idle.clear()
        else:
            self._idle.set()

    def _begin_soon(self) -> None:
        """Begins what waits; an engine that knows its speed first gives those the time to come who did before."""
        self._note_idle()
        missing = self._most_open - self._open
        if not self._rate or missing <= 0 or (self._running and missing > _MOST_MISSING):
            self._next_batches()
        elif self._gathering is None:
            patience = min(_PATIENCE * self._waiting_tokens / self._rate, _MOST_PATIENCE)
            self._gathering = asyncio.get_running_loop().call_later(patience, self._next_batches)

    def _next_batches(self) -> None:
        """Hands a batch to every worker that has none, as long as something waits."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        # A batch that has the machine for itself goes to the first worker every time: each worker that runs one gets
        # threads of its own for the other cores.
        while (free := [n for n in range(self._workers) if n not in self._running]) and self._death is None:
            waiting = self._ready()
            if not waiting or any(batch.alone for batch in self._running.values()):
                break
            # What has to wait for one prompt cannot be shared by the workers, so it may as well go together.
            alone = not self._running and self._wait_for_one_prompt(waiting)
            cost = cost_of(waiting, self._computed)
            parts = 1 if alone else max(1, min(len(free), round(cost / _FAIR_SHARE)))
            entries = choose(waiting, -(-cost // parts), self._batch_tokens, self._computed)
            for entry in entries:
                self._remove(entry)
            alone = alone or not (self._running or self._waiting)
            watchdog = asyncio.get_running_loop().call_later(self._batch_seconds, self._hung)
            self._running[free[0]] = _Running(entries, alone, watchdog)
            self._inboxes[free[0]].put(([entry.item for entry in entries], alone))
        self._note_idle()

    def _ready(self) -> list[Waiting]:
        """What waits, without the texts whose prompt another batch computes now: after that it need not be computed."""
        if not self._running:
            return list(self._waiting)
        in_work = {entry.prompt for batch in self._running.values() for entry in batch.entries} - self._computed
        return [e for e in self._waiting if e.prompt not in in_work or len(e.item.prompt_ids) < _WORTH_WAITING]

    def _wait_for_one_prompt(self, waiting: list[Waiting]) -> bool:
        """Whether all of it has one prompt, which nobody has computed yet and is worth waiting for."""
        first = waiting[0]
        new = len(first.item.prompt_ids) >= _WORTH_WAITING and first.prompt not in self._computed
        return new and all(entry.prompt == first.prompt for entry in waiting)

    def _finish(self, worker: int, outcome: list[Scored] | Exception, seconds: float) -> None:
        """Takes the outcome of a worker's batch, on the event loop."""
        if worker not in self._running:  # it came after the engine gave up, and those who waited have been told
            return
        running = self._running.pop(worker)
        running.watchdog.cancel()
        batch = running.entries
        for request in {entry.request for entry in batch}:
            request.inference_seconds += seconds
        tokens = sum(entry.tokens for entry in batch)
        if isinstance(outcome, Exception):
            self._fail(batch, outcome)
        else:
            rate = (1 if running.alone else self._workers) * tokens / max(seconds, 1e-6)
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
            self._failed_at = -math.inf
            for entry, scored in zip(batch, outcome, strict=True):
                entry.request.results[entry.position] = scored
                entry.request.missing -= 1
                if not entry.request.missing:
                    _settle(entry.request, None)
            if self._backend.keeps_prompts:
                self._computed |= {entry.prompt for entry in batch}
        self._computed &= {entry.prompt for entry in self._waiting}
        self._most_open = max(self._open, self._most_open - 1)
        self._next_batches()
        if self._on_batch is not None:
            cached = 0 if isinstance(outcome, Exception) else sum(scored.cached_tokens for scored in outcome)
            fill = cost_of(batch) / self._batch_tokens
            self._on_batch(BatchReport(len(batch), tokens, cached, fill, seconds, isinstance(outcome, Exception)))

    def _fail(self, batch: list[Waiting], error: Exception) -> None:
        """A text that failed alone fails its request; of several, nobody knows which, so each is tried alone."""
        if len(batch) == 1:
            self._drop(batch[0].request)
            _settle(batch[0].request, self._blame(batch[0], error))
            return
        again: dict[Waiting, None] = {}
        for entry in batch:
            if not entry.request.done.done():
                entry.suspect = True
                again[entry] = None
                self._waiting_tokens += entry.tokens
        self._waiting = again | self._waiting

    def _blame(self, entry: Waiting, error: Exception) -> Exception:
        """What a request is told whose text failed alone: the text is at fault only where the backend says so."""
        if isinstance(error, InputError | StageError):
            kind = InputError if isinstance(error, InputError) else StageError
            return kind(f"item {entry.position}: {error}")
        self._failed_at = time.monotonic()
        # The error's own message may quote what was sent.
        logger().error("backend_failed", error=type(error).__name__, frames=frames_of(error))
        return Unavailable(
            f"item {entry.position}: the model failed ({type(error).__name__}), which need not be the text's fault; "
            "try again, and tell the server's operator if it stays so"
        )

    def _died(self, reason: str) -> None:
        """A worker thread is gone."""
        if self._death is not None or (self._stopping and not self._running and not self._waiting):
            return
        self._give_up(f"the scoring worker died ({reason}); restart the server")

    def _hung(self) -> None:
        """A batch takes too long."""
        self._hangs = True
        self._give_up(f"the scoring worker hangs (a batch took over {self._batch_seconds:g} s); restart the server")

    def _give_up(self, reason: str) -> None:
        """Nothing will be scored any more: everybody who waits is told."""
        self._death = reason
        for batch in self._running.values():
            batch.watchdog.cancel()
        logger().error("gave_up", reason=reason)
        taken = [entry for batch in self._running.values() for entry in batch.entries]
        for request in {entry.request for entry in [*taken, *self._waiting]}:
            _settle(request, Unavailable(self._death))
        self._running, self._waiting, self._waiting_tokens = {}, {}, 0
        self._note_idle()

    def _work(self, worker: int) -> None:
        """A worker thread: batches in, outcomes out, until it is handed None."""
        reason = "it ended"
        try:
            while (handed := self._inboxes[worker].get()) is not None:
                batch, alone = handed
                began = time.monotonic()
                outcome: list[Scored] | Exception
                try:
                    outcome = self._backend.score(batch, alone=alone)
                    if len(outcome) != len(batch):
                        outcome = RuntimeError(f"the backend gave {len(outcome)} results for {len(batch)} texts")
                except Exception as error:
                    outcome = error
                self._tell(self._finish, worker, outcome, time.monotonic() - began)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._tell(self._died, reason)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed under the worker: nobody is left to tell
                self._loop.call_soon_threadsafe(function, *arguments)


def _settle(request: Request, error: Exception | None) -> None:
    if request.done.done():
        return
    if error is None:
        request.done.set_result(None)
    else:
        request.done.set_exception(error)
