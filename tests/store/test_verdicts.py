"""The store of paid verdicts: each paid once, whoever asks at once, whatever is killed or damaged."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from papo.errors import BusyError, DamagedError, DataError, MissingInputError, SetupError, UserError
from papo.schemas import VERDICTS
from papo.store import database, verdict_rows, verdicts
from papo.store.layout import Workspace
from papo.store.owners import new_owner
from papo.store.tables import read_rows
from papo.store.verdicts import (
    StoredVerdict,
    VerdictStore,
    default_store,
    verdict_key,
    verdict_parts,
    verify_store,
)

SAMPLING = {"temperature": 0.0, "seed": 7}


def verdict(number: int, **change: Any) -> StoredVerdict:
    parts = verdict_parts("judge-7b", "d1g357", f"prompt {number}", SAMPLING, 0)
    facts: dict[str, Any] = {
        "key": hashlib.sha256(parts.encode()).hexdigest(), "model": "judge-7b", "rubric": "levels/1", "answer": f"answer {number}",
        "finish_reason": "stop", "prompt_tokens": 900, "completion_tokens": 80, "seconds": 1.5, "created": 1.7e9 + number, "parts": parts,
    }  # fmt: skip
    return StoredVerdict(**facts | change)


def keys(*numbers: int) -> list[str]:
    return [verdict(number).key for number in numbers]


def filled(path: Path, count: int) -> None:
    """A closed store of `count` verdicts, all in the main file."""
    with VerdictStore.open(path) as opened, ThreadPoolExecutor(16) as threads:
        list(threads.map(opened.put, map(verdict, range(count))))


def edit(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


# ---- keys ----


def test_everything_that_decides_a_verdict_is_in_its_key() -> None:
    base: dict[str, Any] = {
        "model": "m",
        "rubric": "r",
        "prompt": "p",
        "sampling": {"temperature": 0, "seed": 1},
        "vote": 0,
    }
    changes = [
        {},
        {"model": "n"},
        {"rubric": "s"},
        {"prompt": "q"},
        {"sampling": {"temperature": 1, "seed": 1}},
        {"vote": 1},
    ]
    assert len({verdict_key(verdict_parts(**base | change)) for change in changes}) == len(changes)


def test_the_order_of_the_sampling_params_is_not_in_the_key() -> None:
    assert verdict_parts("m", "r", "p", {"a": 1, "b": 2}, 0) == verdict_parts("m", "r", "p", {"b": 2, "a": 1}, 0)


def test_a_key_is_the_digest_of_its_parts_and_any_prompt_has_one() -> None:
    parts = verdict_parts("m", "r", "half a pair: \ud800 \0", SAMPLING, 3)
    assert verdict_key(parts) == hashlib.sha256(parts.encode()).hexdigest()
    assert json.loads(parts)["vote"] == 3


# ---- what is stored ----


def test_what_was_put_is_read_by_whoever_opens_the_store_later(path: Path) -> None:
    odd = verdict(2, answer="\ud800\0 \u202e 7", finish_reason=None, parts="", key="0" * 64)
    with VerdictStore.open(path) as store:
        assert store.put(verdict(1)) == verdict(1)
        store.put(odd)
    with VerdictStore.open(path) as store:
        assert store.get_many([*keys(1, 3), odd.key]) == {verdict(1).key: verdict(1), odd.key: odd}
        assert store.get_many([]) == {}


def test_the_first_verdict_of_a_key_stays_and_everybody_gets_it(store: VerdictStore) -> None:
    store.put(verdict(1))
    late = verdict(1, answer="another answer")
    assert store.put(late).answer == "answer 1"
    assert store.get_many(keys(1))[late.key].answer == "answer 1"


@pytest.mark.parametrize(
    "change",
    [
        {"answer": ""},
        {"answer": " \n"},
        {"finish_reason": "length"},
        {"finish_reason": "content_filter"},
        {"key": "x" * 64},
        {"key": "0" * 64},
        {"key": ""},
        {"prompt_tokens": -1},
        {"seconds": float("nan")},
        {"created": float("inf")},
    ],
    ids=str,
)
def test_a_failure_or_nonsense_cannot_be_a_verdict(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"verdict|key|tokens|times"):
        verdict(1, **change)


def test_a_large_table_is_looked_up_at_once(path: Path) -> None:
    filled(path, 1300)
    with VerdictStore.open(path) as store:
        found = store.get_many(keys(*range(2000)))
    assert sorted(one.created - 1.7e9 for one in found.values()) == list(range(1300))


def test_threads_that_put_at_once_lose_nothing_and_share_transactions(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = VerdictStore._put

    def slow(self: VerdictStore, connection: sqlite3.Connection, some: list[StoredVerdict]) -> Any:
        batches.append(len(some))
        time.sleep(0.02)
        return real(self, connection, some)

    monkeypatch.setattr(VerdictStore, "_put", slow)
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(store.put, [verdict(number % 50) for number in range(100)]))
    assert len(store.get_many(keys(*range(50)))) == 50
    assert sum(batches) == 100
    assert len(batches) < 90  # on a busy machine many a thread comes alone


def test_a_verdict_is_kept_also_if_whoever_waits_for_it_is_cancelled(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = VerdictStore._put

    def slow(self: VerdictStore, connection: sqlite3.Connection, some: list[StoredVerdict]) -> Any:
        time.sleep(0.2)
        return real(self, connection, some)

    monkeypatch.setattr(VerdictStore, "_put", slow)

    async def cancel() -> StoredVerdict:
        first, second = (asyncio.create_task(store.keep(verdict(number))) for number in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert asyncio.run(cancel()) == verdict(1)
    assert set(store.get_many(keys(0, 1))) == set(keys(0, 1))


def test_an_event_loop_keeps_many_at_once(store: VerdictStore) -> None:
    async def keep() -> list[StoredVerdict]:
        return await asyncio.gather(*(store.keep(verdict(number)) for number in range(100)))

    assert asyncio.run(keep()) == [verdict(number) for number in range(100)]
    assert len(store.get_many(keys(*range(100)))) == 100


def test_a_put_that_fails_says_so_to_each_thread_and_stores_nothing(
    store: VerdictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise SetupError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(VerdictStore, "_put", fail)
        with pytest.raises(SetupError):
            store.put(verdict(1))
    assert store.get_many(keys(1)) == {}
    store.put(verdict(1))
    assert len(store.get_many(keys(1))) == 1


# ---- claims ----


def test_of_two_owners_only_one_may_pay(store: VerdictStore, path: Path) -> None:
    mine, theirs = new_owner(), new_owner()
    with VerdictStore.open(path) as other:
        assert store.claim(keys(1, 2), mine) == set(keys(1, 2))
        assert other.claim(keys(1, 2, 3), theirs) == set(keys(3))
        assert store.claim(keys(1, 2, 3), mine) == set(keys(1, 2))  # those that it has are still its own
        store.put(verdict(1))
        store.release(keys(1, 2, 3), mine)
        assert other.claim(keys(1, 2, 3), theirs) == set(keys(2, 3))


def test_what_is_stored_is_nobodys_to_pay_for(store: VerdictStore) -> None:
    store.put(verdict(1))
    assert store.claim(keys(1), new_owner()) == set()


def test_what_is_stored_is_claimed_no_more(store: VerdictStore) -> None:
    store.claim(keys(1, 2), new_owner())
    store.put(verdict(1))
    assert store.stats().claims == 1


def test_a_limit_takes_the_first_that_are_free(store: VerdictStore) -> None:
    mine = new_owner()
    store.put(verdict(1))
    assert store.claim(keys(1, 2, 3, 4), mine, limit=2) == set(keys(2, 3))
    assert store.claim(keys(1, 2, 3, 4), new_owner(), limit=2) == set(keys(4))


def test_closing_the_store_gives_up_its_claims(store: VerdictStore, path: Path) -> None:
    with VerdictStore.open(path) as other:
        other.claim(keys(1), new_owner())
        assert store.claim(keys(1), new_owner()) == set()
    assert store.claim(keys(1), new_owner()) == set(keys(1))
    assert store.stats().claims == 1


@pytest.mark.parametrize(("owner", "limit"), [("me", None), ("", None), (None, 0), (None, -1)])
def test_a_claim_by_nobody_or_of_nothing_is_refused(store: VerdictStore, owner: str | None, limit: int | None) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of many kinds, each with its own words
        store.claim(keys(1), new_owner() if owner is None else owner, limit=limit)


def test_who_waits_gets_what_others_store_and_may_pay_for_what_they_release(
    store: VerdictStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "POLL_S", 0.01)
    mine, theirs = new_owner(), new_owner()

    async def both() -> list[Any]:
        with VerdictStore.open(path) as other:
            other.claim(keys(1, 2), theirs)
            waiting = asyncio.create_task(store.wait(keys(1, 2), mine))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            other.put(verdict(1))
            first = await waiting
            waiting = asyncio.create_task(store.wait(keys(2), mine))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            other.release(keys(2), theirs)
            return [first, await waiting, await store.wait([], mine)]

    assert asyncio.run(both()) == [({verdict(1).key: verdict(1)}, set()), ({}, set(keys(2))), ({}, set())]


def test_who_waits_for_a_few_looks_beyond_the_many_that_others_pay_for(store: VerdictStore, path: Path) -> None:
    with VerdictStore.open(path) as other:
        other.claim(keys(*range(250)), new_owner())
        other.put(verdict(120))
        table, mine = keys(*range(260)), new_owner()
        assert asyncio.run(store.wait(table, mine, limit=5)) == ({verdict(120).key: verdict(120)}, set())
        table.remove(verdict(120).key)
        assert asyncio.run(store.wait(table, mine, limit=5)) == ({}, set(keys(*range(250, 255))))


def test_a_wait_that_is_cancelled_leaves_no_claim_behind_when_the_store_is_closed(path: Path) -> None:
    async def cancel(after_s: float) -> None:
        with VerdictStore.open(path) as store:
            waiting = asyncio.create_task(store.wait(keys(*range(200)), new_owner()))
            await asyncio.sleep(after_s)
            waiting.cancel()
            await asyncio.wait([waiting])

    for turn in range(10):
        asyncio.run(cancel(turn / 1000))
    with VerdictStore.open(path) as store:
        assert store.stats().claims == 0


JUDGE = """
import asyncio, hashlib, os, sys
from pathlib import Path
from papo.store.owners import new_owner
from papo.store.verdicts import StoredVerdict, VerdictStore

