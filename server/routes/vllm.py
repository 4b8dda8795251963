"""Drop-in for a vLLM server: POST /pooling (token_classify) and POST /classify.

/classify is also what verl's reward loop calls: it posts {"model", "input": text, "activation": false} and reads
data[-1].probs[-1]. That client gives up at any 4xx and tries again at a 5xx, waiting ever longer, so a full queue is
503. vLLM's own answer to a client that asks for too much is a 400.

As in vLLM, special tokens are added to text unless `add_special_tokens` is false, but never a second BOS. Fields that
would change the values in a way this server does not offer are refused; others that vLLM knows are ignored.
"""

import base64
import time
import uuid
from typing import Annotated, Any, Literal, Self

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from starlette.responses import Response

from dvpo.data.templates import Encoded
from dvpo.errors import InputError
from server.errors import refuse, responses
from server.routes import JsonRoute, service_of
from server.service import Service, Work
from server.text import Codec

router = APIRouter(route_class=JsonRoute, tags=["vLLM"])
Text = str | list[int]


def _texts(value: Any) -> list[Text]:
    """One text or several, each a string or a list of ids, as a list of texts. Raises ValueError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return list(value)
    if isinstance(value, list) and _are_ids(value):
        return [value]
    if isinstance(value, list) and all(isinstance(v, list) and _are_ids(v) for v in value):
        return list(value)
    raise ValueError("should be a string, a list of token ids, or a list of either")


def _are_ids(value: list[Any]) -> bool:
    return all(type(v) is int and v >= 0 for v in value)


_ID_LIST: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
Input = Annotated[
    Any,
    AfterValidator(_texts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _ID_LIST,
                {"type": "array", "items": _ID_LIST},
            ],
            "description": "A text, its token ids, or a list of either.",
        }
    ),
]


NotTrue = Annotated[bool | None, WithJsonSchema({"anyOf": [{"const": False}, {"type": "null"}]})]


class _VllmRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = Field(None, description="Taken and not compared.")
    input: Input
    add_special_tokens: bool = True
    use_activation: NotTrue = Field(None, description="Values are raw: true is refused.")
    activation: NotTrue = Field(None, description="The former name of `use_activation`.")
    truncate_prompt_tokens: Annotated[int | None, WithJsonSchema({"type": "null"})] = Field(
        None, description="Refused: nothing is truncated."
    )

    @model_validator(mode="after")
    def _raw_and_whole(self) -> Self:
        if self.use_activation or self.activation:
            raise ValueError("values are raw here; leave use_activation out or set it to false")
        if self.truncate_prompt_tokens is not None:
            raise ValueError("nothing is truncated here; leave truncate_prompt_tokens out and shorten the text")
        return self


class PoolingRequest(_VllmRequest):
    """A value for every token of every text."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "gvm", "task": "token_classify", "input": [5, 6, 7]}]}
    )

    task: Literal["token_classify"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    dimensions: None = None


class ClassifyRequest(_VllmRequest):
    """One score for every text."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "gvm", "input": "2 + 2 is 4.", "activation": False}]}
    )


class VllmUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class PoolingData(BaseModel):
    """Values of one text: [[value] for each token], or base64 of little-endian float32."""

    index: int
    object: str = "pooling"
    data: list[list[float]] | str


class PoolingReply(BaseModel):
    """Values in the order of the texts."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[PoolingData]
    usage: VllmUsage


class ClassifyData(BaseModel):
    """The score of one text is probs[0], a raw value."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    """Scores in the order of the texts."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ClassifyData]
    usage: VllmUsage


@router.post(
    "/pooling",
    summary="vLLM's token_classify",
    response_model=PoolingReply,
    responses=responses(400, 413, 415, 422, 503),
)
async def pooling(request: Request, body: PoolingRequest) -> Response:
    """A value for every token of the whole text, the prompt's too: what the model says after reading that token."""
    service = service_of(request)
    work = await _score(service, request, body)
    data = [
        {"index": i, "object": "pooling", "data": _encoded(scored.values_S, body.encoding_format)}
        for i, scored in enumerate(work.reply.scored)
    ]
    return work.answer(_envelope("pool", service, work, data))


@router.post(
    "/classify",
    summary="vLLM's classify, as verl reads it",
    response_model=ClassifyReply,
    responses=responses(400, 413, 415, 422, 503),
)
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """One raw score for every text: the value at its last token.

    A token classifier is read at the EOS of a text that ends with EOS and white space, as chat templates write it:
    it has learnt nothing about what comes after.
    """
    service = service_of(request)
    work = await _score(service, request, body, to_end=not service.reads_last_token)
    label = "LABEL_0"
    data = [
        {"index": i, "label": label, "probs": [float(scored.values_S[-1])], "num_classes": 1}
        for i, scored in enumerate(work.reply.scored)
    ]
    return work.answer(_envelope("classify", service, work, data))


async def _score(service: Service, request: Request, body: _VllmRequest, to_end: bool = False) -> Work:
    texts: list[Text] = body.input
    service.check_count("input", len(texts))
    of_ids = [""] if to_end else []  # what follows the end is decoded: work for the tokenizer
    items = await service.prepare(
        "input",
        [[text] if isinstance(text, str) else of_ids for text in texts],
        lambda i: _whole(service.codec, i, texts[i], body.add_special_tokens, to_end),
    )
    service.check("input", items)
    return await service.score(request, items)


def _whole(codec: Codec, number: int, text: Text, add_special_tokens: bool, to_end: bool) -> Encoded:
    """A text whose tokens all count. Its first stands as the prompt, so that there is a value at every token."""
    if isinstance(text, str):
        ids = codec.prompt_ids(text, add_special_tokens)
    else:
        try:
            codec.require_known(text)
        except InputError as error:
            raise refuse(f"input[{number}]: {error}", f"input[{number}]") from error
        ids = text
    if to_end:
        ids = codec.without_space_after_end(ids)
    return Encoded(ids[:1], ids[1:])


def _encoded(values_S: NDArray[np.float32], encoding: str) -> list[list[float]] | str:
    if encoding == "base64":
        return base64.b64encode(values_S.astype("<f4").tobytes()).decode()
    return [[value] for value in values_S.tolist()]


def _envelope(kind: str, service: Service, work: Work, data: list[dict[str, Any]]) -> dict[str, Any]:
    total = work.prompt_tokens + work.response_tokens
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.info.name,
        "data": data,
        "usage": VllmUsage(prompt_tokens=total, total_tokens=total).model_dump(),
    }
