"""A packed row cut into parts that several threads compute at the same time, layer by layer.

With torch's operations two cores on half a row each are done sooner than both on the whole. A token looks at
earlier ones only, so a part needs nothing but the keys and values of the parts before it, which are handed over layer
by layer: all parts work on the same layer at about the same time, and the first never waits.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dvpo.packed_row import Earlier, Handover, Packing, Segment

LEAST_PART = 128
"""Tokens that are worth a core's joining in: fewer are done sooner with all cores on every operation."""
_IDLE_SECONDS = 0.03
"""For so long a core must have had nothing to do before it joins in with another: its next batch may be on its way."""


class Cores:
    """Those of a machine that have nothing to do, as shares that a batch runs on. For several threads.

    threads: that each share has.
    """

    def __init__(self, count: int, threads: int = 1) -> None:
        self.threads = threads
        self._idle = count
        self._since = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def busy(self, count: int) -> Iterator[None]:
        """While something else runs on so many."""
        self._change(-count)
        try:
            yield
        finally:
            self._change(count)

    def claim(self, most: int) -> int:
        """How many may join in: that many are busy until they are released."""
        with self._lock:
            if time.monotonic() - self._since < _IDLE_SECONDS:
                return 0
            found = max(0, min(self._idle, most))
            self._idle -= found
            return found

    @property
    def missing(self) -> int:
        """How many shares fewer there are than are in use: a batch that has several should do with so many fewer."""
        with self._lock:
            return max(0, -self._idle)

    def release(self, count: int) -> None:
        """They have done what they were claimed for."""
        self._change(count)

    def _change(self, by: int) -> None:
        with self._lock:
            self._idle += by
            self._since = time.monotonic()


@dataclass(frozen=True)
class Row:
    """A packed row, or a part of one: how it is read, token ids, positions."""

    packing: Packing
    ids: list[int]
    positions: list[int]


def cut(row: Row, parts: int, width: int) -> list[Row]:
    """The row in at most so many parts that take about as long as each other; see `bounds_of` and `cut_packing`."""
    bounds = bounds_of(row.packing, len(row.ids), parts, width)
    return [
        Row(packing, row.ids[start:stop], row.positions[start:stop])
        for packing, (start, stop) in zip(cut_packing(row.packing, bounds), pairwise(bounds), strict=True)
    ]


def bounds_of(packing: Packing, tokens: int, parts: int, width: int) -> list[int]:
    """Where the parts of a row begin, and the last one's end.

    Args:
        width: of the hidden states. A layer's products grow with it, attention with the tokens that are looked at.
    """
    costs_N = np.ones(tokens)
    # Twice the width: the two parts of a text of 300 tokens, whose model had 576, then took equally long.
    for segment in packing.segments:
        count = segment.stop - segment.start
        costs_N[segment.start : segment.stop] += (np.arange(count) + segment.keys - count) / (2 * width)
    sums_N = costs_N.cumsum()
    ends = np.searchsorted(sums_N, sums_N[-1] * np.arange(1, parts) / parts).tolist() if parts > 1 else []
    return sorted({0, *ends, tokens})


def cut_packing(whole: Packing, bounds: Sequence[int], first_layer: int = 0) -> list[Packing]:
    """How every part is read, from a layer on; what is kept of prompts is collected for the whole row."""
    handovers = [Handover(first_layer) for _ in bounds[1:]]
    return [_packing(whole, bounds, handovers, part) for part in range(len(handovers))]


def _packing(whole: Packing, bounds: Sequence[int], handovers: Sequence[Handover], part: int) -> Packing:
    """How one part is read. Asks the parts before it for what it needs."""
    start, stop = bounds[part], bounds[part + 1]

    def seen(piece: Earlier) -> tuple[Earlier, ...]:
        if not isinstance(piece, slice):
            return (piece,)
        found: list[Earlier] = []
        for other, (first, last) in enumerate(pairwise(bounds[: part + 2])):
            here = slice(max(piece.start, first) - first, min(piece.stop, last) - first)
            if here.start < here.stop:
                found.append(here if other == part else handovers[other].want(here))
        return tuple(found)

    packing = Packing(handover=handovers[part], kept=whole.kept)
    if whole.wanted is not None:
        packing.wanted = [place - start for place in whole.wanted if start <= place < stop]
    for segment in whole.segments:
        first, last = max(segment.start, start), min(segment.stop, stop)
        if first < last:
            own = (slice(segment.start, first),) if segment.start < first else ()
            before = tuple(p for piece in (*segment.before, *own) for p in seen(piece))
            packing.segments.append(Segment(first - start, last - start, before))
    for index, pieces in whole.keep.items():
        end = max(piece.stop for piece in pieces if isinstance(piece, slice))
        if start < end <= stop:
            packing.keep[index] = tuple(p for piece in pieces for p in seen(piece))
    return packing


def run_together(run: Callable[[int], Tensor], packings: Sequence[Packing], threads: int) -> list[Tensor]:
    """`run` of every part by its number, the first in this thread and the others in threads of their own.

    Args:
        threads: torch's, for each part.

    Raises what a part raised that failed by itself.
    """
    before = torch.get_num_threads()
    results: list[Tensor | BaseException] = [torch.empty(0)] * len(packings)

    def run_part(index: int) -> None:
        torch.set_num_threads(threads)  # of this thread only
        try:
            results[index] = run(index)
        except BaseException as error:
            results[index] = error
            fail(packings[index])

    def fail(packing: Packing) -> None:
        if packing.handover is not None:
            packing.handover.fail()

    others = [threading.Thread(target=run_part, args=(i,), name=f"part-{i}") for i in range(1, len(packings))]
    try:
        for other in others:
            other.start()
    except BaseException:  # no room for a thread: those that run would wait for ever
        for packing in packings:
            fail(packing)
        raise
    run_part(0)
    for other in others:
        other.join()
    torch.set_num_threads(before)
    found: list[Tensor] = []
    for result in results:  # the parts behind one that failed have failed for its sake
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
