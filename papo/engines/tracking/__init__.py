"""Tracking: the record of a run in MLflow. Write-only, and never a reason for a run to stop or to wait."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from papo.engines.protocols import Tracker
from papo.engines.tracking.delivery import Delivery, Opener, absolute
from papo.engines.tracking.outbox import FINISHED, Journal, Outbox, key_of
from papo.engines.tracking.traces import Sample
from papo.engines.tracking.troubles import PASSES, DeliveryError, brief_of, trouble, without_password
from papo.errors import PapoError, SetupError
from papo.params import TrackingParams

__all__ = ["BackgroundTracker", "NullTracker", "make_tracker", "resolved", "without_password"]

ABLATION = "papo.ablation"
"""Tag of the runs of an ablation, and of the run that stands for it."""
CONNECT_S = 90.0  # how long `finish` waits for a server that has taken nothing yet
PATIENCE_S = 300.0  # how long `finish` waits for any one later record, such as the upload of a policy
EARLIER_S = 30.0  # how long `finish` waits for what earlier runs left, once its own record is delivered
PAUSES_S = (1.0, 60.0)  # the first pause after a failure, and the longest; each is twice the one before
BUSY_S = 0.25  # the pause while others write to the same database, or deliver the same journal


def make_tracker(params: TrackingParams, *, outbox: Path, warn: Callable[[str], None]) -> Tracker:
    """The tracker that `tracking` describes; one that records nothing where it is off or MLflow cannot be imported.

    Args:
        outbox: the folder where the record waits until MLflow has it.
    """
    if not params.enabled:
        return NullTracker()
    params = resolved(params)
    from papo.engines.tracking.mlflow import MlflowTracker, prepare

    try:
        prepare()
    except Exception as error:  # a broken installation raises anything, and must not stop a run
        warn(
            f"MLflow cannot be imported ({brief_of(error)}); the run goes on without a record. To keep one, run "
            "`pip install mlflow`; to drop this warning, set tracking.enabled to false"
        )
        return NullTracker()
    return BackgroundTracker(MlflowTracker, params, outbox=Outbox(outbox), warn=warn)


def resolved(params: TrackingParams) -> TrackingParams:
    """The params with what the environment variable `tracking.uri_env` holds as `uri`, where one is named.

    Raises:
        SetupError: there is no such variable.
    """
    if params.uri_env is None:
        return params
    if not (found := os.environ.get(params.uri_env, "").strip()):
        raise SetupError(
            f"the environment variable {params.uri_env} holds no address",
            where="tracking.uri_env",
            fix=f"export {params.uri_env}, or set tracking.enabled to false",
        )
    return params.model_copy(update={"uri": found})


class NullTracker:
    """Records nothing."""

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None: ...

    def trace(self, call: Mapping[str, Any]) -> None: ...

    def tag(self, key: str, value: str) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None: ...

    def finish(self, status: str, metrics: Mapping[str, float]) -> None: ...

    def settle(self) -> None: ...

    def link(self) -> str | None:
        return None


class BackgroundTracker:
    """The one boundary between a run and its record: a call writes one line to a journal, and no failure of MLflow gets through.

    One worker thread delivers the journal in its order, and after it what earlier runs of the workspace left. What cannot be delivered
    stays on the disk: for a later try of this run, for the next run, or for `papo track sync`.

    Args:
        open_backend: makes the way to MLflow; only the worker uses it.
        warn: told of each kind of trouble once, in the thread of the run, by the next call of any method.
        connect, patience, earlier: seconds that `finish` waits: for the first record, for any later one, and for those of earlier runs.
        pauses: the first and the longest pause after a failure.
    """

    def __init__(
        self,
        open_backend: Opener,
        params: TrackingParams,
        *,
        outbox: Outbox,
        warn: Callable[[str], None],
        connect: float = CONNECT_S,
        patience: float = PATIENCE_S,
        earlier: float = EARLIER_S,
        pauses: tuple[float, float] = PAUSES_S,
    ) -> None:
        self._open_backend, self._outbox, self._warn = open_backend, outbox, warn
        self._params = params.model_copy(update={"uri": absolute(params.uri)})
        self._target = without_password(self._params.uri)
        self._connect, self._patience, self._earlier, self._pauses = connect, patience, earlier, pauses
        self._sample = Sample(params.judge_traces)
        self._round = 0
        self._journal: Journal | None = None
        self._delivery: Delivery | None = None
        self._link: str | None = None
        self._messages: list[str] = []
        self._told: set[str] = set()
        self._turn = threading.Condition()
        self._news = self._closing = self._over = False
        self._earlier_done = self._own_done = False
        self._done = 0
        # A daemon, so that a server that never answers cannot keep the process alive.
        self._worker = threading.Thread(target=self._work, name="papo-tracking", daemon=True)

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        shown = _without_passwords(dict(params))
        tags = {key: without_password(value) for key, value in tags.items()}
        experiment = self._params.experiment
        try:
            self._journal = self._outbox.open(key_of(tags), target=self._target, experiment=experiment, warn=self._say)
        except (PapoError, OSError) as error:
            self._journal = self._outbox.new()
            self._unwritable(error)
        self._delivery = Delivery(self._journal, self._params, self._open_backend, say=self._say)
        opening = {"name": name, "target": self._target, "experiment": experiment, "params": shown, "tags": tags}
        self._put("start", opening)
        self._worker.start()

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self._round = max(self._round, round_ or 0)
        shown = {**manifest, "params": _without_passwords(manifest.get("params", {}))}
        self._put("stage", {"stage": stage, "round": round_, "manifest": shown})
        if stage == "score_prm":
            self._put_traces(round_)

    def trace(self, call: Mapping[str, Any]) -> None:
        # Not in the journal yet: which calls of a round are kept is known at its end, and a judge may be asked before the record is opened.
        if self._over:
            return
        try:
            self._sample.add(call)
        except Exception as error:  # a call without a key, or one that is no number
            self._tell_once("trace", f"a call of the judge has no trace in MLflow: {brief_of(error)}")

    def tag(self, key: str, value: str) -> None:
        self._put("tag", {"key": key, "value": without_password(value)})

    def artifact(self, path: Path) -> None:
        self._put_file("artifact", path, {"name": path.name})

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None:
        self._put_file("policy", path, {"name": name, "metrics": dict(metrics), "step": self._round})

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        if self._journal is None or self._over:
            return
        for round_ in self._sample.rounds():
            self._put_traces(round_)
        self._put("finish", {"status": status, "metrics": dict(metrics), "step": self._round})
        self._journal.sync()
        self._drain()
        self._over = True
        self._conclude()
        self._tell()

    def settle(self) -> None:
        """Delivers what earlier runs left, where this one opened no record; waits for it as `finish` does."""
        if self._journal is None and not self._over and self._outbox.journals():
            self._own_done = True
            self._worker.start()
            self._drain()
            self._over = True
            self._tell()

    def link(self) -> str | None:
        """Where a person sees the run; what waits, if not all of it is delivered."""
        self._tell()
        if self._journal is None:
            return None
        waiting = self._waiting_line() if self._over else ""
        return "; ".join(part for part in (self._link, waiting) if part) or None

    # ---- in the thread of the run ----

    def _put(self, kind: str, content: Mapping[str, Any]) -> None:
        self._tell()
        if self._journal is None or self._over:
            return
        try:
            self._journal.append(kind, content)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._unwritable(error)
        self._wake()

    def _put_traces(self, round_: int | None) -> None:
        if calls := self._sample.take(round_):
            self._put("traces", {"round": round_, "calls": calls})

    def _put_file(self, kind: str, path: Path, content: Mapping[str, Any]) -> None:
        if self._journal is None or self._over:
            return
        try:
            found = self._journal.keep(path, copy=kind == "artifact")
        except (PapoError, OSError) as error:
            self._tell_once(f"keep {path}", f"{path} will be missing in MLflow: {brief_of(error)}")
            return
        self._put(kind, {**content, **found})

    def _unwritable(self, error: BaseException) -> None:
        self._tell_once(
            "outbox",
            f"the outbox {self._outbox.folder} cannot be written ({brief_of(error)}); the run goes on, and what MLflow does not "
            "take before it ends is lost. Free space, or correct the folder's permissions",
        )

    def _drain(self) -> None:
        """Waits for the worker as long as it gets on: no single record may take longer than its limit."""
        with self._turn:
            self._closing = self._news = True
            self._turn.notify_all()
        own_until: float | None = None
        before, since = -1, time.monotonic()
        while self._worker.is_alive():
            if self._done != before:
                before, since = self._done, time.monotonic()
            limit = since + (self._patience if self._done else self._connect)
            if self._own_done:
                own_until = own_until or time.monotonic() + self._earlier
                limit = min(limit, own_until)
            if (left := limit - time.monotonic()) <= 0:
                return
            self._worker.join(min(left, 0.1))

    def _conclude(self) -> None:
        """What is to be said at the end of the record."""
        assert self._journal is not None
        assert self._delivery is not None
        if self._journal.dropped or self._journal.unwritten:
            lost = self._journal.dropped + len(self._journal.unwritten)
            self._say(
                f"{lost} records of this run are lost: MLflow did not take them, and the outbox cannot be written"
            )
        for line in self._delivery.refused:
            self._say(
                f"MLflow did not record {line}; it waits in {self._journal.path}, and `papo track sync` tries it again"
            )
        if line := self._waiting_line():
            self._say(line)
        self._journal.close()

    def _waiting_line(self) -> str:
        """How many records of this run wait, and what to do; empty if none does."""
        assert self._journal is not None
        assert self._delivery is not None
        waiting = self._delivery.waiting - len(self._journal.unwritten)
        return f"{waiting} records wait in {self._journal.path}; `papo track sync` delivers them" if waiting > 0 else ""

    def _tell(self) -> None:
        with self._turn:
            messages, self._messages = self._messages, []
        for message in messages:
            self._warn(message)

    # ---- in either ----

    def _say(self, message: str) -> None:
        with self._turn:
            self._messages.append(message)

    def _tell_once(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._say(message)

    def _wake(self) -> None:
        with self._turn:
            self._news = True
            self._turn.notify_all()

    # ---- in the worker ----

    def _work(self) -> None:
        pause = self._pauses[0]
        while not self._over:
            closing = self._closing
            try:
                if self._journal is not None:
                    self._journal.sync()
                busy = self._deliver_own(closing)
                if not busy:
                    self._deliver_earlier(closing)
            except Exception as raised:  # an outbox that cannot be read, too, is no reason for the worker to end
                error = trouble(raised, uri=self._target, experiment=self._params.experiment)
                busy = error.kind in PASSES
                if not busy or pause > self._pauses[0]:
                    waits = "the run goes on, and its record waits on the disk"
                    self._tell_once(
                        error.kind, f"{error.what}; {waits}" + (f". To do: {error.fix}" if error.fix else "")
                    )
                self._earlier_done = False
                if closing and not busy:
                    return
                self._rest(BUSY_S if busy and closing else pause, closing)
                pause = min(2 * pause, self._pauses[1])
                continue
            pause = self._pauses[0]
            if busy:
                self._rest(BUSY_S, closing)
            elif closing:
                return
            else:
                self._wait()

    def _deliver_own(self, closing: bool) -> bool:
        """Delivers this run's journal as far as it goes; whether another process holds it.

        Raises:
            DeliveryError: nothing can be delivered now.
        """
        if self._delivery is None:
            return False
        with self._delivery.held() as mine:
            if not mine:
                return self._delivery.journal.path.exists() and bool(self._delivery.waiting)
            if closing:
                self._delivery.again()
            while not self._over and self._delivery.step():
                self._done += 1
                self._link = self._delivery.backend.link() if self._delivery.backend else None
            if closing and not self._over:
                self._own_done = True
                self._delivery.complete()
        return False

    def _deliver_earlier(self, closing: bool) -> None:
        """Delivers what earlier runs of the workspace left for the same server: once it answers, and again at the end."""
        if self._earlier_done and not closing:
            return
        for journal in self._outbox.journals():
            opening = journal.opening()
            if self._over or opening is None or opening.content["target"] != self._target:
                continue
            if self._journal is not None and journal.id == self._journal.id:
                continue
            params = self._params.model_copy(update={"experiment": opening.content["experiment"]})
            delivery = Delivery(journal, params, self._open_backend, say=self._say)
            if not delivery.waiting and journal.status() != FINISHED:
                continue
            try:
                with delivery.held() as mine:
                    while mine and not self._over and delivery.step():
                        self._done += 1
                    if mine and not self._over:
                        delivery.complete()
            except DeliveryError as error:
                if self._journal is None:
                    raise
                self._tell_once(f"earlier {error.kind}", f"records of an earlier run wait in {journal.path}: {error}")
        self._earlier_done = True

    def _wait(self) -> None:
        """Until there is something new."""
        with self._turn:
            while not self._news:
                self._turn.wait()
            self._news = False

    def _rest(self, seconds: float, closing: bool) -> None:
        """A pause, which the end of the run cuts short."""
        until = time.monotonic() + seconds
        with self._turn:
            while self._closing == closing and (left := until - time.monotonic()) > 0:
                self._turn.wait(left)


def _without_passwords(value: Any) -> Any:
    """Params, whatever they are nested in, without the passwords of their URIs."""
    if isinstance(value, Mapping):
        return {key: _without_passwords(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_passwords(item) for item in value]
    return without_password(value) if isinstance(value, str) else value
