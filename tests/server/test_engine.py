"""The engine as a client sees it, over a backend that is told what to do; and over a real one, with many clients."""

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from dvpo.data.templates import Encoded
from dvpo.errors import InputError, StageError
from server.backends import ModelInfo, Scored
from server.backends.transformers import TransformersBackend
from server.engine import Engine
from server.outcomes import BatchReport, Overloaded, Unavailable

BAD = 666


class Fake:
    """Gives every token its own id as value. `gate` holds a batch back; token BAD fails the batch that holds it."""

    def __init__(self, max_tokens: int = 1000) -> None:
        self.info = ModelInfo("gvm", "fake", "0", "0", "float32", "fake", max_tokens)
        self.keeps_prompts = True
        self.batches: list[list[Encoded]] = []
        self.alone: list[bool] = []
        self.gate = threading.Event()
        self.gate.set()
        self.action: Callable[[], None] | None = None
        self.closed = False

    def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
        self.batches.append(list(items))
        self.alone.append(alone)
        assert self.gate.wait(20)
        if self.action:
            self.action()
        if any(BAD in item.response_ids for item in items):
            raise StageError("text 0 has a value that is not finite")
        return [Scored(np.float32([item.prompt_ids[-1], *item.response_ids]), 0) for item in items]

    def close(self) -> None:
        self.closed = True


def item(response: list[int], prompt: Sequence[int] = (1,)) -> Encoded:
    return Encoded(list(prompt), response)


def run(work: Callable[[Engine], Coroutine[Any, Any, None]], backend: Fake, **options: Any) -> Engine:
    """Runs `work` against a started engine, with a limit on its time: nothing here may hang."""

    async def all_of_it() -> Engine:
        engine = Engine(backend, **options)
        engine.start()
        async with asyncio.timeout(20):
            await work(engine)
            backend.gate.set()
            await engine.stop()
        return engine

    return asyncio.run(all_of_it())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def hold(engine: Engine, backend: Fake) -> asyncio.Task:
    """Occupies the worker with one text until the gate is opened."""
    backend.gate.clear()
    task = asyncio.ensure_future(engine.submit([item([9])]))
    await until(lambda: len(backend.batches) == 1)
    return task


def test_every_client_gets_its_own_values_in_its_own_order() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        requests = [[item([c, i, *range(i)]) for i in range(4)] for c in range(20)]
        replies = await asyncio.gather(*map(engine.submit, requests))
        for request, reply in zip(requests, replies, strict=True):
            assert [s.values_S[1:].tolist() for s in reply.scored] == [i.response_ids for i in request]
            assert reply.queue_seconds >= 0 and reply.inference_seconds > 0
        assert (await engine.submit([])).scored == []

    run(work, backend)
    assert backend.closed
    assert len(backend.batches) < 20


def test_batches_keep_to_the_budget_and_count_a_shared_prompt_once() -> None:
    backend = Fake()
    reports: list[BatchReport] = []

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        group = asyncio.ensure_future(engine.submit([item([i], range(1, 51)) for i in range(20)]))
        others = asyncio.ensure_future(engine.submit([item([i] * 10, [i + 1] * 20) for i in range(10)]))
        await asyncio.sleep(0)
        assert engine.stats().waiting_items == 30 and engine.stats().waiting_tokens == 20 * 51 + 10 * 30
        backend.gate.set()
        await asyncio.gather(held, group, others)

    run(work, backend, batch_tokens=100, on_batch=reports.append)
    for batch in backend.batches:
        prompts = {tuple(i.prompt_ids) for i in batch}
        assert sum(map(len, prompts)) + sum(len(i.response_ids) for i in batch) <= 100
    # 50 + 20 tokens of the group leave room for one of the others.
    assert [len(b) for b in backend.batches] == [1, 21, 3, 3, 3]
    assert reports[1].fill == 1.0 and reports[1].items == 21 and not reports[1].failed


def test_lengths_of_a_batch_are_near_and_the_oldest_is_never_passed_over() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        lengths = [90, 5, 80, 6, 85, 4]
        tasks = [asyncio.ensure_future(engine.submit([item([1] * n, [n])])) for n in lengths]
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(held, *tasks)

    run(work, backend, batch_tokens=200)
    assert [sorted(len(i.response_ids) for i in b) for b in backend.batches[1:]] == [[85, 90], [4, 5, 6, 80]]


