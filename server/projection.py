"""Values on another tokenizer's tokens: what the value model knew when each of them ended."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dvpo.errors import InputError
from server.text import Shown, Span


def spans_of(text: str, tokens: Sequence[str]) -> list[Span]:
    """Where the caller's tokens lie. Raises InputError unless they give the text when joined."""
    if "".join(tokens) != text:
        raise InputError(
            "response_tokens joined are not response; where tokens hold parts of characters, give response_offsets"
        )
    spans, at = [], 0
    for token in tokens:
        spans.append((at, at + len(token)))
        at += len(token)
    return spans


def require_in_order(text: str, spans: Sequence[Span]) -> None:
    """Raises InputError unless the spans lie in the text, one after another (they may touch or share a character)."""
    before = (0, 0)
    for number, (start, end) in enumerate(spans):
        if not start <= end <= len(text):
            raise InputError(
                f"response_offsets[{number}] is [{start}, {end}], but response has {len(text)} characters; "
                "give [start, end) in characters"
            )
        if start < before[0] or end < before[1]:
            raise InputError(f"response_offsets[{number}] begins or ends before the one before it; give them in order")
        before = (start, end)


def project(
    values_S: NDArray[np.float32], shown: Shown, ends_apart: bool, spans: Sequence[Span]
) -> NDArray[np.float32]:
    """h_0 and the value after each of the caller's N tokens. [N + 1].

    A caller's token has the value after the last of the model's tokens that ends at or before its end (h_0 if there
    is none), so that it never depends on what the caller had not yet written. The EOS that is no part of the text is
    read only by a last caller's token of no characters at the end of the text.

    Args:
        values_S: h_0..h_T of the model's tokens.
        shown: the text and the offsets of the model's T tokens.
        spans: the caller's tokens, in order.
    """
    ends = [end for _, end in shown.offsets[: len(shown.offsets) - ends_apart]]
    places = [0, *(bisect_right(ends, end) for _, end in spans)]
    if spans and spans[-1] == (len(shown.text), len(shown.text)):
        places[-1] = len(values_S) - 1
    return values_S[places]
