"""Sees to it that nothing of a run outlives it, that a run does not outlive its worker, and that no stage hangs for ever.

    python flows/guard.py MARK 25    # started by flows/guarded.py, as a child of the run

A process of its own, and of the standard library and psutil alone, as it has to outlive the run, however that one went. It ends the
run's process, first gently and then not, if

- its worker is gone, since nobody could cancel the run then,
- the server has the run as crashed, cancelled or to be started again: it was taken for dead, and another process may be on its way,
- a stage is not done by the time that standard input names, in lines of `SECONDS STAGE`; a line of 0 ends the wait.

The second argument is the seconds from SIGTERM to SIGKILL. Once the run's process is gone the guard ends what is left of what that one
had started: processes with MARK in their environment, those it saw below the run's process, and all below these.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import sys
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psutil

MARK = "PAPO_GUARDED"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
LOOK_S = 1.0
ASK_S = 5.0
"""Between questions to the server; a crashed run is started again a minute later (flows/setup.py)."""
TAKEN = ("CRASHED", "CANCELLED", "SCHEDULED", "PENDING")
"""States that the server gives to a running run only if it takes its process for gone."""


class Guard:
    """Watches its parent process, the run."""

    def __init__(self, mark: str, gently_s: float) -> None:
        self._mark, self._gently_s = mark, gently_s
        self._run = psutil.Process(os.getppid())
        self._top, self._worker = _below_worker(self._run)
        self._seen: set[psutil.Process] = set()
        self._before = {*self._run.children(recursive=True)} - {psutil.Process()}
        self._unfinished = b""
        self._deadline: tuple[float, str] | None = None
        self._asked = time.monotonic()
        self._attempt = 0  # not known yet

    def watch(self) -> None:
        """Until the run's process is gone, and all that it had started."""
        while self._lives():
            self._listen()
            self._look()
            if self._deadline is not None and time.monotonic() > self._deadline[0]:
                self._stop(f"{self._deadline[1]}; its process could not be asked to stop, and was killed", gently_s=0.0)
            elif self._worker is not None and self._worker_gone():
                self._stop("the worker of this run is gone", gently_s=self._gently_s)
            elif taken := self._taken():
                # Not gently: on SIGTERM Prefect would report, whatever another process is at, that the run has crashed.
                self._stop(f"{taken}: this process of it ends", gently_s=0.0, report=False)
        self._end()

    def _lives(self) -> bool:
        return os.getppid() == self._run.pid

    def _listen(self) -> None:
        if not select.select([0], [], [], LOOK_S)[0]:
            return
        # By the descriptor: of lines that came together, sys.stdin would keep some where `select` does not see them.
        if not (heard := os.read(0, 65536)):  # closed, and the run has yet to end
            time.sleep(LOOK_S)
            return
        *lines, self._unfinished = (self._unfinished + heard).split(b"\n")
        for line in lines:
            seconds, _, stage = line.decode().partition(" ")
            self._deadline = (time.monotonic() + float(seconds), stage) if float(seconds) > 0 else None

    def _look(self) -> None:
        with suppress(psutil.Error):
            self._seen |= {*self._run.children(recursive=True)} - self._before - {psutil.Process()}
        self._seen = {process for process in self._seen if process.is_running()}

    def _worker_gone(self) -> bool:
        try:
            return self._top.ppid() != self._worker
        except psutil.Error:
            return True

    def _taken(self) -> str | None:
        """How the server shows that it takes this process for gone; None if it does not, or does not answer."""
        if time.monotonic() < self._asked + ASK_S or FLOW_RUN not in os.environ:
            return None
        self._asked = time.monotonic()
        with suppress(OSError, ValueError):
            found = ask("GET", f"/flow_runs/{os.environ[FLOW_RUN]}")
            self._attempt = self._attempt or found["run_count"]
            if found["state_type"] in TAKEN:
                return f"the server has the run as {found['state_name']}"
            if found["run_count"] > self._attempt:
                return "the run has been started again elsewhere"
        return None

    def _stop(self, reason: str, *, gently_s: float, report: bool = True) -> None:
        if not self._lives():  # it has ended meanwhile, and all else looks like its worker's end, too
            return
        with suppress(OSError):  # a worker that is gone reads no more
            os.write(2, f"papo: {reason}\n".encode())
        if gently_s:
            _tell([self._run], signal.SIGTERM)
        until = time.monotonic() + gently_s
        while time.monotonic() < until and self._lives():
            self._look()
            time.sleep(0.2)
        if self._lives():
            if report:
                self._report(reason)
            _tell([self._run], signal.SIGKILL)
            while self._lives():
                time.sleep(0.05)

    def _report(self, reason: str) -> None:
        """The reason goes on the run's page before its worker says no more than that a process ended."""
        if FLOW_RUN in os.environ:
            state = {"state": {"type": "CRASHED", "message": reason}}
            with suppress(OSError, ValueError):
                ask("POST", f"/flow_runs/{os.environ[FLOW_RUN]}/set_state", state)

    def _end(self) -> None:
        started = time.monotonic()
        told: set[psutil.Process] = set()
        while left := self._left():
            gentle = time.monotonic() < started + self._gently_s
            _tell(left - told if gentle else left, signal.SIGTERM if gentle else signal.SIGKILL)
            told |= left
            time.sleep(0.2)

    def _left(self) -> set[psutil.Process]:
        left = {process for process in self._seen if _alive(process)}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process not in left and process.environ().get(MARK) == self._mark and _alive(process):
                    left.add(process)
        for process in set(left):
            with suppress(psutil.Error):
                left |= set(process.children(recursive=True))
        self._seen |= left
        return {process for process in left if _alive(process)} - {psutil.Process()}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _tell(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _below_worker(run: psutil.Process) -> tuple[psutil.Process, int | None]:
    """The process that a worker started for this run, and the worker's number; None: none did, or one outside this container."""
    flow_run = os.environ.get(FLOW_RUN)
    top = run
    with suppress(psutil.Error):
        while flow_run and (parent := top.parent()) is not None and parent.environ().get(FLOW_RUN) == flow_run:
            top = parent
        if flow_run and top.ppid() > 1:
            return top, top.ppid()
    return top, None


def ask(method: str, path: str, body: Any = None) -> Any:
    """
    Raises:
        OSError: no answer, or one that says no.
        ValueError: no address, or an answer that is not JSON.
    """
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/") + path
    request = urllib.request.Request(url, method=method, headers={"Content-Type": "application/json"})
    if secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {base64.b64encode(secret.encode()).decode()}")
    elif key := os.environ.get("PREFECT_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    data = None if body is None else json.dumps(body).encode()
    loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    handlers = [urllib.request.ProxyHandler({})] if loopback else []
    with urllib.request.build_opener(*handlers).open(request, data, timeout=10.0) as answer:
        return json.load(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Guard(sys.argv[1], float(sys.argv[2])).watch()
