"""Sampling from vLLM servers: one request a row, each to the least loaded server that lives, and no row twice or lost.

A server that does not answer, breaks a connection or gives HTTP 5xx gets no row until it has proven anew, within a few tries, that it
serves the policy; else it is left out, and its rows go elsewhere. What a row is does not depend on the server that it came from but by the
rounding of arithmetic, which differs with what else a server computes beside it: a row sampled again need not be equal to the last token.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from papo.engines.policy import load_policy
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.engines.samplers.comparison import SURE, Place
from papo.engines.samplers.completions import (
    IDLE_S,
    NAME_FLAG,
    Endpoint,
    NoAnswerError,
    Sampling,
    key_of,
    read_row,
    served_name,
)
from papo.engines.samplers.proof import LIMITS, Fixed, Proof, compute_fixed, prove, with_others
from papo.engines.samplers.rows import Prompts, Row, by_shard, check_temperature
from papo.errors import PapoError, ParamsError, ServerDownError, SetupError
from papo.params import ServerParams
from papo.store.files import digest

FIRST_WAIT_S = 0.5
"""Before a server that failed is tried again; twice as long each further time."""

PROOF_S = 120.0
"""For a server to prove what it serves."""

LAST_WORD_S = 5.0
"""For a server that failed to answer once all rows are there."""


@dataclass(frozen=True)
class _Known:
    """What the folder of the policy says."""

    prompts: Prompts
    fixed: list[Fixed]
    vocabulary: int


class VllmServerSampler:
    """Samples the policy in a folder from the servers at `urls`, which have to prove first that they serve it.

    Args:
        policy: the folder; its digest is what a row will carry.
        others: folders of policies that a server might still serve, and that it is told from; need not be there.
        urls: called once, when the first row is needed; None: those of the params.
        warn: told, in the thread of the caller, once of each server that is left out or failed at last, and once that a proof is none.
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
        others: Sequence[Path] = (),
        urls: Callable[[], Sequence[str]] | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        check_temperature(temperature)
        self._policy, self._params, self._others, self._warn = policy, params, others, warn
        self._temperature, self._top_p = temperature, top_p
        self._max_prompt_tokens, self._max_new_tokens = max_prompt_tokens, max_new_tokens
        self._given_urls = urls if urls is not None else lambda: params.base_urls
        self._warned: set[str] = set()
        self.proofs: dict[str, Proof] = {}
        """By URL: the last one."""
        self.hand_over_s = 0.0
        self.doubted = False
        """Whether it was warned of a proof that is none."""

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
                fix="run `pip install aiohttp` (the extra vllm-server), or set rollout.engine to transformers",
            ) from None
        key_of(self._params)

    def metrics(self) -> dict[str, float]:
        """`hand_over_s`: until servers had the policy and had proven it, none of them sampling. Of the last proofs: `proof_difference`, the
        largest difference of a log-prob, and `proof_margin`, how many standard errors the log-probs of a server are at least from those
        of another policy that it might serve, if there is one."""
        proofs = self.proofs.values()
        if not proofs:
            return {}
        found = {
            "hand_over_s": self.hand_over_s,
            "proof_difference": max(proof.difference for proof in proofs),
        }
        margins = [proof.nearest[1].margin for proof in proofs if proof.nearest is not None]
        return found | ({"proof_margin": min(margins)} if margins else {})

    def versions(self) -> dict[str, str]:
        """Asks the servers for theirs.

        Raises:
            ServerDownError: none answers.
        """
        return {"vllm": self._server_version, "transformers": version("transformers")}

    def fits(self, prompt: str) -> str | None:
        """Why a prompt cannot be sampled; None if it can."""
        return self._known.prompts.fits(prompt)

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
        return by_shard(shards, self._stream(requests), progress)

    def close(self) -> None:
        """The servers are somebody else's."""

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
            dtype=self._params.dtype,
        )
        prompts = Prompts(tokenizer, positions, self._max_prompt_tokens, self._max_new_tokens)
        return _Known(prompts, fixed, int(config.vocab_size))

    @cached_property
    def _fixed(self) -> list[Fixed]:
        return with_others(self._known.fixed, self._policy, self._others, self._params.dtype, self._warn)

    @cached_property
    def _sampling(self) -> Sampling:
        known = self._known
        return Sampling(
            self._max_new_tokens,
            int(known.prompts.tokenizer.eos_token_id),
            known.vocabulary,
            self._temperature,
            self._top_p,
            digest(self._policy),
        )

    # ---- the servers ----

    @cached_property
    def _urls(self) -> list[str]:
        began = time.monotonic()
        urls = list(self._given_urls())
        self.hand_over_s += time.monotonic() - began
        if not urls:
            raise SetupError(
                "there is no server to sample from",
                where="rollout.server.base_urls",
                fix="name servers, or have papo start them",
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

    def _stream(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, Sample]]:
        """(row, sample) as they come. The servers are asked in a thread of its own, which goes on while the caller stores a shard."""
        if not requests:
            return
        self.check()
        prompts = self._known.prompts.encode(requests)
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
                        yield number, self._known.prompts.sample(prompts[number], row)
        finally:
            asking.end()


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
        self._params, self._sampling, self._fixed = sampler._params, sampler._sampling, sampler._fixed
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
        except BaseException as error:  # a cancellation, too: whoever takes the rows waits for an end
            self.out.put(_first(error))
        finally:
            self._loop.close()

    # ---- in the event loop ----

    async def _main(self) -> None:
        async with _session() as session, asyncio.TaskGroup() as self._group:
            self._lines = [_Line(self._sampler._server(url, session)) for url in self._urls]
            began = time.monotonic()
            # No row is asked for before every server has proven itself, or was left out.
            for starting in [self._group.create_task(self._take_in(line)) for line in self._lines]:
                await starting
            self._sampler.hand_over_s += time.monotonic() - began
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
                self._check_name(server)
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
        except TimeoutError:
            raise NoAnswerError(f"no proof within {PROOF_S:g} s") from None
        self._sampler.proofs[server.url] = found
        if found.nearest is not None and not found.nearest[1].is_told:
            self._doubt(server, *found.nearest)

    def _check_name(self, server: Endpoint) -> None:
        """
        Raises:
            SetupError: it should have been started by papo for this policy, and was not.
        """
        p, wanted = self._params, served_name(self._sampler._policy)
        given = p.base_urls or p.model is not None or any(key.replace("_", "-") == NAME_FLAG for key in p.options)
        if not given and server.model != wanted:
            raise SetupError(
                f"the server was started for another policy: its name is {server.model}, not {wanted}",
                where=f"{server.url}, {self._sampler._policy}",
                fix="start the stage again",
            )

    def _doubt(self, server: Endpoint, other: Path, place: Place) -> None:
        """For a server whose log-probs could be those of another policy, too: its name may say which one it was started with.

        Raises:
            SetupError: it is that other one, and none was loaded since.
        """
        if server.model == served_name(self._sampler._policy):
            return
        if server.model == served_name(other) and self._params.reload is None:
            raise SetupError(
                f"the server still serves the policy in {other}: its name is {server.model}",
                where=f"{server.url}, {self._sampler._policy}",
                fix="start it anew with the checkpoint, or set reload",
            )
        if not self._sampler.doubted:
            self._sampler.doubted = True
            self.out.put(
                f"{server.url} could still serve the policy in {other}, for all that its log-probs say: in {self._params.dtype} they are "
                f"{place.margin:.1f} standard errors from those of that one, which tells nothing below {SURE:g}. What is sampled from "
                "either differs by less than rounding; that the server was handed the policy is not proven"
            )


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
