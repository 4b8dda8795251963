"""From messages and text to token ids, once. What the policy sampled is what gets scored: ids are the primary form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dvpo.data.records import Message
from dvpo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and a response as token ids. A response that ended by itself ends with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass
class LengthNotes:
    """What the length limits did to a set of texts, and which had a short tau or none, to be said to the user."""

    texts: int = 0
    cut_responses: int = 0
    dropped_prompts: int = 0
    short_trajectories: int = 0
    without_trajectory: int = 0

    def lines(self) -> list[str]:
        """One sentence for each limit that was met."""
        said = []
        if self.cut_responses:
            said.append(
                f"{self.cut_responses} of {self.texts} responses were over the length limit and were cut (no EOS)"
            )
        if self.dropped_prompts:
            said.append(
                f"{self.dropped_prompts} of {self.texts} texts were left out: their prompt is over the length limit"
            )
        if self.short_trajectories:
            said.append(
                f"{self.short_trajectories} of {self.texts} texts have fewer answers of their policy before them than "
                f"asked for, {self.without_trajectory} of these none"
            )
        return said


Trajectory = Sequence[tuple[Sequence[Message], str]]
"""tau: question-answer pairs of one policy, each a prompt and its response."""


def prompt_messages(prompt: Sequence[Message], trajectory: Trajectory = ()) -> list[Message]:
    """The prompt with the trajectory's pairs put before it as chat turns; a leading system message stays first."""
    prompt = list(prompt)
    system = [prompt.pop(0)] if prompt and prompt[0]["role"] == "system" else []
    turns: list[Message] = []
    for question, answer in trajectory:
        turns += [m for m in question if m["role"] != "system"] + [{"role": "assistant", "content": answer}]
    return system + turns + prompt


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], trajectory: Trajectory = (), **template: Any
) -> list[int]:
    """Token ids of the prompt up to where the assistant begins to answer, with the tokenizer's own chat template.

    template: more for `apply_chat_template`, such as the template's own switches.

    The template writes every special token itself, so none is added (no second BOS). Raises InputError where the
    tokenizer has no template or refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; add one to its folder (chat_template.jinja)")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            prompt_messages(prompt, trajectory), add_generation_prompt=True, tokenize=False, **template
        )
    except TemplateError as error:
        raise InputError(f"the chat template refuses the messages: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a finished response, EOS at the end."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], response: str, trajectory: Trajectory = ()
) -> Encoded:
    """A prompt and a finished response as token ids."""
    return Encoded(encode_prompt(tokenizer, prompt, trajectory), encode_response(tokenizer, response))


def limit(encoded: Encoded, max_prompt: int, max_response: int, notes: LengthNotes) -> Encoded | None:
    """Applies the length limits and counts what they do: a long response is cut, a text with a long prompt left out."""
    notes.texts += 1
    if len(encoded.prompt_ids) > max_prompt:
        notes.dropped_prompts += 1
        return None
    if len(encoded.response_ids) > max_response:
        notes.cut_responses += 1
        return Encoded(encoded.prompt_ids, encoded.response_ids[:max_response])
    return encoded
