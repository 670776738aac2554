"""One run at a time in a workspace."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from papo.errors import BusyError
from papo.store.layout import Workspace


@contextmanager
def exclusive(workspace: Workspace, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the workspace; a second run waits up to `wait_s` seconds.

    The lock is the operating system's, so it ends with the process that holds it, however that ends.

    Raises:
        BusyError: naming the process that holds it, since when, and its command.
    """
    workspace.work.mkdir(parents=True, exist_ok=True)
    note = workspace.work / "lock.json"
    lock = FileLock(workspace.work / "lock")
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise BusyError(
            "another run is going on in this workspace" + _holder(note.read_text() if note.exists() else ""),
            where=str(workspace.root.resolve()),
            fix="wait until it ends, pass --wait SECONDS, or use another folder with --workspace",
        ) from None
    try:
        note.write_text(json.dumps({"pid": os.getpid(), "since": time.time(), "command": " ".join(sys.argv)}))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(text: str) -> str:
    if not text:
        return ""
    holder = json.loads(text)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f" (process {holder['pid']} since {since}: {holder['command']})"