def test_a_text_over_the_budget_runs_by_itself() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        await engine.submit([item([1] * 500), item([2] * 3, [2])])

    run(work, backend, batch_tokens=100)
    assert [[len(i.response_ids) for i in b] for b in backend.batches] == [[500], [3]]


def test_nobody_starves_under_a_stream_of_better_fitting_texts() -> None:
    backend = Fake()
    backend.action = lambda: time.sleep(0.002)

    async def work(engine: Engine) -> None:
        async def stream() -> None:
            while True:
                await engine.submit([item([1] * 10) for _ in range(10)])

        streams = [asyncio.ensure_future(stream()) for _ in range(4)]
        await asyncio.sleep(0.02)
        before = len(backend.batches)
        await engine.submit([item([7] * 90, [3])])
        assert len(backend.batches) - before <= 8
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    run(work, backend, batch_tokens=120)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        waiting = asyncio.ensure_future(engine.submit([item([1] * 79)]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await engine.submit([item([1] * 50)])
        assert 1 <= refused.value.retry_after_seconds <= 60
        assert engine.stats().waiting_tokens == 80
        small = asyncio.ensure_future(engine.submit([item([1] * 10)]))
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(held, waiting, small)
        await engine.submit([item([1] * 50)])
        with pytest.raises(InputError, match="the request has 202 tokens, but at most 100 are taken at once"):
            await engine.submit([item([1] * 100)] * 2)

    run(work, backend, queue_tokens=100)


def test_a_client_that_leaves_costs_nothing_more() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        requests = [item([5], [5])] * 10, [item([6], [6])]
        leaves, stays = [asyncio.ensure_future(engine.submit(request)) for request in requests]
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.wait([leaves])
        assert (engine.stats().waiting_items, engine.stats().waiting_tokens) == (1, 2)
        held.cancel()  # this one runs already; its result is for nobody
        backend.gate.set()
        assert (await stays).scored[0].values_S.tolist() == [6, 6]
        assert leaves.cancelled()

    run(work, backend)
    assert [[i.prompt_ids for i in b] for b in backend.batches] == [[[1]], [[6]]]


def test_a_bad_text_fails_alone() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        bad = asyncio.ensure_future(engine.submit([item([2]), item([BAD]), item([3])]))
        good = [asyncio.ensure_future(engine.submit([item([i])])) for i in range(5)]
        await asyncio.sleep(0)
        backend.gate.set()
        with pytest.raises(StageError, match="item 1: text 0 has a value that is not finite"):
            await bad
        assert [(await g).scored[0].values_S[1] for g in good] == list(range(5))
        await held
        assert (await engine.submit([item([4])])).scored[0].values_S[1] == 4
        assert engine.stats().waiting_tokens == 0

    run(work, backend)


def test_a_backend_that_loses_results_is_an_error() -> None:
    backend = Fake()
    backend.score = lambda items, alone: []  # type: ignore[method-assign]

    async def work(engine: Engine) -> None:
        with pytest.raises(Unavailable, match="the model failed"):
            await engine.submit([item([1])])

    run(work, backend)


def die() -> None:
    raise SystemExit("told to")


def kill_this_thread() -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit))
    time.sleep(0.05)


@pytest.mark.parametrize("end", [die, kill_this_thread])
def test_a_dead_worker_is_said_to_all_who_wait_and_all_who_come(end: Callable[[], None]) -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        waiting = asyncio.ensure_future(engine.submit([item([1])]))
        await asyncio.sleep(0)
        backend.action = end
        backend.gate.set()
        for task in (held, waiting):
            with pytest.raises(Unavailable, match=r"the scoring worker died .*restart the server"):
                await task
        with pytest.raises(Unavailable, match="died"):
            await engine.submit([item([1])])
        assert not engine.stats().accepting

    run(work, backend)


def test_stop_finishes_what_was_taken_and_refuses_the_rest() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        with pytest.raises(Unavailable, match="not started"):
            await Engine(Fake()).submit([item([1])])
        held = await hold(engine, backend)
        waiting = asyncio.ensure_future(engine.submit([item([5])]))
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stopping"):
            await engine.submit([item([1])])
        backend.gate.set()
        await stopping
        assert held.done() and (await waiting).scored[0].values_S[1] == 5

    run(work, backend)
    assert backend.closed


