"""POST /score_tokens: a value for every token of every response."""

import base64
from dataclasses import dataclass

import numpy as np
import torch
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response as HttpResponse

import dvpo
from dvpo.data.records import Message
from dvpo.data.templates import Encoded, Trajectory
from dvpo.errors import InputError
from dvpo.objectives.td import aggregate
from server.backends import ModelInfo, Scored
from server.errors import ApiError, refuse, responses
from server.projection import project, require_in_order, spans_of
from server.routes import JsonRoute, service_of
from server.schemas import (
    Aggregate,
    ChatMessage,
    Item,
    Numbers,
    Pair,
    Provenance,
    ScoredItem,
    ScoreReply,
    ScoreRequest,
    Usage,
)
from server.service import Service, Work
from server.text import Codec, Response, Shown, Span

router = APIRouter(route_class=JsonRoute, tags=["values"])


@dataclass(frozen=True)
class Prepared:
    """One item, ready to be scored. `spans`: where the caller's tokens lie, if values are projected on them."""

    encoded: Encoded
    response: Response
    spans: list[Span] | None


@router.post(
    "/score_tokens",
    summary="Values of every token",
    response_model=ScoreReply,
    responses=responses(400, 413, 415, 422, 503),
)
async def score_tokens(request: Request, body: ScoreRequest) -> HttpResponse:
    """Scores responses: q, the value after each token, v, the value before it, and scores of the whole.

    Prompt and response may each be text, messages or token ids; what ids stand for is what the policy sampled, so
    they are the safest. Nothing is truncated: what is too long is refused.
    """
    service = service_of(request)
    service.check_count("items", len(body.items))
    require_tokenizer(service, body)
    texts = [_texts(item) for item in body.items]
    prepared = await service.prepare("items", texts, lambda i: _prepare(service.codec, body, i))
    items = [p.encoded for p in prepared]
    service.check("items", items)
    work = await service.score(request, items)
    scored = work.reply.scored
    sizes = [4 * len(item.response_ids) for item in items]
    found = await service.each(sizes, lambda i: _item(service.codec, body, prepared[i], scored[i]))
    return work.answer(_reply(service.info, work, found))


def require_tokenizer(service: Service, body: ScoreRequest) -> None:
    """Raises ApiError where the caller's tokenizer is another one and values are not to be projected."""
    ours, theirs = service.info.tokenizer_sha256, body.tokenizer_sha256
    if theirs is not None and theirs != ours and not body.project:
        raise ApiError(
            400,
            f"your tokenizer ({theirs[:12]}) is not this model's ({ours[:12]}), so token ids do not mean the same; "
            "send text with project: true and response_offsets",
            "tokenizer_mismatch",
            "tokenizer_sha256",
        )


def as_messages(messages: list[ChatMessage]) -> list[Message]:
    """The form that templates take."""
    return [{"role": m.role, "content": m.content} for m in messages]


def _texts(item: Item) -> list[str]:
    """What of an item is tokenised."""
    turns = [*(item.messages or []), *(m for pair in item.trajectory or [] for m in pair.messages or [])]
    pairs = [text for pair in item.trajectory or [] for text in (pair.prompt, pair.response)]
    return [text for text in (item.prompt, item.response, *pairs, *(m.content for m in turns)) if text is not None]


def _prepare(codec: Codec, body: ScoreRequest, number: int) -> Prepared:
    item, where = body.items[number], f"items[{number}]"
    try:
        prompt_ids = _prompt(codec, item, body.add_special_tokens)
        if item.response_ids is not None:
            response = codec.sampled(item.response_ids)
        elif item.response:
            response = codec.response(item.response, item.append_eos)
        else:
            raise InputError("the response is empty; give some text, or the EOS token as response_ids")
        if not response.ids:
            raise InputError("the response has no tokens; give at least one")
        spans = _spans(item, body.project)
    except InputError as error:
        raise refuse(f"{where}: {error}", where) from error
    return Prepared(Encoded(prompt_ids, response.ids), response, spans)


