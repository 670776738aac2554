"""`papo score-prm` killed in the middle of asking: what was paid for is kept, and the table is that of an undisturbed run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Papo, papo_forks
from judging import IMPORTS, REPLY, judging, paid_tries, prm_rows, score_prm_command, store_of, write_round
from servers.chat import ChatProcess, chat_process

from papo.store.layout import Workspace
from papo.store.verdicts import verify_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("keyless")]

GROUPS = ("11111000",) * 40
QUESTIONS = 8 * len(GROUPS) - 1
CONCURRENCY = 16
KILLS = 20


@pytest.fixture(scope="module")
def server() -> Iterator[ChatProcess]:
    with chat_process(reply=REPLY, latency_s=0.05) as server:
        yield server


@pytest.fixture
def papo(tmp_path: Path) -> Iterator[Papo]:
    with papo_forks(tmp_path / "here", IMPORTS) as papo:
        yield papo


def round_in(folder: Path) -> Workspace:
    """A round with a store of its own."""
    workspace = Workspace(folder)
    write_round(workspace, GROUPS)
    return workspace


def command(server: ChatProcess, workspace: Workspace) -> list[str]:
    params = judging(server, store=str(store_of(workspace).resolve()), model={"concurrency": CONCURRENCY})
    return score_prm_command(workspace, params)


@pytest.fixture
def undisturbed(server: ChatProcess, papo: Papo, tmp_path: Path) -> bytes:
    """The table of a run that nobody kills."""
    workspace = round_in(tmp_path / "undisturbed")
    server.set()
    papo.run(*command(server, workspace))
    assert set(server.seen.billed.values()) == {1}
    assert server.seen.billed.total() == QUESTIONS
    rows = prm_rows(workspace)
    assert {row["status"] for row in rows} == {"ok"}
    assert sum(row["cached"] for row in rows) == 1  # the same text twice
    return workspace.table(0, "prm").read_bytes()


def killed(papo: Papo, arguments: list[str], server: ChatProcess, after: int, wait_s: float) -> bool:
    """Starts the command and kills it when the server has seen so many more requests, and a moment later; whether that was in time."""
    before = server.seen.requests.total()
    return papo.kill_when(lambda: server.seen.requests.total() >= before + after, wait_s, *arguments)


def twice(billed: Counter[str]) -> int:
    """Billed requests beyond one for each content."""
    return billed.total() - len(billed)


def test_twenty_stores_each_killed_once_at_a_random_moment(
    server: ChatProcess, papo: Papo, undisturbed: bytes, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(11)
    beyond = []
    for number in range(KILLS):
        workspace = round_in(tmp_path / str(number))
        server.set()
        arguments = command(server, workspace)
        assert killed(papo, arguments, server, chance.randrange(QUESTIONS - 2 * CONCURRENCY), chance.random() * 0.05)
        assert not workspace.table(0, "prm").exists()
        papo.run(*arguments)
        billed = server.seen.billed
        assert len(billed) == QUESTIONS
        beyond.append(twice(billed))
        assert workspace.table(0, "prm").read_bytes() == undisturbed
        assert verify_store(store_of(workspace)).damage == []
        # The ledger has every verdict's call, and no call whose reply never came.
        assert paid_tries(store_of(workspace)) == QUESTIONS
    record_property("asked twice, by kill", str(beyond))
    assert max(beyond) <= CONCURRENCY


def test_one_store_killed_twenty_times_in_a_row(
    server: ChatProcess, papo: Papo, undisturbed: bytes, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(12)
    workspace = round_in(tmp_path / "run")
    server.set()
    arguments = command(server, workspace)
    kills = 0
    for _ in range(KILLS):
        kills += killed(papo, arguments, server, chance.randrange(2 * CONCURRENCY), chance.random() * 0.05)
    assert kills == KILLS
    papo.run(*arguments)
    billed = server.seen.billed
    assert len(billed) == QUESTIONS
    record_property("asked twice, by 20 kills", f"{twice(billed)}, one response {max(billed.values())} times in all")
    assert twice(billed) <= KILLS * CONCURRENCY
    assert workspace.table(0, "prm").read_bytes() == undisturbed
    assert verify_store(store_of(workspace)).damage == []
    assert paid_tries(store_of(workspace)) == QUESTIONS
