"""Verdicts of a paid judge, kept for all runs, seeds, variants and processes of a checkout: each is paid for once.

A verdict is named by what decides it (`verdict_key`) and kept as the model sent it, so that a rubric can read it again. What failed is
none: there is no way to store it. Whoever is about to pay claims the keys first; what others have claimed is waited for.

    with VerdictStore.open(default_store(workspace), warn=context.warn) as store:
        owner, missing = new_owner(), set(keys)
        while missing:
            found, mine = await store.wait(sorted(missing), owner, limit=8)
            missing -= found.keys() | mine
            ...  # ask the model about `mine`: `keep` each answer, `release` each failure

What a run paid for is kept beside them (`PaidCall`): a call that brought a verdict comes with it, one that brought none by `charge`.

SQLite in WAL mode. Nothing that `put` or `charge` has returned is lost by a kill of any process or of the machine.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from papo.errors import DamagedError, PapoError, UserError
from papo.store.database import Database, Format, until_damage
from papo.store.files import replacing
from papo.store.layout import Workspace
from papo.store.ledger import (
    MIGRATION,
    OK,
    PaidCall,
    Spent,
    check_calls,
    read_paid_keys,
    read_spent,
    read_spent_by_run,
    salvage_calls,
    write_calls,
)
from papo.store.owners import check_owner, end, lives, new_owner
from papo.store.verdict_rows import (
    COLUMNS,
    INSERT,
    StoredVerdict,
    decode,
    encode,
    to_jsonl,
    to_parquet,
    verdict_key,
    verdict_parts,
    whole_ones,
)

__all__ = [
    "PaidCall",
    "Spent",
    "StoreStats",
    "StoredBy",
    "StoredVerdict",
    "VerdictStore",
    "Verified",
    "default_store",
    "new_owner",
    "verdict_key",
    "verdict_parts",
    "verify_store",
]

T = TypeVar("T")

LEASE_S = 60.0
"""After so long without a sign of life, the claims of an owner are free, though its process may run."""
BEAT_S = 10.0
POLL_S = 0.25

_THREADS = 32  # puts of an event loop that can share a transaction
_CHUNK = 500
_WINDOW = 100
_MIGRATIONS = (
    (
        "CREATE TABLE verdicts (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, model TEXT NOT NULL, rubric TEXT NOT NULL, "
        "answer BLOB NOT NULL, finish_reason TEXT, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, "
        "seconds REAL NOT NULL, created REAL NOT NULL, parts TEXT NOT NULL, digest TEXT NOT NULL)",
        "CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID",
        "CREATE INDEX claims_by_owner ON claims (owner)",
        "CREATE TABLE owners (owner TEXT PRIMARY KEY, beat INTEGER NOT NULL) WITHOUT ROWID",
    ),
    MIGRATION,
)


@dataclass(frozen=True)
class StoredBy:
    """What is stored of one model and rubric; tokens and seconds are sums, the times Unix time."""

    model: str
    rubric: str
    verdicts: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    oldest: float
    newest: float


@dataclass(frozen=True)
class StoreStats:
    path: Path
    size_bytes: int
    claims: int
    by: list[StoredBy]


@dataclass(frozen=True)
class Verified:
    """`recomputed`: verdicts whose key was made anew from its parts. `calls`: paid ones. `damage`: one line each, empty if all is well."""

    verdicts: int
    recomputed: int
    calls: int
    damage: list[str]


def default_store(workspace: Workspace) -> Path:
    """The store of the checkout that commands are typed in, whatever their workspace; of the workspace where that is no checkout."""
    here = Workspace(Path())
    return (here if (here.root / "params.yaml").is_file() else workspace).work / "verdicts.sqlite"


class VerdictStore:
    """The verdicts in one file; for all threads of a process. Every method raises the errors of `Database`."""

    def __init__(
        self, path: Path, *, read_only: bool = False, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        self._warn = warn
        self._database = Database(path, FORMAT, read_only=read_only, warn=warn)
        self._waiting: deque[_Put] = deque()
        self._writing = threading.Lock()
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Future[None]] = {}
        self._owners: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}
        self._warned: set[str] = set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="verdicts")
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="claims of verdicts", daemon=True)
        if not read_only:
            self._beating.start()

    @classmethod
    def open(
        cls, path: Path, *, read_only: bool = False, warn: Callable[[str], None] = lambda message: None
    ) -> VerdictStore:
        """
        Args:
            read_only: of what is there; otherwise the file is made, and repaired, where it has to be.
            warn: told of damage.
        """
        return cls(path, read_only=read_only, warn=warn)

    def __enter__(self) -> VerdictStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Also gives up every claim that was made here."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._beating.is_alive():
            self._beating.join()
        self._threads.shutdown()
        end(self._owners)
        with suppress(PapoError):  # others see that the process has ended, or the lease run out
            if self._owners:
                self._database.write(lambda connection: self._delete(connection, self._owners), durable=False)
        self._database.close()

    # ---- verdicts ----

    def get_many(self, keys: Iterable[str]) -> dict[str, StoredVerdict]:
        """Those of `keys` that are stored; a damaged one is not."""
        wanted = list(keys)
        return self._database.read(lambda connection: self._stored(connection, wanted)) if wanted else {}

    def put(self, verdict: StoredVerdict, call: PaidCall | None = None) -> StoredVerdict:
        """Stores it and ends its claim; durable when it returns.

        Args:
            call: that brought it; stored with it or not at all, and also where another's verdict came first.

        Returns:
            What is stored under the key: the first that came stays, so that everybody reads the same.

        Raises:
            ValueError: the call is for another key, or brought no verdict.
        """
        stored = self._write(_put_of(verdict, call))
        assert stored is not None
        return stored

    async def keep(self, verdict: StoredVerdict, call: PaidCall | None = None) -> StoredVerdict:
        """As `put`, for an event loop; written also if whoever waits for it is cancelled."""
        stored = await self._written(_put_of(verdict, call))
        assert stored is not None
        return stored

    def _write(self, mine: _Put) -> StoredVerdict | None:
        # Threads that write at once share one transaction, for each waits for the disk.
        self._waiting.append(mine)
        with self._writing:
            if not mine.done:
                self._write_waiting()
        return mine.result()

    async def _written(self, mine: _Put) -> StoredVerdict | None:
        """As `_write`: one thread at a time for an event loop, whose next transaction takes all that has come meanwhile."""
        loop = asyncio.get_running_loop()
        self._waiting.append(mine)
        while not mine.done:
            turn = self._turns.get(loop)
            if turn is None or turn.done():
                turn = self._turns[loop] = loop.run_in_executor(self._threads, self._take_turn)
            await asyncio.shield(turn)
        return mine.result()

    def _take_turn(self) -> None:
        with self._writing:
            if self._waiting:
                self._write_waiting()

    def _write_waiting(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        found = [one.verdict for one in batch if one.verdict is not None]
        calls = [one.call for one in batch if one.call is not None]

        def work(connection: sqlite3.Connection) -> dict[str, StoredVerdict]:
            stored = self._put(connection, found) if found else {}
            if calls:
                write_calls(connection, calls)
            return stored

        try:
            stored = self._database.write(work, durable=True)
            for one in batch:
                one.stored = None if one.verdict is None else stored[one.verdict.key]
        except BaseException as error:  # whatever it is, those who wait are told
            for one in batch:
                one.error = error
        for one in batch:
            one.done = True

    def _put(self, connection: sqlite3.Connection, verdicts: Sequence[StoredVerdict]) -> dict[str, StoredVerdict]:
        keys = [verdict.key for verdict in verdicts]
        stored = self._stored(connection, keys)
        for verdict in verdicts:
            if verdict.key not in stored:
                connection.execute(f"INSERT OR REPLACE {INSERT}", encode(verdict))
                stored[verdict.key] = verdict
        connection.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in keys])
        return stored

    def _stored(self, connection: sqlite3.Connection, keys: Sequence[str]) -> dict[str, StoredVerdict]:
        found: dict[str, StoredVerdict] = {}
        for row in _select(connection, f"SELECT {COLUMNS} FROM verdicts WHERE key IN", keys):
            if not isinstance(verdict := decode(row), str):
                found[verdict.key] = verdict
            elif row[0] not in self._warned:
                self._warned.add(row[0])
                self._warn(f"{self._database.path}: the verdict {row[0][:12]} is damaged and is not used: {verdict}")
        return found

    # ---- what was paid ----

    def charge(self, call: PaidCall) -> None:
        """Records a call that brought no verdict; durable when it returns. Its claim goes on.

        Raises:
            ValueError: it brought one, and has to come with it.
        """
        self._write(_charge_of(call))

    async def charged(self, call: PaidCall) -> None:
        """As `charge`, for an event loop."""
        await self._written(_charge_of(call))

    def spent(self, run: str, *, round: int | None = None) -> Spent:
        """What this run paid, in one round or in all. Reads all those calls: keep count beside it where it is asked for often."""
        return self._database.read(lambda connection: read_spent(connection, self._damaged, run, round))

    def spent_by_run(self) -> list[tuple[str, str, Spent]]:
        """(run, variant, what it paid), in the order in which they first paid."""
        return self._database.read(lambda connection: read_spent_by_run(connection, self._damaged))

    def paid_keys(self, run: str, round: int) -> set[str]:
        """Keys whose verdict this run paid for in this round, also where another's came first."""
        return self._database.read(lambda connection: read_paid_keys(connection, run, round))

    def _damaged(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(f"{self._database.path}: {text}; it is in no sum")

    # ---- claims ----

    def claim(self, keys: Iterable[str], owner: str, *, limit: int | None = None) -> set[str]:
        """Those of `keys`, the first `limit` of them, that nobody has stored and that are now this owner's to pay for.

        The others are stored, or claimed by a living owner. A claim ends with `put`, `release`, `close`, the end of its process, or LEASE_S
        after its last sign of life.

        Args:
            owner: by `new_owner`.
        """
        check_owner(owner)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}")
        wanted = list(dict.fromkeys(keys))
        # Most looks of somebody who waits find nothing; they take no turn to write.
        if not self._database.read(lambda connection: self._free(connection, wanted, owner)):
            return set()
        self._owners.add(owner)
        return self._database.write(lambda connection: self._claim(connection, wanted, owner, limit), durable=False)

    def release(self, keys: Iterable[str], owner: str) -> None:
        """Gives up the claims of this owner on `keys`, for others to take."""
        rows = [(key, owner) for key in keys]
        statement = "DELETE FROM claims WHERE key = ? AND owner = ?"
        self._database.write(lambda connection: connection.executemany(statement, rows), durable=False)

    async def wait(
        self, keys: Iterable[str], owner: str, *, limit: int | None = None
    ) -> tuple[dict[str, StoredVerdict], set[str]]:
        """Waits until some of `keys` are stored or can be claimed: (those that are stored, those that are claimed for `owner`)."""
        wanted = list(dict.fromkeys(keys))
        while wanted:
            began = time.monotonic()
            # Whoever wants a few looks no further than he has to.
            for some in _chunks(wanted, len(wanted) if limit is None else max(limit, _WINDOW)):
                stored = await self._aside(self.get_many, some)
                missing = [key for key in some if key not in stored]
                mine = await self._aside(partial(self.claim, limit=limit), missing, owner) if missing else set[str]()
                if stored or mine:
                    return stored, mine
            await asyncio.sleep(max(POLL_S, 4 * (time.monotonic() - began)))
        return {}, set()

    async def _aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work` in a thread, so that nobody else in the loop waits for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _claim(self, connection: sqlite3.Connection, keys: Sequence[str], owner: str, limit: int | None) -> set[str]:
        others = connection.execute("SELECT owner, beat FROM owners WHERE owner <> ?", (owner,)).fetchall()
        self._delete(connection, [other for other, beat in others if not self._lives(other, beat)])
        mine = self._free(connection, keys, owner)[:limit]
        connection.executemany(
            "INSERT OR REPLACE INTO claims (key, owner) VALUES (?, ?)", [(key, owner) for key in mine]
        )
        # From a random number on, so that an owner that comes back shows no beat that was seen of it long ago.
        new = "INSERT INTO owners (owner, beat) VALUES (?, random() >> 1) ON CONFLICT (owner) DO UPDATE SET beat = beat + 1"
        connection.execute(new, (owner,))
        return set(mine)

    def _free(self, connection: sqlite3.Connection, keys: Sequence[str], owner: str) -> list[str]:
        """Those of `keys` that are not stored and that no other living owner has claimed, in order."""
        stored = self._stored(connection, keys)
        query = "SELECT key, claims.owner, coalesce(beat, 0) FROM claims LEFT JOIN owners ON owners.owner = claims.owner WHERE key IN"
        held = {key: (other, beat) for key, other, beat in _select(connection, query, keys) if other != owner}
        living = {other: self._lives(other, beat) for other, beat in set(held.values())}
        return [key for key in keys if key not in stored and not (key in held and living[held[key][0]])]

    def _lives(self, owner: str, beat: int) -> bool:
        if lives(owner) is False:
            return False
        # A process that runs, too, may have given up its claims and been unable to write that down: on a full disk, for instance.
        # By the clock of this process alone, from when it first saw this beat: clocks of two machines may differ.
        now = time.monotonic()
        if owner not in self._seen or self._seen[owner][0] != beat:
            self._seen[owner] = (beat, now)
        return now - self._seen[owner][1] < LEASE_S

    def _beat(self) -> None:
        """Signs of life, for those who cannot see this process."""
        while not self._closing.wait(BEAT_S):
            with suppress(PapoError):
                if self._owners:
                    self._database.write(self._sign, durable=False)

    def _sign(self, connection: sqlite3.Connection) -> None:
        rows = [(owner,) for owner in tuple(self._owners)]
        connection.executemany("UPDATE owners SET beat = beat + 1 WHERE owner = ?", rows)

    def _delete(self, connection: sqlite3.Connection, owners: Iterable[str]) -> None:
        rows = [(owner,) for owner in owners]
        for table in ("claims", "owners"):
            connection.executemany(f"DELETE FROM {table} WHERE owner = ?", rows)

    # ---- what is there ----

    def stats(self) -> StoreStats:
        """Counts, tokens and times by model and rubric; the size with what is not yet in the main file."""
        query = (
            "SELECT model, rubric, count(*), sum(prompt_tokens), sum(completion_tokens), sum(seconds), min(created), max(created) "
            "FROM verdicts GROUP BY model, rubric ORDER BY model, rubric"
        )
        by, claims = self._database.read(
            lambda connection: (
                [StoredBy(*row) for row in connection.execute(query)],
                connection.execute("SELECT count(*) FROM claims").fetchone()[0],
            )
        )
        size = 0
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                size += Path(f"{self._database.path}{suffix}").stat().st_size
        return StoreStats(self._database.path, size, claims, by)

    def export(self, path: Path) -> int:
        """Writes every verdict, oldest first, to `path`: Parquet or lines of JSON, by its ending. Damaged ones are left out with a warning.

        Returns:
            How many were written.

        Raises:
            UserError: another ending.
            SetupError: it cannot be written.
        """
        writers = {".parquet": to_parquet, ".jsonl": to_jsonl}
        if path.suffix not in writers:
            raise UserError(
                "verdicts are exported as Parquet or as lines of JSON",
                where=str(path),
                fix="name it *.parquet or *.jsonl",
            )

        def write(connection: sqlite3.Connection) -> tuple[int, int]:
            (total,) = connection.execute("SELECT count(*) FROM verdicts").fetchone()
            rows = connection.execute(f"SELECT {COLUMNS} FROM verdicts ORDER BY created, id")
            with replacing(path) as temporary:
                return writers[path.suffix](temporary, whole_ones(rows)), total

        written, total = self._database.read(write)
        if written < total:
            self._warn(f"{total - written} damaged verdicts are left out; `papo judge-cache verify` names them")
        return written

    def verify(self) -> Verified:
        """Looks at every page, row, digest and key of the file, and changes nothing."""
        return self._database.read(_verify)


def verify_store(path: Path) -> Verified:
    """As `VerdictStore.verify`, also of a file that cannot be opened any more."""
    try:
        with VerdictStore.open(path, read_only=True) as store:
            return store.verify()
    except DamagedError as error:
        return Verified(0, 0, 0, [error.what])


@dataclass
class _Put:
    """What waits to be written, and what became of it."""

    verdict: StoredVerdict | None
    call: PaidCall | None
    done: bool = False
    stored: StoredVerdict | None = None
    error: BaseException | None = None

    def result(self) -> StoredVerdict | None:
        if self.error is not None:
            raise self.error
        return self.stored


def _put_of(verdict: StoredVerdict, call: PaidCall | None) -> _Put:
    if call is not None and (call.key != verdict.key or call.status != OK):
        raise ValueError(f"a verdict cannot come of a call for {call.key[:12]} that ended as {call.status!r}")
    return _Put(verdict, call)


def _charge_of(call: PaidCall) -> _Put:
    if call.status == OK:
        raise ValueError("a call that brought a verdict is stored with it, by `put`")
    return _Put(None, call)


def _select(connection: sqlite3.Connection, query: str, keys: Sequence[str]) -> Iterator[Any]:
    """Rows of `query`, which ends in IN, over all `keys`."""
    for chunk in _chunks(keys, _CHUNK):
        yield from connection.execute(f"{query} ({', '.join('?' * len(chunk))})", chunk)


def _chunks(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _salvage(old: sqlite3.Connection, new: sqlite3.Connection) -> int:
    """Takes over the verdicts before the first damaged page, then those after the last; the paid calls likewise."""
    count = 0
    for order in ("ASC", "DESC"):
        for verdict in whole_ones(until_damage(old, f"SELECT {COLUMNS} FROM verdicts ORDER BY id {order}")):
            count += new.execute(f"INSERT OR IGNORE {INSERT}", encode(verdict)).rowcount
    salvage_calls(old, new)
    return count


def _verify(connection: sqlite3.Connection) -> Verified:
    damage: list[str] = []
    count = recomputed = calls = 0
    with _noted(damage):
        damage += [line for (line,) in connection.execute("PRAGMA integrity_check") if line != "ok"]
    with _noted(damage):
        for number, *row in connection.execute(f"SELECT id, {COLUMNS} FROM verdicts ORDER BY id"):
            count += 1
            if isinstance(verdict := decode(row), str):
                damage.append(f"row {number}, verdict {str(row[0])[:12]}: {verdict}")
            else:
                recomputed += bool(verdict.parts)
    with _noted(damage):
        for wrong in check_calls(connection):
            calls += 1
            damage += [wrong] if wrong else []
    return Verified(count, recomputed, calls, damage)


@contextmanager
def _noted(damage: list[str]) -> Iterator[None]:
    """What cannot be read keeps nobody from looking at the rest."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        damage.append(str(error))


FORMAT = Format("verdicts", 0x7061706F, _MIGRATIONS, _salvage)