async def judge(path, log, keys):
    with VerdictStore.open(Path(path)) as store:
        owner, missing, have = new_owner(), set(keys), {}
        while missing:
            found, mine = await store.wait(sorted(missing), owner, limit=5)
            have |= found
            for key in mine:
                os.write(log, f"{key}\\n".encode())
                await asyncio.sleep(0.001)
                if int(key[:2], 16) % 8 == 0 and key not in sys.argv:
                    sys.argv.append(key)
                    store.release([key], owner)
                    continue
                have[key] = await store.keep(StoredVerdict(key, "m", "r", f"by {os.getpid()}", "stop", 1, 1, 0.1))
            missing -= have.keys()
    print(hashlib.sha256(repr(sorted((key, one.answer) for key, one in have.items())).encode()).hexdigest())

log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
input()
asyncio.run(judge(sys.argv[1], log, [hashlib.sha256(str(n).encode()).hexdigest() for n in range(int(sys.argv[3]))]))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_that_judge_the_same_table_at_once_pay_for_each_verdict_once(path: Path, tmp_path: Path) -> None:
    judges = [start(JUDGE, path, tmp_path / "paid", 300) for _ in range(2)]
    assert [line(judge) for judge in judges] == ["ready", "ready"]
    for judge in judges:
        assert judge.stdin is not None
        judge.stdin.write("go\n")
        judge.stdin.flush()
    ends = [judge.communicate(timeout=120)[0] for judge in judges]
    assert [judge.returncode for judge in judges] == [0, 0]
    assert ends[0] == ends[1] != ""
    tries = Counter((tmp_path / "paid").read_text().split())
    with VerdictStore.open(path) as store:
        found = store.get_many(tries)
        assert store.stats().claims == 0
    assert len(found) == 300
    # A key of the eighth fails once in each process that gets it; no other is paid for more than once.
    assert {key: count for key, count in tries.items() if count > 1 and int(key[:2], 16) % 8} == {}
    assert len({one.answer for one in found.values()}) == 2, "one process did it all"


