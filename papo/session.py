"""One run of the pipeline in a workspace: who holds it, what it is a run of, its record, and where its time went."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from papo.ahead import Ahead
from papo.calibration import length_warnings
from papo.core.alarms import ALARMS, Alarm, Limits, alarms, onsets
from papo.core.costs import model_asked, totals
from papo.engines.protocols import Tracker
from papo.engines.versioning import Dvc, git_commit
from papo.params import Params
from papo.pipeline import Step, check_judge, check_sampler, check_trainer, final_round, lineage, make_ahead, run_step
from papo.store.files import digest, read_json
from papo.store.layout import Workspace, manifest_path
from papo.store.lock import exclusive
from papo.store.manifest import Context, Manifest

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
    """What a person wants to know at the end of a run; `judging`: what the judge cost over all rounds, if a model was asked."""

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

    @property
    def overhead_share(self) -> float:
        """Share of the wall time, from the start of the process, that is not policy, verifier or judge work."""
        return 1.0 - sum(self.seconds.get(stage, 0.0) for stage in WORK) / self.total_seconds


class Session:
    """Holds the workspace from `with` to the end of it; `step` runs one step, `finish` closes the record.

    Args:
        dvc: records the outputs with DVC at the end, so that `dvc status` is clean; None where the outputs are not DVC's.
        tags: further tags of the record, such as the id of the flow run.
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
    ) -> None:
        self.params, self.workspace = params, workspace
        self.context = dataclasses.replace(context, trace=tracker.trace)
        self._name, self._tracker, self._dvc, self._tags = name, tracker, dvc, dict(tags or {})
        self._lock = exclusive(workspace, wait_s=wait_s)
        self._held: list[tuple[Step, Manifest]] | None = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._ahead: Ahead | None = None  # of the round whose steps are being run
        self._history: list[dict[str, float]] = []
        self._judging: list[Manifest] = []
        self._alarms: list[Alarm] = []
        self._ran = self._skipped = 0
        self._finished = False
        self.lineage = lineage(params)

    def __enter__(self) -> Session:
        if self._dvc is not None:
            self._dvc.check()
        self._lock.__enter__()
        try:
            check_trainer(self.params)
            check_sampler(self.params, self.workspace, self.context)
            check_judge(self.params, self.workspace, self.context)
            for line in length_warnings(self.params, self.workspace):
                self.context.warn(line)
            if not self._recorded.is_file() or self._recorded.read_text() != self._record_name:
                self._start_record()
        except BaseException:  # interrupted: a `with` whose entry fails has no exit
            self._lock.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_ahead()
        try:
            if not self._finished and self._held is None:
                self._tracker.finish("KILLED" if kind is KeyboardInterrupt else "FAILED", {})
        finally:
            self._lock.__exit__(kind, error, trace)

    def step(self, step: Step) -> Manifest:
        """Runs one step, or finds it done; its manifest goes on the record."""
        if step.stage == "rollout" and step.round is not None and self.params.run.overlap:
            self._close_ahead()
            self._ahead = make_ahead(self.params, self.workspace, self.context, step.round)
        manifest = run_step(step, self.params, self.workspace, self.context, self._ahead)
        if manifest.skipped:
            self._skipped += 1
        else:
            self._ran += 1
            self._seconds[step.stage] += manifest.seconds
            if self._held is not None:
                self._start_record()
        if step.stage == "advantage":
            self._watch(manifest)
        if step.stage == "score_prm":
            self._judging.append(manifest)
        self._record(step, manifest)
        return manifest

    def _close_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _watch(self, manifest: Manifest) -> None:
        """Looks at the signals of the rounds so far; an alarm is said when it begins to ring."""
        self._history.append(manifest.metrics)
        self._alarms += alarms(self._history, Limits(**self.params.alarms.model_dump()))
        for alarm in onsets(self._alarms) if not manifest.skipped else ():
            if alarm.round == len(self._history) - 1:
                self.context.warn(f"alarm in round {alarm.round}, {alarm.name}: {alarm.evidence}")

    @property
    def _recorded(self) -> Path:
        """Holds the lineage of the last run that went on the record as a whole."""
        return self.workspace.work / "recorded"

    @property
    def _record_name(self) -> str:
        """What was recorded, and where."""
        tracking = self.params.tracking
        return f"{self.lineage} {tracking.uri if tracking.enabled else 'nowhere'}"

    def _start_record(self) -> None:
        """Opens the record, with the steps that had been done before: a run is recorded whole, whoever ran its steps.

        A run that finds everything done and on the record opens none.
        """
        tags = {"papo.lineage": self.lineage, "papo.workspace": str(self.workspace.root.resolve()), **self._tags}
        if commit := git_commit(self.workspace.root):
            tags |= {"papo.git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("+changes")}
        self._tracker.start(self._name, self.params.flat(), tags)
        held, self._held = self._held or [], None
        for step, manifest in held:
            self._record(step, manifest)

    def _record(self, step: Step, manifest: Manifest) -> None:
        if self._held is not None:
            self._held.append((step, manifest))
            return
        content = manifest.model_dump(mode="json")
        if step.stage == "advantage":
            ringing = {alarm.name for alarm in self._alarms if alarm.round == step.round}
            content["metrics"] |= {f"alarm_{name}": float(name in ringing) for name in ALARMS}
            content["metrics"]["alarms"] = float(len(ringing))
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
        dvc = self._dvc.commit() if self._dvc is not None else "not recorded with DVC"
        if on_record and (lock := self.workspace.root / "dvc.lock").is_file():
            self._tracker.tag("papo.dvc_lock", digest(lock))
        begun = onsets(self._alarms)
        if on_record:
            self._tracker.tag("papo.alarms", ", ".join(f"{a.name} from round {a.round}" for a in begun) or "none")
        summary = Summary(
            evaluation=evaluation,
            first=self._history[0],
            last=self._history[-1],
            alarms=begun,
            seconds=dict(self._seconds),
            total_seconds=time.time() - psutil.Process().create_time(),
            ran=self._ran,
            skipped=self._skipped,
            report=self.workspace.report / "index.html",
            link=self._tracker.link() if on_record else None,
            dvc=dvc,
            judging=self._cost(),
        )
        if on_record:
            judged = {
                name: sum(summary.judging.get(part, 0.0) for part in parts)
                for name, parts in JUDGING.items()
                if any(part in summary.judging for part in parts)
            }
            self._tracker.finish("FINISHED", metrics | judged | {"overhead_share": summary.overhead_share})
            self._recorded.write_text(self._record_name)
        self._finished = True
        return summary

    def _cost(self) -> dict[str, float]:
        """What the judge cost, in rounds that had been done before, too; nothing if no model was asked."""
        metrics = [manifest.metrics for manifest in self._judging]
        asked = any(map(model_asked, metrics))
        return totals(metrics, [manifest.rows for manifest in self._judging]) if asked else {}


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
        shutil.copytree(output, copy, copy_function=_link)
        _link(manifest, manifest_path(copy))
    for made in source.calibrations.glob("*/calibration.json"):
        copy = target.root / made.relative_to(source.root)
        if not copy.exists() or copy.stat().st_mtime_ns < made.stat().st_mtime_ns:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            _link(made, copy)


def _link(source: Path | str, target: Path | str) -> None:
    # Files are only ever replaced, never written in place, so two workspaces can hold the same one.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
