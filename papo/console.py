"""What a person sees in a terminal: progress with rates, warnings, the table at the end. Plain lines where there is no terminal."""

from __future__ import annotations

import logging
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from papo.calibration import MEASURES
from papo.core.alarms import ALARMS, Alarm, onsets
from papo.core.cost_model import Line
from papo.core.costs import money
from papo.decisions import Decisions, user
from papo.engines.policy import import_libraries
from papo.errors import printable
from papo.inspection import Explained, Rederivation, Response
from papo.params import OnAlarmParams
from papo.session import Summary
from papo.store.manifest import Context
from papo.store.verdicts import Spent, StoreStats, Verified
from papo.track import Delivered, Waiting
from papo.watch import Answer, Question

# Columns that are no numbers.
WORDS = (
    "measure",
    "meaning",
    "kind",
    "labelled",
    "policy",
    "benchmark",
    "tier",
    "signal",
    "stage",
    "alarm",
    "evidence",
    "done",
    "stored",
    "variant",
    "model",
    "rubric",
    "run",
    "claim",
    "says",
    "arm",
    "against",
    "verdict",
)
MEANING = {
    "agreement": "score and label are of one level",
    "kappa": "the same, over chance; 1: always, 0: as by chance",
    "kappa_linear": "the same, two levels apart being twice as wrong as one",
    "auc": "chance that the better of two responses scores higher",
    "length_bias": "correlation of score and length among equally good responses",
    "length_effect": "what they gain by one standard deviation of length",
    "answer_bias": "correlation of score and correct answer among equally good responses",
}
console = Console(stderr=True)
log = logging.getLogger("papo")


def make_context(work: Path, *, quiet: bool = False) -> Context:
    """Progress bars in a terminal, a log line a stage elsewhere."""
    progress = _bar if console.is_terminal and not quiet else _lines
    return Context(work=work, begin=import_libraries, progress=progress, warn=warn, say=log.info)


def warn(message: str) -> None:
    log.warning(message)


def configure_logging() -> None:
    """Structured lines on standard error: time, level, message."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class _Plain(logging.Formatter):
    """Whatever a line quotes, it steers no terminal and begins no line as this log does."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n  ")


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


def show_stored(stats: StoreStats, spent: Sequence[tuple[str, str, Spent]]) -> None:
    """What the store of verdicts holds, and what each run paid, on standard output."""
    out = _output()
    if stats.by:
        out.print(_table(stored_rows(stats)))
    where = f"{stats.path}: {stats.size_bytes / 1e6:,.1f} MB, {sum(one.verdicts for one in stats.by):,} verdicts"
    out.print(f"{where}, {stats.claims:,} being asked for", markup=False, highlight=False, soft_wrap=True)
    if spent:
        out.print("Paid calls by run", highlight=False)
        out.print(_table(spent_rows(spent)))


def stored_rows(stats: StoreStats) -> list[dict[str, str]]:
    return [
        {
            "model": one.model,
            "rubric": one.rubric,
            "verdicts": f"{one.verdicts:,}",
            "tokens in": f"{one.prompt_tokens:,}",
            "tokens out": f"{one.completion_tokens:,}",
            "s each": f"{one.seconds / one.verdicts:.2f}",
            "oldest": _day(one.oldest),
            "newest": _day(one.newest),
        }
        for one in stats.by
    ]


def spent_rows(spent: Sequence[tuple[str, str, Spent]]) -> list[dict[str, str]]:
    return [
        {
            "run": _middle_cut(run),
            "variant": variant,
            "calls": f"{one.calls:,}",
            "failed": f"{one.failed:,}",
            "tokens in": f"{one.prompt_tokens:,}",
            "tokens out": f"{one.completion_tokens:,}",
            "cost": "" if one.cost is None else money(one.cost),
        }
        for run, variant, one in spent
    ]


def _middle_cut(name: str) -> str:
    """Names of runs that begin, or end, alike stay apart."""
    return name if len(name) <= 24 else f"{name[:12]}…{name[-10:]}"


def show_verified(verified: Verified, store: Path) -> int:
    """Every damage, a line each, on standard output; the exit code."""
    out = _output()
    for line in verified.damage:
        out.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    found = f"damages: {len(verified.damage)}" if verified.damage else "all is whole"
    keys = f"{verified.recomputed:,} keys computed anew, {verified.calls:,} paid calls"
    out.print(
        f"{store}: {verified.verdicts:,} verdicts, {keys}, {found}", markup=False, highlight=False, soft_wrap=True
    )
    return 1 if verified.damage else 0