@pytest.mark.parametrize(
    ("bad", "said"),
    [(item([1], []), "item 1: the prompt has no tokens"), (item([1] * 30), "item 1: .* are 31 tokens, .* at most 20")],
)
def test_what_can_never_be_scored_is_refused_at_once(bad: Encoded, said: str) -> None:
    backend = Fake(max_tokens=20)

    async def work(engine: Engine) -> None:
        with pytest.raises(InputError, match=said):
            await engine.submit([item([1]), bad])

    run(work, backend)
    assert not backend.batches


def test_workers_take_a_fair_share_each_and_run_at_the_same_time() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        backend.gate.clear()
        task = asyncio.ensure_future(engine.submit([item([i] * 499) for i in range(9)]))
        await until(lambda: len(backend.batches) == 2)
        assert engine.stats().running_items == 9 and engine.stats().waiting_items == 0
        backend.gate.set()
        assert [s.values_S[1] for s in (await task).scored] == list(range(9))

    run(work, backend, workers=2, batch_tokens=4096)
    assert sorted(map(len, backend.batches)) == [4, 5]
    assert not any(backend.alone)


def test_the_only_free_worker_takes_what_waits() -> None:
    backend = Fake(max_tokens=3000)

    async def work(engine: Engine) -> None:
        backend.gate.clear()
        first = asyncio.ensure_future(engine.submit([item([1] * 1999), item([2] * 1999)]))
        await until(lambda: len(backend.batches) == 2)
        rest = [asyncio.ensure_future(engine.submit([item([i] * 499)])) for i in range(4)]
        await until(lambda: engine.stats().waiting_items == 4)
        backend.gate.set()
        await asyncio.gather(first, *rest)

    run(work, backend, workers=2, batch_tokens=4096)
    assert list(map(len, backend.batches)) == [1, 1, 4]


@pytest.mark.parametrize(("texts", "batches"), [(3, [3]), (4, [4]), (5, [2, 3]), (6, [3, 3])])
def test_a_little_more_than_a_share_is_one_batch_and_more_is_divided_evenly(texts: int, batches: list[int]) -> None:
    backend = Fake()
    run(lambda engine: engine.submit([item([i] * 124) for i in range(texts)]), backend, workers=2)
    assert sorted(map(len, backend.batches)) == batches


def test_what_fits_one_batch_has_the_machine_for_itself() -> None:
    backend = Fake(max_tokens=3000)

    async def work(engine: Engine) -> None:
        backend.gate.clear()
        tasks = [asyncio.ensure_future(engine.submit([item([i] * 50) for i in range(8)]))]
        await until(lambda: len(backend.batches) == 1)
        tasks.append(asyncio.ensure_future(engine.submit([item([1] * 2000), item([2] * 2000)])))
        await asyncio.sleep(0.05)
        assert len(backend.batches) == 1
        backend.gate.set()
        await asyncio.gather(*tasks)

    run(work, backend, workers=4)
    assert [len(batch) for batch in backend.batches] == [8, 1, 1]
    assert backend.alone == [True, False, False]


@pytest.mark.parametrize(("prompt_tokens", "batches"), [(1000, 2), (10, 3)])
def test_a_text_waits_for_a_long_prompt_that_is_computed_now(prompt_tokens: int, batches: int) -> None:
    backend = Fake(max_tokens=3000)

    async def work(engine: Engine) -> None:
        backend.gate.clear()
        items = [item([9] * 1500), *(item([i] * 1500, [3] * prompt_tokens) for i in range(2))]
        task = asyncio.ensure_future(engine.submit(items))
        await until(lambda: len(backend.batches) == batches)
        await asyncio.sleep(0.05)
        assert len(backend.batches) == batches
        backend.gate.set()
        await task

    run(work, backend, workers=3)
    assert len(backend.batches) == 3


def test_a_group_goes_as_one_and_what_is_too_much_for_a_batch_is_shared_when_its_prompt_is_known() -> None:
    backend = Fake(max_tokens=3000)

    async def work(engine: Engine) -> None:
        backend.gate.clear()
        task = asyncio.ensure_future(engine.submit([item([i] * 1500, [3] * 1000) for i in range(6)]))
        await until(lambda: len(backend.batches) == 1)
        await asyncio.sleep(0.05)
        assert len(backend.batches[0]) == 2 and len(backend.batches) == 1
        backend.action = backend.gate.clear  # for those that come after it
        backend.gate.set()
        await until(lambda: len(backend.batches) == 3)
        backend.action = None
        backend.gate.set()
        await task

    run(work, backend, workers=2, batch_tokens=4096)
    assert backend.alone[:3] == [True, False, False]


