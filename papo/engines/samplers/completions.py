"""What a vLLM server is asked for one row, and which of its answers are believed.

A prompt goes out as token ids and a completion comes back as token ids: no text is tokenised again. The row's seed is the lower 63 bits
of its own, as vLLM takes what int64 holds and reads -1 as "any"; on a CPU its random stream depends on the lowest 32 of them. All that a
checkpoint's generation_config.json or a server's own settings could change of the distribution is stated in each request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.engines.samplers.rows import Limits, Row, are_ids, check_row, fold_seed, row_error
from papo.errors import DataError, ParamsError, SetupError
from papo.params import ServerParams
from papo.store.files import digest

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 10.0
IDLE_S = 2.0
"""How long a connection is kept without use; the server ends one after five seconds, maybe just as it is taken again."""

NAME_FLAG = "served-model-name"
"""Of `vllm serve`: the name of the model."""

_AGAIN = {408, 425, 429}


def served_name(policy: Path) -> str:
    """The name by which a server that papo starts serves the policy, if the params give it none: no two policies share it."""
    return f"policy-{digest(policy)[:12]}"


class NoAnswerError(Exception):
    """A request that another server may answer; its text is the brief cause."""


@dataclass(frozen=True)
class Sampling(Limits):
    """What all rows of a round share. `salt`: keeps what a server remembers of an earlier policy from being used for this one."""

    temperature: float
    top_p: float
    salt: str

    def body(self, model: str, prompt: Sequence[int], seed: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "seed": fold_seed(seed),
            # The end of text of the policy alone: a checkpoint's generation_config.json may name further ones.
            "ignore_eos": True,
            "stop_token_ids": [self.eos],
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": self.salt,
        }


class Endpoint:
    """One server, asked over one session of aiohttp.

    Args:
        url: its base URL, with /v1.
        key: sent as a bearer token; "" for none.
        timeout_s: for one answer.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, *, key: str, key_name: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._session, self._key_name, self._timeout_s = session, key_name, timeout_s
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.model = ""
        self.max_model_len: int | None = None

    async def look(self, model: str | None) -> None:
        """Learns by which name it serves the policy, and how long a context may be.

        Raises:
            NoAnswerError: it does not answer.
            SetupError: it serves no such model, several without one being named, or is no such server.
        """
        found = await self._call("GET", "/models")
        cards = found.get("data") if isinstance(found, Mapping) else None
        if not isinstance(cards, list) or not all(isinstance(card, Mapping) and "id" in card for card in cards):
            raise SetupError(
                "what answers is no server of OpenAI's protocol: /models is no list of models",
                where=self.url,
                fix="correct base_urls: they end in /v1",
            )
        names = [str(card["id"]) for card in cards]
        if (model is None and len(names) != 1) or (model is not None and model not in names):
            wanted = "several models, and none is named" if model is None else f"no model {model}"
            raise SetupError(
                f"the server has {wanted}: it has {', '.join(names) or 'none'}",
                where=self.url,
                fix="name one of them as model, or start the server with --served-model-name",
            )
        card = cards[0 if model is None else names.index(model)]
        length = card.get("max_model_len")
        self.model, self.max_model_len = str(card["id"]), length if isinstance(length, int) else None

    async def version(self) -> str:
        """Of vLLM; "unknown" where it does not say."""
        try:
            found = await self._call("GET", "/version", above=True)
        except (SetupError, DataError, ParamsError):
            return "unknown"
        return str(found.get("version", "unknown")) if isinstance(found, Mapping) else "unknown"

    async def complete(self, body: Mapping[str, Any]) -> Any:
        """The JSON of one completion.

        Raises:
            NoAnswerError: nobody answered, or the server failed.
            SetupError, ParamsError, DataError: as `_call`.
        """
        return await self._call("POST", "/completions", json.dumps(body).encode())

    async def _call(self, method: str, path: str, data: bytes | None = None, *, above: bool = False) -> Any:
        """
        Raises:
            NoAnswerError: nobody answered, or the server failed.
            SetupError: the key, the model or the address is refused.
            ParamsError: the request is.
            DataError: the answer is no JSON.
        """
        import aiohttp

        base = self.url.removesuffix("/v1") if above else self.url
        limit = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=CONNECT_S)
        try:
            async with self._session.request(
                method, base + path, data=data, headers=self._headers, timeout=limit, allow_redirects=False
            ) as response:
                status, content = response.status, await response.read()
        except aiohttp.ClientConnectorError:
            raise NoAnswerError("no connection") from None
        except aiohttp.InvalidURL:
            raise SetupError("that is no URL", where=self.url, fix="correct base_urls") from None
        except TimeoutError:
            raise NoAnswerError(f"no answer within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError):
            raise NoAnswerError("connection lost") from None
        if status >= 500 or status in _AGAIN:
            raise NoAnswerError(f"HTTP {status}")
        if status != 200:
            raise self._refused(status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise DataError(
                f"the server's answer is no JSON: {content[:60]!r}",
                where=self.url + path,
                fix="see what answers at that address",
            ) from None

    def _refused(self, status: int, content: bytes) -> SetupError | ParamsError:
        said = _message(content)
        if status in (401, 403):
            return SetupError(
                f"the server refuses the key: HTTP {status}", where=self.url, fix=f"export its key as {self._key_name}"
            )
        if status in (400, 422):
            return ParamsError(
                f"the server refuses a row: {said or f'HTTP {status}'}",
                where=self.url,
                fix="lower max_new_tokens or max_prompt_tokens, or start the server with a larger --max-model-len",
            )
        of = f"the model {self.model}" if self.model else "its models"
        return SetupError(
            f"the server refuses to be asked for {of}: HTTP {status} {said}".rstrip(),
            where=self.url,
            fix="correct base_urls (they end in /v1) or model, or start a server that has /v1/completions",
        )


def key_of(params: ServerParams) -> str:
    """The key to send, or "".

    Raises:
        SetupError: what the variable holds cannot be one.
    """
    key = os.environ.get(params.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise SetupError(
            f"what the environment variable {params.api_key_env} holds cannot be a key: it has spaces, or more than ASCII",
            where="rollout.server.api_key_env",
            fix=f"correct {params.api_key_env}",
        )
    return key


def read_row(reply: Any, prompt: Sequence[int], sampling: Sampling, where: str) -> Row:
    """The row in an answer.

    Raises:
        DataError: naming `where`, if the answer cannot be what was asked for.
    """
    choice = only_choice(reply, where)
    ids, given = choice.get("token_ids"), choice.get("prompt_token_ids")
    if ids is None or given is None:
        raise _wrong("no token ids", where, "ask a server of vLLM 0.10.2 or later")
    if not are_ids(given, None) or list(given) != list(prompt):
        raise _wrong("a completion of another prompt than was sent", where)
    noted = choice.get("logprobs")
    values = noted.get("token_logprobs") if isinstance(noted, Mapping) else None
    return check_row(ids, values, choice.get("finish_reason"), sampling, where, "server")


def only_choice(reply: Any, where: str) -> Mapping[str, Any]:
    """
    Raises:
        DataError: there is not exactly one choice.
    """
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise _wrong("no completion", where)
    return choices[0]


def _wrong(what: str, where: str, fix: str = "") -> DataError:
    return row_error(what, where, "server", fix)


def _message(content: bytes) -> str:
    """What an error says, in brief."""
    try:
        found = json.loads(content)
    except ValueError:
        return ""
    error = found.get("error", found) if isinstance(found, Mapping) else None
    said = error.get("message", "") if isinstance(error, Mapping) else ""
    return " ".join(str(said).split())[:300]
