"""The runs of a plan, each in a workspace of its own: which are done, and doing the others within a budget.

Nothing is kept of a run beside its workspace: a run is done if its record there says so for the params and the code of now, but for the
code of its report. So whoever ends an ablation, by a budget or by kill -9, the next start goes on with the runs that are left, and a run
that was under way goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil
from pydantic import ValidationError

from papo.ablations.plan import Run
from papo.errors import DataError, ParamsError, StageError
from papo.lineage.record import RunRecord, read_record
from papo.params import Params
from papo.pipeline import CODE, lineage
from papo.session import share_start
from papo.store.faults import reached
from papo.store.files import read_json, write_json
from papo.store.layout import Workspace, manifest_path
from papo.store.lock import exclusive
from papo.store.manifest import code_digest

State = Literal["done", "failed", "stopped", "unfinished", "open"]
"""`stopped`: by an alarm or a person; `unfinished`: its process is gone, or at work; `open`: not begun with these params and code."""

LOG = "ablation.log"
"""Of a run, in its workspace: what `papo run` said."""
GENTLY_S = 30.0
"""From SIGTERM to SIGKILL of a run that an interruption ends."""
LOOK_S = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where the workspaces of a plan lie: `runs/ablations/<plan>`, unless named."""

    root: Path

    def workspace(self, run: Run) -> Workspace:
        return Workspace(self.root / run.name)

    def start(self, run: Run) -> Workspace:
        """Problem sets and warm start that runs share."""
        return Workspace(self.root / f"start-{run.start}")

    def ended(self, run: Run) -> Path:
        """What a run said that ended before it had a record."""
        return self.root / run.name / "ended.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def history(self) -> Path:
        """When it was worked on, and for how long."""
        return self.root / "history.json"


@dataclass(frozen=True)
class Found:
    """How a run stands: its record for the params and code of now, None if it was never begun with them."""

    run: Run
    state: State
    record: RunRecord | None = None
    why: str = ""

    @property
    def seconds(self) -> float:
        """Work of its stages; of a run that shares its start, without that."""
        return self.record.seconds if self.record is not None else 0.0

    @property
    def cost(self) -> float:
        """What its judge was paid, in the currency of score_prm.prices."""
        return cost_of(self.record) if self.record is not None else 0.0


def cost_of(record: RunRecord) -> float:
    return sum(step.metrics.get("cost", 0.0) for step in record.steps if step.stage == "score_prm" and step.made)


def look(run: Run, place: Place) -> Found:
    """How a run stands, by the records in its workspace."""
    records = []
    for path in place.workspace(run).records.glob("*.json"):
        with suppress(
            DataError
        ):  # `papo lineage` says what is wrong with it; the run is found done, or done again, by its manifests
            records.append(read_record(path))
    last = max((one for one in records if _is_of(one, run)), key=lambda record: record.last.at, default=None)
    if last is None:
        ended = place.ended(run)
        said = read_json(ended) if ended.is_file() else {}
        return Found(run, "failed", None, said["why"]) if said.get("lineage") == run.lineage else Found(run, "open")
    states: dict[str, State] = {"finished": "done", "failed": "failed", "stopped": "stopped"}
    return Found(run, states.get(last.state, "unfinished"), last, last.last.why)


def _is_of(record: RunRecord, run: Run) -> bool:
    """Whether the record is of the params and code of now; those that only wrote its report may be others."""
    if record.lineage == run.lineage:
        return True
    if any(record.code.get(stage) != code_digest(CODE[stage]) for stage in CODE if stage != "report"):
        return False
    try:
        return lineage(Params.model_validate(record.params)) == run.lineage
    except ValidationError:
        return False  # of another version


