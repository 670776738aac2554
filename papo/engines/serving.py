"""The servers that a policy is sampled from: started here and anew for each policy, or told to load it, or taken as they are.

What is started runs under a watchdog, in a session of its own, and none of its processes is left when it is closed, or when this process
is gone. Whether a server serves the policy that it should is for the sampler to prove.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

from papo.engines.samplers.completions import NAME_FLAG, key_of, served_name
from papo.engines.watched import Watched
from papo.errors import CheckpointError, ServerDownError, SetupError
from papo.params import ServerParams
from papo.store.files import digest

GENTLY_S = 20.0
"""For a server to end after SIGTERM."""

NAMED = "vllm.entrypoints.openai.api_server"
"""The command whose last word this is takes the model as --model; `vllm serve` takes it as it stands."""

_TAIL = 40


class Server:
    """A vLLM server for one policy.

    Args:
        log: what it says goes there; written anew at each start.
        port: None: a free one.
        device: CUDA_VISIBLE_DEVICES; None: as it is here.
    """

    def __init__(
        self,
        params: ServerParams,
        policy: Path,
        log: Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        device: str | None = None,
    ) -> None:
        self.policy, self.log = policy, log
        self._params, self._device = params, device
        self._host, self._port = host, free_port() if port is None else port
        self._process: Watched | None = None

    @property
    def name(self) -> str:
        """By which it serves the policy."""
        return self._params.model or served_name(self.policy)

    @property
    def url(self) -> str:
        shown = "127.0.0.1" if self._host in ("", "0.0.0.0") else self._host
        return f"http://{shown}:{self._port}/v1"

    def start(self) -> None:
        """Starts it; `wait` says when it answers.

        Raises:
            CheckpointError: there is no policy.
            SetupError: the command is not there.
        """
        if not (self.policy / "config.json").is_file():
            raise CheckpointError(
                "not a policy: config.json is missing", where=str(self.policy), fix="name a folder in Hugging Face form"
            )
        command = self.command()
        self._process = Watched(command, self.log, gently_s=GENTLY_S, device=self._device, environment=self._key())

    def command(self) -> list[str]:
        """What is run.

        Raises:
            SetupError: the program is not there.
        """
        words = program_of(self._params)
        named = ["--model"] if words[-1] == NAMED else []
        flags: dict[str, str | int | float | bool] = {
            NAME_FLAG: self.name,
            "host": self._host,
            "port": self._port,
            "dtype": self._params.dtype,
            # The distribution that is sampled, not that at temperature 1; and vLLM's own settings, not those beside the weights.
            "logprobs-mode": "processed_logprobs",
            "generation-config": "vllm",
        }
        return [*words, *named, str(self.policy.resolve()), *flags_of(flags | self._params.options)]

    def wait(self) -> None:
        """Until it answers.

        Raises:
            SetupError: it ended by itself.
            ServerDownError: it does not answer within start_s.
        """
        assert self._process is not None
        until = time.monotonic() + self._params.start_s
        while not answers(self.url):
            if self._process.status is not None:
                raise SetupError(
                    f"the server ended with {self._process.status} as it started:\n{self._process.tail()}",
                    where=str(self.log),
                    fix="correct what it says there",
                )
            if time.monotonic() > until:
                said = self._process.tail()
                self.close()
                raise ServerDownError(
                    f"the server does not answer within {self._params.start_s:g} s:\n{said}",
                    where=str(self.log),
                    fix="raise start_s, or correct what it says there",
                )
            time.sleep(0.2)

    def running(self) -> bool:
        return self._process is not None and self._process.status is None

    def join(self) -> int:
        """Its exit status, once it ends by itself."""
        assert self._process is not None
        status = self._process.wait()
        assert status is not None
        return status

    def close(self) -> None:
        """Ends all of its processes."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _key(self) -> dict[str, str]:
        key = os.environ.get(self._params.api_key_env, "").strip()
        return {"VLLM_API_KEY": key} if key else {}


