"""What a run paid models for: one row for each call, written with the verdict that the call brought, if it brought one."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from papo.store.database import until_damage
from papo.store.verdict_rows import check_key

OK = "ok"

MIGRATION = (
    "CREATE TABLE paid_calls (id INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, variant TEXT NOT NULL, "
    "key TEXT NOT NULL, model TEXT NOT NULL, rubric TEXT NOT NULL, status TEXT NOT NULL, tries INTEGER NOT NULL, "
    "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL, seconds REAL NOT NULL, created REAL NOT NULL)",
    "CREATE INDEX paid_calls_by_run ON paid_calls (run, round)",
)

_MOST = 10**15  # far above what can be, and exact as a number of SQLite


@dataclass(frozen=True)
class PaidCall:
    """One call, with all its tries. `cost` is money, None where no price is known; `seconds` how long it took, `created` when it ended.

    Args:
        round: -1 outside of rounds.
        key: of the verdict that was asked for.
        status: "ok" if it brought a verdict, else what became of it.
        tries: those that were billed.

    Raises:
        ValueError: a field that cannot be.
    """

    run: str
    round: int
    variant: str
    key: str
    model: str
    rubric: str
    status: str
    tries: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float
    created: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        for text in (self.run, self.variant, self.model, self.rubric, self.status):
            text.encode()  # SQLite takes no half of a surrogate pair; the error is a ValueError
            if not text.strip():
                raise ValueError("a paid call without run, variant, model, rubric or status")
        check_key(self.key)
        _check_number("round", self.round, int, least=-1)
        _check_number("tries", self.tries, int, least=1 if self.status == OK else 0)
        _check_number("prompt_tokens", self.prompt_tokens, int)
        _check_number("completion_tokens", self.completion_tokens, int)
        _check_number("seconds", self.seconds, (int, float))
        _check_number("created", self.created, (int, float))
        if self.cost is not None:
            _check_number("cost", self.cost, (int, float))


def _check_number(name: str, value: float, kind: type | tuple[type, ...], *, least: int = 0) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{name} of a paid call cannot be {value!r}")


@dataclass(frozen=True)
class Spent:
    """Sums over paid calls. `failed`: those that brought no verdict. `cost`: of the calls with a price, None if none had one."""

    calls: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


class _Sum:
    def __init__(self) -> None:
        self.calls = self.failed = self.prompt_tokens = self.completion_tokens = 0
        self.costs: list[float] = []

    def add(self, call: PaidCall) -> None:
        self.calls += 1
        self.failed += call.status != OK
        self.prompt_tokens += call.prompt_tokens
        self.completion_tokens += call.completion_tokens
        if call.cost is not None:
            self.costs.append(call.cost)

    def spent(self) -> Spent:
        # Rounded once: the order in which threads wrote the rows, or a salvage left them, changes no digit.
        cost = math.fsum(self.costs) if self.costs else None
        return Spent(self.calls, self.failed, self.prompt_tokens, self.completion_tokens, cost)


_NAMES = tuple(item.name for item in fields(PaidCall))
_values = attrgetter(*_NAMES)
_COLUMNS = ", ".join(_NAMES)
_INSERT = f"INTO paid_calls (id, {_COLUMNS}) VALUES (?{', ?' * len(_NAMES)})"


def write_calls(connection: sqlite3.Connection, calls: Iterable[PaidCall]) -> None:
    connection.executemany(f"INSERT {_INSERT}", [(None, *_values(call)) for call in calls])


def read_spent(connection: sqlite3.Connection, damaged: Callable[[str], None], run: str, round_: int | None) -> Spent:
    """Of one run, in one round or in all.

    Args:
        damaged: told of each row that cannot be read and is not in the sums.
    """
    total = _Sum()
    where, values = ("run = ?", [run]) if round_ is None else ("run = ? AND round = ?", [run, round_])
    for call in _whole_ones(
        connection.execute(f"SELECT id, {_COLUMNS} FROM paid_calls WHERE {where}", values), damaged
    ):
        total.add(call)
    return total.spent()


def read_spent_by_run(connection: sqlite3.Connection, damaged: Callable[[str], None]) -> list[tuple[str, str, Spent]]:
    """(run, variant, sums), in the order in which they first paid."""
    totals: dict[tuple[str, str], _Sum] = {}
    rows = connection.execute(f"SELECT id, {_COLUMNS} FROM paid_calls ORDER BY id")
    for call in _whole_ones(rows, damaged):
        totals.setdefault((call.run, call.variant), _Sum()).add(call)
    return [(*named, total.spent()) for named, total in totals.items()]


def read_paid_keys(connection: sqlite3.Connection, run: str, round_: int) -> set[str]:
    query = "SELECT DISTINCT key FROM paid_calls WHERE run = ? AND round = ? AND status = ?"
    return {key for (key,) in connection.execute(query, (run, round_, OK))}


def salvage_calls(old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    """Takes over the rows before the first damaged page, then those after the last; none of a file that never had any."""
    for order in ("ASC", "DESC"):
        for number, *row in until_damage(old, f"SELECT id, {_COLUMNS} FROM paid_calls ORDER BY id {order}"):
            if not isinstance(call := _decode(row), str):
                new.execute(f"INSERT OR IGNORE {_INSERT}", (number, *_values(call)))


def check_calls(connection: sqlite3.Connection) -> Iterator[str]:
    """What is wrong with each row, in words; an empty text where nothing is."""
    for number, *row in connection.execute(f"SELECT id, {_COLUMNS} FROM paid_calls ORDER BY id"):
        yield _named(number, call) if isinstance(call := _decode(row), str) else ""


def _whole_ones(rows: Iterable[Sequence[Any]], damaged: Callable[[str], None]) -> Iterator[PaidCall]:
    for number, *row in rows:
        if isinstance(call := _decode(row), str):
            damaged(_named(number, call))
        else:
            yield call


def _named(number: int, wrong: str) -> str:
    return f"row {number} of the paid calls: {wrong}"


def _decode(row: Sequence[Any]) -> PaidCall | str:
    """The call of a row, or what is wrong with the row."""
    try:
        return PaidCall(*row)
    except (ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
