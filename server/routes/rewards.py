"""Drop-in for the reward servers of OpenRLHF (POST /get_reward) and slime (POST /reward).

OpenRLHF posts {"query", "prompts", "labels"}, reads "rewards", "scores" and "extra_logs", and tries five times, a
second apart, whatever the status. slime posts {"prompt", "response", "label"}, takes the whole body as the number, and
tries ten times with growing pauses, whatever the status. For both a full queue is 503.

Both send what the policy wrote with its special tokens, so EOS is there if the response ended by itself: none is added.
The reward is the value at the last token, unless the operator has chosen another aggregate (`--reward`).
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema
from starlette.responses import Response

from dvpo.data.templates import Encoded
from server.errors import refuse, responses
from server.routes import JsonRoute, service_of
from server.routes.score import as_messages, scores
from server.schemas import ChatMessage, check_prompt
from server.service import Service, Work
from server.text import Codec

router = APIRouter(route_class=JsonRoute, tags=["reward servers"])
_MESSAGES = TypeAdapter(list[ChatMessage])


class OpenRlhfRequest(BaseModel):
    """Whole texts, prompt and response together."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        json_schema_extra={
            "examples": [{"query": ["2 + 2 is 4.<eos>"], "prompts": ["2 + 2 is"], "labels": ["4"]}],
        },
    )

    query: list[Annotated[str, Field(json_schema_extra={"minLength": 1})]] = Field(
        description="Prompt and response as one text; no special token is added."
    )
    prompts: list[str] | None = Field(
        None, description="The prompts alone; where given, they say where responses begin."
    )
    labels: Any = Field(None, description="Not used.")


class OpenRlhfReply(BaseModel):
    """`rewards` and `scores` are the same numbers, in the order of `query`."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def _prompt(value: Any) -> str | list[ChatMessage]:
    if isinstance(value, str):
        return value
    try:
        messages = _MESSAGES.validate_python(value)
    except ValidationError as error:
        raise ValueError('should be text or a list of messages {"role", "content"}') from error
    check_prompt(messages)
    return messages


class SlimeRequest(BaseModel):
    """One prompt and its response."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        json_schema_extra={"examples": [{"prompt": "2 + 2 is", "response": " 4.<eos>", "label": "4"}]},
    )

    prompt: Annotated[
        Any,
        AfterValidator(_prompt),
        WithJsonSchema(
            {
                "anyOf": [{"type": "string"}, {"type": "array", "items": ChatMessage.model_json_schema()}],
                "description": "Text as it stands, or messages for the checkpoint's chat template.",
            }
        ),
    ]
    response: str = Field(json_schema_extra={"minLength": 1})
    label: Any = Field(None, description="Not used.")


@router.post(
    "/get_reward",
    summary="OpenRLHF's reward server",
    response_model=OpenRlhfReply,
    responses=responses(400, 413, 415, 422, 503),
)
async def get_reward(request: Request, body: OpenRlhfRequest) -> Response:
    """A reward for every query. No queries give no rewards."""
    service = service_of(request)
    service.check_count("query", len(body.query))
    if body.prompts is not None and len(body.prompts) != len(body.query):
        raise refuse(f"query has {len(body.query)} texts and prompts {len(body.prompts)}; give one for each", "prompts")
    prompts = body.prompts or [""] * len(body.query)
    last = service.settings.reward == "last"

    items = await service.prepare(
        "query",
        [[query] for query in body.query],
        lambda i: _query(service.codec, f"query[{i}]", body.query[i], prompts[i], last),
    )
    service.check("query", items)
    work = await service.score(request, items)
    found = await service.in_text_thread(lambda: _rewards(service, work))
    return work.answer({"rewards": found, "scores": found, "extra_logs": {}})


@router.post(
    "/reward",
    summary="slime's reward server",
    response_model=float,
    responses=responses(400, 413, 415, 422, 503),
)
async def reward(request: Request, body: SlimeRequest) -> Response:
    """The reward of one response: the body of the reply is the number."""
    service = service_of(request)

    def prepare(_: int) -> Encoded:
        codec = service.codec
        text = isinstance(body.prompt, str)
        prompt = codec.prompt_ids(body.prompt, False) if text else codec.chat_ids(as_messages(body.prompt))
        response = codec.response(body.response, append_eos=False).ids
        if not response:
            raise refuse("response: the response is empty; give some text", "response")
        return Encoded(prompt, response)

    parts = [body.prompt] if isinstance(body.prompt, str) else [m.content for m in body.prompt]
    (item,) = await service.prepare("texts", [[*parts, body.response]], prepare)
    if not item.prompt_ids:
        raise refuse("prompt: the prompt has no tokens; give at least one", "prompt")
    work = await service.score(request, [item])
    return work.answer((await service.in_text_thread(lambda: _rewards(service, work)))[0])


def _query(codec: Codec, where: str, query: str, prompt: str, last: bool) -> Encoded:
    """A query, cut where its prompt ends; as one text where that is not known and does not matter."""
    if prompt and query.startswith(prompt) and len(query) > len(prompt):
        return Encoded(codec.prompt_ids(prompt, False), codec.response(query[len(prompt) :], append_eos=False).ids)
    if not last:
        raise refuse(
            f"{where}: this server's reward is an aggregate over the response, so it must begin with its text in "
            "prompts and go on after it; or start the server with --reward last",
            where,
        )
    ids = codec.prompt_ids(query, False)
    return Encoded(ids[:1], ids[1:])


def _rewards(service: Service, work: Work) -> list[float]:
    how: Any = service.settings.reward
    if how == "last":
        return [float(scored.values_S[-1]) for scored in work.reply.scored]
    return [scores(scored.values_S, [how])[how] for scored in work.reply.scored]
