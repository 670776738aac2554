"""The ledger of paid calls: no verdict without its cost, no cost lost or counted twice, sums exact."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from papo.errors import DataError, SetupError
from papo.store import verdicts
from papo.store.owners import new_owner
from papo.store.verdicts import PaidCall, Spent, StoredVerdict, VerdictStore, verify_store

NOTHING = Spent(0, 0, 0, 0, None)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def verdict(number: int, **change: Any) -> StoredVerdict:
    facts: dict[str, Any] = {
        "key": key(number), "model": "judge-7b", "rubric": "levels/1", "answer": f"answer {number} " + "x" * 400, "finish_reason": "stop",
        "prompt_tokens": 900, "completion_tokens": 80, "seconds": 1.5, "created": 1.7e9 + number,
    }  # fmt: skip
    return StoredVerdict(**facts | change)


def call(number: int, **change: Any) -> PaidCall:
    facts: dict[str, Any] = {
        "run": "nightly", "round": 0, "variant": "papo", "key": key(number), "model": "judge-7b", "rubric": "levels/1", "status": "ok",
        "tries": 1, "prompt_tokens": 900, "completion_tokens": 80, "cost": 0.1, "seconds": 1.5, "created": 1.7e9 + number,
    }  # fmt: skip
    return PaidCall(**facts | change)


def failed(number: int, **change: Any) -> PaidCall:
    return call(number, **{"status": "timeout", "completion_tokens": 0} | change)


def fill(path: Path, count: int) -> None:
    """A closed store of `count` verdicts with their calls, all in the main file."""
    with VerdictStore.open(path) as opened, ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: opened.put(verdict(number), call(number)), range(count)))


def edit(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


# ---- what is recorded ----


def test_what_was_paid_is_known_to_whoever_opens_the_store_later(path: Path) -> None:
    with VerdictStore.open(path) as store:
        assert store.put(verdict(1), call(1, tries=2)) == verdict(1)
        store.charge(failed(2, cost=0.2))
        store.put(verdict(3))  # by nobody that keeps books
    with VerdictStore.open(path, read_only=True) as store:
        assert store.spent("nightly") == Spent(2, 1, 1800, 80, math.fsum([0.1, 0.2]))
        assert store.paid_keys("nightly", 0) == {key(1)}
        assert store.get_many(map(key, range(5))).keys() == {key(1), key(3)}


def test_sums_and_keys_are_those_of_the_run_and_of_the_round(store: VerdictStore) -> None:
    store.put(verdict(1), call(1))
    store.put(verdict(2), call(2, round=1))
    store.put(verdict(3), call(3, round=-1))
    store.put(verdict(4), call(4, run="other"))
    assert store.spent("nightly", round=0) == store.spent("nightly", round=1) == Spent(1, 0, 900, 80, 0.1)
    assert store.spent("nightly") == Spent(3, 0, 2700, 240, math.fsum([0.1] * 3))
    assert store.spent("nightly", round=7) == store.spent("nobody") == NOTHING
    assert store.paid_keys("nightly", 1) == {key(2)}
    assert store.paid_keys("nightly", -1) == {key(3)}
    assert store.paid_keys("nightly", 7) == store.paid_keys("nobody", 0) == set()


def test_who_came_second_has_paid_too(store: VerdictStore) -> None:
    store.put(verdict(1), call(1))
    assert store.put(verdict(1, answer="another"), call(1, run="other", cost=0.3)) == verdict(1)
    assert store.spent("other") == Spent(1, 0, 900, 80, 0.3)
    assert store.paid_keys("other", 0) == {key(1)}


def test_each_failed_call_for_a_key_counts_and_its_claim_goes_on(store: VerdictStore) -> None:
    mine = new_owner()
    assert store.claim([key(1)], mine) == {key(1)}
    store.charge(failed(1))
    store.charge(failed(1))
    assert store.paid_keys("nightly", 0) == set()
    assert store.claim([key(1)], new_owner()) == set()
    assert store.stats().claims == 1
    store.put(verdict(1), call(1))
    assert store.stats().claims == 0
    assert store.spent("nightly") == Spent(3, 2, 2700, 80, math.fsum([0.1] * 3))


def test_runs_are_listed_by_variant_in_the_order_in_which_they_first_paid(store: VerdictStore) -> None:
    assert store.spent_by_run() == []
    store.charge(failed(1, run="z", cost=None))
    store.put(verdict(2), call(2, run="a"))
    store.put(verdict(3), call(3, run="z", variant="orm"))
    store.put(verdict(4), call(4, run="z", cost=None))
    assert store.spent_by_run() == [
        ("z", "papo", Spent(2, 1, 1800, 80, None)),
        ("a", "papo", Spent(1, 0, 900, 80, 0.1)),
        ("z", "orm", Spent(1, 0, 900, 80, 0.1)),
    ]


# ---- sums ----


def test_a_sum_is_the_nearest_number_to_the_true_one_in_whatever_order_the_rows_are(path: Path) -> None:
    costs = [1e6, 1e-9, 0.1, 3e-5, 7.7, 1e-12, 1 / 3] * 30
    sums, naive = set(), set()
    for seed in range(3):
        random.Random(seed).shuffle(costs)
        naive.add(sum(costs))
        with VerdictStore.open(path.with_name(f"{seed}.sqlite")) as store:
            with ThreadPoolExecutor(32) as threads:
                list(threads.map(store.charge, [failed(n, cost=cost) for n, cost in enumerate(costs)]))
            sums.add(store.spent("nightly").cost)
            assert store.spent_by_run()[0][2] == store.spent("nightly")
    assert sums == {math.fsum(costs)}
    assert len(naive) > 1, "any way of adding would do"


def test_calls_without_a_price_are_counted_and_cost_nothing_known(store: VerdictStore) -> None:
    store.charge(failed(1, cost=None))
    assert store.spent("nightly") == Spent(1, 1, 900, 0, None)
    store.charge(failed(2, cost=0))
    assert store.spent("nightly").cost == 0.0
    store.charge(failed(3, cost=0.25))
    assert store.spent("nightly") == Spent(3, 3, 2700, 0, 0.25)


def test_sums_of_tokens_outgrow_the_numbers_of_the_file(store: VerdictStore, path: Path) -> None:
    store.charge(failed(1, prompt_tokens=10**15))
    with closing(sqlite3.connect(path)) as connection, connection:
        columns = "run, round, variant, key, model, rubric, status, tries, prompt_tokens, completion_tokens, cost, seconds, created"
        connection.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9999) "
            f"INSERT INTO paid_calls ({columns}) SELECT {columns} FROM paid_calls, n"
        )
    assert store.spent("nightly").prompt_tokens == 10**19 > 2**63


# ---- bad values ----


@pytest.mark.parametrize(
    "change",
    [
        {"run": ""},
        {"run": "half a pair \ud800"},
        {"variant": " "},
        {"model": ""},
        {"rubric": "\n"},
        {"status": ""},
        {"key": "x" * 64},
        {"key": "0" * 63},
        {"round": -2},
        {"round": 0.5},
        {"round": True},
        {"tries": 0},
        {"tries": -1},
        {"prompt_tokens": -1},
        {"prompt_tokens": 1.5},
        {"prompt_tokens": 2**63},
        {"completion_tokens": -1},
        {"completion_tokens": "8"},
        {"cost": -0.01},
        {"cost": float("nan")},
        {"cost": float("inf")},
        {"cost": "1"},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"created": float("inf")},
        {"created": None},
    ],
    ids=str,
)
def test_nonsense_is_no_paid_call(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"paid call|key of a verdict|surrogates"):
        call(1, **change)


def test_a_failure_may_have_cost_no_try(store: VerdictStore) -> None:
    store.charge(failed(1, tries=0, prompt_tokens=0, cost=0.0))
    assert store.spent("nightly") == Spent(1, 1, 0, 0, 0.0)


@pytest.mark.parametrize("other", [call(2), failed(1)], ids=["another key", "a failure"])
def test_a_verdict_comes_with_no_other_call_than_its_own(store: VerdictStore, other: PaidCall) -> None:
    with pytest.raises(ValueError, match="a verdict cannot come of"):
        store.put(verdict(1), other)
    assert store.get_many([key(1)]) == {}
    assert store.spent("nightly") == NOTHING


def test_a_call_that_brought_a_verdict_is_not_charged_without_it(store: VerdictStore) -> None:
    with pytest.raises(ValueError, match="is stored with it"):
        store.charge(call(1))
    assert store.spent("nightly") == NOTHING


# ---- many at once ----


def test_threads_that_put_and_charge_at_once_lose_nothing_and_share_transactions(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = verdicts.write_calls

    def slow(connection: sqlite3.Connection, calls: list[PaidCall]) -> None:
        batches.append(len(calls))
        while len(batches) == 1 and len(store._waiting) < 15:  # the first one, until all other threads wait for theirs
            time.sleep(0.001)
        real(connection, calls)

    monkeypatch.setattr(verdicts, "write_calls", slow)

    def work(number: int) -> None:
        if number % 3:
            assert store.put(verdict(number % 50), call(number % 50)) == verdict(number % 50)
        else:
            store.charge(failed(number))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(150)))
    assert store.spent("nightly") == Spent(150, 50, 150 * 900, 100 * 80, math.fsum([0.1] * 150))
    assert store.paid_keys("nightly", 0) == {key(number % 50) for number in range(150) if number % 3}
    assert sum(batches) == 150
    assert max(batches) >= 15, "all that wait are stored at once"


def test_an_event_loop_keeps_and_charges_many_at_once(store: VerdictStore) -> None:
    async def work() -> list[StoredVerdict]:
        charges = [store.charged(failed(number)) for number in range(100, 150)]
        *kept, _ = await asyncio.gather(*(store.keep(verdict(n), call(n)) for n in range(50)), asyncio.gather(*charges))
        return kept

    assert asyncio.run(work()) == [verdict(number) for number in range(50)]
    assert store.spent("nightly") == Spent(100, 50, 90_000, 4000, math.fsum([0.1] * 100))


def test_a_write_that_fails_says_so_to_each_thread_and_records_neither(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def fail(_: sqlite3.Connection, calls: list[PaidCall]) -> None:
        batches.append(len(calls))
        time.sleep(0.05)
        raise SetupError("the disk is full")

    def pay(number: int) -> None:
        if number % 2:
            with pytest.raises(SetupError):
                store.put(verdict(number), call(number))
        else:
            with pytest.raises(SetupError):
                store.charge(failed(number))

    with monkeypatch.context() as patch, ThreadPoolExecutor(16) as threads:
        patch.setattr(verdicts, "write_calls", fail)
        list(threads.map(pay, range(32)))
    assert max(batches) > 1
    assert store.get_many(map(key, range(32))) == {}
    assert store.spent("nightly") == NOTHING
    store.put(verdict(1), call(1))
    assert store.spent("nightly").calls == 1


# ---- kills ----

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from papo.store import verdicts
from test_ledger import call, failed, verdict
end, real = sys.argv[2], verdicts.write_calls

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def last(connection, calls):
    real(connection, calls)
    die()

store = verdicts.VerdictStore.open(Path(sys.argv[1]))
store.put(verdict(1), call(1))
verdicts.write_calls = {"between": die, "before the end": last, "after": real}[end]
store.put(verdict(2), call(2))
die()
"""


