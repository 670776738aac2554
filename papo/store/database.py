"""A SQLite file that threads, processes and runs share: durable, brought to this version, moved aside if it is damaged."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from filelock import FileLock, Timeout

from papo.errors import BusyError, DamagedError, DataError, MissingInputError, PapoError, SetupError, UserError
from papo.store.faults import reached
from papo.store.files import disk_error, make_folder

T = TypeVar("T")

SUFFIX = ".sqlite"
BUSY_S = 60.0
"""How long one operation waits for another process before it gives up."""

# Where the shared memory of WAL does not reach from one machine to the other.
NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "afs", "9p", "fuse.")

_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True)
class Format:
    """What a file holds. `migrations[n]` are the statements that lead from version n to n + 1; version 0 is an empty file.

    Args:
        application: the application id that SQLite keeps in the header.
        salvage: copies what can still be read of a damaged file into a new one, without an error of the former; how many rows.
    """

    name: str
    application: int
    migrations: tuple[tuple[str, ...], ...]
    salvage: Callable[[sqlite3.Connection, sqlite3.Connection], int]

    @property
    def version(self) -> int:
        return len(self.migrations)


class Database:
    """One connection to `path`, for all threads of this process; made if it is not there, unless `read_only`.

    A file that proves damaged, now or later, is moved aside with a warning, and what can be read of it is taken over. One that was deleted
    or replaced while it is open is opened anew.

    Raises, from every method:
        UserError: the name does not end in .sqlite, so that no other file is ever taken for a damaged database.
        DataError: it is a database of something else, or of a later version.
        DamagedError: it is damaged, if `read_only`.
        MissingInputError: it is not there, if `read_only`.
        SetupError: it cannot be written, or the disk is full.
        BusyError: other processes did not let go of it for BUSY_S seconds.
    """

    def __init__(
        self, path: Path, form: Format, *, read_only: bool = False, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        if path.suffix != SUFFIX:
            raise UserError(
                f"{form.name} are kept in a file whose name ends in {SUFFIX}",
                where=str(path),
                fix="choose another name",
            )
        self.path, self._form, self._read_only, self._warn = path.absolute(), form, read_only, warn
        self._turn = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self._inode = -1
        self._open()

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._disconnect()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on one state of the file, whatever others write meanwhile."""
        # Not COMMIT: that fails once a damaged page was met, though `work` may have caught the error.
        return self._run(work, ("BEGIN", "ROLLBACK"), "NORMAL")

    def write(self, work: Callable[[sqlite3.Connection], T], *, durable: bool) -> T:
        """`work` in one transaction: done as a whole or not at all, however this process ends.

        Args:
            durable: what was written also outlives the machine's losing power, at the price of waiting for the disk.
        """
        return self._run(work, ("BEGIN IMMEDIATE", "COMMIT"), "FULL" if durable else "NORMAL")

    def _run(self, work: Callable[[sqlite3.Connection], T], bounds: tuple[str, str], synchronous: str) -> T:
        with self._turn:
            if self._closed:
                raise RuntimeError(f"{self.path} was closed")
            if self._connection is None or (not self._read_only and _inode(self.path) != self._inode):
                self._open()
            try:
                try:
                    return self._transaction(work, bounds, synchronous)
                except sqlite3.DatabaseError as error:
                    if self._read_only or not is_damage(error):
                        raise
                    self._replace(error)
                    return self._transaction(work, bounds, synchronous)
            except sqlite3.Error as error:
                raise _named(error, self.path) from error

    def _transaction(self, work: Callable[[sqlite3.Connection], T], bounds: tuple[str, str], synchronous: str) -> T:
        connection = self._connection
        assert connection is not None
        connection.execute(f"PRAGMA synchronous={synchronous}")
        reached("transaction", self.path)
        connection.execute(bounds[0])
        try:
            result = work(connection)
            reached("commit", self.path)
            connection.execute(bounds[1])
            reached("committed", self.path)
        except BaseException:  # an interrupt, too, must leave no transaction open; it is raised again
            with suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise
        return result

    # ---- opening ----

    def _open(self) -> None:
        self._disconnect()
        if self._read_only:
            self._connection = self._look()
            return
        with self._alone():
            try:
                self._connection = self._prepare()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise _named(error, self.path) from error
                self._connection = self._anew(error)
            self._inode = _inode(self.path)

    def _replace(self, error: sqlite3.Error) -> None:
        """Moves the file aside, unless another process has done so by now."""
        self._disconnect()
        with self._alone():
            self._connection = self._anew(error) if _inode(self.path) == self._inode else self._prepare()
            self._inode = _inode(self.path)

    def _anew(self, error: sqlite3.Error) -> sqlite3.Connection:
        aside = self.path.with_name(f"{self.path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{SUFFIX}")
        # The log first, so that it is never beside a file that is not its own.
        for end in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                reached("set aside", self.path)
                Path(f"{self.path}{end}").replace(f"{aside}{end}")
        connection, old = self._prepare(), _connect(aside, "ro")
        try:
            old.execute("PRAGMA writable_schema=ON")  # lets SQLite look into a file that is too short
            connection.execute("BEGIN IMMEDIATE")
            count = self._form.salvage(old, connection)
            connection.execute("COMMIT")
        except BaseException:  # an interrupt, too, must leave no connection open; it is raised again
            connection.close()
            raise
        finally:
            old.close()
        self._warn(
            f"{self.path} is damaged ({error}); moved to {aside.name}, {count} {self._form.name} of it taken over"
        )
        return connection

    def _prepare(self) -> sqlite3.Connection:
        """A connection to a file of this version, which is made or migrated."""
        reached("open database", self.path)
        connection = _connect(self.path, "rwc")
        try:
            connection.execute("BEGIN IMMEDIATE")
            version = self._version(connection)
            for number, statements in enumerate(self._form.migrations[version:], version + 1):
                for statement in statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={number}")
                connection.execute(f"PRAGMA application_id={self._form.application}")
            connection.execute("COMMIT")
            connection.execute(f"PRAGMA journal_mode={'DELETE' if on_network(self.path) else 'WAL'}")
        except BaseException:  # an interrupt, too, must leave no connection open; it is raised again
            connection.close()
            raise
        return connection

    def _look(self) -> sqlite3.Connection:
        """A connection that writes nothing, to a file that must be there and of this version."""
        if not self.path.is_file():
            raise MissingInputError(
                f"there are no {self._form.name} yet",
                where=str(self.path),
                fix="name the right file, or have a run make it",
            )
        # The second is for a folder that takes no write, where the first cannot share memory with writers.
        for mode in ("ro", "ro&immutable=1"):
            connection = _connect(self.path, mode)
            try:
                version = self._version(connection)
            except sqlite3.Error as error:
                connection.close()
                if mode == "ro" and _code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                    continue
                raise _named(error, self.path) from error
            except BaseException:  # an interrupt, too, must leave no connection open; it is raised again
                connection.close()
                raise
            if version == self._form.version:
                return connection
            connection.close()
            break
        raise DataError(
            f"version {version} of {self._form.name}; this papo reads {self._form.version}", where=str(self.path),
            fix="a run that uses it brings it to this version",
        )  # fmt: skip

    def _version(self, connection: sqlite3.Connection) -> int:
        """
        Raises:
            DataError: of a later version, or of another program.
            sqlite3.DatabaseError: damaged.
        """
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != self._form.application and (application or version or objects):
            raise DataError(
                f"a database of something else, not of {self._form.name}", where=str(self.path), fix="name another file"
            )
        if version > self._form.version:
            raise DataError(
                f"version {version} of {self._form.name}, made by a later papo; this one reads {self._form.version}",
                where=str(self.path), fix="update papo, or name another file",
            )  # fmt: skip
        return int(version)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else opens, makes or moves the file."""
        try:
            make_folder(self.path.parent)
            reached("lock", self.path)
            with FileLock(f"{self.path}.lock", timeout=BUSY_S):
                yield
        except Timeout:
            raise _busy(self.path) from None
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise SetupError("there cannot be a file", where=str(self.path), fix="name another file") from None
        except sqlite3.Error as error:
            raise _named(error, self.path) from error
        except OSError as error:
            raise disk_error(error, self.path) from error


def is_damage(error: sqlite3.Error) -> bool:
    return _code(error) in _DAMAGE


def until_damage(connection: sqlite3.Connection, query: str) -> Iterator[Any]:
    """The rows of `query` up to the first that cannot be read, without an error."""
    with suppress(sqlite3.DatabaseError):
        yield from connection.execute(query)


def on_network(path: Path) -> bool:
    """Whether another machine may write the folder of `path`."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[folder] for folder in path.resolve().parents if folder in mounts), "")
    return kind.lower().startswith(NETWORK)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise _named(error, path) from error
    # A flipped bit may leave no UTF-8; whoever keeps a digest of the row sees it.
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def _code(error: sqlite3.Error) -> int:
    """The primary result code of SQLite; -1 where an error has none."""
    number = getattr(error, "sqlite_errorcode", None)
    return -1 if number is None else int(number) & 0xFF


def _busy(path: Path) -> BusyError:
    return BusyError(
        f"other processes have not let go of it for {BUSY_S:g} s", where=str(path), fix="wait and start again"
    )


def _named(error: sqlite3.Error, path: Path) -> PapoError:
    """The error that tells a person what to do."""
    code, where = _code(error), str(path)
    if code == sqlite3.SQLITE_FULL:
        return SetupError("the disk is full", where=where, fix="free space and start again; what is stored is kept")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _busy(path)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
        return SetupError(
            f"cannot open or write it: {error}", where=where, fix="check the permissions of file and folder"
        )
    if code in _DAMAGE:
        return DamagedError(
            f"damaged: {error}", where=where, fix="a run that uses it moves it aside and saves what it can"
        )
    return SetupError(f"SQLite cannot go on: {error}", where=where, fix="check the disk, or name another file")
