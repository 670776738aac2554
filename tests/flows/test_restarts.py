"""How often a run has been started again by the server's automation."""

from contextlib import nullcontext
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import State, StateType

from flows.restarts import count_restarts, restarts
from papo.errors import StageError

KINDS = {"Pending": StateType.PENDING, "Running": StateType.RUNNING, "Crashed": StateType.CRASHED}


def states(names: str) -> list[State]:
    return [State(type=KINDS.get(name, StateType.SCHEDULED), name=name) for name in names.split()]


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("Running", 0),
        ("Scheduled Pending Running", 0),
        ("Scheduled Running Crashed Restarting Late Pending Running", 1),
        ("Scheduled Running Crashed Restarting Crashed Restarting Running", 1),
        ("Scheduled Running Crashed Restarting Running Crashed Restarting Running", 2),
        ("Scheduled Running Crashed Restarting Running Crashed AwaitingRetry Running", 0),
        ("Scheduled Running Crashed AwaitingRetry Running Crashed Restarting Running", 1),
    ],
)
def test_starts_are_counted_since_a_person_or_a_schedule_started_it(names: str, count: int) -> None:
    assert count_restarts(states(names)) == count


@pytest.mark.parametrize(("crashes", "fails"), [(3, False), (4, True)])
def test_a_run_whose_process_died_too_often_fails_with_a_message(
    crashes: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states("Scheduled Running" + " Crashed Restarting Running" * crashes)
    client = SimpleNamespace(read_flow_run_states=lambda _: seen)
    monkeypatch.setattr("flows.restarts.get_client", lambda **_: nullcontext(client))
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    with pytest.raises(StageError, match="died 4 times in a row") if fails else nullcontext():
        assert restarts() == crashes
