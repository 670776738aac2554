"""Sampling with vLLM in processes of papo's own, under the interpreter of an environment that has it: its requirements clash with papo's.

Each engine is one process (`vllm_worker.py`) with a socket. All rows of a call are spread over the engines, each to the one with the
fewest, and an engine has enough of them at a time to be kept busy across the borders of shards. Engines start when the first row is needed
and end with `close`. What a row is depends on its seed, and on what is computed beside it by the rounding of arithmetic.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from papo.engines.policy import load_settings
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.engines.samplers.rows import Limits, Prompts, by_shard, check_row, check_temperature, fold_seed, row_error
from papo.engines.watched import Watched, environment_of
from papo.errors import CheckpointError, ParamsError, ServerDownError, SetupError
from papo.params import VllmParams

GENTLY_S = 20.0
"""For an engine to end after SIGTERM."""

LOOK_S = 120.0
"""For an interpreter to say which vLLM it has."""

AHEAD = 2
"""Rows that an engine is given, as a multiple of those that it computes at a time."""

STARTS = 2
"""Of an engine that ended by itself; then it is left out."""

OWN = ("model", "dtype", "logprobs_mode", "generation_config")
"""Arguments of vllm.LLM that are no options, as they decide which rows are right."""

_WORKER = Path(__file__).with_name("vllm_worker.py")

_LOOK = """\
import importlib.metadata as metadata, importlib.util, json
def version(name):
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return metadata.version(metadata.packages_distributions()[name][0])
print(json.dumps({name: version(name) for name in ("vllm", "transformers")}))
"""


class VllmSampler:
    """Samples the policy in a folder; a context manager, which ends the engines.

    Args:
        logs: folder for what the engines say.
        warn: told of each engine that ended by itself.
    """

    name = "vllm"
    repeatable = False

    def __init__(
        self,
        policy: Path,
        *,
        temperature: float,
        top_p: float,
        max_prompt_tokens: int,
        max_new_tokens: int,
        params: VllmParams,
        logs: Path,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        check_temperature(temperature)
        options = {name.replace("-", "_"): value for name, value in params.options.items()}
        if taken := [name for name in OWN if name in options]:
            raise ParamsError(
                f"{taken[0]} is no option: papo sets it itself",
                where="rollout.vllm.options",
                fix="set rollout.vllm.dtype" if taken[0] == "dtype" else "leave it out",
            )
        self._policy, self._params, self._options, self._logs, self._warn = policy, params, options, logs, warn
        self._temperature, self._top_p = temperature, top_p
        self._max_prompt_tokens, self._max_new_tokens = max_prompt_tokens, max_new_tokens
        self._heard: SimpleQueue[tuple[_Engine, dict[str, Any] | None]] = SimpleQueue()
        self._engines: list[_Engine] = []
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engines; the memory that they held is free then. Further rows start new ones."""
        # All at once, as each takes seconds.
        closing = [threading.Thread(target=engine.end) for engine in self._engines]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        self._engines = []

    def check(self) -> None:
        """
        Raises:
            SetupError: there is no such interpreter, or it has no vLLM.
        """
        self.versions()

    def versions(self) -> dict[str, str]:
        """As `check`."""
        return self._versions

    def metrics(self) -> dict[str, float]:
        """`engine_start_s`: until all engines had loaded the policy; `engine_ends`: how often one ended by itself."""
        return dict(self._metrics)

    def fits(self, prompt: str) -> str | None:
        """Why a prompt cannot be sampled; None if it can."""
        return self._prompts.fits(prompt)

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        """One sample a request, in order.

        Raises:
            SetupError, ParamsError: an engine cannot be started as the params say; nothing was sampled.
            ServerDownError: no engine is left; the stage can be started again.
            CheckpointError: the policy gives log-probs that are no numbers.
            DataError: a prompt does not fit, or an engine gave what cannot be a row.
        """
        return dict(self.sample_shards([requests], progress))[0]

    def sample_shards(
        self, shards: Sequence[Sequence[SampleRequest]], progress: Progress
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Number and samples of each shard as it completes; the engines go on with the next one meanwhile.

        Raises:
            PapoError: as `sample`; shards that were yielded before are good.
        """
        requests = [request for shard in shards for request in shard]
        return by_shard(shards, self._stream(requests), progress)

    # ---- what is known before an engine runs ----

    @cached_property
    def _python(self) -> str:
        """
        Raises:
            SetupError: there is no such program.
        """
        found = shutil.which(self._params.python or sys.executable)
        if found is None:
            raise SetupError(
                f"there is no interpreter {self._params.python}",
                where="rollout.vllm.python",
                fix="name the python of an environment that has vLLM",
            )
        return str(Path(found).absolute())

    @cached_property
    def _versions(self) -> dict[str, str]:
        fix = "run `pip install vllm==0.32.0` in an environment of its own and name its python as rollout.vllm.python"
        try:
            # Elsewhere, so that nothing in this folder is taken for a library.
            done = subprocess.run(
                [self._python, "-c", _LOOK], cwd=os.sep, env=environment_of(None), stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=LOOK_S, check=True,
            )  # fmt: skip
            found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
        except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise SetupError(
                f"which vLLM there is cannot be seen: {said[-1] if said else error}", where=self._python, fix=fix
            ) from error
        if found["vllm"] is None:
            raise SetupError("the interpreter has no vllm", where=self._python, fix=fix)
        return {name: version for name, version in found.items() if version is not None}

    @cached_property
    def _known(self) -> tuple[Prompts, Limits]:
        config, tokenizer = load_settings(self._policy)
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        return (
            Prompts(tokenizer, positions, self._max_prompt_tokens, self._max_new_tokens),
            Limits(self._max_new_tokens, int(tokenizer.eos_token_id), int(text.vocab_size)),
        )

    @property
    def _prompts(self) -> Prompts:
        return self._known[0]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What each engine is told first."""
        prompts, limits = self._known
        # More would take memory that is never used.
        length = min(prompts.positions or math.inf, self._max_prompt_tokens + self._max_new_tokens)
        return {
            "engine": {"max_model_len": length}
            | self._options
            | {
                "model": str(self._policy.resolve()),
                "dtype": self._params.dtype,
                # The distribution that is sampled, not that at temperature 1; and vLLM's own settings, not those beside the weights.
                "logprobs_mode": "processed_logprobs",
                "generation_config": "vllm",
            },
            "sampling": {
                "n": 1,
                "max_tokens": self._max_new_tokens,
                "temperature": self._temperature,
                "top_p": self._top_p,
                "top_k": 0,
                "min_p": 0.0,
                # The end of text of the policy alone: a checkpoint's generation_config.json may name further ones.
                "ignore_eos": True,
                "stop_token_ids": [limits.eos],
                "logprobs": 0,
                "detokenize": False,
            },
        }

    # ---- the engines ----

    def _stream(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, Sample]]:
        """(row, sample) as they come."""
        if not requests:
            return
        prompts = self._prompts.encode(requests)
        todo, left, whole = deque(range(len(requests))), len(requests), False
        try:
            self._start()
            for engine in self._engines:
                self._check_context(engine, prompts)
            self._give(todo, requests, prompts)
            while left:
                engine, message = self._hear()
                if engine not in self._engines:
                    continue
                if message is None:
                    todo.extendleft(sorted(engine.rows, reverse=True))
                    self._ended(engine)
                elif "ready" in message or engine.room == 0:
                    self._ready(engine, message, prompts)
                else:
                    row = int(message["id"])
                    engine.rows.discard(row)
                    if not engine.rows:
                        engine.until = math.inf
                    yield row, self._sample(prompts[row], message, f"row {row}: {requests[row].prompt[:60]!r}")
                    left -= 1
                self._give(todo, requests, prompts)
            whole = True
        finally:
            if not whole:  # rows that nobody waits for are under way
                self.close()

    def _start(self) -> None:
        if self._engines:
            return
        self.check()
        self._heard = SimpleQueue()
        self._began = time.monotonic()
        for number, device in enumerate(self._params.devices or [None]):
            engine = _Engine(f"engine-{number}", device, self._logs / f"engine-{number}.log")
            self._engines.append(engine)
            self._launch(engine)

    def _launch(self, engine: _Engine) -> None:
        engine.start(self._python, self._settings, self._heard, until=time.monotonic() + self._params.start_s)

    def _hear(self) -> tuple[_Engine, dict[str, Any] | None]:
        """What an engine says next; None when it ended, or was ended as it said nothing for stall_s.

        Raises:
            ServerDownError: one has not loaded the policy within start_s.
        """
        while True:
            slow = min(self._engines, key=lambda engine: engine.until)
            try:
                heard = self._heard.get(timeout=min(max(0.0, slow.until - time.monotonic()), threading.TIMEOUT_MAX))
            except Empty:
                if slow.room:
                    slow.hang_up()
                    continue
                break
            engine, message = heard
            if message is not None and "ready" not in message:
                engine.until = time.monotonic() + self._params.stall_s
            return heard
        raise ServerDownError(
            f"{slow.name} has not loaded the policy within {self._params.start_s:g} s:\n{slow.tail()}",
            where=str(slow.log),
            fix="raise rollout.vllm.start_s, or correct what it says there",
        )

    def _ready(self, engine: _Engine, message: dict[str, Any], prompts: Sequence[list[int]]) -> None:
        """
        Raises:
            SetupError: it cannot load the policy.
            ParamsError: its context is too short.
        """
        if "ready" not in message:
            if engine.starts > 1:
                return  # it ends now, and is left out then
            raise SetupError(
                f"{engine.name} cannot load the policy: {message.get('error')}\n{engine.tail()}",
                where=str(engine.log),
                fix="correct rollout.vllm.options, dtype or devices by what it says",
            )
        engine.context = int(message["ready"]["max_model_len"])
        self._check_context(engine, prompts)
        engine.room, engine.until = AHEAD * int(message["ready"]["max_num_seqs"]), math.inf
        self._metrics["engine_start_s"] = max(self._metrics.get("engine_start_s", 0.0), time.monotonic() - self._began)

    def _check_context(self, engine: _Engine, prompts: Sequence[list[int]]) -> None:
        """
        Raises:
            ParamsError: that of the engine is too short.
        """
        longest = max(map(len, prompts))
        need = longest + self._max_new_tokens
        if engine.context < need:
            raise ParamsError(
                f"a prompt of {longest} tokens and {self._max_new_tokens} new ones do not fit into the context of {engine.context} tokens",
                where="rollout.vllm.options",
                fix=f"set max_model_len to {need} or more, or lower max_new_tokens or max_prompt_tokens",
            )

    def _ended(self, engine: _Engine) -> None:
        """Starts it once more, or leaves it out.

        Raises:
            SetupError: it has never loaded the policy.
            ServerDownError: no engine is left.
        """
        status, loaded = engine.join(), engine.room > 0
        said = f"{engine.name} ended with {status}"
        if not loaded and engine.starts == 1:
            raise SetupError(
                f"{said} as it loaded the policy:\n{engine.tail()}",
                where=str(engine.log),
                fix="correct what it says there",
            )
        self._metrics["engine_ends"] = self._metrics.get("engine_ends", 0.0) + 1.0
        if engine.starts < STARTS:
            self._warn(f"{said} and is started once more; its rows are sampled anew, see {engine.log}")
            self._began = time.monotonic()
            self._launch(engine)
            return
        self._engines.remove(engine)
        if not self._engines:
            raise ServerDownError(
                f"{said}, and none is left:\n{engine.tail()}",
                where=str(engine.log),
                fix="correct what it says there, then start the stage again: shards that are stored stay",
            )
        self._warn(f"{said} and is left out, its rows go to other engines; see {engine.log}")

    def _give(self, todo: deque[int], requests: Sequence[SampleRequest], prompts: Sequence[list[int]]) -> None:
        """Rows to the engines, each to the one with the fewest, as long as one has room."""
        given: dict[_Engine, list[dict[str, Any]]] = {}
        while todo:
            engine = min(self._engines, key=lambda one: len(one.rows) if one.room else math.inf)
            if len(engine.rows) >= engine.room:
                break
            row = todo.popleft()
            engine.rows.add(row)
            message = {"id": row, "prompt": prompts[row], "seed": fold_seed(requests[row].seed)}
            given.setdefault(engine, []).append(message)
        for engine, messages in given.items():
            if len(engine.rows) == len(messages):  # it had none
                engine.until = time.monotonic() + self._params.stall_s
            engine.say(*messages)

    def _sample(self, prompt: list[int], message: dict[str, Any], where: str) -> Sample:
        if "error" in message:
            raise row_error(f"an error for a row: {message['error']}", where, "engine")
        values = message["logprobs"]
        if not all(map(math.isfinite, values)):
            raise CheckpointError(
                "the policy gives log-probs that are no finite numbers",
                where=str(self._policy),
                fix="go on from an earlier policy, with a lower train.learning_rate",
            )
        limits = self._known[1]
        return self._prompts.sample(
            prompt, check_row(message["ids"], values, message["finish_reason"], limits, where, "engine")
        )


