"""A packed row cut into parts that several threads compute at the same time, layer by layer.

Two cores on half a row each are done sooner than both on every operation of the whole row. A token looks at earlier
ones only, so a part needs nothing but the keys and values of the parts before it, which are handed over layer by layer:
all parts work on the same layer at about the same time, and the first never waits.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dvpo.packed_attention import Earlier, Handover, Packing, Segment


@dataclass(frozen=True)
class Row:
    """A packed row, or a part of one: how attention reads it, token ids, positions, and where a value is wanted."""

    packing: Packing
    ids: list[int]
    positions: list[int]
    wanted: list[int]


def cut(row: Row, parts: int, width: int) -> list[Row]:
    """The row in at most so many parts that take about as long as each other.

    Args:
        width: of the hidden states. A layer's products grow with it, attention with the tokens that are looked at.
    """
    costs_N = np.ones(len(row.ids))
    for segment in row.packing.segments:
        count = segment.stop - segment.start
        costs_N[segment.start : segment.stop] += (np.arange(count) + segment.keys - count) / (3 * width)
    sums_N = costs_N.cumsum()
    ends = np.searchsorted(sums_N, sums_N[-1] * np.arange(1, parts) / parts).tolist() if parts > 1 else []
    bounds = sorted({0, *ends, len(row.ids)})
    handovers = [Handover() for _ in bounds[1:]]
    packings = [_packing(row.packing, bounds, handovers, part) for part in range(len(handovers))]
    return [
        Row(
            packing,
            row.ids[start:stop],
            row.positions[start:stop],
            [place - start for place in row.wanted if start <= place < stop],
        )
        for packing, (start, stop) in zip(packings, pairwise(bounds), strict=True)
    ]


def _packing(whole: Packing, bounds: Sequence[int], handovers: Sequence[Handover], part: int) -> Packing:
    """How attention reads one part. Asks the parts before it for what it needs."""
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

    packing = Packing(handover=handovers[part])
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


def run_together(run: Callable[[Row], Tensor], parts: Sequence[Row]) -> list[Tensor]:
    """`run` of every part, the first in this thread and the others in threads of their own; torch's threads are shared.

    Raises what a part raised that failed by itself.
    """
    threads = torch.get_num_threads()
    results: list[Tensor | BaseException] = [torch.empty(0)] * len(parts)

    def run_part(index: int) -> None:
        torch.set_num_threads(max(1, threads // len(parts)))  # of this thread only
        try:
            results[index] = run(parts[index])
        except BaseException as error:
            results[index] = error
            if (handover := parts[index].packing.handover) is not None:
                handover.fail()

    others = [threading.Thread(target=run_part, args=(i,), name=f"part-{i}") for i in range(1, len(parts))]
    try:
        for other in others:
            other.start()
    except BaseException:  # no room for a thread: those that run would wait for ever
        for part in parts:
            if part.packing.handover is not None:
                part.packing.handover.fail()
        raise
    run_part(0)
    for other in others:
        other.join()
    torch.set_num_threads(threads)
    found: list[Tensor] = []
    for result in results:  # the parts behind one that failed have failed for its sake
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
