"""What a person sees of a run in Prefect's pages: log lines, a bar, and artifacts at the end."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from papo.console import accuracy_rows, alarm_rows, course_rows, judging_words, log, time_rows
from papo.core.costs import model_asked
from papo.errors import PapoError, printable
from papo.pipeline import ROUND_STAGES, Step
from papo.session import Summary


def _without_traceback(record: logging.LogRecord) -> bool:
    """The message of a PapoError says all there is to say; tracebacks are for the other errors."""
    if record.exc_info and isinstance(record.exc_info[1], PapoError):
        record.exc_info = None
    return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_without_traceback)


@contextmanager
def log_of_run() -> Iterator[None]:
    """papo's log lines go to the page of this flow run, too."""
    run = flow_run.get_id()

    def name_run(record: logging.LogRecord) -> bool:
        # The thread that writes the record of the run knows nothing of Prefect.
        if FlowRunContext.get() is None and TaskRunContext.get() is None:
            record.flow_run_id = run
        return True

    handler = APILogHandler()
    handler.addFilter(name_run)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _if_the_server_answers() -> Iterator[None]:
    """What only shows something waits for no server, and fails no run."""
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
            yield
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("not shown on the page of the run, as its server does not answer: %s", type(error).__name__)


def show_progress(rounds: int) -> Callable[[Step], None]:
    """A bar at 0; the function returned moves it at the end of each round."""
    bar: UUID | None = None
    with _if_the_server_answers():
        made = create_progress_artifact(0.0, key="papo-progress", description=f"0 of {rounds} rounds")
        assert isinstance(made, UUID)  # not a coroutine: a flow that is not async gets the artifact
        bar = made

    def show(step: Step) -> None:
        if step.stage == ROUND_STAGES[-1] and step.round is not None and bar is not None:
            done = step.round + 1
            with _if_the_server_answers():
                update_progress_artifact(bar, progress=100.0 * done / rounds, description=f"{done} of {rounds} rounds")

    return show


def show_result(summary: Summary) -> None:
    """The result in words and as tables."""
    tables = {
        "papo-accuracy": accuracy_rows(summary),
        "papo-training": course_rows(summary),
        "papo-alarms": alarm_rows(summary.alarms, summary.accepted),
        "papo-time": time_rows(summary),
    }
    with _if_the_server_answers():
        create_markdown_artifact(_words(summary), key="papo-result", description="the result in words")
        for key, rows in tables.items():
            if rows:
                create_table_artifact(rows, key=key)


def _words(summary: Summary) -> str:
    rows = accuracy_rows(summary)
    lines = []
    for row in (row for row in rows if row["tier"] == "all"):
        facts = (f"{name} {value}" for name, value in row.items() if name not in ("benchmark", "tier"))
        lines.append(f"- **{row['benchmark']}**: {', '.join(facts)}")
    lines += [f"- alarm from round {alarm.round}, {alarm.name}: {alarm.evidence}" for alarm in summary.alarms]
    work = f"{summary.ran} steps ran in {summary.total_seconds:.0f} s, {summary.skipped} had been done before."
    link = f"MLflow: {summary.link}" if summary.link else "Not recorded in MLflow."
    judge = [f"Judge: {judging_words(summary.judging)}"] if model_asked(summary.judging) else []
    where = [
        f"Run: `papo lineage {summary.run}`",
        *judge,
        f"Report: `{summary.report.resolve()}`",
        link,
        f"DVC: {summary.dvc}",
    ]
    return "\n\n".join(["\n".join(lines), _table(rows), work, *where])


def _table(rows: list[dict[str, str]]) -> str:
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *(list(map(_cell, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text, such as the tier of a data set, that ends neither its cell nor the table, and is no markup."""
    return html.escape(printable(text), quote=False).replace("|", "\\|").replace("\n", " ")
