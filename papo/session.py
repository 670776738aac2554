"""One run of the pipeline in a workspace: who holds it, what it is a run of, its record, and where its time went."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from papo.ahead import Ahead
from papo.calibration import length_warnings
from papo.core.alarms import ALARMS, TRAINING_ALARMS, Alarm, onsets
from papo.core.costs import model_asked, totals
from papo.engines.protocols import Tracker
from papo.engines.tracking import without_password
from papo.engines.versioning import Dvc, git_commit
from papo.errors import AlarmError, PapoError, ToldToStopError
from papo.lineage.describe import data_digests, make_recorder, step_record
from papo.lineage.record import Recorder
from papo.params import Params
from papo.pipeline import Step, check_judge, check_sampler, check_trainer, final_round, lineage, make_ahead, run_step
from papo.store.faults import reached, watched
from papo.store.files import digest, read_json, replacing
from papo.store.layout import Workspace, manifest_path
from papo.store.lock import exclusive
from papo.store.manifest import Context, Manifest
from papo.watch import END, Ask, Watch

# What counts as work when the overhead of a run is stated: policy, verifier and judge.
WORK = ("warmstart", "rollout", "score_orm", "score_prm", "train", "evaluate")

# What of the judge's cost a run shows at its end, and the metrics of score_prm that it is the sum of.
JUDGING = {
    "judge_calls": ("calls",),
    "judge_tokens": ("prompt_tokens", "completion_tokens"),
    "judge_cost": ("cost",),
    "judge_saved_by_store": ("cache_saved",),
    "judge_saved_by_not_asking": ("not_asked_saved",),
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a person wants to know at the end of a run.

    `judging`: what the judge cost over all rounds, if a model was asked. `accepted`: by alarm, who let the run go on, and when.
    """

    evaluation: dict[str, Any]
    first: dict[str, float]
    last: dict[str, float]
    alarms: list[Alarm]
    seconds: dict[str, float]
    total_seconds: float
    ran: int
    skipped: int
    report: Path
    link: str | None
    dvc: str
    judging: dict[str, float] = dataclasses.field(default_factory=dict)
    accepted: dict[str, str] = dataclasses.field(default_factory=dict)
    run: str = ""
    """Its id, as `papo lineage` takes it."""

    @property
    def overhead_share(self) -> float:
        """Share of the wall time, from the start of the process, that is not policy, verifier or judge work."""
        return 1.0 - sum(self.seconds.get(stage, 0.0) for stage in WORK) / self.total_seconds


