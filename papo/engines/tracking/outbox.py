"""The record of a run on disk, until MLflow has it: one journal a run, written by the run and delivered by whoever comes first.

    <folder>/<id>.jsonl           a line a record: CRC-32 of the rest, a space, JSON; only ever appended to
    <folder>/<id>.files/          copies of small artifacts
    <folder>/<id>.<target>.done   how far one server has it
    <folder>/<id>.damaged         lines that were not what had been written, set aside

A write reaches the disk's cache before a call returns, so that the end of a process loses nothing; the disk is waited for beside the run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from papo.store.files import digest, disk_error

OUTBOX_BYTES = 1 << 30
"""Journals and copies of one workspace; what would go beyond is kept in memory as far as that may go."""
COPY_BYTES = 32 << 20
"""Artifacts up to this size are copied; larger ones, and policies, are delivered from where they lie, if they still are what they were."""
MEMORY_BYTES = 16 << 20
"""What waits in memory where the disk takes no more."""
KEPT_UNFINISHED = 20
"""Journals of runs that failed and are wholly delivered, kept so that the next start can go on with the same record."""

FINISHED = "FINISHED"
_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Record:
    """One call of the run. `at`: when it was made, in Unix seconds; `start` and `end`: where its line lies, -1 in memory only."""

    kind: str
    at: float
    content: dict[str, Any]
    start: int = -1
    end: int = -1


@dataclass(frozen=True)
class Damaged:
    """A line that is not what was written."""

    line: bytes
    start: int
    end: int


@dataclass
class Progress:
    """How far one server has a journal: up to `offset`, but for the records that it refused."""

    offset: int = 0
    delivered: int = 0
    run: str = ""
    refused: list[dict[str, Any]] = field(default_factory=list)


class Journal:
    """The journal of one run, to be read and delivered by anyone, and appended to by the process that holds the workspace."""

    def __init__(self, path: Path) -> None:
        self.path, self.id = path, path.name.removesuffix(_SUFFIX)
        self.unwritten: deque[Record] = deque()
        self.dropped = 0
        self._waiting_bytes = 0
        self._handle = -1
        self._size = self._others = 0

    # ---- writing ----

    def open(self, others: int) -> str:
        """Makes ready to append; what was cut off, in words, if the last write had not been whole.

        Args:
            others: bytes that the outbox holds beside this journal.

        Raises:
            SetupError: it cannot be written; `append` then keeps records in memory.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            whole = self._whole()
            self._size, self._others = os.fstat(self._handle).st_size, others
            if torn := self._size - whole:
                os.ftruncate(self._handle, whole)
                self._size = whole
                return f"the last {torn} bytes of {self.path} were no whole record and are dropped"
        except OSError as error:
            self.close()
            if (named := disk_error(error, self.path)) is error:
                raise
            raise named from error
        return ""

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """One record, by one write.

        Raises:
            OSError: the disk does not take it. It waits in memory, and so do all that follow, so that their order stays.
        """
        record = Record(kind, time.time(), dict(content))
        line = _line(record)
        if self.unwritten or self.dropped or self._handle < 0:
            self._remember(record, len(line))
            return
        try:
            if self._others + self._size + len(line) > OUTBOX_BYTES:
                raise OSError(f"the outbox holds {OUTBOX_BYTES >> 20} MiB, and that is its limit")
            if os.write(self._handle, line) != len(line):
                raise OSError("the disk took a part of a record only")
            self._size += len(line)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._handle, self._size)
            self._remember(record, len(line))
            raise

    def keep(self, path: Path, *, copy: bool) -> dict[str, Any]:
        """What finds an artifact again: its path and its digest, and a copy if it is small.

        Args:
            copy: False for what is never copied.

        Raises:
            PapoError, OSError: it is not there, or the disk does not take the copy.
        """
        found = {"path": str(path.resolve()), "digest": digest(path)}
        size = _bytes_of(path)
        if not copy or size > COPY_BYTES or self._handle < 0:
            return found
        kept = self.files / found["digest"][:16] / path.name
        if not kept.exists():
            if self._others + self._size + size > OUTBOX_BYTES:
                return found
            temporary = kept.parent / f".{secrets.token_hex(4)}"
            temporary.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, temporary)
            else:
                shutil.copyfile(path, temporary)
            temporary.replace(kept)
            self._others += size
        return found | {"copy": str(kept.relative_to(self.path.parent))}

    def sync(self) -> None:
        """Waits for the disk."""
        with suppress(OSError):
            if self._handle >= 0:
                os.fdatasync(self._handle)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def forget(self, record: Record) -> None:
        """A record that waited in memory was delivered."""
        self.unwritten.popleft()
        self._waiting_bytes -= len(_line(record))

    def _remember(self, record: Record, size: int) -> None:
        if self._waiting_bytes + size > MEMORY_BYTES:
            self.dropped += 1
        else:
            self.unwritten.append(record)
            self._waiting_bytes += size

    def _whole(self) -> int:
        """Bytes up to the end of the last line that has one."""
        end = os.fstat(self._handle).st_size
        while end:
            start = max(0, end - 65536)
            found = os.pread(self._handle, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    # ---- reading ----

    @property
    def files(self) -> Path:
        return self.path.with_name(f"{self.id}.files")

    @property
    def damaged(self) -> Path:
        return self.path.with_name(f"{self.id}.damaged")

    def read(self, offset: int = 0) -> Iterator[Record | Damaged]:
        """What stands in the file from `offset` on, one line in memory at a time; without a last line that has no end."""
        try:
            stream = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return
        with stream:
            stream.seek(offset)
            while (line := stream.readline()).endswith(b"\n"):
                end = offset + len(line)
                yield _record(line, offset, end) or Damaged(line, offset, end)
                offset = end

    def opening(self) -> Record | None:
        """The first record that opens it; None if it cannot be read."""
        whole = (item for item in self.read() if isinstance(item, Record) and item.kind == "start")
        return next(whole, None)

    def status(self) -> str:
        """What the last `finish` says; empty while the run goes on, or if it was killed."""
        status = ""
        for item in self.read():
            if isinstance(item, Record) and item.kind in ("start", "finish"):
                status = str(item.content.get("status", ""))
        return status

    def torn(self) -> int:
        """Bytes at the end that are no whole line."""
        with suppress(FileNotFoundError), self.path.open("rb") as stream:
            stream.seek(max(0, (size := self.path.stat().st_size) - (1 << 26)))
            return size and len(stream.read().rpartition(b"\n")[2])
        return 0

    def waiting(self, target: str) -> int:
        """Records that `target` does not have."""
        progress = self.progress(target)
        return sum(1 for _ in self.read(progress.offset)) + len(progress.refused) + len(self.unwritten)

    def progress(self, target: str) -> Progress:
        """As noted last; from the beginning if that cannot be read, which is safe because no delivery doubles anything."""
        try:
            return Progress(**json.loads(self._done(target).read_text()))
        except (OSError, ValueError, TypeError):
            return Progress()

    def note(self, target: str, progress: Progress) -> None:
        """Not waited for on the disk: a note that is lost costs a second delivery, which changes nothing."""
        path = self._done(target)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(progress)))
            temporary.replace(path)

    def set_aside(self, damaged: Damaged) -> None:
        with suppress(OSError), self.damaged.open("ab") as stream:
            stream.write(damaged.line)

    def find(self, content: Mapping[str, Any]) -> Path:
        """The artifact or policy of a record.

        Raises:
            FileNotFoundError, ValueError: it is gone, or no longer what was recorded.
        """
        copy = self.path.parent / content["copy"] if "copy" in content else None
        path = copy if copy is not None and copy.exists() else Path(content["path"])
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone")
        if digest(path) != content["digest"]:
            raise ValueError(f"{path} is no longer what was recorded (its digest was {content['digest'][:12]})")
        return path

    def remove(self) -> None:
        """All but what was set aside."""
        for path in self.path.parent.glob(f"{self.id}.*.done"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether this thread alone delivers the journal, until the end of the block or of the process."""
        try:
            stream = self.path.open("r+b")  # NFS locks no file that is open for reading only
        except OSError:
            # A record that is in memory only can have no other deliverer.
            yield self._handle < 0 and bool(self.unwritten)
            return
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            try:
                # Whoever held it before may have delivered and removed it.
                yield self.path.exists()
            finally:
                # Not by closing alone: a process that was forked meanwhile would go on holding it.
                fcntl.flock(stream, fcntl.LOCK_UN)

    def _done(self, target: str) -> Path:
        return self.path.with_name(f"{self.id}.{hashlib.sha256(target.encode()).hexdigest()[:8]}.done")


class Outbox:
    """The journals of one workspace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def journals(self) -> list[Journal]:
        """Oldest first."""
        return [Journal(path) for path in sorted(self.folder.glob(f"*{_SUFFIX}"))]

    def open(self, key: Mapping[str, str], *, target: str, experiment: str, warn: Callable[[str], None]) -> Journal:
        """The journal of a run that begins: a new one, or that of the same run if it has not ended well.

        Args:
            key: tags that make two starts one run; none for a run that is never taken up.

        Raises:
            SetupError: it cannot be written.
        """
        journal = (self._unfinished(key, target, experiment) if key else None) or self._new()
        self._prune(journal)
        if torn := journal.open(self.size() - _bytes_of(journal.path)):
            warn(torn)
        return journal

    def new(self) -> Journal:
        """One that is not on the disk."""
        return self._new()

    def size(self) -> int:
        return _bytes_of(self.folder)

    def _new(self) -> Journal:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(8)}"
        return Journal(self.folder / f"{name}{_SUFFIX}")

    def _unfinished(self, key: Mapping[str, str], target: str, experiment: str) -> Journal | None:
        for journal in reversed(self.journals()):
            opening = journal.opening()
            if opening is None or (opening.content["target"], opening.content["experiment"]) != (target, experiment):
                continue
            if key == key_of(opening.content["tags"]) and journal.status() != FINISHED:
                return journal
        return None

    def _prune(self, own: Journal) -> None:
        idle = [
            journal
            for journal in self.journals()
            if journal.id != own.id
            and (opening := journal.opening())
            and not journal.waiting(opening.content["target"])
        ]
        for journal in idle[:-KEPT_UNFINISHED]:
            journal.remove()


SAME = ("papo.lineage", "papo.run", "papo.workspace")


def key_of(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that make two starts one run; none without a lineage."""
    return {name: tags[name] for name in SAME if name in tags} if SAME[0] in tags else {}


def _line(record: Record) -> bytes:
    # The kind first, for people; ASCII, so that half a surrogate pair is no matter.
    body = json.dumps({"kind": record.kind, "at": record.at, **record.content}, default=str).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _record(line: bytes, start: int, end: int) -> Record | None:
    total, _, body = line[:-1].partition(b" ")
    try:
        if int(total, 16) != zlib.crc32(body):
            return None
        content = json.loads(body)
        return Record(content.pop("kind"), content.pop("at"), content, start, end)
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None


def _bytes_of(path: Path) -> int:
    """Of a file or of all in a folder; 0 if it is not there or goes meanwhile."""
    total = 0
    for item in path.rglob("*") if path.is_dir() else [path]:
        with suppress(OSError):
            total += item.stat().st_size if item.is_file() else 0
    return total