async def company(engine: Engine) -> None:
    """Four requests at once: a batch of one, which comes first, and one of three."""
    await asyncio.gather(*(engine.submit([item([1])]) for _ in range(4)))


def test_an_engine_waits_a_little_for_those_who_came_together_before() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        backend.action = lambda: time.sleep(0.2)
        await company(engine)
        backend.batches.clear()
        tasks = [asyncio.ensure_future(engine.submit([item([i])])) for i in range(3)]
        await asyncio.gather(*tasks)

        assert [len(batch) for batch in backend.batches] == [3]

    run(work, backend)


def test_a_free_worker_waits_a_little_while_another_runs() -> None:
    """Of two batches one is done; those it was of come again, one after the other, and go together."""

    class Uneven(Fake):
        def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
            scored = super().score(items, alone=alone)
            time.sleep(0.5 if any(2 in each.response_ids for each in items) else 0.1)
            return scored

    backend = Uneven()

    async def work(engine: Engine) -> None:
        await asyncio.gather(*(engine.submit([item([1] * 400)]) for _ in range(6)))
        slow = [asyncio.ensure_future(engine.submit([item([token] * 400)])) for token in (2, 3, 3, 3)]
        await slow[3]
        backend.batches.clear()
        again = []
        for _ in range(2):
            again.append(asyncio.ensure_future(engine.submit([item([4] * 400)])))
            await asyncio.sleep(0)
        await asyncio.gather(*slow, *again)
        assert [len(batch) for batch in backend.batches] == [2]

    run(work, backend, workers=2, batch_tokens=4096)


def test_an_engine_with_one_client_waits_for_nobody() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        await company(engine)
        for _ in range(3):
            await engine.submit([item([1])])
        for number in range(2, 5):
            task = asyncio.ensure_future(engine.submit([item([number])]))
            await asyncio.sleep(0)
            assert engine.stats().running_items == 1
            await task

    run(work, backend)


def test_a_slow_first_batch_makes_nobody_wait_long() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        backend.action = lambda: time.sleep(0.5)
        await asyncio.gather(*(engine.submit([item([], [1])]) for _ in range(2)))  # some tokens a second
        backend.action = None
        began = time.monotonic()
        await engine.submit([item([1] * 400)])
        assert time.monotonic() - began < 1  # not 8 s

    run(work, backend)


def test_what_came_before_a_stop_is_scored_though_nothing_has_begun() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        backend.action = lambda: time.sleep(0.2)
        await company(engine)
        before = len(backend.batches)
        task = asyncio.ensure_future(engine.submit([item([2]), item([3])]))
        await asyncio.sleep(0)
        assert len(backend.batches) == before
        await engine.stop()
        assert [s.values_S[1] for s in (await task).scored] == [2, 3]

    run(work, backend)


def test_a_prompt_that_the_backend_does_not_keep_is_counted_again() -> None:
    backend = Fake(max_tokens=3000)
    backend.keeps_prompts = False
    run(lambda engine: engine.submit([item([i] * 100, [3] * 1000) for i in range(12)]), backend, batch_tokens=1400)
    assert [len(batch) for batch in backend.batches] == [4, 4, 4]


def test_when_one_of_several_workers_dies_all_are_told() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        backend.gate.clear()
        tasks = [asyncio.ensure_future(engine.submit([item([i] * 900)])) for i in range(2)]
        await until(lambda: len(backend.batches) == 1)
        tasks.append(asyncio.ensure_future(engine.submit([item([5])])))
        await asyncio.sleep(0)
        backend.action = die
        backend.gate.set()
        for task in tasks:
            with pytest.raises(Unavailable, match="died"):
                await task

    run(work, backend, workers=2)
    assert backend.closed


def test_a_failing_observer_stops_nothing() -> None:
    backend = Fake()

    def observer(report: BatchReport) -> None:
        raise RuntimeError("no metrics today")

    async def work(engine: Engine) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        for i in range(3):
            assert (await engine.submit([item([i])])).scored[0].values_S[1] == i

    run(work, backend, on_batch=observer)


