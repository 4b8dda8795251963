"""A judge behind any OpenAI-compatible endpoint, with every reply archived.

A reply is known by the judge's name, the body of the request and the digest of the judge's prompt, and not by the
address of the endpoint. What fails is a reply too: it has a reason in place of a text, it is archived, counted by
whoever asked, and asked again by the next run that is not offline.
"""

import asyncio
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dvpo.data.records import Message
from dvpo.errors import InputError, StageError
from dvpo.evaluation.archive import Archive

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY_NAMES = ("DVPO_JUDGE_API_KEY", "OPENAI_API_KEY")
MISSING = "not in the archive"
_ROUNDING = 1e-3  # of a log-probability of 0 in half precision
CHARACTERS_PER_TOKEN = 4  # of English text under the tokenizers of today's judges, roughly
_SORRY = re.compile(
    r"\W*(i['’]?m|i am|we['’]?re|we are)? ?(very |so |really )?(sorry|afraid|unable to)\b|\W*as an ai\b"
    r"|\W*i (can['’]?t|cannot|won['’]?t|will not|must decline)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Request:
    """One question to the judge. `prompt_sha256` identifies the judge's prompt that its messages were made from."""

    messages: tuple[Message, ...]
    prompt_sha256: str
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None

    def body(self) -> dict[str, Any]:
        """What the endpoint is sent beside the judge's name."""
        body: dict[str, Any] = {
            "messages": list(self.messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body

    def asked(self, model: str) -> dict[str, Any]:
        """What the reply is archived under."""
        return {"model": model, "request": self.body(), "prompt_sha256": self.prompt_sha256}


@dataclass(frozen=True)
class Reply:
    """What came back: a text, or the reason why there is none.

    finish: the endpoint's finish_reason; "length" means that the text was cut at max_tokens.
    logprobs: of every token of the text, {token: log-probability} of the likeliest ones, without those that are no
        log-probability; None where not asked for.
    model: what the endpoint says that it ran.
    detail: what the endpoint says is wrong with the request itself.
    """

    text: str | None
    failure: str | None = None
    finish: str | None = None
    logprobs: list[dict[str, float]] | None = None
    model: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What asking would take: requests that differ, those with an archived text, and the tokens of all the others.

    Tokens are estimated from characters; those of the replies are the most that is allowed.
    """

    requests: int
    archived: int
    input_tokens: int
    output_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """The most that it costs, given the prices of a million tokens."""
        return (self.input_tokens * price_in + self.output_tokens * price_out) / 1e6


class Judge:
    """Asks a judge, a bounded number of requests at a time, and archives what it says."""

    def __init__(
        self,
        model: str,
        archive: Archive,
        *,
        url: str | None = None,
        api_key: str | None = None,
        rpm: float | None = None,
        concurrency: int = 4,
        timeout: float = 120,
        retries: int = 6,
        offline: bool = False,
        on_reply: Callable[[int, int], None] | None = None,
    ):
        """Nothing is connected yet.

        Args:
            model: the judge's name at the endpoint.
            url: the endpoint up to and including /v1; None: the one of the `openai` package.
            api_key: None: from the environment (`KEY_NAMES`); an endpoint at a given `url` may need none.
            rpm: at most so many requests a minute, repeated ones included.
            timeout: seconds that an attempt may take.
            retries: attempts after the first, after HTTP 408, 409, 429, 5xx, a lost connection or a time-out; they
                wait longer each time, or as long as the endpoint says.
            offline: only the archive is read.
            on_reply: called with (requests done, requests) after every reply that was not archived yet.
        """
        self.model, self.archive, self.offline, self.on_reply = model, archive, offline, on_reply
        self.url, self.timeout, self.retries, self.concurrency = url, timeout, retries, concurrency
        self.api_key = api_key or next((os.environ[n] for n in KEY_NAMES if os.environ.get(n)), None)
        self.seconds_between = 60 / rpm if rpm else 0.0
        self._next_start = 0.0

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """The reply to every request, in their order. Equal requests are asked once.

        Raises:
            InputError: the endpoint refuses the key or does not know the judge, or there is no key.
            StageError: nobody answers at the endpoint. What was archived before stays.
        """
        asked = [r.asked(self.model) for r in requests]
        keys = [Archive.key(a) for a in asked]
        known = {key: self._archived(key) for key in keys}
        if not self.offline:
            open_ones = {key: a for key, a in zip(keys, asked, strict=True) if known[key] is None}
            if open_ones:
                known |= asyncio.run(self._ask_all(open_ones))
        return [known[key] or Reply(None, MISSING) for key in keys]

    def estimate(self, requests: Sequence[Request]) -> Estimate:
        """What `ask` would take now."""
        differing = {Archive.key(r.asked(self.model)): r for r in requests}
        left = [r for key, r in differing.items() if self._archived(key) is None]
        characters = sum(len(m["content"]) for r in left for m in r.messages)
        tokens_in, tokens_out = -(-characters // CHARACTERS_PER_TOKEN), sum(r.max_tokens for r in left)
        return Estimate(len(differing), len(differing) - len(left), tokens_in, tokens_out)

    def _archived(self, key: str) -> Reply | None:
        """The archived reply. One that failed only for now counts where nothing can be asked again."""
        record = self.archive.get(key)
        if record is None:
            return None
        reply = Reply(**record["reply"])
        return reply if self.offline or reply.failure is None or reply.failure == "refused" else None

    async def _ask_all(self, asked: dict[str, dict[str, Any]]) -> dict[str, Reply]:
        replies: dict[str, Reply] = {}
        gate = asyncio.Semaphore(self.concurrency)

        async def one(client: "AsyncOpenAI", key: str, question: dict[str, Any]) -> None:
            async with gate:
                replies[key] = await self._reply(client, question)
                self.archive.put(question, {"reply": asdict(replies[key])})
                if self.on_reply:
                    self.on_reply(len(replies), len(asked))

        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for key, question in asked.items():
                        group.create_task(one(client, key, question))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return replies

    def _client(self) -> "AsyncOpenAI":
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise InputError("a judge needs the package openai; install dvpo[judge]") from error
        if self.api_key is None and self.url is None:
            raise InputError(f"no key for the judge; set {' or '.join(KEY_NAMES)}, or name an endpoint by its URL")
        return AsyncOpenAI(
            base_url=self.url,
            api_key=self.api_key or "none",
            timeout=self.timeout,
            max_retries=self.retries,
            # A hook, so that attempts which the package repeats by itself wait for their turn too.
            http_client=DefaultAsyncHttpxClient(event_hooks={"request": [self._wait_for_turn]}),
        )

    async def _wait_for_turn(self, _: Any) -> None:
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + self.seconds_between
        await asyncio.sleep(start - now)

    async def _reply(self, client: "AsyncOpenAI", asked: dict[str, Any]) -> Reply:
        import openai

        try:
            answer = await client.chat.completions.create(model=self.model, **asked["request"])
        except openai.APITimeoutError:
            return Reply(None, "timed out")
        except openai.APIConnectionError as error:
            if _nobody_there(error):
                raise StageError(
                    f"nobody answers at the judge's endpoint ({error.__cause__}); start it and run the command again"
                ) from error
            return Reply(None, "connection lost")
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise InputError(
                    f"the judge's endpoint says HTTP {error.status_code} to model {self.model}; check its name, the "
                    f"URL and the key in {' or '.join(KEY_NAMES)}"
                ) from error
            # Other errors may name the account in their text.
            detail = _text(error.message[:300]) if error.status_code in (400, 413, 422) else None
            return Reply(None, f"HTTP {error.status_code}", detail=detail)
        except (openai.APIError, ValueError, RecursionError):  # a body that is no JSON, or not of this protocol
            return Reply(None, "malformed response")
        return _read(answer)


def _nobody_there(error: Exception) -> bool:
    import httpx

    return isinstance(error.__cause__, httpx.ConnectError)


def _read(answer: Any) -> Reply:
    """The reply in a chat completion. The package checks no types: any field may hold any JSON value."""
    try:
        choice, model = answer.choices[0], _text(getattr(answer, "model", None))
        text, refusal = _text(choice.message.content), getattr(choice.message, "refusal", None)
        finish, logprobs = _text(getattr(choice, "finish_reason", None)), None
        if getattr(choice, "logprobs", None) is not None and choice.logprobs.content is not None:
            logprobs = [_likeliest(token.top_logprobs) for token in choice.logprobs.content]
    except (AttributeError, LookupError, TypeError):
        return Reply(None, "malformed response")
    if refusal or finish == "content_filter":
        return Reply(None, "refused", finish, model=model)
    if text is None:
        return Reply(None, "malformed response", finish, model=model)
    return Reply(text, None, finish, logprobs, model)


def _text(value: Any) -> str | None:
    """The text, None where it is none. JSON can spell half a surrogate pair, which no file can take."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else None


def _likeliest(tops: Any) -> dict[str, float]:
    """{token: log-probability}. A negative infinity, also spelt null, is a token of no probability and left out."""
    found = {}
    for top in tops:
        token, logprob = _text(top.token), top.logprob
        if token is not None and isinstance(logprob, float) and -math.inf < logprob <= _ROUNDING:
            found[token] = min(logprob, 0.0)
    return found


def why_no_verdict(reply: Reply) -> str:
    """The reason to count for a reply that no verdict was found in."""
    if reply.text is None:
        return reply.failure or "malformed response"
    if _SORRY.match(reply.text):
        return "refused"
    return "cut off" if reply.finish == "length" else "unparsable"


def count_failures(reasons: Sequence[str | None]) -> dict[str, int]:
    """How often each reason stands in the list, the commonest first; None is no failure."""
    return dict(Counter(reason for reason in reasons if reason is not None).most_common())


def judge_identity(model: str, prompt_sha256: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """What a result document says about its judge: name, prompt's digest, and what the endpoint says that it ran."""
    reported = sorted({r.model for r in replies if r.model is not None})
    return {"model": model, "prompt_sha256": prompt_sha256, "reported_models": reported}
