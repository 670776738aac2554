"""The guard of a run that has its process for itself, and the limits of its stages."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect.settings import get_current_settings

from flows import guard

HARD_S = 30.0
"""After a stage's time is up Prefect raises an error in it; if that has had no effect for so long, the guard kills the run's process."""
GENTLY_S = 25.0
"""From SIGTERM to SIGKILL; a watchdog of papo/engines has its processes gone by then."""
LOCK_S = 120.0
"""A deployed run waits so long for its workspace, which an earlier process of it may still hold while it ends."""

_guard: subprocess.Popen[bytes] | None = None


def start_guard() -> None:
    """Starts the guard of this process; a second call does nothing.

    For processes that are a run and nothing else: what they started ends with them.
    """
    global _guard
    if _guard is not None and _guard.poll() is None:
        return
    mark = os.environ[guard.MARK] = secrets.token_hex(8)
    # Prefect may have its settings from a profile; the guard has them from its environment alone, and no mark, as it ends what is marked.
    environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True, include_secrets=True)
    del environment[guard.MARK]
    _guard = subprocess.Popen(
        [sys.executable, str(Path(guard.__file__)), mark, str(GENTLY_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # what ends the run's process group must not end what cleans up after it
    )


def guard_own_process() -> float:
    """Starts the guard if a worker started this process for one flow run, as it is nobody else's then.

    Returns:
        seconds to wait for the workspace.
    """
    if guard.FLOW_RUN not in os.environ:
        return 0.0
    start_guard()
    return LOCK_S


@contextmanager
def no_longer_than(seconds: float | None, what: str) -> Iterator[None]:
    """The guard kills this process if it is still in here `HARD_S` after that time; without a guard nothing does."""
    if seconds is None or _guard is None:
        yield
        return
    _say(f"{seconds + HARD_S} {what} did not end within {seconds / 60:g} min (flow.timeouts)")
    try:
        yield
    finally:
        _say("0")


def _say(line: str) -> None:
    assert _guard is not None
    assert _guard.stdin is not None
    with suppress(OSError):  # somebody killed the guard; the run goes on without
        _guard.stdin.write(f"{line}\n".encode())
        _guard.stdin.flush()