def test_a_group_in_requests_of_their_own_computes_its_prompt_once(checkpoints) -> None:
    backend = TransformersBackend(checkpoints["llama", "value"])
    alone = TransformersBackend(checkpoints["llama", "value"], exact=True)
    prompt = list(range(1, 31))
    items = [item([i, i + 1], prompt) for i in range(8)]

    async def work() -> None:
        engine = Engine(backend)
        engine.start()
        replies = await asyncio.gather(*(engine.submit([i]) for i in items))
        await engine.stop()
        scored = [r.scored[0] for r in replies]
        assert sorted(s.cached_tokens for s in scored) == [0] + [30] * 7
        for one, expected in zip(scored, alone.score(items), strict=True):
            assert np.abs(one.values_S - expected.values_S).max() <= 1e-5

    asyncio.run(work())


def test_the_limits_themselves_are_allowed() -> None:
    """A text as long as the model reads, and a queue that is full to the last token."""
    backend = Fake(max_tokens=80)

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        waiting = [asyncio.ensure_future(engine.submit([item([1] * n)])) for n in (79, 19)]
        await asyncio.sleep(0)
        assert engine.stats().waiting_tokens == 100
        engine._rate = 1e-3
        with pytest.raises(Overloaded) as refused:
            await engine.submit([item([1])])
        assert refused.value.retry_after_seconds == 60
        backend.gate.set()
        await asyncio.gather(held, *waiting)

    run(work, backend, queue_tokens=100)


def test_nothing_more_of_a_failed_request_is_scored() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        bad = asyncio.ensure_future(engine.submit([item([BAD]), item([3]), item([4])]))
        await asyncio.sleep(0)
        backend.gate.set()
        with pytest.raises(StageError, match="item 0"):
            await bad
        await held
        await engine.submit([item([5])])

    run(work, backend)
    assert [[i.response_ids for i in b] for b in backend.batches] == [[[9]], [[BAD], [3], [4]], [[BAD]], [[5]]]


async def hold_again(engine: Engine, backend: Fake, held: asyncio.Task) -> None:
    """Lets the first batch go and holds back the next one."""
    backend.action = backend.gate.clear
    backend.gate.set()
    await held
    backend.action = None
    await until(lambda: len(backend.batches) == 2)


def test_those_of_a_failed_batch_are_tried_before_those_who_came_later() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        first = [asyncio.ensure_future(engine.submit([item([i])])) for i in (BAD, 3)]
        await asyncio.sleep(0)
        await hold_again(engine, backend, held)
        later = asyncio.ensure_future(engine.submit([item([7])]))
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(*first, later, return_exceptions=True)

    run(work, backend)
    assert [i.response_ids for b in backend.batches[2:] for i in b] == [[BAD], [3], [7]]


def test_who_left_a_batch_that_fails_is_not_tried_again() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        held = await hold(engine, backend)
        leaves, stays = [asyncio.ensure_future(engine.submit([item([i])])) for i in (3, BAD)]
        await asyncio.sleep(0)
        await hold_again(engine, backend, held)
        leaves.cancel()
        await asyncio.wait([leaves])
        backend.gate.set()
        with pytest.raises(StageError):
            await stays

    run(work, backend)
    assert [i.response_ids for b in backend.batches[2:] for i in b] == [[BAD]]


def test_the_times_of_a_request_are_those_of_its_batches() -> None:
    backend = Fake()
    backend.action = lambda: time.sleep(0.1)

    async def work(engine: Engine) -> None:
        reply = await engine.submit([item([1] * 90), item([2] * 90, [2])])
        assert len(backend.batches) == 2
        assert reply.inference_seconds >= 0.2
        assert reply.queue_seconds < 0.1

    run(work, backend, batch_tokens=100)


def test_the_speed_is_that_of_all_workers_and_moves_slowly() -> None:
    backend = Fake()

    async def work(engine: Engine) -> None:
        engine._rate = 1000.0
        await engine.submit([item([1] * 9)])  # alone: its own speed
        assert engine.stats().tokens_per_second > 800
        slow = engine.stats().tokens_per_second
        backend.action = lambda: time.sleep(0.2)
        await engine.submit([item([1] * 9)])
        assert engine.stats().tokens_per_second == pytest.approx(0.8 * slow, rel=0.1)

    run(work, backend)


def test_no_prompt_is_remembered_when_nothing_waits_for_it() -> None:
    backend = Fake()
    engine = run(lambda e: e.submit([item([1], range(1, 80)), item([2], range(1, 80))]), backend)
    assert not engine._computed