def show_alarms(rounds: int, raised: list[Alarm], on_alarm: OnAlarmParams, decisions: Decisions) -> None:
    """Each alarm as it began to ring, what is done about it, and what was decided, on standard output."""
    out = _output()
    rows = alarm_rows(onsets(raised), decisions.words)
    for row in rows:
        row["policy"] = on_alarm.of(row["alarm"])
    if rows:
        out.print(_table(rows))
    ringing = [alarm.name for alarm in raised if alarm.round == rounds - 1]
    out.print(
        f"{rounds} {'round' if rounds == 1 else 'rounds'}; ringing in the last one: {', '.join(ringing) or 'none'}",
        highlight=False,
    )
    policies: dict[str, list[str]] = {}
    for name in ALARMS:
        policies.setdefault(on_alarm.of(name), []).append(name)
    for policy, alarms in policies.items():
        out.print(f"{policy}: {', '.join(alarms)}", highlight=False, soft_wrap=True)
    if (stopped := decisions.stopped) is not None:
        names = ", ".join(one.name for one in stopped.alarms)
        good = f"the last good policy is {stopped.good.policy}: {stopped.good.why}"
        out.print(f"stopped at {stopped.at} by {names}; {good}", highlight=False, markup=False, soft_wrap=True)


def ask_in_terminal(question: Question) -> Answer | None:
    """Asks whether the run goes on, with the evidence; None where there is no terminal to answer in."""
    if not sys.stdin.isatty():
        return None
    lines = [f"alarm {alarm.name} in round {alarm.round}: {alarm.evidence}" for alarm in question.alarms]
    good = question.good
    lines += [f"the last good policy is {good.policy} in {good.folder}: {good.why}", f"going on {question.meaning}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    while True:
        console.print("go on (y) or stop here (n)? ", end="", highlight=False, markup=False)
        line = sys.stdin.readline()
        if not line:
            return None
        if (given := line.strip().lower()) in ("y", "yes", "go on", "n", "no", "stop here"):
            return Answer(given in ("y", "yes", "go on"), user())


def show_waiting(waiting: Sequence[Waiting]) -> None:
    """Runs of which some is not in MLflow, on standard output."""
    out = _output()
    for one in waiting:
        refused = f", {one.refused} of them refused" if one.refused else ""
        out.print(
            f"{one.workspace}: {one.run} ({one.status}): {one.records} records wait for {one.target}, experiment {one.experiment}"
            f"{refused}; {one.megabytes:,.1f} MB, {one.journal}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    total = sum(one.records for one in waiting)
    end = (
        f"{total} records of {len(waiting)} runs wait; `papo track sync` delivers them" if waiting else "nothing waits"
    )
    out.print(end, highlight=False, soft_wrap=True)


def show_delivered(results: Sequence[Delivered]) -> None:
    """What became of each run that had waited, on standard output."""
    out = _output()
    for one in results:
        waits = f", {one.waiting} wait: {one.why}" if one.why else ""
        line = f"{one.workspace}: {one.run}: {one.delivered} records delivered to {one.target}{waits}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if not results:
        out.print("nothing waits", highlight=False)


def show_rederivation(rederivation: Rederivation) -> None:
    """A row a round and variant, with the remarks below, on standard output."""
    out = _output()
    table = _fitted(out, rederivation_rows(rederivation))
    out.print("Advantages from the stored scores, against those stored", style="bold", highlight=False)
    out.print(table)
    sign = "sign: of how many responses it changed; flipped, silenced to 0 or woken from 0. rank: of how many within the group"
    _section(out, "", [sign, *rederivation.notes])


def show_explained(explained: Explained, *, text: bool = False) -> None:
    """One problem in one round, on standard output; `text` adds the responses themselves."""
    out = _output()
    table = _fitted(out, response_rows(explained.responses))
    others = ", ".join(map(str, explained.other_rounds))
    also = f" (also in round {others})" if others else ""
    _section(out, f"Problem {explained.problem_id}, round {explained.round}{also}", [explained.prompt.strip()])
    _section(out, "Gold answer", [explained.answer])
    out.print(f"Responses; {explained.settings.words()}", style="bold", highlight=False, markup=False)
    out.print(table)
    _section(out, "", explained_notes(explained))
    _section(out, "Why", explained.why.group)
    _section(out, "", _numbered(explained.responses, explained.why.responses))
    if disputed := disputed_lines(explained.responses):
        _section(out, "Second opinion", disputed)
    _section(out, f"What the judge said ({explained.judge})", reason_lines(explained.responses))
    if text:
        for response in explained.responses:
            _section(out, f"Response {response.sample_index}", [response.text.rstrip()])


def show_summary(summary: Summary) -> None:
    """The tables at the end of a run, on standard output."""
    out = _output()
    time_title = f"Time: {summary.ran} steps ran, {summary.skipped} had been done before"
    for title, rows in (
        ("Accuracy in percent, 95 % interval", accuracy_rows(summary)),
        ("Training", course_rows(summary)),
        ("Alarms", alarm_rows(summary.alarms, summary.accepted)),
        (time_title, time_rows(summary)),
    ):
        if rows:
            out.print(title, style="bold", highlight=False)
            out.print(_table(rows))
    if summary.judging:
        out.print(f"judge    {judging_words(summary.judging)}", highlight=False, soft_wrap=True)
    out.print(f"report   {summary.report}")
    if summary.link:
        out.print(f"MLflow   {summary.link}", soft_wrap=True)
    out.print(f"DVC      {summary.dvc}", soft_wrap=True)


def show_tables(tables: Sequence[tuple[str, list[dict[str, str]]]], lines: Sequence[str]) -> None:
    """Tables with their titles on standard output, those with rows, and lines below them."""
    out = _output()
    for title, rows in tables:
        if rows:
            out.print(title, style="bold", highlight=False)
            out.print(_table(rows))
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)


def show_costs(lines: Sequence[Line]) -> None:
    """A table on standard output; what was not measured is said to be unknown."""
    _output().print(_table(cost_rows(lines)))


def cost_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """One row an amount: a round, the run, and from what it follows."""
    return [
        {"stage": line.what, "a round": _amount(line.round, line.unit), "the run": _amount(line.run, line.unit), "meaning": line.by}
        for line in lines
    ]  # fmt: skip


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        power = min(4, int(math.log(value, 1000))) if value >= 1 else 0
        return f"{value / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
    return money(value) if unit == "money" else f"{value:,.{1 if value < 100 else 0}f} {unit}"


def show_calibration(folder: Path, found: dict[str, Any]) -> None:
    """How far a judge can be trusted, on standard output."""
    out = _output()
    title = f"{found['judge']} ({found['rubric']}) on {found['data']}: {found['scored']} of {found['responses']} responses scored"
    out.print(title, style="bold", highlight=False, markup=False)
    for rows in (measure_rows(found), confusion_rows(found), kind_rows(found)) if found["scored"] else ():
        if rows:
            out.print(_fitted(out, rows))
    _section(out, "", found["notes"])
    out.print(f"rows and measures: {folder}", highlight=False, soft_wrap=True)


def measure_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """A row a measure, with its interval and what it says; `-` where the data could not give it."""
    rows = [
        {
            "measure": text,
            "value": _two(found[name]["value"]),
            "95 % interval": _ends(found[name]),
            "meaning": MEANING[name],
        }
        for name, text in MEASURES.items()
    ]
    votes, errors = found["votes"], found["first_error"]
    further = {
        "agreement between votes": (votes["agreement"], f"equal pairs of votes, on {votes['responses']} responses with several"),
        "alpha of the votes": (votes["alpha"], "Krippendorff, votes as numbers; 1: always the same"),
        "first wrong step found": (errors["found"], f"where one is labelled; {errors['compared']} responses compared in all"),
        "no wrong step, and none named": (errors["none_right"], "where none is labelled"),
        **{f"no score, {status}": (share, "share of all responses") for status, share in found["statuses"].items() if status != "ok"},
    }  # fmt: skip
    return rows + [
        {"measure": name, "value": _two(value), "95 % interval": "", "meaning": meaning}
        for name, (value, meaning) in further.items()
    ]


def confusion_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """A row a label: how many responses got which score, as the nearest level."""
    levels = [f"{level:g}" for level in found["levels"]]
    return [
        {"labelled": level} | {f"scored {name}": str(count) for name, count in zip(levels, counts, strict=True)}
        for level, counts in zip(levels, found["confusion"], strict=True)
    ]


def kind_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """A row a kind of responses, if there are several."""
    if len(found["kinds"]) < 2:
        return []
    return [
        {
            "kind": _shortened(row["kind"], 40),
            "responses": str(row["responses"]),
            "scored": str(row["scored"]),
            "mean label": _two(row["label"]),
            "mean score": _two(row["score"]),
            "agreement": _two(row["agreement"]),
        }
        for row in found["kinds"]
    ]


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ends(measured: dict[str, Any]) -> str:
    return "" if measured["low"] is None else f"{measured['low']:.2f} to {measured['high']:.2f}"


def show_comparison(folder: Path, evaluation: dict[str, Any]) -> None:
    """Policies named by hand on each benchmark, and the paired difference, on standard output."""
    out = _output()
    out.print("Accuracy in percent, with its interval", style="bold", highlight=False)
    out.print(_table(comparison_rows(evaluation)))
    out.print(f"samples and metrics: {folder}", highlight=False, soft_wrap=True)


def comparison_rows(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """A row a benchmark and policy, and one for the paired difference."""
    rows = []
    for benchmark, policies in evaluation.items():
        for name, found in policies.items():
            if name == "gain":
                continue
            rows.append(
                {
                    "benchmark": benchmark,
                    "policy": name,
                    "avg@k": _interval(found["avg_at_k"]),
                    "pass@k": _interval(found["pass_at_k"]),
                    "maj@k": _interval(found["maj_at_k"]),
                    "k": str(found["k"]),
                    "length": f"{found['length_mean']:.1f}",
                    "truncated": f"{found['truncated_share']:.1%}",
                    "no answer": f"{found['no_answer_share']:.1%}",
                    "timeout": f"{found['timeout_share']:.1%}",
                }
            )
        if "gain" in policies:
            gain = policies["gain"]
            column = gain["metric"].replace("_at_", "@")
            rows.append({"benchmark": benchmark, "policy": "difference", column: _interval(gain, sign=True)})
    return rows


def accuracy_rows(summary: Summary) -> list[dict[str, str]]:
    """One row a benchmark and one a tier of it: accuracy with interval of warm start and final policy."""
    rows = []
    for benchmark, policies in summary.evaluation.items():
        first, last, gain = policies["warmstart"], policies["final"], policies["gain"]
        other = "" if gain["metric"] == "avg_at_k" else f" in {gain['metric'].replace('_at_', '@')}"
        rows.append(
            {
                "benchmark": benchmark,
                "tier": "all",
                f"warm start avg@{first['k']}": _interval(first["avg_at_k"]),
                f"final avg@{last['k']}": _interval(last["avg_at_k"]),
                "gain": _interval(gain, sign=True) + other,
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


def alarm_rows(begun: list[Alarm], accepted: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """A row each time an alarm began to ring, with who let the run go on, if anybody had to."""
    rows = [{"alarm": alarm.name, "from round": str(alarm.round), "evidence": alarm.evidence} for alarm in begun]
    if accepted:
        rows = [row | {"done": accepted.get(row["alarm"], "")} for row in rows]
    return rows


def judging_words(judging: dict[str, float]) -> str:
    """What a model that judges cost over a run, and what was saved, in money where it has a price."""
    calls = f"{judging.get('calls', 0):,.0f} calls"
    if failed := judging.get("calls_failed"):
        calls += f", {failed:,.0f} without a verdict"
    tokens = judging.get("prompt_tokens", 0) + judging.get("completion_tokens", 0)
    spent = [calls, f"{tokens:,.0f} tokens", *([f"cost {money(judging['cost'])}"] if "cost" in judging else [])]
    saved = []
    for name, way in (("cache", "by the store"), ("not_asked", "by not asking")):
        if f"{name}_saved" in judging:
            saved.append(f"{money(judging[f'{name}_saved'])} {way}")
        elif f"{name}_tokens" in judging:
            saved.append(f"{judging[f'{name}_tokens']:,.0f} tokens {way}")
    return ", ".join(spent) + (f"; saved {', '.join(saved)}" if saved else "")


def rederivation_rows(rederivation: Rederivation) -> list[dict[str, str]]:
    """A row a round and variant: what would change, in numbers of responses."""
    return [
        {
            "round": str(row.round),
            "stored": row.stored,
            "variant": row.variant,
            "responses": str(row.changes.responses),
            "sign": str(row.changes.sign_changed),
            "flipped": str(row.changes.flipped),
            "silenced": str(row.changes.silenced),
            "woken": str(row.changes.woken),
            "rank": str(row.changes.rank_changed),
            "A = 0": f"{row.zero_share:.3f}",
            "inversions": str(row.inversions),
            "missing": str(row.missing),
        }
        for row in rederivation.rows
    ]


def response_rows(responses: list[Response]) -> list[dict[str, str]]:
    """A row a response: its scores, or why there is none; its advantages; what others would have given it."""
    return [
        {
            "sample": str(response.sample_index),
            "outcome": _score(response.orm, response.orm_status),
            "extracted": _shortened(response.extracted or "-"),
            "process": _score(response.prm, response.prm_status),
            "tokens": str(response.tokens),
            "A_out": _signed(response.outcome),
            "A_proc": _signed(response.process),
            "A": _signed(response.advantage),
            **{f"as {name}": _signed(value) for name, value in response.peers.items()},
        }
        for response in responses
    ]


def explained_notes(explained: Explained) -> list[str]:
    """How to read the table."""
    notes = ["as ...: what A would be; GDPO is standardised over the round, by TRL over responses, by verl over tokens"]
    if any(math.isnan(response.prm) for response in explained.responses):
        notes.append(
            "no process score: missing to papo and TRL, 0 to verl; to mult and fullnorm 0 if the response is wrong"
        )
    if explained.settings.overlong is not None:
        notes.append("the penalty for length is in orm, mult and fullnorm, too, and in neither GDPO")
    if explained.token_level:
        notes.append("advantages are by token: A_out, A_proc and A are means over the tokens of a response")
    return notes


def reason_lines(responses: list[Response]) -> list[str]:
    """What the judge said about each response, and which ones it was not asked about."""
    asked = [response for response in responses if response.prm_status != "not_asked"]
    lines = _numbered(asked, [response.reason.strip() or "no reason given" for response in asked])
    unasked = [str(response.sample_index) for response in responses if response.prm_status == "not_asked"]
    return [*lines, f"not asked about {', '.join(unasked)}"] if unasked else lines


def disputed_lines(responses: list[Response]) -> list[str]:
    """Where the second opinion is not that of the verifier."""
    disputed = [response for response in responses if response.disputed]
    said = "the model calls {} equivalent to the gold answer; the outcome stays the verifier's: wrong"
    return _numbered(disputed, [said.format(_shortened(response.extracted or "-")) for response in disputed])


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


def _fitted(out: Console, rows: list[dict[str, str]]) -> Table:
    """A table of text that is no markup; where there is no terminal, the output becomes as wide as it needs."""
    table = _table(rows)
    if not out.is_terminal:
        out.width = max(out.width, out.measure(table, options=out.options.update(width=1000)).maximum)
    return table


def _section(out: Console, title: str, paragraphs: list[str]) -> None:
    """A title and paragraphs below it, wrapped to the console, the lines of each below its first set in."""
    if title:
        out.print(title, style="bold", highlight=False, markup=False)
    for paragraph in paragraphs:
        for line in printable(paragraph).splitlines() or [""]:
            wrapped = textwrap.fill(line, out.width, initial_indent="  ", subsequent_indent="      ")
            out.print(wrapped, highlight=False, markup=False)


def _numbered(responses: list[Response], lines: list[str]) -> list[str]:
    return [f"{response.sample_index:>2}  {line}" for response, line in zip(responses, lines, strict=True)]


def _shortened(text: str, limit: int = 24) -> str:
    plain = printable(text).replace("\n", " ")
    return plain if len(plain) <= limit else f"{plain[: limit - 3]}..."


def _score(value: float, status: str) -> str:
    return status if math.isnan(value) else f"{value:.3g}"


def _day(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # of a damaged row
        return "?"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) > 1e-9 else "0"


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
        table.add_row(*(escape(printable(value)) for value in row.values()))
    return table
