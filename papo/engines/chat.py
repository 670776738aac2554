"""A client of chat endpoints that speak OpenAI's protocol: one place for tries, limits, deadlines and a server that is down.

What becomes of a call:

    ok            a chat completion; its text is "" where it says nothing
    refused       the model, or a filter in front of it, refused
    too_long      the texts do not fit into the model's context
    timeout       no reply within `timeout_s`, all tries together
    rate_limited  HTTP 429 to the last try
    error         the server failed, sent no chat completion, or refused the request for another reason

Tried again is after HTTP 408, 409, 429, 5xx and a failed connection: when the server asks for it (Retry-After), else after a random part
of 0.5 s, 1 s, 2 s ... up to 30 s. A call that would have to wait beyond its deadline ends at once as what its last try was. Calls in a
row that end with a failed connection, 5xx or without a reply mean that the server is down, and those that end with HTTP 401, 403 or 404
that the key, the model or the address is not the right one: `breaker` of them, and no other is made.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, Field

from papo.errors import ServerDownError, SetupError
from papo.params import ChatParams

if TYPE_CHECKING:
    import httpx2
    from openai import APIStatusError
    from tenacity import RetryCallState

OPENAI_URL = "https://api.openai.com/v1"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
SPACING_S = 0.002
"""Between the starts of two tries. What goes out in a bunch comes back in a bunch, in which each waits for the CPU that all of it takes."""

_AGAIN = {408, 409, 429}
_WRONG_PARAMS = {401, 403, 404}
_TOO_LONG = re.compile(
    r"context_length|exceed_context|context (length|size|window)|maximum context|prompt is too long"
    r"|longer than the (maximum )?model|exceeds the maximum number of tokens"
)
_SCHEMA = re.compile(r"response_format|json_?schema|guided_json|structured output|\bschema\b")
_FILTER = re.compile(r"content_filter|content management policy|responsibleaipolicyviolation")


@dataclass(frozen=True)
class ChatRequest:
    """Two messages; `schema`: of the JSON that is asked for, where the server can hold a model to one."""

    system: str
    user: str
    schema: Mapping[str, Any] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ChatReply:
    """What became of a call; see the table of this module.

    Tokens are those of the reply as the server counts them, or estimated at four characters each where it states no number that can be
    true; 0 without a reply. `seconds` are those of all tries. `billed_tries`: those that the server may charge for, because it took the
    request and sent no HTTP error. `cause` is brief, and holds nothing that the server sent but its HTTP status.
    """

    status: str
    text: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    tries: int
    cause: str
    billed_tries: int


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None


@dataclass(frozen=True)
class _Found:
    """What one try gave."""

    status: str
    cause: str = ""
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    again: bool = False  # worth another try
    down: bool = False  # nobody may be there, or nobody for us
    wait_s: float | None = None  # before the next try, as the server asks


class _AgainError(Exception):
    """A try that is worth another."""

    def __init__(self, found: _Found) -> None:
        super().__init__(found.cause)
        self.found = found


class _Pace:
    """So many units a minute, evenly spread, and at least so many seconds apart; None: any number."""

    def __init__(self, per_minute: int | None, apart_s: float = 0.0) -> None:
        self._unit_s = max(60.0 / per_minute if per_minute else 0.0, apart_s)
        self._next = 0.0

    def take(self, units: int) -> float:
        """Takes them, and returns the seconds to wait before they may be used."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + units * self._unit_s
        return start - now

    def correct(self, units: int) -> None:
        """Takes so many more, or gives them back."""
        self._next += units * self._unit_s


