"""A server as a process of its own: started in a folder, awaited until it is healthy, ended with all that it started.

with serving(Server(command, folder=tmp_path, name="mlflow", url=url, health="/health")) as server:
    server.kill()    # -9, its children too
    server.start()   # again, at the same address
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

START_S = 900.0
"""Prefect and MLflow make their tables when they first start: some 15 s on a quiet machine, five minutes
on one with thirty others at work."""

GENTLY_S = 30.0

# What a person has set for servers of their own means nothing to those of a test; nor do proxies, as all of them are on loopback.
FOREIGN = ("PREFECT_", "MLFLOW_", "AWS_", "PG")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class ServerFailedError(Exception):
    """The server ended or was not healthy in time; the message ends with the tail of its log."""


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def clean_environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of this process without what would lead to other servers, and with `given`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and name.lower() not in PROXIES
    }
    return kept | {"NO_PROXY": "*", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"} | dict(given or {})


@dataclass
class Server:
    """A command that serves at `url`; what it says is in `log`, over all of its starts.

    Args:
        health: a path below `url` that answers with 200 to anyone, or a function that says whether it is there.
        user: whom it runs as, if not as whoever runs the tests.
        stop: the signal that ends it gently.
    """

    command: Sequence[str | Path]
    folder: Path
    name: str
    url: str
    health: str | Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=clean_environment)
    user: str | None = None
    stop_signal: int = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None
    took: float = 0.0
    """Seconds until it was healthy, the last time."""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].split("/")[0])

    def start(self, *, start_s: float = START_S) -> None:
        """Returns when it is healthy.

        Raises:
            ServerFailedError: it is not, within `start_s`; nothing of it is left then.
        """
        assert self.process is None, f"{self.name} runs"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [str(word) for word in self.command], cwd=self.folder, env=dict(self.environment),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                user=self.user, group=self.user, extra_groups=None if self.user is None else [],
            )  # fmt: skip
        begun = time.monotonic()
        try:
            self._await(start_s)
        except BaseException:  # also where the test is interrupted
            self.kill()
            raise
        self.took = time.monotonic() - begun

    def stop(self) -> None:
        """Gently, then by force; nothing if it does not run."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """With SIGKILL, and everything that it started."""
        self._end(signal.SIGKILL)

    def family(self) -> list[psutil.Process]:
        """Its processes: what it started, and what these started."""
        assert self.process is not None, f"{self.name} does not run"
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> float:
        """MiB that its processes hold between them: a page that several share is counted once."""
        total = 0.0
        for one in self.family():
            with suppress(psutil.NoSuchProcess):  # such as that of a connection which has just been closed
                total += one.memory_full_info().pss / 2**20
        return total

    def _await(self, start_s: float) -> None:
        assert self.process is not None
        until = time.monotonic() + start_s
        while not self._healthy():
            if (code := self.process.poll()) is not None:
                raise ServerFailedError(f"{self.name} ended with {code}:\n{self.tail()}")
            if time.monotonic() > until:
                raise ServerFailedError(f"{self.name} was not healthy within {start_s:g} s:\n{self.tail()}")
            time.sleep(0.3)

    def _healthy(self) -> bool:
        if callable(self.health):
            return self.health()
        return answers(self.url + self.health)

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        family = self.family()
        if number == signal.SIGKILL:
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        elif self.process.poll() is None:
            self.process.send_signal(number)
        _, left = psutil.wait_procs(family, timeout=GENTLY_S)
        for member in left:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(GENTLY_S)
        self.process = None

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


S = TypeVar("S", bound=Server)


@contextmanager
def serving(server: S, *, start_s: float = START_S) -> Iterator[S]:
    """`server`, started; none of its processes is left when the `with` ends, however it ends."""
    try:
        server.start(start_s=start_s)
        yield server
    finally:
        server.stop()


def answers(url: str) -> bool:
    """Whether GET of `url` gives 200; nothing between us and it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False
