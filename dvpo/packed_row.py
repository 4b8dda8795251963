"""A packed row: many texts behind one another, what each of them sees, and what is kept of it."""

import threading
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """What is kept of a prompt of P tokens: keys and values of all L layers, and h_0."""

    keys_L_1_H_P_D: Tensor
    values_L_1_H_P_D: Tensor
    h_0: float

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.keys_L_1_H_P_D.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return int(self.keys_L_1_H_P_D.nbytes + self.values_L_1_H_P_D.nbytes)


class Handover:
    """Keys and values of one part of a row, layer by layer, for the parts behind it, which other threads compute.

    first_layer: the first that is computed in parts.
    """

    def __init__(self, first_layer: int = 0) -> None:
        self._first_layer = first_layer
        self._start, self._stop = -1, -1  # what is passed on, from the first token that is wanted to the last
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._failed = False
        self._changed = threading.Condition()

    @property
    def wanted(self) -> bool:
        """Whether anybody asked for anything."""
        return self._stop > 0

    def want(self, place: slice) -> "Passed":
        """Asks for tokens of the part, before it is computed."""
        self._start = place.start if self._start < 0 else min(self._start, place.start)
        self._stop = max(self._stop, place.stop)
        return Passed(self, place)

    def put(self, key: Tensor, value: Tensor) -> None:
        """Passes on the next layer's keys and values, [1, heads, N, D] of the part."""
        with self._changed:
            # Cloned, so that the rest of the part's need not be kept.
            self._layers.append(
                (key[:, :, self._start : self._stop].clone(), value[:, :, self._start : self._stop].clone())
            )
            self._changed.notify_all()

    def fail(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def get(self, layer: int, place: slice) -> tuple[Tensor, Tensor]:
        """Waits for a layer's keys and values of some tokens. Raises RuntimeError where they will not come."""
        at = layer - self._first_layer
        with self._changed:
            self._changed.wait_for(lambda: self._failed or len(self._layers) > at)
            if len(self._layers) <= at:
                raise RuntimeError("an earlier part of the row failed")
            key, value = self._layers[at]
        here = slice(place.start - self._start, place.stop - self._start)
        return key[:, :, here], value[:, :, here]


@dataclass(frozen=True)
class Passed:
    """Tokens of an earlier part of the row, by their place there."""

    handover: Handover
    place: slice

    @property
    def length(self) -> int:
        """How many."""
        return int(self.place.stop - self.place.start)


Earlier = slice | Prefix | Passed
"""Tokens that stand before others: in the same row, kept from a former one, or in an earlier part of this one."""


@dataclass
class Segment:
    """Tokens [start, stop) of the row that attend to themselves, causally, and to all of what stands before them."""

    start: int
    stop: int
    before: tuple[Earlier, ...] = ()

    @property
    def keys(self) -> int:
        """Tokens that its last token sees."""
        return sum(map(_length, self.before)) + self.stop - self.start


class Kept:
    """Collects a prompt's keys and values, in one tensor each: many small ones would lie scattered in memory."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.count = 0

    def put(self, key_1_H_P_D: Tensor, value_1_H_P_D: Tensor) -> None:
        """Takes the next layer's."""
        if not self.count:
            self.keys_L_1_H_P_D, self.values_L_1_H_P_D = (
                of.new_empty(self.layers, *of.shape) for of in (key_1_H_P_D, value_1_H_P_D)
            )
        self.keys_L_1_H_P_D[self.count] = key_1_H_P_D
        self.values_L_1_H_P_D[self.count] = value_1_H_P_D
        self.count += 1

    def fill(self, keys_L_1_H_P_D: Tensor, values_L_1_H_P_D: Tensor) -> None:
        """Takes all layers' at once."""
        self.keys_L_1_H_P_D, self.values_L_1_H_P_D = keys_L_1_H_P_D, values_L_1_H_P_D
        self.count = self.layers


@dataclass
class Packing:
    """How a row is read.

    keep, kept: prompts whose keys and values are to be collected, by group, and what collects them. wanted: where the
    last hidden state is read, if not everywhere; a model may leave out the others after its last layer. handover:
    given where later parts of the row are computed beside it. `masks`, `rotation` and `together` serve all layers, each
    form of which keeps there what it needs.
    """

    segments: list[Segment] = field(default_factory=list)
    keep: dict[int, tuple[Earlier, ...]] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    wanted: list[int] | None = None
    handover: Handover | None = None
    masks: dict[int, Tensor] = field(default_factory=dict)
    rotation: Tensor | None = None
    together: "Together | None" = None


@dataclass(frozen=True)
class Together:
    """All segments of a row for one call of an attention that takes texts of many lengths.

    prefixes: the kept prompts, whose keys stand behind those of the row. keys_K: the places of every segment's keys
    there, one segment behind the other; None where that is the row as it is. queries_G1, keys_G1: where each of G
    segments begins, and the last one's end. kept_P: the places of all prompts that are to be kept, one behind the
    other; kept: their keys and values, by layer.
    """

    prefixes: list[Prefix]
    keys_K: Tensor | None
    queries_G1: Tensor
    keys_G1: Tensor
    most_queries: int
    most_keys: int
    kept_P: Tensor | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def keys_of(piece: Earlier, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of earlier tokens, [1, heads, length, D]."""
    if isinstance(piece, Prefix):
        return piece.keys_L_1_H_P_D[layer], piece.values_L_1_H_P_D[layer]
    if isinstance(piece, Passed):
        return piece.handover.get(layer, piece.place)
    return key[:, :, piece], value[:, :, piece]


def _length(piece: Earlier) -> int:
    return int(piece.stop - piece.start) if isinstance(piece, slice) else piece.length