class Budget:
    """What one start of an ablation may take; without limits it allows everything.

    Args:
        minutes: of wall time from now on. A run is begun only if it should end within them, by the median of those that are done.
        money: for judges, in the currency of score_prm.prices, likewise.
    """

    def __init__(self, minutes: float | None = None, money: float | None = None) -> None:
        for name, limit in (("minutes", minutes), ("money", money)):
            if limit is not None and not 0.0 < limit < float("inf"):
                raise ParamsError(f"{name} is {limit:g}", where=f"--{name}", fix="give a number above 0, or none")
        self._minutes, self._money = minutes, money
        self._began = time.monotonic()
        self._took: list[float] = []
        self._paid: list[float] = []
        self._spent = 0.0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def known(self, found: Iterable[Found]) -> None:
        """Runs that were done before: what the others should take."""
        for one in found:
            if one.state == "done" and one.record is not None and len(one.record.starts) == 1:
                start = one.record.last
                self._took.append(_seconds_between(start.at, start.ended))
                self._paid.append(one.cost)

    def ended(self, seconds: float, cost: float) -> None:
        """A run of this start has ended."""
        self._took.append(seconds)
        self._paid.append(cost)
        self._spent += cost

    def refuses(self, under_way: int) -> str:
        """Why no further run is to be begun beside those under way; empty if one may be.

        Where nothing is known of what a run takes, one is begun.
        """
        if not self._took and not under_way:
            return ""
        if self._minutes is not None:
            expected = statistics.median(self._took) if self._took else 0.0
            if self.seconds + expected > 60.0 * self._minutes:
                left = max(60.0 * self._minutes - self.seconds, 0.0)
                return f"a run takes some {expected:.0f} s, and {left:.0f} s are left of {self._minutes:g} minutes"
        if self._money is not None:
            expected = statistics.median(self._paid) if self._paid else 0.0
            if self._spent + (under_way + 1) * expected > self._money or self._spent >= self._money:
                return f"a run costs some {expected:.2f}, and {self._spent:.2f} of {self._money:g} are spent"
        return ""


def _seconds_between(first: str, last: str | None) -> float:
    if last is None:
        return 0.0
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


@dataclass
class Outcome:
    """What one start did. `stopped`: why not everything was begun; empty if it was."""

    began: list[Run] = field(default_factory=list)
    stopped: str = ""


Begin = Callable[[Run], Callable[[], bool]]
"""Begins a run, and gives what says whether it has ended."""


def work(runs: Sequence[Run], place: Place, *, jobs: int, budget: Budget, begin: Begin, say: Say) -> Outcome:
    """Does the runs that are not done, at most `jobs` at a time, in order; what failed before comes last.

    A run that fails is told, and the others go on.
    """
    found = [look(run, place) for run in runs]
    budget.known(found)
    todo = sorted((one for one in found if one.state != "done"), key=lambda one: one.state in ("failed", "stopped"))
    say(f"{len(runs)} runs: {len(runs) - len(todo)} done, {len(todo)} to do, {jobs} at a time")
    outcome, under_way = Outcome(), dict[str, tuple[Run, Callable[[], bool], float]]()

    def collect() -> None:
        for name, (run, ended, since) in list(under_way.items()):
            if not ended():
                continue
            del under_way[name]
            now = look(run, place)
            if now.state == "open":
                write_json(
                    place.ended(run), {"lineage": run.lineage, "why": last_line(place.workspace(run).root / LOG)}
                )
                now = look(run, place)
            budget.ended(time.monotonic() - since, now.cost)
            done = len(outcome.began) - len(under_way)
            why = f": {now.why}" if now.why else ""
            say(f"{run.name} {now.state}{why} after {time.monotonic() - since:.0f} s ({done} of {len(todo)})")

    for one in todo:
        while len(under_way) >= jobs:
            collect()
            time.sleep(LOOK_S)
        if stopped := budget.refuses(len(under_way)):
            outcome.stopped = f"{len(todo) - len(outcome.began)} runs are left for the next start: {stopped}"
            say(outcome.stopped)
            break
        outcome.began.append(one.run)
        under_way[one.run.name] = (one.run, begin(one.run), time.monotonic())
    while under_way:
        collect()
        time.sleep(LOOK_S)
    return outcome


