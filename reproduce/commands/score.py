"""`dvpo score`: a value model's token values of given responses, and the response scores read from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvpo.errors import InputError, StageError, in_row
from dvpo.files import require_place
from reproduce.bundles.adapters import laid_on
from reproduce.commands.common import print_json, require_checkpoint, table_text

if TYPE_CHECKING:
    from dvpo.data.records import Message

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """A prompt with a response to score, and where they come from, for messages."""

    origin: str
    prompt: "list[Message]"
    response: str


def run(
    gvm: str,
    requests: Sequence[Request],
    aggregates: Sequence[str] = (),
    heatmap: Path | None = None,
    as_json: bool = False,
    base: Path | None = None,
) -> None:
    """Scores the requests and prints them; `aggregates` empty means all. base: an adapter's base model."""
    if heatmap is not None and heatmap.suffix not in (".html", ".png"):
        raise InputError(f"{heatmap}: a heat map is a .html or .png file; name one that ends so")
    require_place(heatmap)
    require_checkpoint(gvm)
    with laid_on(gvm, base) as folder:
        items = score(str(folder), requests, aggregates)
    if heatmap is not None:
        from reproduce.token_picture import Scored, write

        pictures = [
            Scored(request.origin, _shown(request), item["tokens"], item["q"], item["v"])
            for request, item in zip(requests, items, strict=True)
        ]
        write(pictures, heatmap)
    if as_json:
        print_json({"items": items})
    else:
        print("\n\n".join(_text(request, item) for request, item in zip(requests, items, strict=True)))


def score(gvm: str, requests: Sequence[Request], aggregates: Sequence[str] = ()) -> list[dict[str, Any]]:
    """For every request {"prompt_tokens", "token_ids", "tokens", "q", "v", "scores"}, in order.

    q is the value at each response token (h_t), v the value before it (h_{t-1}).

    Raises:
        InputError: an unknown aggregate, no value or reward model there, or a text longer than the model's context.
        StageError: a value is not finite.
    """
    import torch

    from dvpo import models
    from dvpo.data.templates import encode
    from dvpo.objectives.td import AGGREGATES, aggregate
    from dvpo.values import score_all

    if unknown := [name for name in aggregates if name not in AGGREGATES]:
        raise InputError(f"unknown aggregate {unknown[0]!r}; choose from {', '.join(AGGREGATES)}")
    model: Any = models.load(gvm, "reward" if models.role_of(gvm) == "reward" else "value")
    tokenizer: Any = models.load_tokenizer(gvm)
    texts = []
    for request in requests:
        with in_row(request.origin):
            texts.append(encode(tokenizer, request.prompt, request.response))
    limit = models.most_tokens(model)
    for request, text in zip(requests, texts, strict=True):
        length = len(text.prompt_ids) + len(text.response_ids)
        if limit is not None and length > limit:
            raise InputError(
                f"{request.origin}: {length} tokens, but the model reads at most {limit}; shorten the text"
            )
    if torch.cuda.is_available():
        model.to("cuda")
    items: list[dict[str, Any]] = [{} for _ in requests]
    for i, values_S in score_all(model, texts, tokenizer.pad_token_id):
        if not bool(values_S.isfinite().all()):
            raise StageError(
                f"{requests[i].origin}: a value is not finite; the weights in {gvm} are damaged or overflow"
            )
        mask_1_S = torch.ones(1, len(values_S), dtype=torch.bool)
        values = values_S.tolist()
        items[i] = {
            "prompt_tokens": len(texts[i].prompt_ids),
            "token_ids": texts[i].response_ids,
            "tokens": [tokenizer.decode([token]) for token in texts[i].response_ids],
            "q": values[1:],
            "v": values[:-1],
            "scores": {how: float(aggregate(values_S[None], mask_1_S, how)) for how in aggregates or AGGREGATES},
        }
    return items


def requests_from(prompt: str | None, response: str | None, file: Path | None) -> list[Request]:
    """What is to be scored: one prompt and response, or every row of a JSON lines file. Raises InputError."""
    if file is not None:
        if prompt is not None or response is not None:
            raise InputError("--input stands beside --prompt or --response; give the file or the texts, not both")
        return read_requests(file)
    if prompt is None or response is None:
        raise InputError("nothing to score; give --prompt and --response, or --input FILE.jsonl")
    return [_request("the text given", {"prompt": prompt, "response": response})]


def read_requests(file: Path) -> list[Request]:
    """The rows {"prompt": text or messages, "response": text}; other fields of a row are ignored.

    Raises:
        InputError: the file is missing or empty, or a row is malformed (with its line).
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); name a JSON lines file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        origin = f"{file}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "not usable text"
            )
            raise InputError(f"{origin}: the line is not JSON ({reason}); mend or remove it") from error
        found.append(_request(origin, row))
    if not found:
        raise InputError(f'{file}: no rows; give one {{"prompt": ..., "response": ...}} a line')
    return found


def _request(origin: str, row: Any) -> Request:
    if not isinstance(row, dict):
        raise InputError(f'{origin}: the row is not an object; write {{"prompt": ..., "response": ...}}')
    prompt, response = (_present(origin, row, name) for name in ("prompt", "response"))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{origin}: "prompt" is neither text nor a list of messages; make it one')
    for number, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise InputError(
                f'{origin}: "prompt[{number}]" is not a message; write {{"role": {"|".join(_ROLES)}, "content": text}}'
            )
    if messages[-1]["role"] == "assistant":
        raise InputError(f'{origin}: "prompt" ends with a message of the assistant; move that text to "response"')
    if not isinstance(response, str):
        raise InputError(f'{origin}: "response" is not text; make it text')
    request = Request(origin, [{"role": m["role"], "content": m["content"]} for m in messages], response)
    if not response.strip() or not any(m["content"].strip() for m in messages):
        raise InputError(f"{origin}: the {'prompt' if response.strip() else 'response'} is empty; give some text")
    try:
        (response + "".join(m["content"] for m in messages)).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{origin}: the text is broken Unicode (half a surrogate pair); mend it") from error
    return request


def _present(origin: str, row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise InputError(f'{origin}: field "{name}" is missing; add it')
    return row[name]


def _shown(request: Request) -> str:
    """The prompt as a reader sees it."""
    if len(request.prompt) == 1:
        return request.prompt[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in request.prompt)


def _text(request: Request, item: dict[str, Any]) -> str:
    per_token = zip(item["token_ids"], item["tokens"], item["v"], item["q"], strict=True)
    rows = [
        (str(t), str(token), repr(text), f"{v:.4f}", f"{q:.4f}", f"{q - v:+.4f}")
        for t, (token, text, v, q) in enumerate(per_token, 1)
    ]
    tokens = table_text(("t", "id", "token", "v before", "q after", "q-v"), rows, left=(2,))
    scores = table_text(("score", ""), [(how, f"{value:.4f}") for how, value in item["scores"].items()])
    return f"{request.origin}: {item['prompt_tokens']} prompt tokens, {len(rows)} response tokens\n{tokens}\n\n{scores}"
