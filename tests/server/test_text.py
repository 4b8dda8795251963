"""From text to ids once, and back to the characters of every token."""

import copy
import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dvpo.data.templates import encode_prompt
from dvpo.errors import InputError
from server.projection import project, require_in_order, spans_of
from server.text import Codec, Shown

TEXTS = [
    "hello world",
    " leading and  double  spaces ",
    "naïve café",
    "日本語 の 文",
    "😀 and 👩‍👩‍👧 families",
    "𓀀 rare, e\u0301 combining, \u200d joiner",
    "line\nbreak\ttab",
    "a<eos>b",
]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["byte-level", "byte-fallback", "word-level"])
def codec(request: Any, byte_tokenizer: Any, fallback_tokenizer: Any, tokenizer: Any) -> Codec:
    kinds = {"byte-level": byte_tokenizer, "byte-fallback": fallback_tokenizer, "word-level": tokenizer}
    return Codec(kinds[request.param])


def check(shown: Shown, count: int) -> None:
    """What is true of any response: one span a token, in order, inside the text, and whole tokens are their slice."""
    assert len(shown.tokens) == len(shown.offsets) == count
    at = 0
    for token, (start, end) in zip(shown.tokens, shown.offsets, strict=True):
        assert 0 <= start <= end <= len(shown.text)
        assert start >= at
        at = start
        if "\ufffd" not in token and start < end:
            assert shown.text[start:end] == token
    ends = [end for _, end in shown.offsets]
    assert ends == sorted(ends)


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_of_a_text_belongs_to_a_token(codec: Codec, text: str) -> None:
    response = codec.response(text, append_eos=True)
    shown = codec.show(response)
    check(shown, len(response.ids))
    assert shown.text == text
    covered = {i for start, end in shown.offsets for i in range(start, end)}
    missed = {c for i, c in enumerate(text) if i not in covered}
    assert not {c for c in missed if not c.isspace()}
    assert shown.tokens[-1] == "<eos>"
    assert shown.offsets[-1] == (len(text), len(text))


@QUICK
@given(text=st.text(min_size=1, max_size=30))
def test_any_text(codec: Codec, text: str) -> None:
    response = codec.response(text, append_eos=False)
    shown = codec.show(response)
    assert shown.text == text
    check(shown, len(response.ids))


@QUICK
@given(data=st.data())
def test_any_ids(codec: Codec, data: Any) -> None:
    ids = data.draw(st.lists(st.integers(0, codec.vocabulary - 1), min_size=1, max_size=20))
    response = codec.sampled(ids)
    shown = codec.show(response)
    assert response.ids == ids
    check(shown, len(ids))


def test_the_parts_of_a_character_have_its_span(byte_tokenizer: Any, fallback_tokenizer: Any) -> None:
    for tokenizer, first in ((byte_tokenizer, "h"), (fallback_tokenizer, "h")):
        codec = Codec(tokenizer)
        response = codec.response("h𓀀é!", append_eos=False)
        for one in (response, codec.sampled(response.ids)):
            shown = codec.show(one)
            spans = [s for s in shown.offsets if s == (1, 2)]
            assert len(spans) == 4, "four bytes, four tokens, one character"
            assert shown.tokens.count("\ufffd") >= 4
            assert shown.text == "h𓀀é!"
            assert shown.tokens[0].strip() == first or shown.tokens[:2] == ["", "h"]
            assert shown.offsets[-1] == (3, 4)


def test_bytes_that_are_no_character_are_shown_as_such(byte_tokenizer: Any, fallback_tokenizer: Any) -> None:
    """A policy may sample half a character and go on."""
    for tokenizer in (byte_tokenizer, fallback_tokenizer):
        codec = Codec(tokenizer)
        emoji = codec.response("𓀀", append_eos=False).ids[-4:]
        letter = codec.response("ah", append_eos=False).ids[-1:]
        shown = codec.show(codec.sampled([*emoji[:2], *letter]))
        check(shown, 3)
        assert "\ufffd" in shown.text
        assert shown.text.endswith("h")
        assert shown.tokens[2] == "h"
        assert shown.offsets[2] == (len(shown.text) - 1, len(shown.text))
        cut = codec.show(codec.sampled([*letter, *emoji[:3]]))
        assert cut.text.startswith("h\ufffd")


def test_thousands_of_bytes_that_are_no_character_take_no_longer_than_others(
    byte_tokenizer: Any, fallback_tokenizer: Any
) -> None:
    """The library decodes all that it holds back with every token more: 8,000 took half a minute."""
    for tokenizer in (byte_tokenizer, fallback_tokenizer):
        codec = Codec(tokenizer)
        emoji = codec.response("𓀀", append_eos=False).ids[-4:]
        letter = codec.response("ah", append_eos=False).ids[-1:]
        began = time.monotonic()
        shown = codec.show(codec.sampled([*emoji[:1] * 8000, *letter]))
        assert time.monotonic() - began < 5
        check(shown, 8001)
        assert shown.text.endswith("\ufffdh")
        assert shown.tokens[-1] == "h"


