"""A client of the scoring server: the values of many responses over HTTP.

Ids are the primary form: what the policy sampled is what gets scored. One implementation, asynchronous; `score` runs it
to its end.
"""

import asyncio
import base64
import email.utils
import itertools
import json
import logging
import random
import ssl
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from numpy.typing import NDArray

from dvpo.data.records import Message
from dvpo.errors import InputError, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Sequence[Message]
Response = str | Sequence[int]

log = logging.getLogger(__name__)

RETRIED = (429, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0


@dataclass(frozen=True)
class TokenValues:
    """The values of one response of T tokens.

    token_ids, offsets: the T tokens, and where each stands in the response's text (characters).
    q_T: Q(s_t, a_t), the value after each token. v_T: V(s_t), the value before it. Both float32.
    scores: the score of the response under each aggregate that was asked for.
    """

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    q_T: NDArray[np.float32]
    v_T: NDArray[np.float32]
    scores: dict[str, float]

    @property
    def values_S(self) -> NDArray[np.float32]:
        """h_0..h_T, as the value model gives them in the process."""
        return np.concatenate([self.v_T[:1], self.q_T])


class GVMClient:
    """Scores responses with a server started by `dvpo serve`.

    A batch is split into requests of at most `max_items` items and about `max_tokens` tokens (characters, where an item
    is text), of which `concurrency` run at a time. An overloaded server (503, 429), a gateway's error, a cut connection
    and an attempt without an answer in `attempt_timeout` seconds are tried again, with growing random pauses and never
    before the server's `Retry-After`.

    Args:
        url: where the server listens, for example http://127.0.0.1:8000.
        api_key: sent as a bearer token.
        tokenizer: the caller's tokenizer. Ids mean something only in the GVM's own tokens, so a server whose GVM has
            another tokenizer is refused. Leave it out to score text.
        timeout: seconds that one call of `score` may take in all, pauses included.

    Errors of its methods:
        InputError: the server refuses the request (its own sentence is passed on), or its tokenizer is another one.
        StageError: the server failed, or gave no answer in time.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_items: int = 64,
        max_tokens: int = 32768,
        concurrency: int = 4,
        timeout: float = 300.0,
        attempt_timeout: float = 120.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no address of a server; write it like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.max_items, self.max_tokens, self.concurrency = max_items, max_tokens, concurrency
        self.timeout, self.attempt_timeout = timeout, attempt_timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._fingerprint: str | None = None
        if tokenizer is not None:
            from dvpo.models import tokenizer_fingerprint

            self._fingerprint = tokenizer_fingerprint(tokenizer)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()  # slow to make, so made once

    def __getstate__(self) -> dict[str, Any]:
        """For workers in other processes: all but what cannot be pickled, which they make themselves."""
        return {name: value for name, value in self.__dict__.items() if name != "_tls"}

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], aggregate: Sequence[str] = ("mean",)
    ) -> list[TokenValues]:
        """The values of every response to its prompt, in order.

        Args:
            prompts: each as token ids, as text, or as chat messages.
            responses: each as token ids (with EOS, where the response ended by itself) or as the text of a response
                that ended by itself (the server adds EOS).
            aggregate: the response scores wanted: mean, last, p1, p5, p10, p90, p95, p99, bellman.
        """
        work = self.ascore(prompts, responses, aggregate)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work)
        with ThreadPoolExecutor(1) as thread:  # a notebook has a running loop already
            return thread.submit(asyncio.run, work).result()

    async def ascore(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], aggregate: Sequence[str] = ("mean",)
    ) -> list[TokenValues]:
        """`score`, for asynchronous callers."""
        if len(prompts) != len(responses):
            raise InputError(
                f"{len(prompts)} prompts and {len(responses)} responses; give one response for each prompt"
            )
        items = [item_of(p, r) for p, r in zip(prompts, responses, strict=True)]
        deadline = asyncio.get_running_loop().time() + self.timeout
        gate = asyncio.Semaphore(self.concurrency)
        try:
            async with (
                httpx.AsyncClient(headers=self._headers, timeout=None, verify=self._tls) as http,
                asyncio.TaskGroup() as group,
            ):
                parts = [
                    group.create_task(self._score_part(http, gate, part, aggregate, deadline))
                    for part in split(items, self.max_items, self.max_tokens)
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first failure cancelled the others
        return [values for part in parts for values in part.result()]

    def require_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises InputError unless the server's GVM has this tokenizer; one token is scored to see. Kept for later."""
        from dvpo.models import tokenizer_fingerprint

        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self.score([[0]], [[0]])

    async def _score_part(
        self,
        http: httpx.AsyncClient,
        gate: asyncio.Semaphore,
        items: list[dict[str, Any]],
        aggregate: Sequence[str],
        deadline: float,
    ) -> list[TokenValues]:
        body: dict[str, Any] = {"items": items, "aggregate": list(aggregate), "return": "both", "encoding": "base64"}
        if self._fingerprint:
            body["tokenizer_sha256"] = self._fingerprint
        async with gate:
            reply = await self._post(http, body, deadline)
        try:
            theirs = reply["provenance"]["tokenizer_sha256"]
            values = [read_item(item) for item in reply["items"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StageError(f"{self.url}: the reply is not one of a scoring server ({error!r})") from error
        if self._fingerprint not in (None, theirs):
            raise InputError(
                f"the GVM at {self.url} has another tokenizer (fingerprint {str(theirs)[:12]}) than the caller "
                f"({str(self._fingerprint)[:12]}), so its values belong to other tokens; serve a GVM with the caller's"
            )
        if len(values) != len(items) or not all(map(answers, items, values)):
            raise StageError(f"{self.url}: the reply does not belong to the request (other items or other tokens)")
        return values

    async def _post(self, http: httpx.AsyncClient, body: dict[str, Any], deadline: float) -> Any:
        """The server's reply to one request, after as many attempts as the time allows."""
        clock = asyncio.get_running_loop().time
        for attempt in itertools.count():
            asked = None
            try:
                async with asyncio.timeout_at(min(deadline, clock() + self.attempt_timeout)):
                    response = await http.post(f"{self.url}/score_tokens", json=body)
            except TimeoutError:
                trouble = "no answer"
            except httpx.TransportError as error:
                trouble = str(error) or type(error).__name__
            else:
                if response.status_code not in RETRIED:
                    return read_reply(response)
                trouble, asked = f"{response.status_code} {sentence(response)}", retry_after(response)
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1) + (asked or 0)
            if clock() + pause >= deadline:
                raise StageError(
                    f"{self.url} did not score the request within {self.timeout:g} s and {attempt + 1} attempts "
                    f"(the last: {trouble}); see whether the server runs, or allow more time"
                )
            log.warning("%s: %s; trying again in %.1f s", self.url, trouble, pause)
            await asyncio.sleep(pause)
        raise AssertionError  # the loop has no end


def item_of(prompt: Prompt, response: Response) -> dict[str, Any]:
    """One item of a request. Raises InputError for an empty prompt or response."""
    if not len(prompt) or not len(response):
        raise InputError("an empty prompt or response has no values; leave it out")
    item: dict[str, Any] = {}
    if isinstance(prompt, str):
        item["prompt"] = prompt
    elif isinstance(prompt[0], dict):
        item["messages"] = list(prompt)
    else:
        item["prompt_ids"] = [int(i) for i in prompt]  # type: ignore[arg-type]  # numpy and torch integers too
    if isinstance(response, str):
        item["response"] = response
    else:
        item["response_ids"] = [int(i) for i in response]
    return item


def split(items: Sequence[dict[str, Any]], max_items: int, max_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive requests, for neighbours often share a prompt. A single item may be over the size."""
    part: list[dict[str, Any]] = []
    size = 0
    for item in items:
        count = sum(len(json.dumps(x)) if key == "messages" else len(x) for key, x in item.items())
        if part and (len(part) == max_items or size + count > max_tokens):
            yield part
            part, size = [], 0
        part.append(item)
        size += count
    if part:
        yield part


def read_reply(response: httpx.Response) -> Any:
    """The JSON of a good reply. Raises InputError for a refusal (4xx), StageError for a failure."""
    if response.is_success:
        try:
            return response.json()
        except ValueError as error:
            raise StageError(f"{response.url}: the reply is no JSON; is it a scoring server?") from error
    said = f"{response.url}: {response.status_code} {sentence(response)}"
    raise InputError(said) if response.is_client_error else StageError(said)


def sentence(response: httpx.Response) -> str:
    """What the server says of an error, with the field it names."""
    try:
        error = response.json()["error"]
        return error["message"] + (f" (field {error['param']})" if error.get("param") else "")
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; None if it does not say. The header holds seconds or a date."""
    header = response.headers.get("Retry-After")
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def read_item(item: dict[str, Any]) -> TokenValues:
    """One item of a reply. Raises ValueError where its parts differ in length or a value is not finite."""
    q_T, v_T = (np.frombuffer(base64.b64decode(item[key], validate=True), "<f4").astype(np.float32) for key in "qv")
    if not len(item["token_ids"]) == len(item["offsets"]) == len(q_T) == len(v_T):
        raise ValueError("token_ids, offsets, q and v differ in length")
    if not (np.isfinite(q_T).all() and np.isfinite(v_T).all()):
        raise ValueError("a value is not finite")
    offsets = [(int(start), int(end)) for start, end in item["offsets"]]
    return TokenValues(item["token_ids"], offsets, q_T, v_T, item["scores"])


def answers(item: dict[str, Any], values: TokenValues) -> bool:
    """Whether the values are of the tokens that were sent. What was sent as text cannot be told."""
    return item.get("response_ids", values.token_ids) == values.token_ids
