"""Token ids of prompts and responses: special tokens once, limits counted, the trajectory in its place."""

import pytest
from tokenizers.processors import TemplateProcessing

from dvpo.data.atlas import Atlas, build_tokenizer
from dvpo.data.templates import (
    Encoded,
    LengthNotes,
    encode,
    encode_prompt,
    encode_response,
    limit,
    prompt_messages,
)
from dvpo.errors import InputError

USER = {"role": "user", "content": "hello ."}
SYSTEM = {"role": "system", "content": "good question ."}
PAIR = (({"role": "system", "content": "surely"}, {"role": "user", "content": "what is the river ?"}), "the river .")


@pytest.fixture
def with_bos():
    """The atlas tokenizer with a post-processor that puts <system> at the front of every text, as Llama's puts BOS."""
    made = build_tokenizer(Atlas.build(0))
    made.bos_token = "<system>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<system> $A", special_tokens=[("<system>", made.bos_token_id)]
    )
    assert made("hello .")["input_ids"][0] == made.bos_token_id
    return made


def test_no_second_bos(with_bos) -> None:
    """A template that writes BOS gives it once; one that does not gives none."""
    plain = encode_prompt(with_bos, [USER])
    assert plain.count(with_bos.bos_token_id) == 0
    with_bos.chat_template = "{{ bos_token + ' ' }}" + with_bos.chat_template
    written = encode_prompt(with_bos, [USER])
    assert written == [with_bos.bos_token_id, *plain]
    long = encode_prompt(with_bos, [USER], [((USER,), "the river ."), ((USER,), "the salt .")])
    assert long.count(with_bos.bos_token_id) == 1
    assert encode_response(with_bos, "the river .").count(with_bos.bos_token_id) == 0


def test_the_end_token_stands_once_and_last(tokenizer) -> None:
    found = encode_response(tokenizer, "the river .")
    assert found[-1] == tokenizer.eos_token_id
    assert found.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(found[:-1]) == "the river ."
    assert encode_response(tokenizer, "") == [tokenizer.eos_token_id]


def test_a_prompt_ends_where_the_assistant_begins(tokenizer) -> None:
    ids = encode_prompt(tokenizer, [USER])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "hello", ".", "<eos>", "<assistant>"]
    both = encode(tokenizer, [USER], "the river .")
    assert both == Encoded(ids, encode_response(tokenizer, "the river ."))


def test_prompt_and_response_are_the_ids_of_the_whole_chat(tokenizer) -> None:
    """[x, y] is what the template writes for the finished conversation."""
    both = encode(tokenizer, [USER], "the river .")
    chat = [USER, {"role": "assistant", "content": "the river ."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert both.prompt_ids + both.response_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_trajectory_comes_after_the_system_message_and_before_the_prompt() -> None:
    turns = [{"role": "user", "content": "what is the river ?"}, {"role": "assistant", "content": "the river ."}]
    assert prompt_messages([SYSTEM, USER], [PAIR]) == [SYSTEM, *turns, USER]
    assert prompt_messages([USER], [PAIR, PAIR]) == [*turns, *turns, USER]
    assert prompt_messages([SYSTEM, USER]) == [SYSTEM, USER]


def test_the_caller_s_prompt_is_left_alone() -> None:
    prompt = [SYSTEM, USER]
    prompt_messages(prompt, [PAIR])
    assert prompt == [SYSTEM, USER]


def test_the_trajectory_is_a_prefix_of_the_ids(tokenizer) -> None:
    plain, longer = encode_prompt(tokenizer, [USER]), encode_prompt(tokenizer, [USER], [PAIR])
    assert longer[-len(plain) :] == plain
    assert "surely" not in tokenizer.decode(longer)


def test_a_tokenizer_without_a_template_or_a_refused_role_is_an_input_error() -> None:
    made = build_tokenizer(Atlas.build(0))
    with pytest.raises(InputError, match="unknown role"):
        encode_prompt(made, [{"role": "tool", "content": "hello ."}])
    made.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(made, [USER])


def test_limits_are_applied_and_counted() -> None:
    notes = LengthNotes()
    exact = Encoded([1, 2], [3, 4, 5])
    assert limit(exact, 2, 3, notes) is exact
    assert notes.lines() == []
    assert limit(exact, 2, 2, notes) == Encoded([1, 2], [3, 4])
    assert limit(exact, 1, 3, notes) is None
    assert limit(exact, 1, 1, notes) is None
    assert (notes.texts, notes.cut_responses, notes.dropped_prompts) == (4, 1, 2)
    assert [line.split(" texts")[0].split(" responses")[0] for line in notes.lines()] == ["1 of 4", "2 of 4"]
