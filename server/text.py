"""From text to token ids, once, and from token ids to the characters that each of them stands for.

Not for several threads at once: the tokenizer is not made for it. The service gives it a thread of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dvpo.data.records import Message
from dvpo.data.templates import Trajectory, encode_prompt
from dvpo.errors import InputError

Span = tuple[int, int]
FRAGMENT = "\ufffd"
"""What stands for a token that holds a part of a character."""
_MOST_HELD = 12
"""Tokens in which a character must have come: a byte each, it has four at most. The library decodes all that it holds
back again with every token more, which for thousands of broken ones would take half a minute.
"""


@dataclass(frozen=True)
class Response:
    """A response as the T token ids that are scored.

    text: as given, or None where ids were given.
    spans: the tokenizer's own alignment with `text`, without the appended EOS.
    ends_apart: the last token is an EOS that is no part of the text.
    """

    ids: list[int]
    text: str | None
    spans: list[Span]
    ends_apart: bool


@dataclass(frozen=True)
class Shown:
    """A response for readers: its text, and each token's text and [start, end) in characters of it."""

    text: str
    tokens: list[str]
    offsets: list[Span]


class Codec:
    """The served model's tokenizer, both ways."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1  # there may be gaps
        self._spelt: dict[int, bytes] = {}  # what was asked for; no more than the vocabulary

    def prompt_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """A plain text. Special tokens are added only if asked for, and never a BOS before one that the text has."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        bos = self._tokenizer.bos_token_id
        return ids[1:] if add_special_tokens and bos is not None and ids[:2] == [bos, bos] else ids

    def chat_ids(self, messages: Sequence[Message], trajectory: Trajectory = ()) -> list[int]:
        """Messages up to where the assistant begins to answer. Raises InputError where the template refuses them."""
        return encode_prompt(self._tokenizer, messages, trajectory)

    def response(self, text: str, append_eos: bool) -> Response:
        """A text, with EOS after it if it is asked for and not there already."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        eos = self._tokenizer.eos_token_id
        apart = append_eos and (not ids or ids[-1] != eos)
        return Response([*ids, eos] if apart else ids, text, spans, apart)

    def sampled(self, ids: list[int]) -> Response:
        """What a policy sampled. Raises InputError for an id that the tokenizer does not have."""
        self.require_known(ids)
        return Response(ids, None, [], bool(ids) and ids[-1] == self._tokenizer.eos_token_id)

    def require_known(self, ids: Sequence[int]) -> None:
        """Raises InputError for an id that the tokenizer does not have."""
        if ids and max(ids) >= self.vocabulary:
            raise InputError(f"{max(ids)} is not a token id of this model, whose ids are 0 to {self.vocabulary - 1}")

    def at_least(self, text: str) -> int:
        """A number of tokens that the text has at least, without tokenising it; 0 where nobody can tell."""
        return len(text) // self._longest if self._bytelike else 0

    def without_space_after_end(self, ids: list[int]) -> list[int]:
        """The ids up to a last EOS, if nothing but white space follows it: chat templates write a line break there."""
        eos = self._tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if not self._tokenizer.decode(ids[end:]).strip():
                return ids[:end]
        return ids

    def show(self, response: Response) -> Shown:
        """The characters of every token."""
        body = response.ids[:-1] if response.ends_apart else response.ids
        shown = _from_bytes([self._bytes(i) for i in body]) if self._bytelike else self._from_stream(body)
        if response.text is not None and shown.text != response.text:
            # The tokenizer changes texts (it folds cases, joins spaces ...), so its own alignment has to do.
            shown = _from_spans(response.text, response.spans)
        if response.ends_apart:
            end = (len(shown.text), len(shown.text))
            eos = self._tokenizer.eos_token
            shown = Shown(shown.text, [*shown.tokens, eos], [*shown.offsets, end])
        return shown

    @cached_property
    def _bytelike(self) -> bool:
        """Whether the vocabulary spells bytes as letters, as GPT-2's does."""
        decoder = json.loads(self._tokenizer.backend_tokenizer.to_str())["decoder"]
        return "ByteLevel" in json.dumps(decoder)

    @cached_property
    def _longest(self) -> int:
        """Letters of the longest token; each stands for a byte, so no token has more characters."""
        return max(map(len, self._tokenizer.get_vocab()))

    @cached_property
    def _byte_of_letter(self) -> dict[str, int]:
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items()}

    def _bytes(self, token: int) -> bytes:
        if (known := self._spelt.get(token)) is not None:
            return known
        if token in self._added:
            spelt = self._added[token].encode()
        else:
            letters = self._tokenizer.convert_ids_to_tokens(token) or ""
            spelt = bytes(self._byte_of_letter[letter] for letter in letters if letter in self._byte_of_letter)
        self._spelt[token] = spelt
        return spelt

    def _from_stream(self, ids: Sequence[int]) -> Shown:
        """For every other vocabulary: the library decodes token by token, and holds back what is no whole character."""
        backend = self._tokenizer.backend_tokenizer
        stream = DecodeStream(skip_special_tokens=False)
        text, tokens, offsets, held = "", list[str](), list[Span](), 0
        for token in ids:
            try:
                piece = stream.step(backend, token)
            except Exception:  # the library's own type; it happens where a decoder rewrites what it has given out
                piece = backend.decode([token], skip_special_tokens=False)
                stream = DecodeStream(skip_special_tokens=False)
            held += 1
            if piece is not None:
                own = backend.decode([token], skip_special_tokens=False) if held > 1 else ""
                last = piece[-len(own) :] if own and FRAGMENT not in own and piece.endswith(own) else ""
                _release(text, piece[: len(piece) - len(last)], held - bool(last), tokens, offsets)
                text += piece
                if last:
                    tokens.append(last)
                    offsets.append((len(text) - len(last), len(text)))
                held = 0
            if held == _MOST_HELD or (held and len(tokens) + held == len(ids)):  # what never becomes a character
                broken = list(ids[len(tokens) : len(tokens) + held])
                rest = backend.decode(broken, skip_special_tokens=False) or FRAGMENT
                _release(text, rest, held, tokens, offsets)
                text += rest
                stream, held = DecodeStream(skip_special_tokens=False), 0
        return Shown(text, tokens, offsets)


