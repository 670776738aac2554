"""One run at a time in a workspace."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from papo.errors import BusyError, SetupError
from papo.store.faults import reached
from papo.store.files import disk_error, make_folder
from papo.store.layout import Workspace


@contextmanager
def exclusive(workspace: Workspace, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the workspace; a second run waits up to `wait_s` seconds.

    The lock is the operating system's, so it ends with the process that holds it, however that ends.

    Raises:
        BusyError: naming the process that holds it, since when, and its command.
        SetupError: the workspace is no folder, or cannot be written.
    """
    note = workspace.work / "lock.json"
    try:
        make_folder(workspace.work)
    except (FileExistsError, NotADirectoryError):
        raise SetupError("not a folder", where=str(workspace.root), fix="name a folder with --workspace") from None
    except OSError as error:
        raise disk_error(error, workspace.work) from error
    lock = FileLock(workspace.work / "lock")
    try:
        reached("lock", workspace.work / "lock")
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise BusyError(
            "another run is going on in this workspace" + _holder(note),
            where=str(workspace.root.resolve()),
            fix="wait until it ends, pass --wait SECONDS, or use another folder with --workspace",
        ) from None
    except OSError as error:
        raise disk_error(error, workspace.work / "lock") from error
    try:
        with suppress(OSError):  # a full disk must not keep a run from finding that there is nothing to do
            reached("write", note)
            note.write_text(json.dumps({"pid": os.getpid(), "since": time.time(), "command": " ".join(sys.argv)}))
        yield
    finally:
        with suppress(OSError):  # it says who holds the lock, and the lock is not held
            reached("remove", note)
            note.unlink(missing_ok=True)
        lock.release()


def _holder(note: Path) -> str:
    """Who holds the lock, in brackets; empty where the note is gone or half-written by now."""
    try:
        holder = json.loads(note.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f" (process {holder['pid']} since {since}: {holder['command']})"
    except (OSError, ValueError, TypeError):
        return ""
