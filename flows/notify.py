"""Messages to people: a run failed, crashed or was cancelled, or an alarm rang. Never a reason for a run to stop.

Where they go stands in the environment variable PAPO_NOTIFY, never in the params:

- `slack-webhook/lab`: a notification block of Prefect, by type and name,
- `secret/lab-webhook`: a Secret block of Prefect that holds the address of a webhook,
- `https://...`: the address itself; what is posted is `{"text": message}`.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

import httpx
from prefect import runtime
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.utilities.urls import url_for

from papo.core.alarms import Alarm
from papo.errors import SetupError

TARGET = "PAPO_NOTIFY"
PATIENCE_S = 15.0
TO_DO = {
    "CRASHED": "nothing, if the server has papo's automations: it is started again and goes on where it stopped; else retry it there",
    "CANCELLED": "nothing; a retry goes on where it stopped",
    "FAILED": "what the message says; then retry it there: it goes on where it stopped",
}

log = logging.getLogger("papo")


def target_problem() -> str | None:
    """What is wrong with PAPO_NOTIFY, without sending anything; None: nothing, also if it is not set."""
    try:
        if os.environ.get(TARGET):
            _sender(os.environ[TARGET])
    except Exception as error:  # a block may need packages that are not there, and its server may be down
        return f"{type(error).__name__}: {error}"
    return None


def send(subject: str, *facts: str) -> bool:
    """Sends one message; whether it was. What keeps it from going is a line in the log, without the address."""
    if not (target := os.environ.get(TARGET)):
        return False
    try:
        _sender(target)(f"papo: {subject}", "\n".join(fact for fact in facts if fact))
    except Exception as error:  # whatever a block, a network or its server brings; a run must not end by it
        shown = type(error).__name__ if "://" in target or target.startswith("secret/") else f"{error!r}"
        log.warning("no message could be sent as %s says: %s", TARGET, shown)
        return False
    return True


def on_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """The hook for runs that failed, crashed or were cancelled; a worker calls it with these names."""
    kind = state.type.value
    word = {"FAILED": "failed", "CRASHED": "crashed"}.get(kind, "was cancelled")
    todo = TO_DO.get(kind, TO_DO["CANCELLED"])
    what = state.message or ""
    send(f"{flow_run.name} {word}", what, "" if "to do:" in what else f"to do: {todo}", link(flow_run.id))


def on_restart(count: int) -> None:
    """The run of this process has been started again, for the `count`-th time; 0 says nothing."""
    if count:
        send(f"{runtime.flow_run.get_name()} crashed, was started again and goes on where it stopped", _here())


def on_alarms(rung: list[Alarm]) -> None:
    """Tells of the alarms that have begun to ring in the run of this process, and forgets them."""
    while rung:
        alarm = rung.pop(0)
        what = f"{alarm.name} from round {alarm.round}: {alarm.evidence}"
        send(f"alarm in {runtime.flow_run.get_name()}", what, "to do: look at the report, or `papo alarms`", _here())


def link(run_id: object) -> str:
    """The page of a run; empty if the server has none."""
    return url_for("flow-run", str(run_id)) or ""


def _here() -> str:
    return link(runtime.flow_run.get_id())


def _sender(target: str) -> Callable[[str, str], None]:
    """
    Raises:
        SetupError: what PAPO_NOTIFY holds names nothing that messages can go to.
        Exception: whatever Prefect has to say on a block that cannot be loaded.
    """
    if target.startswith(("http://", "https://")):
        return _webhook(target)
    kind, slash, name = target.partition("/")
    if not (kind and slash and name):
        fix = (
            "name a notification block (slack-webhook/lab), a Secret block (secret/lab-webhook), or an https:// address"
        )
        raise SetupError(f"{TARGET} names nothing that messages can go to", where=f"the environment: {TARGET}", fix=fix)
    block: Any = Secret.load(name) if kind == "secret" else Block.load(target)
    if isinstance(block, Secret):
        return _webhook(str(block.get()))
    if not isinstance(block, NotificationBlock):
        raise SetupError(
            f"the block {target} sends no messages", where=f"the environment: {TARGET}", fix="name another"
        )

    def notify(subject: str, body: str) -> None:
        sent = block.notify(body, subject=subject)
        if inspect.iscoroutine(sent):
            run_coro_as_sync(sent)

    return notify


def _webhook(url: str) -> Callable[[str, str], None]:
    def post(subject: str, body: str) -> None:
        httpx.post(url, json={"text": f"{subject}\n{body}"}, timeout=PATIENCE_S).raise_for_status()

    return post
