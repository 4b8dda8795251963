"""Requests and replies of `/score_tokens`. Unknown fields and wrong types are errors; nothing is guessed."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0)]
Span = Annotated[list[TokenId], Field(min_length=2, max_length=2)]
Aggregate = Literal["mean", "last", "p1", "p5", "p10", "p90", "p95", "p99", "bellman"]
Numbers = list[float] | str
"""A list of numbers, or base64 of little-endian float32."""


class Strict(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ChatMessage(Strict):
    """A chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


def _one_of(given: BaseModel, *names: str) -> None:
    present = [name for name in names if getattr(given, name) is not None]
    if len(present) != 1:
        listed = f"{', '.join(names[:-1])} or {names[-1]}"
        found = f"{' and '.join(present)} are" if present else "none is"
        raise ValueError(f"give exactly one of {listed}; {found} there")


def check_prompt(messages: list[ChatMessage]) -> None:
    """Raises ValueError unless the messages are a prompt: some, and the assistant is to answer."""
    if not messages:
        raise ValueError("messages is empty; give at least one")
    if messages[-1].role == "assistant":
        raise ValueError("messages ends with one of the assistant; move that text to response")


class Pair(Strict):
    """A question and this policy's answer to it, put before the prompt as chat turns."""

    prompt: str | None = Field(None, description="The question, as one message of the user.")
    messages: list[ChatMessage] | None = Field(None, description="The question as messages.")
    response: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        _one_of(self, "prompt", "messages")
        if self.messages is not None:
            check_prompt(self.messages)
        return self


class Item(Strict):
    """One prompt with one response. Give one form of each."""

    prompt: str | None = Field(None, description="Plain text, tokenised as it stands; see `add_special_tokens`.")
    messages: list[ChatMessage] | None = Field(None, description="Rendered with the checkpoint's chat template.")
    prompt_ids: list[TokenId] | None = Field(None, description="Token ids; the form that cannot go wrong.")
    response: str | None = Field(None, description="Text of the response; see `append_eos`.")
    response_ids: list[TokenId] | None = Field(None, description="The token ids that the policy sampled, EOS included.")
    append_eos: bool = Field(
        True,
        description="Of a response given as text: it ended by itself, so the end-of-sequence token follows it, as in "
        "training and in `dvpo score`. Set false for a response that was cut off. No second one is added where the "
        "text ends with it, and none to `response_ids`.",
    )
    trajectory: list[Pair] | None = Field(
        None, description="Pairs of the same policy, put before the prompt (with `messages` only)."
    )
    response_offsets: list[Span] | None = Field(
        None,
        description="With `project`: the caller's tokens as [start, end) in characters of `response`, in order. A last "
        "[n, n] at the end of the text is the caller's end-of-sequence token.",
    )
    response_tokens: list[str] | None = Field(
        None,
        description="With `project`: the caller's tokens as strings that give `response` when joined; a last empty "
        "string is the end-of-sequence token.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _one_of(self, "prompt", "messages", "prompt_ids")
        _one_of(self, "response", "response_ids")
        if self.messages is not None:
            check_prompt(self.messages)
        if self.trajectory and self.messages is None:
            raise ValueError("trajectory needs messages: its pairs are chat turns")
        if self.response_offsets is not None and self.response_tokens is not None:
            raise ValueError("give response_offsets or response_tokens, not both")
        return self


class ScoreRequest(Strict):
    """Texts to score."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "response": "It is 4."},
                        {"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 2]},
                    ],
                    "aggregate": ["mean", "last", "p10"],
                    "return": "both",
                }
            ]
        }
    )

    model: str | None = Field(None, description="Taken and not compared: one model is served, the reply names it.")
    items: list[Item]
    aggregate: list[Aggregate] = Field(["mean"], description="Scores of the whole response.")
    returned: Literal["q", "v", "both"] = Field(
        "both", alias="return", description="q: the value at each token, after it. v: the value before it."
    )
    encoding: Literal["list", "base64"] = Field("list", description="base64: q and v as little-endian float32.")
    add_special_tokens: bool = Field(
        False, description="Tokenise a `prompt` with the tokenizer's own special tokens. There is never a second BOS."
    )
    project: bool = Field(
        False,
        description="The caller has another tokenizer. The text is scored in the model's tokens, and every item says "
        "where the caller's tokens lie (`response_offsets` or `response_tokens`); q, v, tokens and offsets are theirs. "
        "q at a caller's token is the value after the last of the model's tokens that ends at or before its end, so it "
        "never looks ahead; v is the q of the caller's token before, and at the first the value before the response.",
    )
    tokenizer_sha256: str | None = Field(
        None,
        description="Fingerprint of the caller's tokenizer. If it is not the model's (see `provenance`), the request "
        "is refused, unless `project` is set.",
    )


class ScoredItem(BaseModel):
    """Values of one response of T tokens (under `project`: of T tokens of the caller)."""

    text: str = Field(description="The response. Decoded, where ids were given; a last EOS is no character of it.")
    token_ids: list[int] | None = Field(description="The T ids that were scored; null under `project`.")
    tokens: list[str] = Field(description="Each token's text; \ufffd where a token holds a part of a character.")
    offsets: list[tuple[int, int]] = Field(
        description="[start, end) in characters of `text`. A token that holds a part of a character has the span of "
        "that character; a last EOS has the empty span at the end."
    )
    q: Numbers | None = Field(None, description="Value after each token: Q(s_t, a_t).")
    v: Numbers | None = Field(None, description="Value before each token: V(s_t).")
    scores: dict[Aggregate, float] = Field(description="Always of the model's own tokens.")
    prompt_tokens: int
    cached_tokens: int = Field(description="Prompt tokens whose computation was kept from before.")


class Usage(BaseModel):
    """Tokens of the whole request."""

    prompt_tokens: int
    response_tokens: int
    cached_tokens: int
    total_tokens: int


class Provenance(BaseModel):
    """What computed the values."""

    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    backend: str
    version: str


class ScoreReply(BaseModel):
    """Values in the order of the items."""

    model: str
    items: list[ScoredItem]
    usage: Usage
    provenance: Provenance