HOLD = """
import sys
from pathlib import Path
from papo.store.owners import new_owner
from papo.store.verdicts import VerdictStore
store = VerdictStore.open(Path(sys.argv[1]))
print(len(store.claim(sys.argv[2:], new_owner())), flush=True)
input()
"""


def test_the_claims_of_a_killed_process_are_taken_over_at_once_and_those_of_a_stopped_one_are_not(
    store: VerdictStore, path: Path
) -> None:
    with start(HOLD, path, *keys(1, 2, 3)) as holder:
        assert line(holder) == "3"
        assert store.claim(keys(1, 2), new_owner()) == set()
        holder.send_signal(signal.SIGSTOP)
        assert store.claim(keys(1, 2), new_owner()) == set()
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert store.claim(keys(1, 2), new_owner()) == set(keys(1, 2))
    assert store.stats().claims == 2


def elsewhere() -> str:
    """An owner on another machine."""
    pid, started, _, nonce = new_owner().split(":")
    return f"{pid}:{started}:{'0' * 16}:{nonce}"


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_claims_hold_while_their_owner_shows_life_and_for_the_lease_after_that(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also those of a process that runs: it may have been unable to write down that it gave them up."""
    monkeypatch.setattr(verdicts, "BEAT_S", 0.05)
    monkeypatch.setattr(verdicts, "LEASE_S", 1.0)
    with VerdictStore.open(path) as there, VerdictStore.open(path) as here:
        there.claim(keys(1, 2), new_owner() if where == "here" else elsewhere())
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            assert here.claim(keys(1), new_owner()) == set()
            time.sleep(0.02)
        there._closing.set()  # it is cut off without having given up anything
        there._beating.join()
        cut = time.monotonic()
        while not (taken := here.claim(keys(1), new_owner())):
            assert time.monotonic() - cut < 20
            time.sleep(0.02)
        assert time.monotonic() - cut > 0.9
        assert taken == set(keys(1))
        there._database.close()


# ---- kills ----

PUT = """
import hashlib, os, sys
from pathlib import Path
from papo.store.owners import new_owner
from papo.store.verdicts import StoredVerdict, VerdictStore
for turn in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        store, number, owner = VerdictStore.open(Path(sys.argv[1])), 0, new_owner()
        print(os.getpid(), flush=True)
        while True:
            key = hashlib.sha256(f"{turn} {number}".encode()).hexdigest()
            store.claim([key], owner)
            store.put(StoredVerdict(key, "m", "r", f"{turn} {number} " + "x" * 3000, "stop", 1, 1, 0.1))
            os.write(1, f"{key}\\n".encode())  # in one piece, also where Python does not buffer
            number += 1
    os.waitpid(pid, 0)
    print("killed", flush=True)
"""


def test_twenty_kills_in_the_middle_of_putting_lose_nothing_that_was_stored(path: Path) -> None:
    said: list[str] = []
    chance = random.Random(5)
    with start(PUT, path, 20) as process:
        for _ in range(20):
            pid = int(line(process))
            said += [line(process) for _ in range(chance.randrange(4))]
            time.sleep(chance.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
            while (key := line(process)) != "killed":
                said.append(key)
    assert len(said) > 20
    verified = verify_store(path)
    assert verified.damage == []
    with VerdictStore.open(path) as store:
        assert store.get_many(said).keys() == set(said)
        assert store.claim(["f" * 64], new_owner())
        assert store.stats().claims == 1
    # At most the one that was under way at each kill was stored and not said.
    assert len(said) <= verified.verdicts <= len(said) + 20


# ---- damage ----


def test_a_file_that_is_no_database_any_more_is_moved_aside_with_a_warning(path: Path, warned: list[str]) -> None:
    filled(path, 3)
    path.write_bytes(b"\0" * 5000)
    with VerdictStore.open(path, warn=warned.append) as store:
        assert store.get_many(keys(0)) == {}
        store.put(verdict(0))
        assert store.get_many(keys(0)) != {}
    (aside,) = path.parent.glob("verdicts.damaged-*.sqlite")
    assert aside.read_bytes() == b"\0" * 5000
    assert len(warned) == 1
    assert "is damaged (file is not a database)" in warned[0]
    assert f"moved to {aside.name}, 0 verdicts of it taken over" in warned[0]


@pytest.mark.parametrize("opened", ["before", "after"])
def test_verdicts_on_both_sides_of_a_damaged_page_are_taken_over(path: Path, warned: list[str], opened: str) -> None:
    filled(path, 400)
    size = path.stat().st_size

    def destroy() -> None:
        with path.open("r+b") as stream:
            stream.seek(size // 2 // 4096 * 4096)
            stream.write(b"\xff" * 4096 * 3)

    if opened == "after":
        destroy()
    with VerdictStore.open(path, warn=warned.append) as store:
        if opened == "before":
            destroy()
        found = store.get_many(keys(*range(400)))
        assert any("moved to verdicts.damaged-" in text for text in warned)
        assert 350 < len(found) < 400
        assert all(one == verdict(int(one.created - 1.7e9)) for one in found.values())
        missing = set(keys(*range(400))) - found.keys()
        assert store.claim(missing, new_owner()) == missing
        assert store.verify().damage == []
    assert len(list(path.parent.glob("*.damaged-*.sqlite"))) == 1


def test_a_truncated_file_is_no_crash(path: Path, warned: list[str]) -> None:
    filled(path, 400)
    os.truncate(path, path.stat().st_size // 2)
    with VerdictStore.open(path, warn=warned.append) as store:
        found = store.get_many(keys(*range(400)))
        assert 0 < len(found) < 400
        store.put(verdict(399))
        assert store.verify().damage == []
    assert "taken over" in warned[0]


def test_the_log_of_a_damaged_file_is_taken_over_too(path: Path, tmp_path: Path, warned: list[str]) -> None:
    filled(path, 400)
    killed = tmp_path / "killed.sqlite"
    with VerdictStore.open(path) as store:
        store.put(verdict(500))
        for end in ("", "-wal"):  # as a killed process leaves them
            shutil.copy(f"{path}{end}", f"{killed}{end}")
    with killed.open("r+b") as stream:
        stream.seek(4096 * 20)
        stream.write(b"\xff" * 4096 * 10)
    with VerdictStore.open(killed, warn=warned.append) as store:
        found = store.get_many(keys(*range(501)))
        assert verdict(500).key in found
        assert 250 < len(found) < 401  # eight a page
    assert len(warned) == 1
    assert verify_store(killed).damage == []


def test_a_changed_row_is_not_used_and_can_be_paid_for_again(
    store: VerdictStore, path: Path, warned: list[str]
) -> None:
    for number in range(4):
        store.put(verdict(number))
    edit(path, "UPDATE verdicts SET answer = ? WHERE key = ?", b"1.0", *keys(1))
    edit(path, "UPDATE verdicts SET answer = ?, prompt_tokens = 'x' WHERE key = ?", b"\xff", *keys(2))
    owner = new_owner()
    assert store.get_many(keys(0, 1, 2, 3)).keys() == set(keys(0, 3))
    assert len(warned) == 2
    assert store.claim(keys(0, 1, 2), owner) == set(keys(1, 2))
    assert store.put(verdict(1, answer="again")).answer == "again"
    assert store.get_many(keys(1))[verdict(1).key].answer == "again"
    assert len(warned) == 2


def test_a_store_that_another_process_deleted_or_replaced_is_opened_anew(store: VerdictStore, path: Path) -> None:
    store.put(verdict(1))
    for left in path.parent.iterdir():
        left.unlink()
    assert store.get_many(keys(1)) == {}
    store.put(verdict(2))
    assert verify_store(path).verdicts == 1


def test_two_that_find_the_damage_at_once_save_what_is_there_once(path: Path, warned: list[str]) -> None:
    filled(path, 100)
    with VerdictStore.open(path, warn=warned.append) as first, VerdictStore.open(path, warn=warned.append) as second:
        path.write_bytes(b"\0" * path.stat().st_size)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda store: store.put(verdict(1)), (first, second)))
        assert first.get_many(keys(1)) == second.get_many(keys(1)) != {}
    assert len(list(path.parent.glob("*.damaged-*.sqlite"))) == len(warned) == 1


# ---- what cannot be a store, or cannot be written ----


def test_a_file_of_another_name_is_never_taken_for_a_damaged_store(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("run: {}")
    with pytest.raises(UserError, match=r"ends in \.sqlite"):
        VerdictStore.open(tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text() == "run: {}"


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    edit(tmp_path / "other.sqlite", "CREATE TABLE runs (id)")
    before = (tmp_path / "other.sqlite").read_bytes()
    for read_only in (False, True):
        with pytest.raises(DataError, match="a database of something else"):
            VerdictStore.open(tmp_path / "other.sqlite", read_only=read_only)
    assert (tmp_path / "other.sqlite").read_bytes() == before


def test_a_store_of_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    filled(path, 1)
    edit(path, "PRAGMA user_version = 3")
    with pytest.raises(DataError, match="version 3 of verdicts, made by a later papo; this one reads 2"):
        VerdictStore.open(path)
    edit(path, "PRAGMA user_version = 2")
    with VerdictStore.open(path) as store:
        assert len(store.get_many(keys(0))) == 1


def test_a_store_of_an_earlier_version_is_migrated_when_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, 1)
    later = replace(
        verdicts.FORMAT, migrations=(*verdicts.FORMAT.migrations, ("ALTER TABLE verdicts ADD COLUMN more TEXT",))
    )
    monkeypatch.setattr(verdicts, "FORMAT", later)
    with pytest.raises(DataError, match="version 2 of verdicts; this papo reads 3"):
        VerdictStore.open(path, read_only=True)
    with VerdictStore.open(path) as store:
        assert store.get_many(keys(0)) == {verdict(0).key: verdict(0)}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT more FROM verdicts").fetchall() == [(None,)]


def test_a_migration_that_fails_leaves_the_store_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, 1)
    bad = (*verdicts.FORMAT.migrations, ("ALTER TABLE verdicts ADD COLUMN more TEXT", "nonsense"))
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "FORMAT", replace(verdicts.FORMAT, migrations=bad))
        with pytest.raises(SetupError, match="syntax error"):
            VerdictStore.open(path)
    with VerdictStore.open(path) as store:
        assert len(store.get_many(keys(0))) == 1
        store.put(verdict(1))


@pytest.mark.parametrize("where", ["file/verdicts.sqlite", "folder.sqlite"])
def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(SetupError) as caught:
        VerdictStore.open(tmp_path / where)
    assert str(tmp_path / where) in caught.value.where
    assert caught.value.fix


def test_a_full_disk_is_named_and_loses_nothing(small_disk: Path, fill: Callable[[Path], Path]) -> None:
    path = small_disk / "verdicts.sqlite"
    with VerdictStore.open(path) as store:
        store.put(verdict(1))
        filler = fill(small_disk)

        def put_on() -> None:
            for number in range(2, 2000):
                store.put(verdict(number, answer="x" * 5000))

        with pytest.raises(SetupError, match=r"the disk is full|SQLite cannot go on") as caught:
            put_on()
        assert str(path) in caught.value.where
        stored = store.get_many(keys(*range(2000)))
        assert stored[verdict(1).key] == verdict(1)
        filler.unlink()
        store.put(verdict(2000))
        assert len(store.get_many(keys(*range(2001)))) == len(stored) + 1
        assert store.verify().damage == []


def test_a_folder_that_takes_no_write_is_named_before_anything_is_paid_and_can_be_read(small_disk: Path) -> None:
    path = small_disk / "verdicts.sqlite"
    filled(path, 3)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SetupError, match="cannot write here"):
        VerdictStore.open(path)
    with VerdictStore.open(path, read_only=True) as store:
        assert len(store.get_many(keys(0, 1, 2))) == 3
        assert store.stats().by[0].verdicts == 3
        with pytest.raises(SetupError):
            store.put(verdict(4))
    with pytest.raises(SetupError):
        VerdictStore.open(small_disk / "new/verdicts.sqlite")


def test_who_holds_the_store_for_too_long_is_reported(
    store: VerdictStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.1)
    with VerdictStore.open(path) as impatient, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError) as caught:
            impatient.put(verdict(1))
        assert impatient.get_many(keys(1)) == {}
        other.execute("ROLLBACK")
        impatient.put(verdict(1))
    assert str(path) in caught.value.where
    with FileLock(f"{path}.lock"), pytest.raises(BusyError, match=r"have not let go of it for 0\.1 s"):
        VerdictStore.open(path)


@pytest.mark.parametrize(("kind", "shared"), [("nfs4", True), ("fuse.sshfs", True), ("lustre", True), ("ext4", False)])
def test_the_innermost_mount_tells_whether_machines_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shared: bool
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="overlay"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(database.psutil, "disk_partitions", lambda **_: mounts)
    assert database.on_network(tmp_path / "kept/verdicts.sqlite") is shared
    assert not database.on_network(tmp_path.parent / "verdicts.sqlite")


def test_a_folder_that_other_machines_share_gets_no_shared_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not database.on_network(path)
    monkeypatch.setattr(database, "on_network", lambda _: True)
    filled(path, 3)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    with VerdictStore.open(path) as store, VerdictStore.open(path) as other:
        assert store.claim(keys(3), new_owner())
        assert other.claim(keys(3), new_owner()) == set()
        assert len(other.get_many(keys(0, 1, 2, 3))) == 3


def test_a_closed_store_is_closed(path: Path) -> None:
    store = VerdictStore.open(path)
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="was closed"):
        store.get_many(keys(1))
    assert not [thread for thread in threading.enumerate() if "verdicts" in thread.name]


# ---- what is there ----


def test_stats_count_by_model_and_rubric(store: VerdictStore, path: Path) -> None:
    for number in range(3):
        store.put(verdict(number))
    store.put(verdict(9, model="judge-32b"))
    store.claim(keys(20, 21), new_owner())
    stats = store.stats()
    assert [(one.model, one.rubric, one.verdicts, one.prompt_tokens, one.completion_tokens) for one in stats.by] == [
        ("judge-32b", "levels/1", 1, 900, 80),
        ("judge-7b", "levels/1", 3, 2700, 240),
    ]
    assert (stats.by[1].oldest, stats.by[1].newest, stats.by[1].seconds) == (1.7e9, 1.7e9 + 2, 4.5)
    assert stats.claims == 2
    assert stats.size_bytes >= path.stat().st_size > 0


def test_an_export_has_every_verdict_oldest_first(
    store: VerdictStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_rows, "_BATCH", 2)
    some = [verdict(number) for number in (4, 0, 3, 1)] + [verdict(2, answer="half \ud800", finish_reason=None)]
    for one in some:
        store.put(one)
    assert store.export(tmp_path / "out.parquet") == 5
    assert store.export(tmp_path / "out.jsonl") == 5
    rows = [asdict(one) for one in sorted(some, key=lambda one: one.created)]
    assert [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    rows[2]["answer"] = "half \\ud800"
    assert read_rows(tmp_path / "out.parquet", VERDICTS) == rows


def test_an_export_of_nothing_is_an_empty_table(store: VerdictStore, tmp_path: Path) -> None:
    assert store.export(tmp_path / "out.parquet") == 0
    assert read_rows(tmp_path / "out.parquet", VERDICTS) == []


def test_an_export_leaves_out_what_is_damaged_and_says_so(
    store: VerdictStore, path: Path, tmp_path: Path, warned: list[str]
) -> None:
    store.put(verdict(0))
    store.put(verdict(1))
    edit(path, "UPDATE verdicts SET model = 'other' WHERE key = ?", *keys(0))
    assert store.export(tmp_path / "out.jsonl") == 1
    assert warned == ["1 damaged verdicts are left out; `papo judge-cache verify` names them"]


@pytest.mark.parametrize("name", ["out.csv", "out", "verdicts.sqlite"])
def test_an_export_to_another_ending_is_refused(store: VerdictStore, path: Path, name: str) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match="Parquet or as lines of JSON"):
        store.export(path.with_name(name))
    assert path.read_bytes() == before


def test_verifying_names_each_damaged_row_and_changes_nothing(path: Path) -> None:
    filled(path, 3)
    with VerdictStore.open(path) as store:
        store.put(verdict(3, parts=""))
        verified = store.verify()
    assert (verified.verdicts, verified.recomputed, verified.damage) == (4, 3, [])
    edit(path, "UPDATE verdicts SET answer = ? WHERE key = ?", b"1", *keys(0))
    edit(path, "UPDATE verdicts SET parts = '{}' WHERE key = ?", *keys(1))
    edit(path, "UPDATE verdicts SET key = ? WHERE key = ?", "e" * 64, *keys(3))
    before = path.read_bytes()
    verified = verify_store(path)
    assert verified.verdicts == 4
    assert [text.split(": ", 1)[1] for text in sorted(verified.damage, key=lambda text: text.split(": ", 1)[1])] == [
        "it cannot be read: the key is not that of its parts",
        "its digest is not that of its content",
        "its digest is not that of its content",
    ]
    assert any(keys(0)[0][:12] in text for text in verified.damage)
    assert path.read_bytes() == before


def test_verifying_a_destroyed_file_lists_the_damage_and_leaves_it_where_it_is(path: Path) -> None:
    filled(path, 400)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = b"\xff" * 20_000
    path.write_bytes(content)
    assert len(verify_store(path).damage) > 0
    path.write_bytes(b"\0" * 5000)
    assert verify_store(path).damage == ["damaged: file is not a database"]
    with pytest.raises(DamagedError):
        VerdictStore.open(path, read_only=True)
    assert path.read_bytes() == b"\0" * 5000


def test_a_store_that_is_not_there_is_not_made_by_looking(path: Path) -> None:
    with pytest.raises(MissingInputError, match="there are no verdicts yet"):
        VerdictStore.open(path, read_only=True)
    assert not path.parent.exists()


def test_runs_beside_share_the_store_of_the_checkout(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = checkout / ".papo/verdicts.sqlite"
    assert default_store(Workspace(Path())).absolute() == ours
    assert default_store(Workspace(Path("runs/other"))).absolute() == ours
    assert default_store(Workspace(tmp_path / "elsewhere")).absolute() == ours
    monkeypatch.chdir(tmp_path)
    assert default_store(Workspace(tmp_path / "run")) == tmp_path / "run/.papo/verdicts.sqlite"