class _Engine:
    """One engine.

    `room`: rows that it may have at a time, 0 until it has loaded the policy; `until`: when it has to have done that, or to have brought
    a row, inf where nothing is expected.
    """

    def __init__(self, name: str, device: str | None, log: Path) -> None:
        self.name, self.log, self._device = name, log, device
        self.rows: set[int] = set()
        self.room, self.starts, self.until = 0, 0, 0.0
        self.context = math.inf  # unknown yet
        self._process: Watched | None = None

    def start(
        self,
        python: str,
        settings: dict[str, Any],
        heard: SimpleQueue[tuple[_Engine, dict[str, Any] | None]],
        *,
        until: float,
    ) -> None:
        """What it says goes into `heard`, and None when it ends."""
        self.rows, self.room, self.until = set(), 0, until
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = Watched(
                [python, str(_WORKER), str(theirs.fileno())],
                self.log,
                gently_s=GENTLY_S,
                device=self._device,
                again=self.starts > 0,
                fds=[theirs.fileno()],
            )
        self.starts += 1
        threading.Thread(target=self._listen, args=(self._socket, heard), daemon=True).start()
        self.say(settings)

    def _listen(self, channel: socket.socket, heard: SimpleQueue[tuple[_Engine, dict[str, Any] | None]]) -> None:
        with suppress(OSError, ValueError), channel.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                heard.put((self, json.loads(line)))
        heard.put((self, None))

    def say(self, *messages: dict[str, Any]) -> None:
        lines = "".join(json.dumps(message, separators=(",", ":")) + "\n" for message in messages)
        with suppress(OSError):  # it ended, which is heard
            self._socket.sendall(lines.encode())

    def hang_up(self) -> None:
        """Listens to it no more, and takes it for ended."""
        self.until = math.inf
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def join(self) -> int | None:
        """Its exit status, where it ends by itself; none of its processes is left."""
        assert self._process is not None
        status = self._process.wait(GENTLY_S)
        self.end()
        return status

    def end(self) -> None:
        """Ends all of its processes."""
        if self._process is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._process.close()
            self._socket.close()

    def tail(self) -> str:
        return "" if self._process is None else self._process.tail()
