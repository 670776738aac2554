"""Imported by the copy of the checkout that tests/flows/test_operations.py runs: a stage hangs while a file in its workspace says so.

`hold-train` holds `python` or `native`: a loop that an error can end, or a call that holds the interpreter and hears no signal. Before it
hangs it starts a process in a session of its own and a forked one that ignores SIGTERM; their numbers are in `held`.
"""

import ctypes
import json
import os
import signal
import subprocess
import time
from typing import Any

from papo.session import Session

step = Session.step


def held_step(self: Session, which: Any) -> Any:
    hold = self.workspace.root / f"hold-{which.stage}"
    if hold.is_file():
        away = subprocess.Popen(["sleep", "3000"], start_new_session=True)
        if (forked := os.fork()) == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(100)
        (self.workspace.root / "held").write_text(json.dumps([os.getpid(), away.pid, forked]))
        if hold.read_text() == "native":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.PyDLL(None).sleep(3000)
        for _ in range(30_000):
            time.sleep(0.1)
    return step(self, which)


Session.step = held_step  # type: ignore[method-assign]  # what this file is for
