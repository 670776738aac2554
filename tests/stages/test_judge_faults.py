"""The stage score_prm and a server that misbehaves: no fault makes a number, and nothing that was paid for is asked again."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from judging import (
    REPLY,
    SCORES,
    attempts,
    delivered,
    judging,
    prm_rows,
    run_stage,
    score_prm_command,
    write_round,
)
from servers.chat import FAULTS, ChatProcess, chat_process

from papo.cli import main
from papo.errors import FailedRowsError, ServerDownError
from papo.schemas import ROLLOUTS
from papo.store.layout import Workspace
from papo.store.manifest import Context
from papo.store.tables import read_rows
from papo.store.verdicts import VerdictStore

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("keyless")


def _benchmark() -> ModuleType:
    path = ROOT / "tests/benchmarks/table_of_faults.py"
    spec = importlib.util.spec_from_file_location("table_of_faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["table_of_faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = _benchmark()


@pytest.fixture(scope="module")
def one_server() -> Iterator[ChatProcess]:
    with chat_process(reply=REPLY) as server:
        yield server


@pytest.fixture
def server(one_server: ChatProcess) -> ChatProcess:
    one_server.set(fault="none", when="all", share=0.1, latency_s=0.0, retry_after_s=0.0)
    return one_server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papo.engines.chat.FIRST_WAIT_S", TABLE.FIRST_WAIT_S)


@pytest.fixture(scope="module")
def matrix(one_server: ChatProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TABLE.Matrix(one_server, tmp_path_factory.mktemp("faults"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    here = Workspace(tmp_path / "run")
    write_round(here)
    return here


def kept(workspace: Workspace) -> int:
    with VerdictStore.open(workspace.work / "verdicts.sqlite", read_only=True) as store:
        return store.verify().verdicts


# ---- every fault ----


def test_without_a_fault_every_score_is_what_the_response_deserves(matrix: Any) -> None:
    texts = [
        row["completion"] for row in read_rows(Workspace(matrix.folder / "undisturbed").table(0, "rollouts"), ROLLOUTS)
    ]
    assert [row["prm_score"] for row in matrix.rows] == [
        next(score for word, score in SCORES.items() if f"is {word}:" in text) for text in texts
    ]
    assert len(set(matrix.names)) == matrix.requests == len(texts) - 1  # two texts are the same


# One of each kind that the client treats alike; the others take another half a minute.
KINDS = ("429", "503", "filtered", "no-schema", "hang", "cut", "empty", "two-verdicts", "usage-huge")
EVERY = [pytest.param(fault, marks=[] if fault in KINDS else [pytest.mark.slow]) for fault in FAULTS]


@pytest.mark.parametrize("when", TABLE.RATES)
@pytest.mark.parametrize("fault", EVERY)
def test_no_fault_makes_a_number_or_loses_what_was_paid_for(matrix: Any, fault: str, when: str) -> None:
    cell = matrix.cell(fault, when)
    for row, undisturbed in zip(cell.rows, matrix.rows, strict=True):
        assert row["prm_score"] in (None, undisturbed["prm_score"])
        assert (row["prm_score"] is None) == (row["status"] != "ok")
    failed = {name for name, row in zip(matrix.names, cell.rows, strict=True) if row["prm_score"] is None}
    # By the server's own count: each is asked about again, once, of which it never sent a whole verdict, and no other.
    assert failed == {name for name in matrix.names if not cell.delivered[name]}
    assert dict(cell.again) == dict.fromkeys(failed, 1)
    assert [row["prm_score"] for row in cell.after] == [row["prm_score"] for row in matrix.rows]
    # A call that hangs may be given up before a busy server has taken it; what a server may charge for is never left out.
    assert cell.paid == cell.billed or (cell.paid > cell.billed and fault in ("hang", "drip"))
    for variant in TABLE.COMPARED:
        after = matrix.advantages(cell.rows, variant)
        stays = after.outcome if variant == "papo" else after.outcome * 0.0
        assert all(after.total[n] == stays[n] for n, row in enumerate(cell.rows) if row["prm_score"] is None)


def test_each_fault_is_met_by_some_calls_and_at_ten_percent_not_by_all(matrix: Any) -> None:
    """Otherwise the matrix would show nothing."""
    assert matrix.cell("503", "first").requests == 2 * matrix.requests
    assert matrix.requests < matrix.cell("503", "share").requests < 1.5 * matrix.requests
    assert {"ok", "refused"} == set(matrix.cell("filtered", "share").statuses)


def test_a_lost_score_moves_a_response_to_the_side_of_its_outcome_and_never_against_it(matrix: Any) -> None:
    """Its process part had pushed it over; others of its group can change sides where their mean moves."""
    flips = [TABLE.lost_scores(correct, "papo", 1) for correct in range(2, 9)]
    assert max(own for own, _ in flips) > 0.3
    assert 0 < max(other for _, other in flips) < 0.1
    assert [TABLE.lost_scores(8, "prm", lost)[0] for lost in (1, 3)] == [0.0, 0.0]
    rows = [row | {"prm_score": None} if n % 3 else row for n, row in enumerate(matrix.rows)]
    before, after = matrix.advantages(matrix.rows, "papo"), matrix.advantages(rows, "papo")
    turned = [n for n in range(len(rows)) if n % 3 and before.total[n] * after.total[n] < 0]
    assert turned
    assert all(after.total[n] == after.outcome[n] for n in turned)


# ---- what stops the stage ----


@contextmanager
def meanwhile(change: Callable[[], None], after: int) -> Iterator[Context]:
    """A context whose stage calls `change` when so many responses are judged."""
    done = 0

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        def count(more: int) -> None:
            nonlocal done
            if done < after <= done + more:
                change()
            done += more

        yield count

    yield Context(progress=progress)


@pytest.mark.parametrize("fault", ["503", "reset", "hang"])
def test_a_server_that_fails_in_the_middle_stops_the_stage_and_the_next_try_goes_on(
    server: ChatProcess, workspace: Workspace, fault: str
) -> None:
    with meanwhile(lambda: server.set(fault=fault), after=20) as context:
        params = judging(server, model={"breaker": 5, "concurrency": 8, "timeout_s": 2.0})
        with pytest.raises(ServerDownError, match=r"the last \d+ calls failed"):
            run_stage(workspace, params, context=context)
    assert not workspace.table(0, "prm").exists()
    before = kept(workspace)
    assert 19 <= before < 63
    server.set(fault="none")
    run_stage(workspace, judging(server))
    assert {row["status"] for row in prm_rows(workspace)} == {"ok"}
    asked = delivered(server)
    assert set(asked.values()) == {1}
    assert asked.total() == 63 - before


def test_a_server_that_dies_is_replaced_by_another_at_another_address(workspace: Workspace) -> None:
    with (
        chat_process(reply=REPLY) as first,
        meanwhile(first.process.kill, after=30) as context,
        pytest.raises(ServerDownError),
    ):
        run_stage(workspace, judging(first, model={"breaker": 5}), context=context)
    before = kept(workspace)
    assert 29 <= before < 63
    with chat_process(reply=REPLY) as second:
        run_stage(workspace, judging(second))
        assert second.seen.requests.total() == 63 - before
    assert {row["status"] for row in prm_rows(workspace)} == {"ok"}


def test_too_many_failures_stop_the_stage_and_the_next_try_asks_only_about_those(
    server: ChatProcess, workspace: Workspace
) -> None:
    server.set(fault="filtered", when="share", share=0.3)
    with pytest.raises(FailedRowsError, match=r"of 64 rows failed: \d+ refused"):
        run_stage(workspace, judging(server, max_failed_share=0.2))
    assert not workspace.table(0, "prm").exists()
    missing = set(attempts(workspace)) - set(delivered(server))
    assert len(missing) > 63 * 0.2
    server.set(fault="none")
    run_stage(workspace, judging(server, max_failed_share=0.2))
    assert dict(delivered(server)) == dict.fromkeys(missing, 1)
    assert {row["status"] for row in prm_rows(workspace)} == {"ok"}


def test_the_command_says_what_stopped_it_and_goes_on(
    server: ChatProcess, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    server.set(fault="503")
    command = score_prm_command(workspace, judging(server, model={"breaker": 5}))
    assert main(command) == 1
    assert "the server of the model m is down: the last" in capsys.readouterr().err
    server.set(fault="filtered", when="share", share=0.3)
    command = score_prm_command(workspace, judging(server, max_failed_share=0.2))
    assert main(command) == 1
    assert "raise score_prm.max_failed_share" in capsys.readouterr().err
    server.set(fault="none", when="all")
    assert main(command) == 0
    assert {row["status"] for row in prm_rows(workspace)} == {"ok"}


# ---- docs ----


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_one_that_is_measured(matrix: Any) -> None:
    said = (ROOT / "docs/judge.md").read_text()
    for line in [*TABLE.table(matrix), *TABLE.table_of_lost_scores()]:
        # How many of the calls that hang a busy machine brings to the server within their time is not the same each time.
        assert line in said or line.startswith(("| hang", "| drip"))
