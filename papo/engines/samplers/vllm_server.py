"""Sampling from vLLM servers: one request a row, each to the least loaded server that lives, and no row twice or lost.

A server that does not answer, breaks a connection or gives HTTP 5xx gets no row until it has proven anew, within a few tries, that it
serves the policy; else it is left out, and its rows go elsewhere. What a row is does not depend on the server that it came from but by the
rounding of arithmetic, which differs with what else a server computes beside it: a row sampled again need not be equal to the last token.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.engines.policy import encode_prompt, load_policy
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.engines.samplers.completions import (
    IDLE_S,
    Endpoint,
    NoAnswerError,
    Row,
    Sampling,
    key_of,
    read_row,
)
from papo.engines.samplers.proof import LIMITS, Fixed, compute_fixed, prove
from papo.errors import DataError, PapoError, ParamsError, ServerDownError, SetupError
from papo.params import ServerParams
from papo.store.files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_TEMPERATURE = 0.01
"""vLLM takes a lower one, but 0, for this."""

FIRST_WAIT_S = 0.5
"""Before a server that failed is tried again; twice as long each further time."""

PROOF_S = 120.0
"""For a server to prove what it serves."""

LAST_WORD_S = 5.0
"""For a server that failed to answer once all rows are there."""


@dataclass(frozen=True)
class _Known:
    """What the folder of the policy says."""

    tokenizer: PreTrainedTokenizerBase
    fixed: list[Fixed]
    positions: int | None
    vocabulary: int


class VllmServerSampler:
    """Samples the policy in a folder from the servers at `urls`, which have to prove first that they serve it.

    Args:
        policy: the folder; its digest is what a row will carry.
        urls: called once, when the first row is needed; None: those of the params.
        warn: told once of each server that is left out or failed at last, in the thread of the caller.
    """

    name = "vllm-server"
    repeatable = False

    def __init__(
        self,
        policy: Path,
        *,
        temperature: float,
        top_p: float,
        max_prompt_tokens: int,
        max_new_tokens: int,
        params: ServerParams,
        urls: Callable[[], Sequence[str]] | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        if 0.0 < temperature < LEAST_TEMPERATURE:
            raise ParamsError(
                f"vLLM samples at no temperature between 0 and {LEAST_TEMPERATURE}",
                where=f"temperature {temperature:g}",
                fix=f"set it to 0, or to {LEAST_TEMPERATURE} or above",
            )
        self._policy, self._params, self._warn = policy, params, warn
        self._temperature, self._top_p = temperature, top_p
        self._max_prompt_tokens, self._max_new_tokens = max_prompt_tokens, max_new_tokens
        self._given_urls = urls if urls is not None else lambda: params.base_urls
        self._warned: set[str] = set()
        self.differences: dict[str, float] = {}
        """By URL: the largest difference of a log-prob in the last proof."""

    def check(self) -> None:
        """
        Raises:
            SetupError: aiohttp is not installed, or what should be a key cannot be one.
        """
        try:
            import aiohttp  # noqa: F401  # only whether it can be imported
        except ImportError as error:
            raise SetupError(
                f"sampling from servers needs the package aiohttp, which cannot be imported: {error}",
                where="rollout.engine",
                fix="run `pip install aiohttp`, or set rollout.engine to transformers",
            ) from None
        key_of(self._params)

    def metrics(self) -> dict[str, float]:
        """`proof_difference`: the largest difference of a log-prob in the last proofs of all servers."""
        return {"proof_difference": max(self.differences.values())} if self.differences else {}

    def versions(self) -> dict[str, str]:
        """Asks the servers for theirs.

        Raises:
            ServerDownError: none answers.
        """
        return {"vllm": self._server_version, "transformers": version("transformers")}

    def fits(self, prompt: str) -> str | None:
        """Why a prompt cannot be sampled; None if it can."""
        return self._misfit(encode_prompt(self._known.tokenizer, prompt))

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        """One sample a request, in order.

        Raises:
            ServerDownError: no server is left, or a row failed on all of them; the stage can be started again.
            SetupError, ParamsError: a server that cannot be used, or serves another policy; no row was kept.
            DataError: a prompt does not fit, or a server gave what cannot be a row.
        """
        return [sample for _, samples in self.sample_shards([requests], progress) for sample in samples]

    def sample_shards(
        self, shards: Sequence[Sequence[SampleRequest]], progress: Progress
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Number and samples of each shard as it completes; the servers go on with the next one meanwhile.

        Raises:
            PapoError: as `sample`; shards that were yielded before are good.
        """
        requests = [request for shard in shards for request in shard]
        of_shard = [number for number, shard in enumerate(shards) for _ in shard]
        starts = [of_shard.index(number) if shard else 0 for number, shard in enumerate(shards)]
        left = [len(shard) for shard in shards]
        found: dict[int, Sample] = {}
        for number, shard in enumerate(shards):
            if not shard:
                yield number, []
        prompts = self._encode(requests)
        for row, sample in self._stream(requests, prompts):
            found[row] = sample
            progress(1)
            number = of_shard[row]
            left[number] -= 1
            if not left[number]:
                first = starts[number]
                yield number, [found.pop(first + index) for index in range(len(shards[number]))]

    # ---- what is known of the policy ----

    @cached_property
    def _known(self) -> _Known:
        # On the CPU: the servers have the memory of the GPU.
        model, tokenizer = load_policy(self._policy, device="cpu")
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        fixed = compute_fixed(
            model.eval(),
            tokenizer,
            temperature=self._temperature,
            top_p=self._top_p,
            room=min(self._max_prompt_tokens + self._max_new_tokens - 1, (positions or 4096) - 1),
        )
        return _Known(tokenizer, fixed, positions, int(config.vocab_size))

    @cached_property
    def _sampling(self) -> Sampling:
        known = self._known
        return Sampling(
            self._temperature,
            self._top_p,
            self._max_new_tokens,
            int(known.tokenizer.eos_token_id),
            known.vocabulary,
            digest(self._policy),
        )

    def _encode(self, requests: Sequence[SampleRequest]) -> list[list[int]]:
        ids = {prompt: encode_prompt(self._known.tokenizer, prompt) for prompt in {one.prompt for one in requests}}
        for request in requests:
            if (why := self._misfit(ids[request.prompt])) is not None:
                raise DataError(
                    why,
                    where=f"prompt {request.prompt[:60]!r}",
                    fix="raise rollout.max_prompt_tokens, lower max_new_tokens, or drop the problem in prepare",
                )
        return [ids[request.prompt] for request in requests]

    def _misfit(self, ids: Sequence[int]) -> str | None:
        positions = self._known.positions
        if not 0 < len(ids) <= self._max_prompt_tokens:
            return f"a prompt has {len(ids)} tokens, allowed are 1 to {self._max_prompt_tokens}"
        if positions is not None and len(ids) + self._max_new_tokens > positions:
            return (
                f"a prompt of {len(ids)} tokens and {self._max_new_tokens} new ones do not fit into the {positions} "
                "positions of the policy"
            )
        return None

    # ---- the servers ----

    @cached_property
    def _urls(self) -> list[str]:
        urls = list(self._given_urls())
        if not urls:
            raise SetupError(
                "there is no server to sample from", where="base_urls", fix="name servers, or have papo start them"
            )
        return urls

    @cached_property
    def _server_version(self) -> str:
        async def ask() -> list[str | NoAnswerError]:
            async with _session() as session:
                return await asyncio.gather(*(_version(self._server(url, session)) for url in self._urls))

        self.check()
        # In a thread of its own, as there may be a loop in this one.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(asyncio.run, ask()).result()
        versions = sorted({one for one in found if isinstance(one, str)})
        if not versions:
            raise _down({url: str(cause) for url, cause in zip(self._urls, found, strict=True)})
        return " and ".join(versions)

    def _server(self, url: str, session: Any) -> Endpoint:
        p = self._params
        return Endpoint(url, session, key=key_of(p), key_name=p.api_key_env, timeout_s=p.timeout_s)

    def _stream(self, requests: Sequence[SampleRequest], prompts: Sequence[list[int]]) -> Iterator[tuple[int, Sample]]:
        """(row, sample) as they come. The servers are asked in a thread of its own, which goes on while the caller stores a shard."""
        if not requests:
            return
        self.check()
        asking = _Asking(self, requests, prompts)
        asking.start()
        try:
            while True:
                match asking.out.get():
                    case None:
                        return
                    case str() as message:
                        if message not in self._warned:
                            self._warned.add(message)
                            self._warn(message)
                    case BaseException() as error:
                        raise error
                    case number, row:
                        yield number, self._sample(prompts[number], row)
        finally:
            asking.end()

    def _sample(self, prompt: list[int], row: Row) -> Sample:
        text = row.ids[:-1] if row.finish_reason == "stop" else row.ids
        completion = self._known.tokenizer.decode(text, skip_special_tokens=False)
        return Sample(prompt, row.ids, completion, row.logprobs, row.finish_reason)


