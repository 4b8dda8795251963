"""Texts of like length together, so that little padding is computed."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def buckets(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Cuts texts into batches of `rows` by length, longest first: what is too large for memory fails at the start.

    Texts that fit one batch keep their order.

    Args:
        lengths: tokens of each text.

    Returns:
        The texts' indices, batch by batch; the last batch may be short.
    """
    order = list(range(len(lengths)))
    if len(order) > rows:
        order.sort(key=lambda i: lengths[i], reverse=True)
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def places(batches: Sequence[Sequence[int]]) -> list[int]:
    """Where each text's result is once the batches' results are joined: `joined[places]` is in the texts' order."""
    order = [i for batch in batches for i in batch]
    return sorted(range(len(order)), key=order.__getitem__)


def of_like_length(texts: Sequence[T], length: Callable[[T], int], batch_size: int, window: int, seed: int) -> list[T]:
    """The texts of a training in another order: a batch holds texts of like length, so that little padding is computed.

    Texts move within a window of so many batches only, whose full batches stand in a seeded order.
    """
    rng = random.Random(seed)
    ordered: list[T] = []
    for start in range(0, len(texts), window * batch_size):
        texts_of_window = sorted(texts[start : start + window * batch_size], key=length)
        short = len(texts_of_window) % batch_size
        batches = [texts_of_window[i : i + batch_size] for i in range(short, len(texts_of_window), batch_size)]
        rng.shuffle(batches)
        ordered += [text for batch in batches for text in batch] + texts_of_window[:short]
    return ordered


def epochs_of(texts: Sequence[T], epochs: float, seed: int) -> list[T]:
    """All texts of a training: every epoch in a seeded order of its own, the last one perhaps in part.

    At least one text, where there is any.
    """
    rng = random.Random(seed)
    count = round(epochs * len(texts)) or min(1, len(texts))
    ordered: list[T] = []
    while len(ordered) < count:
        ordered += rng.sample(texts, len(texts))
    return ordered[:count]