class Session:
    """Holds the workspace from `with` to the end of it; `run` does one step and what its alarms ask for, `finish` closes the record.

    Args:
        dvc: records the outputs with DVC at the end, so that `dvc status` is clean; None where the outputs are not DVC's.
        tags: further tags of the record, such as the id of the flow run.
        ask: where `on_alarm` is `pause`; None: there is nobody to ask, and the run ends.
        go_on: accept the alarm that stopped this run before.
    """

    def __init__(
        self,
        params: Params,
        workspace: Workspace,
        *,
        name: str,
        tracker: Tracker,
        context: Context,
        dvc: Dvc | None = None,
        tags: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        ask: Ask | None = None,
        go_on: bool = False,
    ) -> None:
        self.params, self.workspace = params, workspace
        self.context = dataclasses.replace(context, trace=tracker.trace, begin=self._begin)
        self._begun = context.begin
        self._on_disk: Recorder | None = None  # the record of this run in its workspace
        self._name, self._tracker, self._dvc, self._tags = name, tracker, dvc, dict(tags or {})
        self._lock = exclusive(workspace, wait_s=wait_s)
        self._held: list[tuple[Step, Manifest, list[Alarm]]] | None = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._ahead: Ahead | None = None  # of the round whose steps are being run
        self._judging: list[Manifest] = []
        self._ran = self._skipped = 0
        self._finished = False
        self.lineage = lineage(params)
        self._go_on = go_on
        self._watch = Watch(params, workspace, self.lineage, tracker=tracker, ask=ask, warn=context.warn)

    def __enter__(self) -> Session:
        if self._dvc is not None:
            self._dvc.check()
        self._lock.__enter__()
        try:
            self._watch.check(go_on=self._go_on)
            if watched():
                self.context.warn("faults are being injected into this run: it is a test")
            reached("session begins")
            check_trainer(self.params)
            check_sampler(self.params, self.workspace, self.context)
            check_judge(self.params, self.workspace, self.context)
            for line in length_warnings(self.params, self.workspace):
                self.context.warn(line)
            self._on_disk = make_recorder(
                self.params, self.workspace, lineage=self.lineage, name=self._name, tags=self._tags,
                warn=self.context.warn,
            )  # fmt: skip
            self._on_disk.begin()
            if not self._recorded.is_file() or self._recorded.read_text() != self._record_name:
                self._start_record()
        except BaseException as error:  # interrupted: a `with` whose entry fails has no exit
            if self._on_disk is not None:
                self._on_disk.end(error)
            self._lock.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_ahead()
        try:
            reached("session ends")
            if not self._finished and self._held is None:
                self._tracker.tag(END, _ending(error))
                # What is no Exception came from outside: Ctrl-C, SIGTERM, a cancelled flow run.
                stopped = not isinstance(error, Exception | None) or isinstance(error, ToldToStopError)
                self._tracker.finish("KILLED" if stopped else "FAILED", {})
        finally:
            if self._on_disk is not None:
                self._on_disk.end(error)
            self._lock.__exit__(kind, error, trace)

    def run(self, step: Step, attempt: Callable[[Step], object] | None = None) -> None:
        """Does one step, by `attempt` if it is given, which calls `step`; then what the alarms that ring ask for.

        Raises:
            AlarmError: an alarm ends the run here, as `on_alarm` says.
            PapoError: as `step`.
        """
        while True:
            try:
                (attempt or self.step)(step)
            except AlarmError:
                if not self._watch.acting:
                    raise
                self._settle()  # returns if a person says that the stage is to be started again
            else:
                self._settle()
                return

    def _settle(self) -> None:
        if self._watch.acting:
            self._close_ahead()
            if self._held is not None:
                self._start_record()
            self._watch.settle()

    def step(self, step: Step) -> Manifest:
        """Runs one step, or finds it done; its manifest goes on the record. What alarms ask for is done by `run`.

        Raises:
            AlarmError: it could not finish for what is an alarm, whose policy is not `warn`.
            PapoError: as the stage.
        """
        if step.stage == "rollout" and step.round is not None and self.params.run.overlap:
            self._close_ahead()
            self._ahead = make_ahead(self.params, self.workspace, self.context, step.round)
        try:
            manifest = run_step(step, self.params, self.workspace, self.context, self._ahead)
        except PapoError as error:
            failed = self._watch.failed(step.stage, step.round, error)
            if failed is error:
                raise
            raise failed from error
        if manifest.skipped:
            self._skipped += 1
        else:
            self._ran += 1
            self._seconds[step.stage] += manifest.seconds
            if self._held is not None:
                self._start_record()
        if self._on_disk is not None:
            self._on_disk.step(step_record(manifest, self.workspace))
        ringing = self._ringing(step, manifest)
        if step.stage == "score_prm":
            self._judging.append(manifest)
        self._record(step, manifest, ringing)
        return manifest

    def _ringing(self, step: Step, manifest: Manifest) -> list[Alarm]:
        if step.stage == "advantage":
            return self._watch.sampled(manifest)
        return self._watch.trained(manifest) if step.stage == "train" else []

    def _begin(self, stage: str) -> None:
        """A stage has something to do."""
        if self._on_disk is not None:
            self._on_disk.open()
        self._begun(stage)

    def _close_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    @property
    def rung(self) -> list[Alarm]:
        """Alarms that began to ring in this session; whoever tells people of them takes them from here."""
        return self._watch.rung

    @property
    def _recorded(self) -> Path:
        """Holds the lineage of the last run that went on the record as a whole."""
        return self.workspace.work / "recorded"

    @property
    def _record_name(self) -> str:
        """What was recorded, and where."""
        tracking = self.params.tracking
        where = without_password(tracking.uri) if tracking.uri_env is None else f"${tracking.uri_env}"
        return f"{self.lineage} {where if tracking.enabled else 'nowhere'}"

    def _start_record(self) -> None:
        """Opens the record, with the steps that had been done before: a run is recorded whole, whoever ran its steps.

        A run that finds everything done and on the record opens none.
        """
        tags = {"papo.lineage": self.lineage, "papo.workspace": str(self.workspace.root.resolve()), **self._tags}
        tags[END] = self._end("runs")
        if self._on_disk is not None:
            tags["papo.run_id"] = self._on_disk.id
        if commit := git_commit(self.workspace.root):
            tags |= {"papo.git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("+changes")}
        reached("track", detail="start")
        self._tracker.start(self._name, self.params.flat(), tags)
        held, self._held = self._held or [], None
        for step, manifest, ringing in held:
            self._record(step, manifest, ringing)

    def _record(self, step: Step, manifest: Manifest, ringing: list[Alarm]) -> None:
        if self._held is not None:
            self._held.append((step, manifest, ringing))
            return
        content = manifest.model_dump(mode="json")
        if step.stage in ("advantage", "train"):
            there = {alarm.name for alarm in ringing}
            own = [name for name in ALARMS if (name in TRAINING_ALARMS) == (step.stage == "train")]
            content["metrics"] |= {f"alarm_{name}": float(name in there) for name in own}
        if step.stage == "advantage":
            content["metrics"]["alarms"] = float(len(ringing))
        reached("track", detail=str(step))
        self._tracker.stage(step.stage, step.round, content)
        if step.stage == "prepare":
            self._tracker.artifact(self.workspace.problems / "card.json")

    def finish(self) -> Summary:
        """Records outputs with DVC and the result with the tracker."""
        evaluation = read_json(self.workspace.evaluation / "metrics.json")
        metrics = {
            f"{benchmark}/{policy}/avg_at_k": values["avg_at_k"]["value"]
            for benchmark, policies in evaluation.items()
            for policy, values in policies.items()
            if policy != "gain"
        }
        on_record = self._held is None
        if on_record:
            self._tracker.artifact(self.workspace.report)
            final = {name.split("/")[0]: value for name, value in metrics.items() if "/final/" in name}
            last = final_round(self.params, self.workspace)
            self._tracker.policy(self.workspace.policy(last), "final", final)
        reached("dvc commit")
        dvc = self._dvc.commit() if self._dvc is not None else "not recorded with DVC"
        reached("dvc committed")
        if on_record and (lock := self.workspace.root / "dvc.lock").is_file():
            self._tracker.tag("papo.dvc_lock", digest(lock))
        begun = onsets(self._watch.raised)
        lock = self.workspace.root / "dvc.lock"
        if self._on_disk is not None:
            self._on_disk.finish(
                data=data_digests(self.workspace), evaluation=evaluation, alarms=begun,
                dvc_lock=digest(lock) if self._dvc is not None and lock.is_file() else None,
            )  # fmt: skip
        if on_record:
            self._tracker.tag("papo.alarms", ", ".join(f"{a.name} from round {a.round}" for a in begun) or "none")
        summary = Summary(
            evaluation=evaluation,
            first=self._watch.history[0],
            last=self._watch.history[-1],
            alarms=begun,
            seconds=dict(self._seconds),
            total_seconds=time.time() - psutil.Process().create_time(),
            ran=self._ran,
            skipped=self._skipped,
            report=self.workspace.report / "index.html",
            link=None,
            dvc=dvc,
            judging=self._cost(),
            accepted=self._watch.decided,
            run=self._on_disk.id if self._on_disk is not None else "",
        )
        if on_record:
            judged = {
                name: sum(summary.judging.get(part, 0.0) for part in parts)
                for name, parts in JUDGING.items()
                if any(part in summary.judging for part in parts)
            }
            self._tracker.tag(END, self._end("finished"))
            reached("track", detail="finish")
            self._tracker.finish("FINISHED", metrics | judged | {"overhead_share": summary.overhead_share})
            with replacing(self._recorded) as temporary:
                temporary.write_text(self._record_name)
            summary = dataclasses.replace(summary, link=self._tracker.link())
        else:
            self._tracker.settle()
        self._watch.done()
        self._finished = True
        return summary

    def _end(self, how: str) -> str:
        """How the run ends, or that it does not yet, with the alarms that it went on in spite of."""
        return "; ".join([how, *(f"{name} {words}" for name, words in self._watch.decided.items())])

    def _cost(self) -> dict[str, float]:
        """What the judge cost, in rounds that had been done before, too; nothing if no model was asked."""
        metrics = [manifest.metrics for manifest in self._judging]
        asked = any(map(model_asked, metrics))
        return totals(metrics, [manifest.rows for manifest in self._judging]) if asked else {}


def _ending(error: BaseException | None) -> str:
    """Why a run ended before it was done. Messages of errors that are not papo's may hold anything, and are left out."""
    if isinstance(error, PapoError):
        return error.what
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"


def share_start(source: Workspace, target: Workspace) -> None:
    """Links the problem sets and the warm start of one workspace into another, so that a run beside it does not make them again.

    Nothing is assumed of them: the stages compare params, inputs, code and digests, and run where something differs. Calibrations of
    judges are linked, too, unless the other has made one later.
    """
    for output in (source.problems, source.warmstart):
        copy = target.root / output.relative_to(source.root)
        manifest = manifest_path(output)
        if copy.exists() or not manifest.is_file():
            continue
        with replacing(manifest_path(copy)) as file:  # first: it says nothing as long as the output is not there
            _link(manifest, file)
        with replacing(copy) as folder:
            shutil.copytree(output, folder, copy_function=_link)
    for made in source.calibrations.glob("*/calibration.json"):
        copy = target.root / made.relative_to(source.root)
        if not copy.exists() or copy.stat().st_mtime_ns < made.stat().st_mtime_ns:
            with replacing(copy) as file:
                _link(made, file)


def _link(source: Path | str, target: Path | str) -> None:
    # Files are only ever replaced, never written in place, so two workspaces can hold the same one.
    reached("link", Path(target))
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