class Processes:
    """Begins each run as a process of its own, with its log in its workspace; those under way end with the `with`.

    Args:
        options: further words of `papo run`, such as --tag.
    """

    def __init__(self, place: Place, *, preset: str | None = None, options: Sequence[str] = (), say: Say) -> None:
        self._place, self._say = place, say
        self._preset = ("--preset", preset) if preset is not None else ()
        self._options = (*self._preset, *options)
        self._open: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        living = [process for process in self._open if process.poll() is None]
        for process in living:
            process.terminate()
        until = time.monotonic() + GENTLY_S
        for process in living:
            try:
                process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def begin(self, run: Run) -> Callable[[], bool]:
        """Starts a run; makes what it shares with others first, if that is not there.

        Raises:
            SetupError, StageError: that could not be made.
        """
        make_start(run, self._place, preset=self._preset, say=self._say)
        workspace = self._place.workspace(run)
        take_start(self._place.start(run), workspace)
        process = start_run(run, workspace, self._options)
        self._open.append(process)
        return lambda: process.poll() is not None


def command_of(run: Run, workspace: Workspace, options: Sequence[str] = ()) -> list[str]:
    """`papo run` as a person would type it."""
    given = [word for override in run.overrides for word in ("--set", override)]
    return ["papo", "run", "--no-dvc", "--workspace", str(workspace.root), "--wait", "60", *options, *given]


def start_run(run: Run, workspace: Workspace, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The process of a run, whose log goes on at the end of what an earlier start said."""
    reached("write", workspace.root / LOG)
    workspace.root.mkdir(parents=True, exist_ok=True)
    with (workspace.root / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command_of(run, workspace, options)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:  # pragma: no cover  # in the child, before it is Python's again
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(
            1, signal.SIGTERM
        )  # PR_SET_PDEATHSIG: a run does not outlive an ablation that was killed


def make_start(run: Run, place: Place, *, preset: Sequence[str] = (), say: Say) -> None:
    """Problem sets and warm start of a run, for all that have the same; taken over from another plan's, the checkout's or another start.

    Raises:
        StageError: a stage failed; what it said is in the log.
    """
    start = place.start(run)
    made, code = start.root / "made.json", {stage: code_digest(CODE[stage]) for stage in ("prepare", "warmstart")}
    reached("write", start.root / LOG)
    start.root.mkdir(parents=True, exist_ok=True)
    with exclusive(start, wait_s=3600.0):
        if made.is_file() and read_json(made) == code:
            return
        same, others = place.root.parent.glob(f"*/{start.root.name}"), place.root.glob("start-*")
        for other in map(Workspace, (*sorted(same), Path(), *sorted(others))):
            if other.root.resolve() != start.root.resolve():
                share_start(other, start)
    for stage in code:
        say(f"{stage}, which {run.name} and others share, in {start.root}")
        given = [word for override in run.overrides for word in ("--set", override)]
        with (start.root / LOG).open("ab") as log:
            done = subprocess.run(
                [sys.executable, "-m", "papo", stage, "--workspace", str(start.root), "--wait", "60", *preset, *given],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False, preexec_fn=_end_with_parent,
            )  # fmt: skip
        if done.returncode:
            raise StageError(
                f"{stage}, which runs share, ended with {done.returncode}: {last_line(start.root / LOG)}",
                where=str(start.root / LOG),
                fix="mend what it says, then start the ablation again",
            )
    write_json(made, code)


def take_start(source: Workspace, target: Workspace) -> None:
    """As `share_start`, and what the target has of an earlier start that is another one now makes room for it."""
    for output in (source.problems, source.warmstart):
        copy = target.root / output.relative_to(source.root)
        mine, other = manifest_path(copy), manifest_path(output)
        if copy.exists() and not (mine.is_file() and mine.read_bytes() == other.read_bytes()):
            reached("remove", copy)
            mine.unlink(missing_ok=True)
            shutil.rmtree(copy)
    share_start(source, target)


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_bytes()[-4000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def cores() -> int:
    """Runs at a time, unless a person says otherwise: one a core, as each has one thread."""
    return max(len(psutil.Process().cpu_affinity() or [0]), 1)
