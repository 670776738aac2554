"""Who holds a claim: one owner in one process, told from every other process, also of other machines and of before a restart."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple


class _Owner(NamedTuple):
    pid: int
    started: int
    place: str
    nonce: str


_ended: set[str] = set()


def new_owner() -> str:
    """An owner that lives as long as this process; two of one process are two."""
    pid = os.getpid()
    return f"{pid}:{_started(pid)}:{_place()}:{secrets.token_hex(4)}"


def end(owners: Iterable[str]) -> None:
    """Those of this process that hold nothing any more, which their store may have been unable to write down."""
    _ended.update(owners)


def lives(owner: str) -> bool | None:
    """Whether the process of `owner` is running; None where that cannot be seen from here: on another machine, in another container.

    One that was ended in this process does not live. A process that has ended and only waits for its parent to notice is not running; nor
    is one that has its number again.
    """
    if owner in _ended:
        return False
    try:
        pid, started, place, _ = _read(owner)
    except ValueError:
        return False
    if place != _place():
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # of another user, whose entry in /proc may be hidden
    return _started(pid) == started


def check_owner(owner: str) -> None:
    """
    Raises:
        ValueError: not made by `new_owner`.
    """
    _read(owner)


def _read(owner: str) -> _Owner:
    pid, started, place, nonce = owner.split(":")
    if int(pid) < 1:
        raise ValueError(f"no process has the number {pid}")
    return _Owner(int(pid), int(started), place, nonce)


def _started(pid: int) -> int:
    """Ticks from the start of the machine to that of the process; -1 if it has ended. A clock that is set does not change it."""
    with suppress(OSError):
        # The name of the program stands in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return int(fields[19])
    return -1


@cache
def _place() -> str:
    """Names what numbers of processes hold for: this start of this machine, and the container."""
    boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").readlink()
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:16]
