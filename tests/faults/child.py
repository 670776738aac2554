"""What is done to a run from inside its process: it writes down the points that it reaches, and at one of them the fault strikes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import mutations
from faults.power import Power

from papo.store import faults

# What each fault that a library or the system raises is raised at: a full disk lets go of files, a read-only one does not.
WRITES = ("mkdir", "write", "written", "fsync", "link")
CHANGES = (*WRITES, "remove", "rename", "set aside")

_until_the_end: list[Any] = []


def arm(
    root: str, trace: str, *, at: dict[str, Any] | None = None, fault: str = "none", mutation: str = "none"
) -> None:
    """Watches this process.

    Args:
        root: the workspace.
        trace: a file for one line a point: step, point, label and path.
        at: `place`, the step, point, label and number of the occurrence where the fault strikes, and `victim`, the name of the file
            beside it that is hit instead.
        fault: kill, torn, lost, emptied, flipped, full, read-only, clock or group.
        mutation: what is broken in the package, for the test of this harness.
    """
    mutations.apply(mutation)
    watching = faults.watching(_Watcher(Path(root), Path(trace), at, fault))
    watching.__enter__()
    _until_the_end.append(watching)


def label(path: Path | None, root: Path) -> str:
    """A path in the workspace without what differs from run to run or counts shards: `.papo/work/rollout-1/rollouts-#.parquet`."""
    if path is None:
        return ""
    path = path.absolute()
    text = str(path.relative_to(root)) if path.is_relative_to(root) else "the folder above"
    text = re.sub(r"/\.([^/]+?)\.\d+\.tmp", r"/\1 (new)", f"/{text}")[1:]
    text = re.sub(r"(work/[a-z_0-9-]+?)-[0-9a-f]{16}", r"\1", text)
    text = re.sub(r"\(new\)/.*", "(new)/*", text)
    text = re.sub(r"artifacts/runs/(?!diffs)[^/]+?\.json", "artifacts/runs/#.json", text)
    text = re.sub(r"samples/[0-9a-f]{32}", "samples/#", text)
    return re.sub(r"-\d{5,6}\b", "-#", text)


class _Watcher:
    def __init__(self, root: Path, trace: Path, at: dict[str, Any] | None, fault: str) -> None:
        self._root, self._at, self._fault = root.absolute(), at, fault
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._step = "start"
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._raising: tuple[int, tuple[str, ...]] | None = None
        self._power = Power(self._root) if fault in ("lost", "emptied") else None

    def __call__(self, point: str, path: Path | None, detail: str) -> None:
        if point == "stage begins":
            self._step = detail
        where = (self._step, point, label(path, self._root))
        self._seen[where] += 1
        line = {"step": where[0], "point": point, "label": where[2], "path": str(path or ""), "detail": detail}
        os.write(self._trace, (json.dumps(line) + "\n").encode())
        if self._at is not None and [*where, self._seen[where]] == self._at["place"]:
            os.write(self._trace, b'{"point": "struck"}\n')
            self._strike(path if not self._at["victim"] or path is None else path.with_name(self._at["victim"]))
        if self._raising is not None and point in self._raising[1]:
            raise OSError(self._raising[0], os.strerror(self._raising[0]), str(path))
        if point in ("stage ends", "session ends"):
            self._step = "end" if point == "stage ends" else "over"

    def _strike(self, path: Path | None) -> None:
        if self._fault == "full":
            self._raising = (errno.ENOSPC, WRITES)
        elif self._fault == "read-only":
            self._raising = (errno.EROFS, CHANGES)
        elif self._fault == "clock":
            set_back(self._root)
        else:
            if self._fault in ("torn", "flipped"):
                assert path is not None
                temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                damage(temporary if temporary.exists() else path, torn=self._fault == "torn")
            if self._power is not None:
                self._power.lose(emptied=self._fault == "emptied")
            if self._fault == "group":
                threading.Timer(1.0, os.killpg, (os.getpgid(0), signal.SIGKILL)).start()
                return
            os.kill(os.getpid(), signal.SIGKILL)


def damage(path: Path, *, torn: bool) -> None:
    """Cuts off a file in the middle, or changes one byte of it: of JSON a digit, so that it remains JSON. Of a folder, the largest file."""
    if path.is_dir():
        path = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    if torn:
        data = data[: len(data) // 2]
    elif path.suffix == ".json":
        digits = [match.start(1) for match in re.finditer(rb"[ \[]\d*\.?\d*?([0-8])[,\n]", data)]
        place = digits[len(digits) // 2] if digits else len(data) // 2
        data[place] ^= 1
    else:
        data[len(data) // 2] ^= 0x10
    # As another hand would: not by way of a new file.
    with path.open("r+b") as stream:
        stream.write(data)
        stream.truncate(len(data))


def set_back(root: Path, seconds: float = 3600.0) -> None:
    """Every file is from the future, and the clock of this process is behind."""
    for path in itertools.chain([root], root.rglob("*")):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9)))
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - seconds
    time.time_ns = lambda: now_ns() - int(seconds * 1e9)
