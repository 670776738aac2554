"""A run's alarms and what it does about them: which act now, which policy is the last good one, what ends the run or lets it go on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from papo.core.alarms import ALARMS, TRAINING_ALARMS, Alarm, Limits, alarms, last_good, onset, onsets, trained
from papo.decisions import Accepted, Decisions, LastGood, Stop, now, read_decisions, rung, user, write_decisions
from papo.engines.protocols import Tracker
from papo.errors import (
    AlarmError,
    FailedRowsError,
    NotFiniteError,
    PapoError,
    ServerDownError,
    ToldToStopError,
    UnansweredError,
)
from papo.params import Params
from papo.store.files import digest, write_json
from papo.store.layout import Workspace, manifest_path
from papo.store.manifest import Manifest

FAILURES: dict[str, tuple[str, tuple[type[PapoError], ...]]] = {
    "score_prm": ("judge_outage", (ServerDownError, FailedRowsError)),
    "train": ("non_finite_loss", (NotFiniteError,)),
}
"""By stage, the alarm that it is when the stage fails by one of these errors."""

END, NOTE = "papo.end", "mlflow.note.content"


class Question(NamedTuple):
    """What a person is asked. `again`: going on starts a stage again that had failed; else it accepts the alarms for this run."""

    alarms: tuple[Alarm, ...]
    good: LastGood
    again: bool

    @property
    def evidence(self) -> str:
        return "; ".join(f"{alarm.name} in round {alarm.round}: {alarm.evidence}" for alarm in self.alarms)

    @property
    def names(self) -> str:
        return ", ".join(alarm.name for alarm in self.alarms)

    @property
    def meaning(self) -> str:
        """Of going on."""
        return "starts the stage again" if self.again else f"accepts {self.names} for the rest of this run"


class Answer(NamedTuple):
    go_on: bool
    by: str
    note: str = ""


Ask = Callable[[Question], Answer | None]
"""Asks a person and waits; None if there is nobody, or nobody has answered in time."""


class Watch:
    """Follows the rounds of one run.

    Args:
        run: the run's lineage.
        ask: for alarms whose policy is `pause`; None: there is nobody to ask.
        warn: told of each alarm as it begins, and of going on in spite of one.
    """

    def __init__(
        self,
        params: Params,
        workspace: Workspace,
        run: str,
        *,
        tracker: Tracker,
        ask: Ask | None,
        warn: Callable[[str], None],
    ) -> None:
        self._params, self._workspace, self._run = params, workspace, run
        self._tracker, self._ask, self._warn = tracker, ask, warn
        self._limits = Limits(**params.alarms.model_dump())
        self._acting: tuple[Alarm, ...] = ()
        self._failure: PapoError | None = None
        self.history: list[dict[str, float]] = []
        self.raised: list[Alarm] = []
        self.rung: list[Alarm] = []

    @property
    def decided(self) -> dict[str, str]:
        """By alarm, that it was accepted in this run, by whom and when."""
        return self._decisions.words

    def check(self, *, go_on: bool) -> None:
        """For the start of a run: one that an alarm stopped stays stopped until a person says otherwise.

        Raises:
            AlarmError: it was stopped, the policy is still to stop, and nobody has said to go on.
        """
        stopped = self._decisions.stopped
        if stopped is None:
            if go_on:
                self._warn("no alarm has stopped this run: there is nothing to accept")
            return
        raised = tuple(Alarm(one.name, one.round, one.evidence) for one in stopped.alarms)
        question = Question(raised, stopped.good, stopped.again)
        if go_on:  # the record has not been opened, and will say so when it is
            self._accept(question, Answer(True, user(), "--go-on"))
        elif any(self._params.on_alarm.of(alarm.name) == "stop" for alarm in raised):
            raise self._error(AlarmError, f"this run was stopped by an alarm at {stopped.at}", question)

    def sampled(self, manifest: Manifest) -> list[Alarm]:
        """Takes the signals of the next round; the alarms that ring in it."""
        self.history.append(dict(manifest.metrics))
        followed = self._workspace.policy(len(self.history) - 1)
        return self._ringing(set(ALARMS) - set(TRAINING_ALARMS), manifest, followed)

    def trained(self, manifest: Manifest) -> list[Alarm]:
        """Takes the metrics of the training of the same round; the alarms on it that ring."""
        round_ = len(self.history) - 1
        self.history[-1] = trained(self.history[-1], manifest.metrics, len(manifest.history))
        last = round_ + 1 == self._params.run.rounds
        followed = (
            self._workspace.evaluation / "metrics.json" if last else self._workspace.table(round_ + 1, "rollouts")
        )
        return self._ringing(TRAINING_ALARMS, manifest, followed)

    def _ringing(self, names: Collection[str], manifest: Manifest, followed: Path) -> list[Alarm]:
        found = [alarm for alarm in alarms(self.history, self._limits) if alarm.name in names]
        self.raised += found
        begun = onsets(self.raised)
        for alarm in found if not manifest.skipped else ():
            if alarm in begun:
                self.rung.append(alarm)
                self._warn(f"alarm in round {alarm.round}, {alarm.name}: {alarm.evidence}")
        # What came after it has been done: there is nothing left to stop.
        if not (manifest.skipped and manifest_path(followed).is_file()):
            silenced = self._decisions.silenced
            self._acting = tuple(
                alarm
                for alarm in found
                if self._params.on_alarm.of(alarm.name) != "warn" and alarm.name not in silenced
            )
        return found

    def failed(self, stage: str, round_: int | None, error: PapoError) -> PapoError:
        """What is to be raised for an error of a stage: itself, or an AlarmError if it is an alarm that acts."""
        name, kinds = FAILURES.get(stage, ("", ()))
        if round_ is None or not isinstance(error, kinds) or self._params.on_alarm.of(name) == "warn":
            return error
        self._acting, self._failure = (Alarm(name, round_, error.what),), error
        return AlarmError(f"{name} in round {round_}: {error.what}", where=error.where, fix=error.fix)

    @property
    def acting(self) -> bool:
        """Whether an alarm rings that has to be settled."""
        return bool(self._acting)

    def settle(self) -> None:
        """Does what the alarms that ring ask for: returns if the run goes on.

        The last good policy is written down and goes on the record before anybody is asked.

        Raises:
            AlarmError: the run ends here.
        """
        if not self._acting:
            return
        question = Question(self._acting, self._last_good(self._acting), self._failure is not None)
        failure, self._acting, self._failure = self._failure, (), None
        good = question.good
        write_json(self._workspace.last_good, good.model_dump() | {"alarms": question.evidence, "run": self._run})
        self._tracker.tag("papo.last_good", f"{good.policy}, digest {good.digest[:12]}: {good.why}")
        self._tracker.policy(self._workspace.root / good.folder, f"last-good-{good.policy}", {})
        stops = any(self._params.on_alarm.of(alarm.name) == "stop" for alarm in question.alarms)
        answer = None if stops else self._answer(question)
        if answer is not None and answer.go_on:
            accepted = self._accept(question, answer)
            self._tracker.tag(END, f"goes on: {accepted}")
            self._tracker.tag(NOTE, f"{question.evidence}\n\n{accepted}")
            return
        if stops:
            kind, why, what = AlarmError, "policy", "an alarm has stopped this run"
        elif answer is not None:
            kind, why, what = ToldToStopError, "person", f"{answer.by} said to stop here"
        else:
            kind, why, what = (
                UnansweredError,
                "unanswered",
                "a person has to say whether this run goes on, and none did",
            )
        error = self._error(kind, what, question, failure)
        stop = Stop(
            alarms=rung(question.alarms), good=good, again=question.again, why=why, at=now(),
            by=answer.by if answer is not None else user(), note=answer.note if answer is not None else "",
        )  # fmt: skip
        self._write(self._decisions.model_copy(update={"stopped": stop}))
        self._tracker.tag(NOTE, str(error))
        raise error

    def _answer(self, question: Question) -> Answer | None:
        self._tracker.tag(END, f"waits for a person: {question.evidence}")
        return self._ask(question) if self._ask is not None else None

    def done(self) -> None:
        """The run has ended as it should: whatever had stopped it does so no more."""
        decisions = self._decisions
        if decisions.stopped is not None:
            self._write(decisions.model_copy(update={"stopped": None}))

    def _last_good(self, acting: tuple[Alarm, ...]) -> LastGood:
        """The earliest of those of the alarms."""
        found = [
            last_good(self.history, alarm.name, onset([*self.raised, alarm], alarm.name), self._limits)
            for alarm in acting
        ]
        round_, why = min(found)
        folder = self._workspace.policy(round_)
        return LastGood(
            round=round_,
            policy="warmstart" if round_ < 0 else f"round-{round_}",
            folder=folder.relative_to(self._workspace.root).as_posix(),
            digest=digest(folder),
            why=why,
        )

    def _accept(self, question: Question, answer: Answer) -> str:
        """Writes it down; what was accepted, in words."""
        decisions = self._decisions
        accepted = [
            Accepted(alarm=one, for_good=not question.again, at=now(), by=answer.by, note=answer.note)
            for one in rung(question.alarms)
        ]
        self._write(Decisions(stopped=None, accepted=[*decisions.accepted, *accepted]))
        words = "; ".join(f"{one.alarm.name} {one.words}" for one in accepted)
        self._warn(words)
        return words

    def _error(
        self, kind: type[AlarmError], what: str, question: Question, failure: PapoError | None = None
    ) -> AlarmError:
        good = question.good
        asked = "papo evaluate --policy last-good --against warmstart says what that one is worth"
        on = f"the same command with --go-on (of a flow: go_on) {question.meaning} and goes on"
        return kind(
            f"{what}: {question.evidence}",
            where=f"{self._workspace.root}; the last good policy is {good.policy} in {good.folder}: {good.why}",
            fix=f"{failure.fix}; {on}" if failure is not None and failure.fix else f"{asked}; {on}",
        )

    @property
    def _decisions(self) -> Decisions:
        return read_decisions(self._workspace, self._run)

    def _write(self, decisions: Decisions) -> None:
        write_decisions(self._workspace, self._run, decisions)