def test_text_and_ids_of_one_response_agree(codec: Codec) -> None:
    text = "the river of velor is mild ."
    response = codec.response(text, append_eos=True)
    assert codec.show(codec.sampled(response.ids)).text == codec.show(response).text


def test_eos_is_appended_once(byte_tokenizer: Any) -> None:
    codec, eos = Codec(byte_tokenizer), byte_tokenizer.eos_token_id
    assert codec.response("hi", append_eos=True).ids[-1] == eos
    assert codec.response("hi<eos>", append_eos=True).ids.count(eos) == 1
    assert eos not in codec.response("hi", append_eos=False).ids
    written = codec.show(codec.response("hi<eos>", append_eos=True))
    assert written.offsets[-1] == (2, 7), "an EOS that the text spells has its characters"


def test_there_is_never_a_second_bos(byte_tokenizer: Any) -> None:
    codec, bos = Codec(byte_tokenizer), byte_tokenizer.bos_token_id
    assert bos not in codec.prompt_ids("hello", add_special_tokens=False)
    assert codec.prompt_ids("hello", add_special_tokens=True).count(bos) == 1
    assert codec.prompt_ids("<bos>hello", add_special_tokens=True).count(bos) == 1
    messages = [{"role": "user", "content": "hello"}]
    assert codec.chat_ids(messages) == encode_prompt(byte_tokenizer, messages)
    assert codec.chat_ids(messages).count(bos) == 1


def test_white_space_after_the_end_is_left_out(byte_tokenizer: Any) -> None:
    codec = Codec(byte_tokenizer)
    ids = codec.prompt_ids("hello<eos>", False)
    assert codec.without_space_after_end([*ids, *codec.prompt_ids("\n", False)]) == ids
    longer = codec.prompt_ids("hello<eos>\nmore", False)
    assert codec.without_space_after_end(longer) == longer


def test_ids_outside_the_vocabulary_are_refused(codec: Codec) -> None:
    with pytest.raises(InputError, match=f"{codec.vocabulary} is not a token id"):
        codec.sampled([0, codec.vocabulary])


def test_a_vocabulary_may_have_gaps(tokenizer: Any) -> None:
    """Its highest id is then no less than the number of its tokens."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = described["model"]["vocab"]
    word = max(ids, key=ids.__getitem__)
    ids[word] += 40
    gappy = copy.deepcopy(tokenizer)
    gappy._tokenizer = Tokenizer.from_str(json.dumps(described))
    codec = Codec(gappy)
    assert codec.vocabulary == ids[word] + 1
    assert codec.show(codec.sampled([ids[word]])).tokens == [word]


def test_projection_reads_the_value_when_the_callers_token_has_ended() -> None:
    import numpy as np

    values_S = np.arange(5, dtype=np.float32)  # h_0, then "ab" "c" "de" EOS
    shown = Shown("abcde", ["ab", "c", "de", "<eos>"], [(0, 2), (2, 3), (3, 5), (5, 5)])

    def onto(*spans: tuple[int, int]) -> list[float]:
        return project(values_S, shown, True, spans).tolist()

    assert onto((0, 2), (2, 3), (3, 5), (5, 5)) == [0, 1, 2, 3, 4], "the same tokens: nothing changes"
    assert onto((0, 1), (1, 2)) == [0, 0, 1], "inside a token the model has read nothing more"
    assert onto((0, 4), (4, 5)) == [0, 2, 3], "no look-ahead into the token that goes on"
    assert onto((0, 5)) == [0, 3], "the end is read only by the caller's own end"


@QUICK
@given(cuts=st.sets(st.integers(1, 26)), text=st.just("the quick brown fox jumps o"))
def test_projection_never_looks_ahead(byte_tokenizer: Any, cuts: set[int], text: str) -> None:
    import numpy as np

    codec = Codec(byte_tokenizer)
    response = codec.response(text, append_eos=True)
    shown = codec.show(response)
    edges = [0, *sorted(cuts), len(text)]
    spans = list(pairwise(edges))
    values_S = np.arange(len(response.ids) + 1, dtype=np.float32)
    q_N = project(values_S, shown, True, spans)[1:]
    assert list(q_N) == sorted(q_N)
    for (_, end), value in zip(spans, q_N, strict=True):
        read = shown.offsets[int(value) - 1][1] if value else 0
        following = shown.offsets[int(value)][1]
        assert read <= end
        assert following > end or int(value) == len(response.ids) - 1


def test_the_callers_tokens_are_checked() -> None:
    assert spans_of("abc", ["a", "bc", ""]) == [(0, 1), (1, 3), (3, 3)]
    with pytest.raises(InputError, match="joined are not response"):
        spans_of("abc", ["a", "b"])
    with pytest.raises(InputError, match="has 3 characters"):
        require_in_order("abc", [(0, 4)])
    with pytest.raises(InputError, match=r"response_offsets\[1\]"):
        require_in_order("abc", [(1, 2), (0, 3)])
