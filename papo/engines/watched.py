"""A program under the watchdog: in a session of its own, its words in a log, and none of its processes left when it is closed.

Nor when this process is gone, however it went.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from papo.engines import watchdog
from papo.errors import SetupError

_TAIL = 40


class Watched:
    """Runs `command` until it ends or is closed.

    Args:
        log: what it says goes there; its folder is the one that the program runs in.
        gently_s: for its processes to end after SIGTERM.
        device: CUDA_VISIBLE_DEVICES; None: as it is here.
        again: what the log holds is kept.
        fds: file descriptors that it gets, under the same numbers.

    Raises:
        SetupError: no process can be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        gently_s: float,
        device: str | None = None,
        environment: Mapping[str, str] | None = None,
        again: bool = False,
        fds: Sequence[int] = (),
    ) -> None:
        self.log, self._gently_s = log, gently_s
        log.parent.mkdir(parents=True, exist_ok=True)
        # Its folder is on no import path, and what it leaves there is in nobody's way.
        with log.open("ab" if again else "wb") as stream:
            try:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    [sys.executable, str(Path(watchdog.__file__)), str(gently_s), *command],
                    cwd=log.parent,
                    env=environment_of(device) | dict(environment or {}),
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    pass_fds=fds,
                    start_new_session=True,  # Ctrl-C is for whoever started it, who then ends it
                )
            except OSError as error:
                raise SetupError(f"no process can be started: {error}", where=command[0], fix="free memory") from error

    @property
    def pid(self) -> int:
        """Of the watchdog; the program is its child."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, below 0 for a signal; None while it runs."""
        code = self._process.poll()
        return code - 256 if code is not None and code > 192 else code

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit status, once it ends by itself; None if it does not within that time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.status

    def close(self) -> None:
        """Ends all of its processes."""
        self._process.terminate()  # standard input is for the case that nobody is left to do that
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._gently_s + watchdog.KILLED_S + 10.0)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL:])


def environment_of(device: str | None) -> dict[str, str]:
    """For a program of another environment, which fetches and reports nothing."""
    # PYTHONPATH would have it import from folders of this project.
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given |= {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return given | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
