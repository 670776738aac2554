"""Several `papo score-prm` at once on one store: each response is paid for once, and all come to the same scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Papo, papo_forks
from judging import IMPORTS, REPLY, judging, paid_tries, prm_rows, score_prm_command, write_round
from servers.chat import ChatProcess, chat_process

from papo.params import Variant
from papo.store.layout import Workspace

pytestmark = pytest.mark.usefixtures("keyless")

GROUPS = ("11111000",) * 10
QUESTIONS = 8 * len(GROUPS) - 1
CONCURRENCY = 8


@pytest.fixture(scope="module")
def one_server() -> Iterator[ChatProcess]:
    with chat_process(reply=REPLY, latency_s=0.2) as server:
        yield server


@pytest.fixture
def server(one_server: ChatProcess) -> ChatProcess:
    one_server.set()
    return one_server


@pytest.fixture(scope="module")
def papo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Papo]:
    with papo_forks(tmp_path_factory.mktemp("here"), IMPORTS) as papo:
        yield papo


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared.sqlite"


def workspaces(folder: Path, count: int) -> list[Workspace]:
    made = [Workspace(folder / f"run {number}") for number in range(count)]
    for workspace in made:
        write_round(workspace, GROUPS)
    return made


def command(server: ChatProcess, workspace: Workspace, store: Path, *, variant: Variant = "prm") -> list[str]:
    params = judging(server, store=str(store.resolve()), model={"concurrency": CONCURRENCY})
    return score_prm_command(workspace, params, variant=variant)


def scores(workspace: Workspace) -> list[Any]:
    return [(row["prm_score"], row["status"], row["reason"], row["votes"]) for row in prm_rows(workspace)]


def bought(workspace: Workspace) -> int:
    return sum(not row["cached"] for row in prm_rows(workspace))


def seen_by(server: ChatProcess, requests: int, papo: Papo) -> None:
    """Waits until the server has seen so many."""
    until = time.monotonic() + 60
    while server.seen.requests.total() < requests:
        assert time.monotonic() < until, papo.log.read_text()
        time.sleep(0.005)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_judge_the_same_table_at_once_pay_for_each_response_once(
    server: ChatProcess, papo: Papo, tmp_path: Path, shared: Path, count: int
) -> None:
    all_ = workspaces(tmp_path, count)
    ends = [papo.start(*command(server, workspace, shared)) for workspace in all_]
    assert [papo.wait(pid) for pid in ends] == [0] * count, papo.log.read_text()
    billed = server.seen.billed
    assert (len(billed), set(billed.values())) == (QUESTIONS, {1})
    first, *others = map(scores, all_)
    assert all(other == first for other in others)
    assert {status for _, status, *_ in first} == {"ok"}
    # They shared the work, and each row of each table says rightly who paid.
    assert sum(map(bought, all_)) == QUESTIONS == paid_tries(shared)
    assert sum(bought(workspace) > 0 for workspace in all_) >= 2


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_when_one_of_them_is_killed_the_others_take_over_what_it_had_claimed(
    server: ChatProcess, papo: Papo, tmp_path: Path, shared: Path, count: int,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    all_ = workspaces(tmp_path, count)
    victim, *others = [papo.start(*command(server, workspace, shared)) for workspace in all_]
    seen_by(server, QUESTIONS // 2, papo)
    started = time.monotonic()
    assert papo.kill(victim)
    assert [papo.wait(pid) for pid in others] == [0] * (count - 1), papo.log.read_text()
    took_s = time.monotonic() - started
    papo.run(*command(server, all_[0], shared))
    billed = server.seen.billed
    assert len(billed) == QUESTIONS
    assert billed.total() - QUESTIONS <= CONCURRENCY
    assert max(billed.values()) <= 2
    first, *rest = map(scores, all_)
    assert all(other == first for other in rest)
    assert {status for _, status, *_ in first} == {"ok"}
    record_property("asked twice", f"{billed.total() - QUESTIONS}; done {took_s:.1f} s after the kill")
    assert took_s < 50  # they wait for no lease to run out


def test_two_variants_at_once_share_what_both_ask_about(
    server: ChatProcess, papo: Papo, tmp_path: Path, shared: Path
) -> None:
    some, every = workspaces(tmp_path, 2)
    ends = [
        papo.start(*command(server, some, shared, variant="papo")),
        papo.start(*command(server, every, shared, variant="prm")),
    ]
    assert [papo.wait(pid) for pid in ends] == [0, 0], papo.log.read_text()
    billed = server.seen.billed
    assert (len(billed), set(billed.values())) == (QUESTIONS, {1})
    pairs = list(zip(scores(some), scores(every), strict=True))
    asked = [pair for pair in pairs if pair[0][1] != "not_asked"]
    assert len(asked) == 5 * len(GROUPS)
    assert all(of_papo == of_prm for of_papo, of_prm in asked)
