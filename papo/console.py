"""What a person sees in a terminal: progress with rates, warnings, the table at the end. Plain lines where there is no terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from papo.core.alarms import Alarm, onsets
from papo.engines.policy import import_libraries
from papo.session import Summary
from papo.store.manifest import Context

WORDS = ("benchmark", "tier", "signal", "stage", "alarm", "evidence")  # columns that are no numbers
console = Console(stderr=True)
log = logging.getLogger("papo")


def make_context(work: Path, *, quiet: bool = False) -> Context:
    """Progress bars in a terminal, a log line a stage elsewhere."""
    progress = _bar if console.is_terminal and not quiet else _lines
    return Context(work=work, begin=import_libraries, progress=progress, warn=warn)


def warn(message: str) -> None:
    log.warning(message)


def configure_logging() -> None:
    """Structured lines on standard error: time, level, message."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="progress.data.speed")


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def _lines(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A line when the stage ends, and one every 30 seconds before that."""
    started = shown = time.monotonic()
    count = 0

    def advance(done: int) -> None:
        nonlocal count, shown
        count += done
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            log.info("%s %d/%d %.1f/s", description, count, total, count / (shown - started))

    yield advance
    seconds = time.monotonic() - started
    log.info("%s %d/%d in %.1f s (%.1f/s)", description, count, total, seconds, count / max(seconds, 1e-9))


def show_alarms(rounds: int, raised: list[Alarm]) -> None:
    """Each alarm as it began to ring, on standard output."""
    out = _output()
    rows = alarm_rows(onsets(raised))
    if rows:
        out.print(_table(rows))
    ringing = [alarm.name for alarm in raised if alarm.round == rounds - 1]
    out.print(f"{rounds} {'round' if rounds == 1 else 'rounds'}; ringing in the last one: {', '.join(ringing) or 'none'}", highlight=False)


def show_summary(summary: Summary) -> None:
    """The tables at the end of a run, on standard output."""
    out = _output()
    time_title = f"Time: {summary.ran} steps ran, {summary.skipped} had been done before"
    for title, rows in (
        ("Accuracy in percent, 95 % interval", accuracy_rows(summary)),
        ("Training", course_rows(summary)),
        ("Alarms", alarm_rows(summary.alarms)),
        (time_title, time_rows(summary)),
    ):
        if rows:
            out.print(title, style="bold", highlight=False)
            out.print(_table(rows))
    out.print(f"report   {summary.report}")
    if summary.link:
        out.print(f"MLflow   {summary.link}", soft_wrap=True)
    out.print(f"DVC      {summary.dvc}", soft_wrap=True)


def accuracy_rows(summary: Summary) -> list[dict[str, str]]:
    """One row a benchmark and one a tier of it: accuracy with interval of warm start and final policy."""
    rows = []
    for benchmark, policies in summary.evaluation.items():
        first, last, gain = policies["warmstart"], policies["final"], policies["gain"]
        rows.append(
            {
                "benchmark": benchmark,
                "tier": "all",
                f"warm start avg@{first['k']}": _interval(first["avg_at_k"]),
                f"final avg@{last['k']}": _interval(last["avg_at_k"]),
                "gain": _interval(gain, sign=True),
                "length": f"{first['length_mean']:.1f} -> {last['length_mean']:.1f}",
            }
        )
        shared = {tier: values for tier, values in last["tiers"].items() if tier in first["tiers"]}
        for tier, values in shared.items() if len(shared) > 1 else ():
            rows.append(
                {
                    "benchmark": "",
                    "tier": tier,
                    f"warm start avg@{first['k']}": _interval(first["tiers"][tier]),
                    f"final avg@{last['k']}": _interval(values),
                    "gain": f"{100 * (values['value'] - first['tiers'][tier]['value']):+.1f}",
                    "length": "",
                }
            )
    return rows


def course_rows(summary: Summary) -> list[dict[str, str]]:
    """How the signals that a person looks at first moved from the first round to the last."""
    names = {
        "accuracy": "training accuracy",
        "prm_mean_correct": "judge's score, correct responses",
        "zero_advantage_share": "zero-advantage share",
        "groups_process_active_share": "groups with active process advantage",
        "length_mean": "mean length, tokens",
        "truncated_share": "truncated share",
    }
    return [
        {"signal": text, "first round": f"{summary.first[name]:.3f}", "last round": f"{summary.last[name]:.3f}"}
        for name, text in names.items()
        if name in summary.first and name in summary.last
    ]


def alarm_rows(begun: list[Alarm]) -> list[dict[str, str]]:
    """A row each time an alarm began to ring."""
    return [{"alarm": alarm.name, "from round": str(alarm.round), "evidence": alarm.evidence} for alarm in begun]


def time_rows(summary: Summary) -> list[dict[str, str]]:
    """Seconds by stage; what is left of the wall time is overhead."""
    total = summary.total_seconds
    rows = [
        {"stage": stage, "seconds": f"{seconds:.1f}", "share": f"{seconds / total:.0%}"}
        for stage, seconds in summary.seconds.items()
    ]
    rows.append({"stage": "whole run", "seconds": f"{total:.1f}", "share": "100%"})
    if not summary.ran:
        return rows
    share = summary.overhead_share
    return [
        *rows,
        {"stage": "not policy, verifier or judge", "seconds": f"{share * total:.1f}", "share": f"{share:.1%}"},
    ]


def _output() -> Console:
    out = Console()
    if not out.is_terminal:
        out.width = 120
    return out


def _interval(estimate: dict[str, Any], *, sign: bool = False) -> str:
    """`45.1 [41.0, 49.2]`, in percent."""
    value, low, high = (None if estimate[key] is None else 100 * estimate[key] for key in ("value", "low", "high"))
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return text if low is None else f"{text} [{low:.1f}, {high:.1f}]"


def _table(rows: list[dict[str, str]]) -> Table:
    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name in WORDS else "right")
    for row in rows:
        table.add_row(*row.values())
    return table