def _release(text: str, piece: str, held: int, tokens: list[str], offsets: list[Span]) -> None:
    """Gives `piece`, which follows `text`, to the tokens that were held back: all of it to each."""
    tokens += [piece] if held == 1 else [FRAGMENT] * held
    offsets += [(len(text), len(text) + len(piece))] * held


def _from_bytes(pieces: Sequence[bytes]) -> Shown:
    """Tokens that are bytes: each one's span runs from the character of its first byte to that of its last."""
    text, owner = _characters(b"".join(pieces))
    tokens, offsets, at = [], [], 0
    for piece in pieces:
        end = at + len(piece)
        if piece:
            offsets.append((owner[at], owner[end - 1] + 1))
        else:
            here = owner[at] if at < len(owner) else len(text)
            offsets.append((here, here))
        tokens.append(piece.decode("utf-8", "replace"))
        at = end
    return Shown(text, tokens, offsets)


def _characters(data: bytes) -> tuple[str, Sequence[int]]:
    """The text, and for every byte the index of the character it is part of. Broken sequences become U+FFFD."""
    if data.isascii():
        return data.decode(), range(len(data))
    parts: list[str] = []
    owner: list[int] = []

    def take(good: bytes) -> None:
        parts.append(good.decode())
        begins = np.frombuffer(good, np.uint8) & 0xC0 != 0x80  # a character's other bytes are 10xxxxxx
        owner.extend((begins.cumsum() + (owner[-1] if owner else -1)).tolist())

    while data:
        try:
            take(data)
            break
        except UnicodeDecodeError as error:
            take(data[: error.start])
            owner.extend([owner[-1] + 1 if owner else 0] * (error.end - error.start))
            parts.append(FRAGMENT)
            data = data[error.end :]
    return "".join(parts), owner


def _from_spans(text: str, spans: Sequence[Span]) -> Shown:
    """The tokenizer's alignment; a span of no character inside a text (a byte of one) becomes that character's."""
    offsets = [(s, min(s + 1, len(text))) if s == e else (s, e) for s, e in spans]
    tokens = []
    for i, (start, end) in enumerate(offsets):
        shared = any(0 <= j < len(offsets) and _overlap((start, end), offsets[j]) for j in (i - 1, i + 1))
        tokens.append(FRAGMENT if shared else text[start:end])
    return Shown(text, tokens, offsets)


def _overlap(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])