class _Line:
    """A server, and how many rows it has under way. `up`: it gets rows; `hoped`: it may get some again."""

    def __init__(self, server: Endpoint) -> None:
        self.server, self.busy, self.up, self.hoped = server, 0, False, True


class _Asking:
    """The asking for some rows, in a thread; `out` takes (number, row) pairs, warnings, and at the end None or an exception."""

    def __init__(
        self, sampler: VllmServerSampler, requests: Sequence[SampleRequest], prompts: Sequence[list[int]]
    ) -> None:
        self._sampler, self._requests, self._prompts = sampler, requests, prompts
        self._params, self._sampling, self._fixed = sampler._params, sampler._sampling, sampler._known.fixed
        self._urls = sampler._urls
        self.out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._todo = deque(range(len(requests)))
        self._fails: Counter[int] = Counter()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._recoveries: set[asyncio.Task[None]] = set()
        self._causes: dict[str, str] = {}

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._main())
        self._thread = threading.Thread(target=self._run, name="papo-sampling", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Rows under way are lost."""
        with suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
            self.out.put(None)
        except BaseException as error:
            self.out.put(_first(error))
        finally:
            self._loop.close()

    # ---- in the event loop ----

    async def _main(self) -> None:
        async with _session() as session, asyncio.TaskGroup() as self._group:
            self._lines = [_Line(self._sampler._server(url, session)) for url in self._urls]
            # No row is asked for before every server has proven itself, or was left out.
            for starting in [self._group.create_task(self._take_in(line)) for line in self._lines]:
                await starting
            width = min(len(self._todo), len(self._lines) * self._params.concurrency)
            for worker in [self._group.create_task(self._work()) for _ in range(width)]:
                await worker
            for recovery in self._recoveries:
                recovery.cancel()
            for line in self._lines:
                if line.hoped and not line.up:
                    await self._last_word(line.server)

    async def _work(self) -> None:
        while self._todo:
            number = self._todo.popleft()
            self.out.put((number, await self._row(number)))

    async def _row(self, number: int) -> Row:
        """
        Raises:
            ServerDownError: no server is left, or so many tries failed.
        """
        request, prompt = self._requests[number], self._prompts[number]
        while True:
            line = await self._turn()
            server = line.server
            try:
                reply = await server.complete(self._sampling.body(server.model, prompt, request.seed))
            except NoAnswerError as error:
                self._failed(line, str(error))
            else:
                return read_row(reply, prompt, self._sampling, f"{server.url}, row {number}: {request.prompt[:60]!r}")
            finally:
                line.busy -= 1
                self._wake()
            self._fails[number] += 1
            if self._fails[number] >= self._params.tries + len(self._lines):
                raise _down(self._causes, f"row {number} failed {self._fails[number]} times, {request.prompt[:60]!r}")

    async def _turn(self) -> _Line:
        """The least loaded server that lives, once one has room.

        Raises:
            ServerDownError: none is left.
        """
        while True:
            free = [line for line in self._lines if line.up and line.busy < self._params.concurrency]
            if free:
                line = min(free, key=lambda line: line.busy)
                line.busy += 1
                return line
            if not any(line.up or line.hoped for line in self._lines):
                raise _down(self._causes)
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def _wake(self, *, everyone: bool = False) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not everyone:
                    return

    def _failed(self, line: _Line, cause: str) -> None:
        self._causes[line.server.url] = cause
        if line.up:
            line.up, line.hoped = False, True
            recovery = self._group.create_task(self._take_in(line, after_s=FIRST_WAIT_S))
            self._recoveries.add(recovery)
            recovery.add_done_callback(self._recoveries.discard)

    async def _take_in(self, line: _Line, *, after_s: float = 0.0) -> None:
        """Gives a server rows once it has proven itself, or leaves it out."""
        for number in range(self._params.tries):
            await asyncio.sleep(after_s if number == 0 else FIRST_WAIT_S * 2**number)
            try:
                await self._examine(line.server)
            except NoAnswerError as error:
                self._causes[line.server.url] = str(error)
            else:
                line.up = True
                break
        else:
            line.hoped = False
            self.out.put(
                f"{line.server.url} is left out, its rows go to other servers: {self._causes[line.server.url]}"
            )
        self._wake(everyone=True)

    async def _last_word(self, server: Endpoint) -> None:
        """Warns of a server that failed and does not answer: with more rows it would have been left out."""
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await server.look(self._params.model)
        except (NoAnswerError, PapoError, TimeoutError):
            self.out.put(f"{server.url} failed, its rows went to other servers: {self._causes[server.url]}")

    async def _examine(self, server: Endpoint) -> None:
        """
        Raises:
            NoAnswerError, SetupError, ParamsError: as they say; no row is asked of such a server.
        """
        try:
            async with asyncio.timeout(PROOF_S):
                await server.look(self._params.model)
                longest = max(self._prompts, key=len)
                need = len(longest) + self._sampling.max_new_tokens
                if server.max_model_len is not None and need > server.max_model_len:
                    raise ParamsError(
                        f"a prompt of {len(longest)} tokens and {self._sampling.max_new_tokens} new ones do not fit into "
                        f"the context of {server.max_model_len} tokens",
                        where=server.url,
                        fix=f"start the server with --max-model-len {need}, or lower max_new_tokens or max_prompt_tokens",
                    )
                limit = self._params.max_difference or LIMITS[self._params.dtype]
                room = (server.max_model_len or need) - 1
                fixed = [one for one in self._fixed if len(one.ids) <= room]
                found = await prove(server, fixed, self._sampling, limit, self._sampler._policy)
                self._sampler.differences[server.url] = found
        except TimeoutError:
            raise NoAnswerError(f"no proof within {PROOF_S:g} s") from None


@asynccontextmanager
async def _session() -> AsyncIterator[Any]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


async def _version(server: Endpoint) -> str | NoAnswerError:
    try:
        return await server.version()
    except NoAnswerError as error:
        return error


def _down(causes: Mapping[str, str], what: str = "no server is left") -> ServerDownError:
    return ServerDownError(
        f"{what}: {', '.join(sorted(set(causes.values())))}",
        where=", ".join(causes),
        fix="start the servers (`curl URL/models` says whether one answers), then the stage again: shards that are stored stay",
    )


def _first(error: BaseException) -> BaseException:
    """The error in a group that says most: one of papo, if there is one."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [_first(one) for one in error.exceptions]
    return next((one for one in inner if isinstance(one, PapoError)), inner[0])
