"""Training in several processes of this machine, one a device: `train.devices`.

The job is written to files, each process is started under a watchdog and tells how it goes over a socket. The first that fails ends all of
them, and none outlives this process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import papo
from papo import errors
from papo.engines.protocols import Progress, TrainJob
from papo.engines.training.checks import check_trainer
from papo.engines.training.jobs import Order, write_job
from papo.engines.training.worker import HOST
from papo.engines.watched import Watched
from papo.errors import PapoError, StageError
from papo.params import TrainParams

STALL_S = 1800.0
"""That a process waits for the others; long enough for the first one to write a policy."""

GENTLY_S = 5.0
"""For a process to end after SIGTERM."""

BLAME_S = 3.0
"""After a process ended: the others, which miss it, end by themselves within that, and whose fault it was can be seen."""


class LaunchedTrainer:
    """Trains in `params.devices.processes` processes.

    Args:
        timeout_s: that a process waits for the others.
    """

    def __init__(
        self,
        params: TrainParams,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        warn: Callable[[str], None] = lambda message: None,
        timeout_s: float = STALL_S,
    ) -> None:
        self._params, self._temperature, self._max_new_tokens = params, temperature, max_new_tokens
        self._seed, self._warn, self._timeout_s = seed, warn, timeout_s

    def versions(self) -> dict[str, str]:
        more = ("deepspeed",) if self._params.devices.kind == "deepspeed" else ()
        return {name: version(name) for name in ("torch", "transformers", "accelerate", *more)}

    def train(self, job: TrainJob, progress: Progress) -> list[dict[str, float]]:
        """See `Trainer`.

        Raises:
            SetupError: this machine has not the devices or libraries that the params ask for; nothing was started.
            StageError: a process ended by itself.
            PapoError: as GrpoTrainer.train, in any of the processes.
        """
        check_trainer(self._params)
        folder = job.work / "processes"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with _meeting_place() as port:
            write_job(folder, self._order(job, port), job)
            return self._follow(folder, progress)

    def _order(self, job: TrainJob, port: int) -> Order:
        return Order(
            port=port,
            timeout_s=self._timeout_s,
            params=self._params,
            temperature=self._temperature,
            max_new_tokens=self._max_new_tokens,
            seed=self._seed,
            round=job.round,
            # The processes run in another folder.
            policy=job.policy.absolute(),
            state=job.state and job.state.absolute(),
            reference=job.reference and job.reference.absolute(),
            out=job.out.absolute(),
            out_state=job.out_state.absolute(),
            work=job.work.absolute(),
        )

    def _follow(self, folder: Path, progress: Progress) -> list[dict[str, float]]:
        """Until all are done; none of them is left then."""
        heard: SimpleQueue[tuple[_Process, dict[str, Any] | None]] = SimpleQueue()
        processes: list[_Process] = []
        history: list[dict[str, float]] = []
        try:
            for rank in range(self._params.devices.processes):
                processes.append(_Process(rank, folder.absolute(), self._params, heard))
            while not all(process.done for process in processes):
                process, message = heard.get()
                if message is None:
                    process.silent = True
                    if not process.done:
                        raise self._blame(processes, heard)
                elif "error" in message:
                    raise _error(message["error"])
                elif "warning" in message:
                    self._warn(message["warning"])
                elif "progress" in message:
                    progress(message["progress"])
                else:
                    process.done = True
                    history = history or message["done"]
        finally:
            _end(processes)
        return history

    def _blame(
        self, processes: Sequence[_Process], heard: SimpleQueue[tuple[_Process, dict[str, Any] | None]]
    ) -> PapoError:
        """The error to raise once one has ended: those that miss it end, too."""
        until = time.monotonic() + BLAME_S
        while not all(process.silent for process in processes) and (left := until - time.monotonic()) > 0:
            with suppress(Empty):
                process, message = heard.get(timeout=left)
                process.silent |= message is None
                if message is not None and "error" in message:
                    return _error(message["error"])
        # One that was killed is to blame before one that failed, which may have missed it.
        ended = [process for process in processes if process.silent and not process.done]
        first = min(ended, key=lambda process: (process.status() or 0) >= 0)
        return StageError(
            f"process {first.rank} of the {len(processes)} that train together ended with {first.status()}:\n{first.tail()}",
            where=str(first.log),
            fix="correct what it says there (-9: killed, often for want of memory), then run train again: it goes on from the last step "
            "that was saved",
        )


@contextmanager
def _meeting_place() -> Iterator[int]:
    """A store of torch's, which the processes meet by, at a free port that only this machine reaches."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it has it by a star

    listener = socket.create_server((HOST, 0))
    port = int(listener.getsockname()[1])
    store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    yield port
    del store


def _error(told: Sequence[str]) -> PapoError:
    name, what, where, fix = told
    kind: type[PapoError] = getattr(errors, name)
    return kind(what, where=where, fix=fix)


def _end(processes: Sequence[_Process]) -> None:
    # All at once, as each takes seconds.
    ending = [threading.Thread(target=process.end) for process in processes]
    for thread in ending:
        thread.start()
    for thread in ending:
        thread.join()


class _Process:
    """One of them; what it says goes into `heard`, and None when it ends."""

    def __init__(
        self, rank: int, folder: Path, params: TrainParams, heard: SimpleQueue[tuple[_Process, dict[str, Any] | None]]
    ) -> None:
        self.rank, self.done, self.silent = rank, False, False
        self.log = folder / f"process-{rank}.log"
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = Watched(
                [sys.executable, "-m", "papo.engines.training.worker", str(theirs.fileno()), str(folder), str(rank)],
                self.log,
                gently_s=GENTLY_S,
                # torch shards on a GPU wherever it sees one.
                device="" if params.devices.device == "cpu" else None,
                environment=_environment(),
                fds=[theirs.fileno()],
            )
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: SimpleQueue[tuple[_Process, dict[str, Any] | None]]) -> None:
        with suppress(OSError, ValueError), self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                heard.put((self, json.loads(line)))
        heard.put((self, None))

    def status(self) -> int | None:
        """How one ended that says nothing more."""
        return self._process.wait(GENTLY_S)

    def tail(self) -> str:
        return self._process.tail()

    def end(self) -> None:
        """Ends all that it started, too."""
        if self.done:
            self._process.wait(GENTLY_S)
        self._process.close()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _environment() -> dict[str, str]:
    paths = [str(Path(papo.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(paths)}
    # What the processes say to one another stays on this machine.
    return found | ({} if "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": "lo"})
