"""How often a run whose process died is started again: by the automation that flows/setup.py makes, and counted by the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run

from papo.errors import StageError

RESTARTS = 3
RESTARTING = "Restarting"
"""Name of the state from which the automation starts a crashed run again."""
WAITING = ("Late", "AwaitingConcurrencySlot")
"""Names that Prefect gives to a scheduled run that has to wait."""


def restarts() -> int:
    """How often this run has been started again by the automation since a person or a schedule started it.

    Raises:
        StageError: more often than `RESTARTS`; whatever kills it does so each time.
    """
    if not (run := flow_run.get_id()):
        return 0
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(UUID(run))
    count = count_restarts(states)
    if count > RESTARTS:
        raise StageError(
            f"the process of this run died {count} times in a row",
            where="the messages of its states, and the log of its worker",
            fix="look for what ends it, most often memory; then retry it: it goes on where it stopped",
        )
    return count


def count_restarts(states: Sequence[State]) -> int:
    """Starts from `RESTARTING` since the last one from any other scheduled state, the oldest state first."""
    count, scheduled = 0, ""
    for state in states:
        if state.type == StateType.SCHEDULED and state.name not in WAITING:
            scheduled = state.name or ""
            count = count if scheduled == RESTARTING else 0
        elif state.type == StateType.RUNNING and scheduled == RESTARTING:
            count, scheduled = count + 1, "running"
    return count
