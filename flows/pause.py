"""An alarm whose policy is `pause`: the flow run waits on its page until a person says "go on" or "stop here".

A person answers on the page in Prefect's UI, or by

    python -m flows.pause FLOW_RUN_ID "go on" --note "the judge had been restarted"
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout, NotPausedError, ObjectNotFound
from prefect.flow_runs import pause_flow_run, resume_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Failed, Running

from papo.console import ask_in_terminal
from papo.errors import AlarmError, ToldToStopError
from papo.watch import Answer, Ask, Question

POLL_S = 10
"""Seconds between looks at whether a paused run has been answered."""


class Decision(RunInput):
    """The form on the page. `answer` has no default: a run that is resumed without one stays paused."""

    answer: Literal["go on", "stop here"]
    note: str = ""


def ask_on_page(wait_hours: float) -> Ask:
    """Asks on the page of this flow run; in the terminal if Prefect's server ends with this process, and its pages with it.

    Args:
        wait_hours: after so long nobody has answered.
    """

    def ask(question: Question) -> Answer | None:
        if not PREFECT_API_URL.value():
            return ask_in_terminal(question)
        run = UUID(str(flow_run.get_id()))
        form = Decision.with_initial_data(description=words(question))
        try:
            decision = pause_flow_run(form, timeout=round(3600 * wait_hours), poll_interval=POLL_S)
        except FlowPauseTimeout:
            with get_client(sync_client=True) as client:
                # Prefect lets a pause that has timed out end only as a failure without a reason.
                client.set_flow_run_state(run, Running(message="nobody answered in time"), force=True)
            return None
        return Answer(decision.answer == "go on", f"Prefect, flow run {run}", decision.note)

    return ask


def words(question: Question) -> str:
    """The evidence, in Markdown."""
    good = question.good
    lines = [f"**{alarm.name}** rings in round {alarm.round}: {alarm.evidence}" for alarm in question.alarms]
    lines += [
        f"The last good policy is `{good.policy}` in `{good.folder}`: {good.why}.",
        f"**go on** {question.meaning}.",
        "**stop here** ends the run; everything done is kept, and the same run with `go_on` goes on from there.",
    ]
    return "\n\n".join(lines)


def ended(error: AlarmError) -> Any:
    """The state of a flow run that an alarm ended: cancelled if a person said so, else failed, so that what watches for failures sees it.

    A flow returns it instead of its result, and Prefect raises the error for whoever called the flow.
    """
    if isinstance(error, ToldToStopError):
        return Cancelled(name="Stopped by a person", message=str(error), data=error)
    return Failed(name="Stopped by alarm", message=str(error), data=error)


def main() -> int:
    """Answers for a paused flow run.

    Returns:
        0 it goes on or stops; 2 there is no such flow run, or it does not wait for an answer.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flows.pause", description="Answers a flow run that an alarm paused."
    )
    parser.add_argument("run", type=UUID, metavar="FLOW_RUN_ID")
    parser.add_argument("answer", choices=["go on", "stop here"])
    parser.add_argument("--note", default="", help="goes on the record")
    options = parser.parse_args()
    try:
        resume_flow_run(options.run, run_input={"answer": options.answer, "note": options.note})
    except (ObjectNotFound, NotPausedError, FlowPauseTimeout) as error:
        sys.stderr.write(f"papo: flow run {options.run} does not wait for an answer: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