class Servers:
    """The servers of a run, by the params; a context manager, which ends those that it started.

    Args:
        logs: folder for what servers and the reload command say.
        say: told what takes time.
    """

    def __init__(self, params: ServerParams, logs: Path, *, say: Callable[[str], None] = lambda message: None) -> None:
        self._params, self._logs, self._say = params, logs, say
        self._started: list[Server] = []
        self._served = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """
        Raises:
            SetupError: servers are to be started here, and there is no such program.
        """
        if not self._params.base_urls:
            program_of(self._params)

    def serve(self, policy: Path) -> list[str]:
        """URLs of servers that were told to serve the policy.

        Raises:
            CheckpointError, SetupError, ServerDownError: they cannot, and why.
        """
        wanted = digest(policy)
        alive = bool(self._params.base_urls) or (self._started and all(one.running() for one in self._started))
        if self._served == wanted and alive:
            return self._urls()
        self._served = ""
        if self._params.base_urls:
            if self._params.reload is not None:
                self._reload(policy)
        else:
            self._start(policy)
        self._served = wanted
        return self._urls()

    def close(self) -> None:
        """Ends those that were started here; the memory that they held is free then."""
        for server in self._started:
            server.close()
        self._started, self._served = [], ""

    def _urls(self) -> list[str]:
        return list(self._params.base_urls) or [one.url for one in self._started]

    def _start(self, policy: Path) -> None:
        self.close()
        p = self._params
        devices: Sequence[str | None] = p.devices or [None] * p.servers
        self._say(f"starting {p.servers} vLLM server{'s' * (p.servers > 1)} for {policy}")
        self._started = [
            Server(p, policy, self._logs / f"server-{number}.log", device=device)
            for number, device in enumerate(devices)
        ]
        try:
            for one in self._started:
                one.start()
            for one in self._started:
                one.wait()
        except BaseException:  # Ctrl-C, too: none of them is left
            self.close()
            raise

    def _reload(self, policy: Path) -> None:
        """Has the person's command tell the servers, and waits until all answer."""
        assert self._params.reload is not None
        command = self._params.reload.replace("{policy}", shlex.quote(str(policy.resolve())))
        self._say(f"reloading: {command}")
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / "reload.log"
        until = time.monotonic() + self._params.start_s
        with log.open("wb") as stream:
            # A file, not a pipe: what the command leaves running would keep a pipe open.
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                status: int | None = process.wait(self._params.start_s)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != 0:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
            how = f"did not end within {self._params.start_s:g} s" if status is None else f"ended with {status}"
            raise SetupError(f"the reload command {how}:\n{said}".rstrip(), where=command, fix="correct reload")
        while silent := [url for url in self._params.base_urls if not answers(url)]:
            if time.monotonic() > until:
                raise ServerDownError(
                    f"after the reload {len(silent)} of {len(self._params.base_urls)} servers do not answer",
                    where=", ".join(silent),
                    fix="see their logs, and what reload does; or raise start_s",
                )
            time.sleep(0.2)


def serve_policy(
    params: ServerParams, policy: Path, log: Path, *, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serves one policy until Ctrl-C.

    Raises:
        CheckpointError, SetupError: it cannot, and why; also if others could reach it and it has no key.
        ServerDownError: it does not answer in time, or ended by itself.
    """
    if not is_loopback(host) and not key_of(params):
        raise SetupError(
            f"at {host or 'every address'} others could reach the server, and it would ask nobody for a key",
            where=f"--host, {params.api_key_env}",
            fix=f"export a secret of yours as {params.api_key_env} here and where papo samples, or leave --host out",
        )
    if taken(host, port):
        raise SetupError(
            f"port {port} is taken", where=f"{host}:{port}", fix="name another --port, or end what listens there"
        )
    server = Server(params, policy, log, host=host, port=port)
    try:
        server.start()
        say(f"starting vLLM for {policy}; its log: {log}")
        server.wait()
        say(f'{policy} answers: base_urls: ["{server.url}"], model: {server.name}')
        status = server.join()
        said = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise ServerDownError(
            f"the server ended by itself, with {status}:\n{said}",
            where=str(log),
            fix="see there why, and start it again",
        )
    except KeyboardInterrupt:
        say("ending the server")
    finally:
        server.close()


def program_of(params: ServerParams) -> list[str]:
    """The words of `command`, the first of them the path of a program.

    Raises:
        SetupError: it is not there.
    """
    words = shlex.split(params.command)
    found = which(words[0]) if words else None
    if found is None:
        raise SetupError(
            f"the server cannot be started: there is no program {words[0] if words else ''}".rstrip(),
            where="rollout.server.command",
            fix="run `pip install vllm==0.32.0` in an environment of its own and name its program as rollout.server.command, "
            "or start servers yourself and name them as rollout.server.base_urls",
        )
    return [found, *words[1:]]


def flags_of(options: dict[str, str | int | float | bool]) -> list[str]:
    """max-model-len: 4096 -> --max-model-len 4096; enforce-eager: true -> --enforce-eager, false -> --no-enforce-eager."""
    flags = []
    for name, value in options.items():
        words = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{words}"] if isinstance(value, bool) else [f"--{words}", str(value)]
    return flags


def which(name: str) -> str | None:
    """A program by its path or on PATH; the same from any folder."""
    found = shutil.which(name)
    return None if found is None else str(Path(found).absolute())


def answers(url: str) -> bool:
    """Whether the server at a base URL is healthy."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url.removesuffix("/").removesuffix("/v1") + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def taken(host: str, port: int) -> bool:
    """Whether somebody listens there.

    Raises:
        SetupError: nobody can.
    """
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise SetupError(
                f"no server can listen there: {error.strerror or error}",
                where=f"{host}:{port}",
                fix="name an IPv4 address of this machine as --host, and a --port of 1024 or above",
            ) from None
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; False for a name other than localhost."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
