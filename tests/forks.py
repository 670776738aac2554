"""Commands of `papo` in processes that can be killed, forked from one that has imported all, so that a start takes no seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_FORKS = """
import json, os, sys
import papo.commands, papo.pipeline
from papo.cli import main
exec(sys.argv[1])
import pyarrow
pyarrow.array([0])  # the first one imports pandas, which takes seconds
for line in sys.stdin:
    said = json.loads(line)
    if "wait" in said:
        print(os.waitstatus_to_exitcode(os.waitpid(said["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        log = os.open(said["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        exec(said.get("before", ""))
        os._exit(main(said["arguments"]))
"""


TESTS = Path(__file__).parent


def with_tests() -> dict[str, str]:
    """The environment of a process that imports this checkout, and what its tests share."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}


class Papo:
    """Commands of `papo`, each in a process of its own that is forked from one that has imported what they need."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self.folder = process, folder
        self.log = folder / "log"

    def start(self, *arguments: str, before: str = "") -> int:
        """Starts a command; its process. `before`: statements that are run in it first."""
        return self._say(arguments=arguments, log=str(self.log), before=before)

    def kill(self, pid: int) -> bool:
        """Kills it without a chance to do anything; whether it was still running."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid) == -signal.SIGKILL

    def kill_when(self, due: Callable[[], bool], wait_s: float, *arguments: str) -> bool:
        """Starts a command and kills it so long after something is due; whether it was still running."""
        until = time.monotonic() + 60
        pid = self.start(*arguments)
        while not due():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.005)
        time.sleep(wait_s)
        return self.kill(pid)

    def wait(self, pid: int) -> int:
        """The exit code, once it has ended."""
        return self._say(wait=pid)

    def cpu_seconds(self) -> float:
        """What the commands that have ended took."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.children_user + times.children_system)

    def run(self, *arguments: str) -> None:
        """A command that has to succeed."""
        assert self.wait(self.start(*arguments)) == 0, self.log.read_text()

    def _say(self, **what: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def papo_forks(folder: Path, imports: str) -> Iterator[Papo]:
    """The current folder of the commands is `folder`; what they print goes to its file `log`.

    Args:
        imports: statements that import what the commands will; what they would compute with must not start threads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TESTS.parent / "params.yaml", folder)
    with subprocess.Popen(
        [sys.executable, "-c", _FORKS, imports],
        cwd=folder,
        env=with_tests(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        try:
            yield Papo(process, folder)
        finally:
            process.stdin.close()
            process.wait(60)