@pytest.mark.parametrize(("when", "calls"), [("between", 1), ("before the end", 1), ("after", 2)])
def test_a_kill_leaves_both_verdict_and_cost_or_none(path: Path, when: str, calls: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path, when, Path(__file__).parent], check=False)
    assert done.returncode == -signal.SIGKILL
    with VerdictStore.open(path) as store:
        assert len(store.get_many([key(1), key(2)])) == len(store.paid_keys("nightly", 0)) == calls
        assert store.spent("nightly").calls == calls
        assert store.verify().damage == []


PAY = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from papo.store.verdicts import VerdictStore
from test_ledger import call, failed, verdict

def pay(number):
    if number % 4:
        store.put(verdict(number), call(number))
    else:
        store.charge(failed(number))
    os.write(1, f"{number}\\n".encode())

for turn in range(int(sys.argv[3])):
    pid = os.fork()
    if pid == 0:
        store = VerdictStore.open(Path(sys.argv[1]))
        os.write(1, f"pid {os.getpid()}\\n".encode())
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(pay, range(turn * 10**6, (turn + 1) * 10**6)))
    os.waitpid(pid, 0)
    os.write(1, b"killed\\n")
"""


def test_ten_kills_in_the_middle_of_paying_by_many_threads_lose_and_double_nothing(path: Path) -> None:
    said: set[int] = set()
    chance = random.Random(3)
    command = [sys.executable, "-c", PAY, str(path), str(Path(__file__).parent), "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(10):
            pid = int(process.stdout.readline().removeprefix("pid "))
            said |= {int(process.stdout.readline()) for _ in range(chance.randrange(1, 20))}
            time.sleep(chance.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
            while (text := process.stdout.readline().strip()) != "killed":
                said.add(int(text))
    assert len(said) > 50
    with closing(sqlite3.connect(path)) as connection:
        kept = [one for (one,) in connection.execute("SELECT key FROM verdicts")]
        paid = [one for (one,) in connection.execute("SELECT key FROM paid_calls WHERE status = 'ok'")]
        lost = {one for (one,) in connection.execute("SELECT key FROM paid_calls WHERE status = 'timeout'")}
    assert sorted(kept) == sorted(paid)
    assert {key(number) for number in said if number % 4} <= set(paid)
    assert {key(number) for number in said if number % 4 == 0} <= lost
    # At most the eight that were under way at each kill were recorded and not said.
    assert len(said) <= len(paid) + len(lost) <= len(said) + 80
    assert verify_store(path).damage == []


# ---- files of version 1, and damaged ones ----


def test_a_store_of_version_1_keeps_its_verdicts_and_gets_a_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "FORMAT", replace(verdicts.FORMAT, migrations=verdicts.FORMAT.migrations[:1]))
        with VerdictStore.open(path) as store:
            for number in range(30):
                store.put(verdict(number))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name LIKE 'paid%'").fetchone() == (0,)
    with pytest.raises(DataError, match="version 1 of verdicts; this papo reads 2"):
        VerdictStore.open(path, read_only=True)
    with VerdictStore.open(path, warn=warned.append) as store:
        assert store.spent("nightly") == NOTHING
        store.put(verdict(30), call(30))
        assert store.get_many(map(key, range(31))) == {key(number): verdict(number) for number in range(31)}
    verified = verify_store(path)
    assert (verified.verdicts, verified.calls, verified.damage, warned) == (31, 1, [], [])


def test_a_damaged_store_of_version_1_is_salvaged_without_a_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "FORMAT", replace(verdicts.FORMAT, migrations=verdicts.FORMAT.migrations[:1]))
        with VerdictStore.open(path) as store, ThreadPoolExecutor(16) as threads:
            list(threads.map(store.put, map(verdict, range(300))))
    destroy(path, 0.5)
    with VerdictStore.open(path, warn=warned.append) as store:
        assert 200 < len(store.get_many(map(key, range(300)))) < 300
        assert store.spent("nightly") == NOTHING
        assert store.verify().damage == []
    assert len(list(path.parent.glob("*.damaged-*.sqlite"))) == len(warned) == 1


def destroy(path: Path, share: float, pages: int = 3) -> None:
    with path.open("r+b") as stream:
        stream.seek(int(path.stat().st_size * share) // 4096 * 4096)
        stream.write(b"\xff" * 4096 * pages)


def page_of_calls(path: Path, share: float) -> int:
    """Number, from 0, of a page of the file that holds rows of the ledger."""
    pages = path.read_bytes()
    where = [start // 4096 for start in range(0, len(pages), 4096) if pages[start : start + 4096].count(b"nightly") > 8]
    rows = [page for page in where if pages[page * 4096 : page * 4096 + 4096].count(b"papo") > 8]  # not of the index
    return rows[int(len(rows) * share)]


@pytest.mark.parametrize("opened", ["before", "after"])
def test_calls_on_both_sides_of_a_damaged_page_are_taken_over_once_each(
    path: Path, warned: list[str], opened: str
) -> None:
    fill(path, 600)
    middle = page_of_calls(path, 0.5) * 4096 / path.stat().st_size + 1e-9
    if opened == "after":
        destroy(path, middle, 1)
    with VerdictStore.open(path, warn=warned.append) as store:
        if opened == "before":
            destroy(path, middle, 1)
        spent = store.spent_by_run()[0][2]
        assert any("moved to verdicts.damaged-" in text for text in warned)
        assert 550 < spent.calls < 600
        assert len(store.paid_keys("nightly", 0)) == spent.calls
        assert spent.prompt_tokens == spent.calls * 900
        assert spent.cost == math.fsum([0.1] * spent.calls)
        assert len(store.get_many(map(key, range(600)))) == 600
        assert store.verify().damage == []
        store.put(verdict(600), call(600))
        assert store.spent("nightly").calls == spent.calls + 1
    assert len(list(path.parent.glob("*.damaged-*.sqlite"))) == 1


def test_calls_that_are_whole_are_taken_over_once_where_verdicts_are_damaged(path: Path, warned: list[str]) -> None:
    fill(path, 600)
    content = path.read_bytes()
    some = [start for start in range(4096, len(content), 4096) if content[start : start + 4096].count(b"answer") > 4]
    destroy(path, (some[len(some) // 2] + 1) / len(content), 1)
    with VerdictStore.open(path, warn=warned.append) as store:
        assert 550 < len(store.get_many(map(key, range(600)))) < 600
        assert store.spent("nightly") == Spent(600, 0, 540_000, 48_000, math.fsum([0.1] * 600))
        assert store.paid_keys("nightly", 0) == set(map(key, range(600)))
    assert len(warned) == 1


def test_a_damaged_call_is_named_and_in_no_sum(store: VerdictStore, path: Path, warned: list[str]) -> None:
    for number in range(4):
        store.put(verdict(number), call(number))
    edit(path, "UPDATE paid_calls SET prompt_tokens = 'x' WHERE key = ?", key(1))
    edit(path, "UPDATE paid_calls SET cost = -1 WHERE key = ?", key(2))
    assert store.spent("nightly") == store.spent("nightly", round=0) == Spent(2, 0, 1800, 160, 0.2)
    assert store.spent_by_run() == [("nightly", "papo", Spent(2, 0, 1800, 160, 0.2))]
    assert len(warned) == 2
    assert all(text.endswith("it is in no sum") for text in warned)
    verified = store.verify()
    assert (verified.verdicts, verified.calls) == (4, 4)
    assert verified.damage == [
        "row 2 of the paid calls: it cannot be read: prompt_tokens of a paid call cannot be 'x'",
        "row 3 of the paid calls: it cannot be read: cost of a paid call cannot be -1.0",
    ]


def test_verifying_looks_at_the_pages_of_the_ledger(path: Path) -> None:
    fill(path, 600)
    assert verify_store(path).calls == 600
    destroy(path, page_of_calls(path, 0.5) * 4096 / path.stat().st_size + 1e-9, 1)
    verified = verify_store(path)
    assert verified.verdicts == 600
    assert 100 < verified.calls < 600
    assert len(verified.damage) > 0