def _prompt(codec: Codec, item: Item, add_special_tokens: bool) -> list[int]:
    if item.prompt_ids is not None:
        codec.require_known(item.prompt_ids)
        return item.prompt_ids
    if item.messages is not None:
        return codec.chat_ids(as_messages(item.messages), _trajectory(item.trajectory or []))
    return codec.prompt_ids(item.prompt or "", add_special_tokens)


def _trajectory(pairs: list[Pair]) -> Trajectory:
    return [
        (
            as_messages(p.messages) if p.messages is not None else [{"role": "user", "content": p.prompt or ""}],
            p.response,
        )
        for p in pairs
    ]


def _spans(item: Item, wanted: bool) -> list[Span] | None:
    """Where the caller's tokens lie; None if values are not to be projected."""
    given = item.response_offsets is not None or item.response_tokens is not None
    if not wanted:
        if given:
            raise InputError("response_offsets and response_tokens go with project: true; set it or leave them out")
        return None
    if not given or item.response is None or item.prompt_ids is not None:
        raise InputError("project needs text: a response with response_offsets or response_tokens, and no ids")
    if item.response_tokens is not None:
        spans = spans_of(item.response, item.response_tokens)
    else:
        spans = [(start, end) for start, end in item.response_offsets or []]
        require_in_order(item.response, spans)
    if not spans:
        raise InputError("there is no token to project on; give at least one")
    return spans


def _reply(info: ModelInfo, work: Work, items: list[dict[str, object]]) -> dict[str, object]:
    usage = Usage(
        prompt_tokens=work.prompt_tokens,
        response_tokens=work.response_tokens,
        cached_tokens=sum(scored.cached_tokens for scored in work.reply.scored),
        total_tokens=work.prompt_tokens + work.response_tokens,
    )
    provenance = Provenance(
        weights_sha256=info.weights_sha256,
        tokenizer_sha256=info.tokenizer_sha256,
        dtype=info.dtype,
        backend=info.backend,
        version=dvpo.__version__,
    )
    return {"model": info.name, "items": items, "usage": usage.model_dump(), "provenance": provenance.model_dump()}


def _item(codec: Codec, body: ScoreRequest, prepared: Prepared, scored: Scored) -> dict[str, object]:
    shown, values_S = codec.show(prepared.response), scored.values_S
    ids: list[int] | None = prepared.response.ids
    if prepared.spans is not None:
        values_S = project(values_S, shown, prepared.response.ends_apart, prepared.spans)
        shown = Shown(shown.text, [shown.text[s:e] for s, e in prepared.spans], prepared.spans)
        ids = None
    item = ScoredItem.model_construct(
        text=shown.text,
        token_ids=ids,
        tokens=shown.tokens,
        offsets=shown.offsets,
        scores=scores(scored.values_S, body.aggregate),
        prompt_tokens=len(prepared.encoded.prompt_ids),
        cached_tokens=scored.cached_tokens,
        q=numbers(values_S[1:], body.encoding) if body.returned != "v" else None,
        v=numbers(values_S[:-1], body.encoding) if body.returned != "q" else None,
    )
    found = dict(item)
    return {name: value for name, value in found.items() if value is not None or name not in ("q", "v")}


def scores(values_S: NDArray[np.float32], names: list[Aggregate]) -> dict[Aggregate, float]:
    """Scores of one response by name."""
    values_1_S = torch.from_numpy(values_S)[None]
    mask_1_S = torch.ones_like(values_1_S, dtype=torch.bool)
    return {name: float(aggregate(values_1_S, mask_1_S, name)) for name in names}


def numbers(values_T: NDArray[np.float32], encoding: str) -> Numbers:
    """A list, or base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(values_T.astype("<f4").tobytes()).decode()
    listed: list[float] = values_T.tolist()
    return listed
