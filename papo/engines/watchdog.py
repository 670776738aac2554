"""Runs a command and ends all that it started: when standard input ends, on SIGTERM, or when the command does.

    python papo/engines/watchdog.py 20 vllm serve ...    # 20: seconds between SIGTERM and SIGKILL

A process of its own, and of the standard library and psutil alone, as it has to outlive whoever started it, however that one went.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Event

import psutil

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
KILLED_S = 10.0
"""For a process to be gone after SIGKILL."""


def watch(command: Sequence[str], gently_s: float) -> int:
    """The command's exit status; none of what it started is left then."""
    told = Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    if sys.platform == "linux":
        # Who loses its parent becomes a child of this process, not of the first one: nobody gets away, and nobody stays as a zombie.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    # close_fds: descriptors that were passed to this process are meant for the command.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False, start_new_session=True)
    try:
        while server.poll() is None and not told.is_set() and not select.select([sys.stdin], [], [], 0.2)[0]:
            pass
    finally:
        end(server.pid, gently_s)
    return server.returncode or 0


def end(group: int, gently_s: float) -> None:
    """Ends a group, and every process below this one.

    Raises:
        TimeoutError: one of them outlived SIGKILL.
    """
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
    started = time.monotonic()
    while time.monotonic() < started + gently_s + KILLED_S:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > started + gently_s:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.1)
    raise TimeoutError(f"{psutil.Process().children(recursive=True)} outlived SIGKILL")


if __name__ == "__main__":
    sys.exit(watch(sys.argv[2:], float(sys.argv[1])))
