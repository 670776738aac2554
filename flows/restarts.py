"""How often a run whose process died is started again: by the automation that flows/setup.py makes, and counted by the run itself.

An automation waits for an event, and a server that is killed forgets events: a run that crashed while the server came back stays Crashed.
So every deployed run, and `python -m flows.setup`, look for such runs and start them again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import PrefectException
from prefect.runtime import deployment, flow_run

from papo.errors import StageError

log = logging.getLogger("papo")

RESTARTS = 3
RESTARTING = "Restarting"
"""Name of the state from which the automation starts a crashed run again."""
FORGOTTEN_S = 180.0
"""From a crash until nothing else will start the run again; the automation does so after a minute."""
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


def look_after_others() -> None:
    """At the start of a deployed run: it starts again what the server forgot; that it can't is no reason to stop."""
    if deployment.id:
        try:
            restart_forgotten()
        except (PrefectException, httpx.HTTPError):
            log.warning("could not look for runs that crashed and were forgotten", exc_info=True)


def restart_forgotten(after_s: float = FORGOTTEN_S) -> list[str]:
    """Starts deployed runs again that are Crashed and that the automation should have started again.

    Args:
        after_s: since the crash, in seconds.

    Returns:
        Their names.

    Raises:
        httpx.HTTPError, PrefectException: the server does not answer, or cannot do it.
    """
    done = []
    with get_client(sync_client=True) as client:
        for run_id, name in _crashed(client, after_s):
            again = State[None](
                type=StateType.SCHEDULED,
                name=RESTARTING,
                message="it crashed and was forgotten; it goes on where it stopped",
            )
            client.set_flow_run_state(run_id, again)
            done.append(name)
    return done


def _crashed(client: SyncPrefectClient, after_s: float) -> list[tuple[UUID, str]]:
    found = client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": ["papo"]}}),
        flow_run_filter=FlowRunFilter.model_validate(
            {"state": {"type": {"any_": ["CRASHED"]}}, "deployment_id": {"is_null_": False}}
        ),
    )
    now = datetime.now(UTC)
    return [(run.id, run.name) for run in found if run.state and (now - run.state.timestamp).total_seconds() > after_s]