class ChatClient:
    """Asks one model; an async context manager, to be used by any number of tasks at once.

    The key is read from the environment when it is needed and is in no message; nor is any text that the server sent.

    Args:
        params: the server, the model, and the limits.
        where: the key of `params`, for messages.
    """

    def __init__(self, params: ChatParams, *, where: str = "score_prm.model") -> None:
        self.params = params
        self.plain = False
        """The server takes no JSON schema; found out once, and kept to."""
        self._where = where

    def check(self) -> None:
        """
        Raises:
            SetupError: a package is not installed, or there is no key, or it cannot be one.
        """
        try:
            import aiohttp  # noqa: F401  # only whether it can be imported
            import openai  # noqa: F401  # likewise
            import tenacity  # noqa: F401  # likewise
        except ImportError as error:
            raise SetupError(
                f"asking a model needs the packages openai, aiohttp and tenacity, which cannot be imported: {error}",
                where=self._where,
                fix=f"run `pip install openai aiohttp tenacity`, or set {self._where} to null",
            ) from None
        self._key()

    async def __aenter__(self) -> Self:
        self.check()
        import httpx2
        from openai import AsyncOpenAI, DefaultAioHttpClient

        p = self.params
        # openai's other transport takes twice the CPU a call. One connection a call under way, all kept; and no redirect, which would take
        # the texts to another place than the params name.
        limits = httpx2.Limits(max_connections=p.concurrency, max_keepalive_connections=p.concurrency)
        http = DefaultAioHttpClient(limits=limits, timeout=None, follow_redirects=False)
        # Without an address of its own, the client would take one from the environment, which no manifest shows.
        url = p.base_url or OPENAI_URL
        self._client = AsyncOpenAI(api_key=self._key(), base_url=url, max_retries=0, timeout=None, http_client=http)
        if p.base_url is not None:  # they come from the environment, too, and are nobody else's business
            self._client.organization = self._client.project = None
        self._turn = asyncio.Semaphore(p.concurrency)
        self._requests, self._tokens = _Pace(p.requests_per_minute, SPACING_S), _Pace(p.tokens_per_minute)
        self._under_way, self._idle, self._open = 0, asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._downs: list[str] = []
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, request: ChatRequest) -> ChatReply:
        """What becomes of one call; no failure of it raises.

        Raises:
            ServerDownError: the server is down; this call was not made, and those under way have ended.
            SetupError: the same of a server that refuses the key, the model or the address.
        """
        async with self._turn:
            await self._wait(self._start_s(request))
            if not self._open.is_set():
                return await self._call(request)
        await self._idle.wait()
        raise self._down_error()

    def raise_if_down(self) -> None:
        """For after the last call: whoever has nothing more to ask is not told by `ask`.

        Raises:
            ServerDownError, SetupError: as `ask`.
        """
        if self._open.is_set():
            raise self._down_error()

    def _down_error(self) -> ServerDownError | SetupError:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(self._downs).most_common())
        where = f"{self._where}, {self.params.base_url or OPENAI_URL}"
        if set(self._downs) <= {f"HTTP {status}" for status in _WRONG_PARAMS}:
            return SetupError(
                f"the server refuses to be asked for the model {self.params.model}: the last {len(self._downs)} calls: {causes}",
                where=where,
                fix=f"correct the key in {self.params.api_key_env}, the name of the model or base_url; what was paid for is kept",
            )
        return ServerDownError(
            f"the server of the model {self.params.model} is down: the last {len(self._downs)} calls failed: {causes}",
            where=where,
            fix="start the stage again when the server answers: what was paid for is kept",
        )

    async def _call(self, request: ChatRequest) -> ChatReply:
        self._under_way += 1
        self._idle.clear()
        try:
            reply, down = await _Call(self, request).run()
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        if not self._open.is_set():
            self._downs = [*self._downs, reply.cause] if down else []
            if len(self._downs) >= self.params.breaker:
                self._open.set()
        return reply

    def _start_s(self, request: ChatRequest) -> float:
        """Takes what a try needs of both limits; seconds until it may be made."""
        return max(self._requests.take(1), self._tokens.take(_estimate(request.system, request.user)))

    async def _wait(self, seconds: float) -> None:
        """Waits, but not for a server that is down."""
        if 0 < seconds < 0.1:
            await asyncio.sleep(seconds)
        elif seconds > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._open.wait()

    def _body(self, request: ChatRequest, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        p = self.params
        texts = {"system": request.system, "user": request.user}
        messages = [{"role": role, "content": _encodable(text)} for role, text in texts.items()]
        body = {"model": p.model, "messages": messages, "temperature": p.temperature, "max_tokens": p.max_tokens}
        if request.seed is not None:
            body["seed"] = request.seed
        if schema is not None:
            form = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    async def _send(self, request: ChatRequest, schema: Mapping[str, Any] | None) -> httpx2.Response:
        import httpx2

        # Typed responses, and the check of the body's keys, would take as much CPU again; `_Completion` reads what counts.
        return await self._client.post("/chat/completions", cast_to=httpx2.Response, body=self._body(request, schema))

    def _key(self) -> str:
        name, url = self.params.api_key_env, self.params.base_url
        key = os.environ.get(name, "").strip()
        if not key and url is None:
            raise SetupError(
                f"the environment variable {name} holds no key",
                where=f"{self._where}.api_key_env",
                fix=f"export {name}, name another variable, or name a server of your own as base_url",
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise SetupError(
                f"what the environment variable {name} holds cannot be a key: it has spaces, or more than ASCII",
                where=f"{self._where}.api_key_env",
                fix=f"correct {name}",
            )
        return key or "none"

    def _without_key(self, body: bytes) -> bytes:
        """A server may say anything, also what it was sent; a reply is stored."""
        key = os.environ.get(self.params.api_key_env, "").strip().encode()
        return body.replace(key, b"***") if len(key) >= 8 else body  # a shorter one is a word, such as none


class _Call:
    """One call with its tries."""

    def __init__(self, client: ChatClient, request: ChatRequest) -> None:
        self.client, self.request = client, request
        self.tries = self.billed = 0
        self.found = _Found("error")  # by the last try

    async def run(self) -> tuple[ChatReply, bool]:
        """The reply, and whether nobody may be there, or nobody for us."""
        from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

        started, timeout_s = time.monotonic(), self.client.params.timeout_s
        self.backoff = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        again = AsyncRetrying(
            stop=self._over,
            wait=self._wait_s,
            retry=retry_if_exception_type(_AgainError),
            sleep=self._pause,
            reraise=True,
        )
        try:
            async with asyncio.timeout(timeout_s) as self.limit:
                found: _Found = await again(self._try)
        except _AgainError as error:
            found = error.found
        except TimeoutError:
            found = _Found("timeout", f"no reply within {timeout_s:g} s", down=True)
        reply = ChatReply(
            found.status,
            found.text,
            found.finish_reason,
            found.prompt_tokens,
            found.completion_tokens,
            time.monotonic() - started,
            self.tries,
            found.cause,
            self.billed,
        )
        return reply, found.down

    async def _try(self) -> _Found:
        from openai import APIConnectionError, APIStatusError

        client, request = self.client, self.request
        schema = None if client.plain else request.schema
        self.tries += 1
        self.billed += 1  # until the server says no
        try:
            response = await client._send(request, schema)
        except APIStatusError as error:
            self.billed -= 1
            if schema is not None and _refuses_schema(error):
                client.plain = True
                return await self._try()
            self.found = _of_status(error)
        except APIConnectionError as error:
            never = _never_connected(error)
            self.billed -= never
            self.found = _Found("error", "no connection" if never else "connection lost", again=True, down=True)
        else:
            self.found = _read(client._without_key(response.content), request, client.params.max_tokens)
            if self.found.prompt_tokens:
                taken = _estimate(request.system, request.user)
                client._tokens.correct(self.found.prompt_tokens + self.found.completion_tokens - taken)
        if self.found.again:
            raise _AgainError(self.found)
        return self.found

    def _wait_s(self, state: RetryCallState) -> float:
        return self.backoff(state) if self.found.wait_s is None else self.found.wait_s

    def _over(self, state: RetryCallState) -> bool:
        """No try is left, or no time for another."""
        end = self.limit.when()
        left_s = math.inf if end is None else end - asyncio.get_running_loop().time()
        return state.attempt_number >= self.client.params.tries or state.upcoming_sleep >= left_s

    async def _pause(self, seconds: float) -> None:
        """Waits as the server asks, and then for our own limits, which the deadline is not about."""
        client, loop = self.client, asyncio.get_running_loop()
        await client._wait(seconds)
        own_s = client._start_s(self.request)
        if own_s > 0 and (end := self.limit.when()) is not None:
            left_s = end - loop.time()
            self.limit.reschedule(None)
            await client._wait(own_s)
            self.limit.reschedule(loop.time() + left_s)
        if client._open.is_set():
            raise _AgainError(self.found)


def _read(body: bytes, request: ChatRequest, max_tokens: int) -> _Found:
    """What a response of HTTP status 200 says."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValueError:
        return _Found("error", "no chat completion")
    choice, usage = completion.choices[0], completion.usage
    text, counts = choice.message.content or "", usage if isinstance(usage, dict) else {}
    # Beside the texts there is what the server puts around the prompt, and what the model thinks.
    prompt = _count(counts.get("prompt_tokens"), _estimate(request.system, request.user), 10_000)
    completed = _count(counts.get("completion_tokens"), _estimate(text), max_tokens)
    if choice.message.refusal or choice.finish_reason == "content_filter":
        return _Found("refused", "refused", None, choice.finish_reason, prompt, completed)
    return _Found("ok", "", text, choice.finish_reason, prompt, completed)


def _never_connected(error: BaseException) -> bool:
    """Whether nothing was sent; openai and httpx2 call any end of a connection a timeout to connect, and keep its cause."""
    from aiohttp import ClientConnectorError, ClientHttpProxyError

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return any(isinstance(cause, ClientConnectorError | ClientHttpProxyError) for cause in causes)


def _of_status(error: APIStatusError) -> _Found:
    """What an HTTP error says."""
    status, said = error.status_code, _said(error)
    cause = f"HTTP {status}"
    if status < 500 and _FILTER.search(said):
        return _Found("refused", cause)
    if status == 413 or (status in (400, 422) and _TOO_LONG.search(said)):
        return _Found("too_long", cause)
    again = status in _AGAIN or status >= 500
    if status == 429 and "insufficient_quota" in said:  # no wait of ours ends that
        again = False
    return _Found(
        "rate_limited" if status == 429 else "error",
        cause,
        again=again,
        down=status >= 500 or status in _WRONG_PARAMS,
        wait_s=retry_after_s(error.response.headers) if again else None,
    )


def _refuses_schema(error: APIStatusError) -> bool:
    said = _said(error)
    return (
        error.status_code == 400 and bool(_SCHEMA.search(said)) and not (_TOO_LONG.search(said) or _FILTER.search(said))
    )


def _said(error: APIStatusError) -> str:
    return error.response.text[:10_000].lower()


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait, by a number or a date; None where it does not, or not in words that make sense."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "")) * unit_s
            if 0 <= seconds < math.inf:
                return seconds
    with suppress(ValueError, TypeError, OverflowError):
        until = _date(headers.get("retry-after", ""))
        # By the server's own clock, where it shows it.
        now = _date(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    return None


def _date(text: str) -> datetime:
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _estimate(*texts: str) -> int:
    """Tokens, at four characters each."""
    return math.ceil(sum(map(len, texts)) / 4)


def _count(stated: Any, estimate: int, beside: int) -> int:
    """Tokens of a text and of what may be `beside` it as the server states them, if only in digits; or the estimate if that cannot be."""
    if isinstance(stated, str) and stated.isascii() and stated.isdecimal() and len(stated) < 20:
        stated = int(stated)
    most = 16 * estimate + beside  # a character has at most four bytes, a token at least one
    usable = isinstance(stated, int) and not isinstance(stated, bool) and 0 <= stated <= most
    return stated if usable else estimate


def _encodable(text: str) -> str:
    """The text with `?` for halves of characters, which no request can hold."""
    return text.encode("utf-8", "replace").decode()
