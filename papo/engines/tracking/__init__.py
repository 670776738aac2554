"""Tracking: the record of a run in MLflow. Write-only, and never a reason for a run to stop."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from papo.engines.protocols import Tracker
from papo.params import TrackingParams

WAITING = 10_000  # calls that may wait for the backend; a run of 1,000 rounds makes half as many
CONNECT_S = 90.0  # how long `finish` waits for a backend that has answered nothing yet
PATIENCE_S = 300.0  # how long `finish` waits for any one later call, such as the upload of a policy


def make_tracker(params: TrackingParams, *, warn: Callable[[str], None]) -> Tracker:
    """The tracker that `tracking` describes; one that records nothing where it is off or MLflow cannot be imported."""
    if not params.enabled:
        return NullTracker()
    from papo.engines.tracking.mlflow import MlflowTracker

    try:
        backend = MlflowTracker(params)
    except Exception as error:  # a broken installation raises anything, and must not stop a run
        warn(
            f"MLflow cannot be imported ({_brief(error)}); the run goes on without a record. To keep one, run "
            "`pip install mlflow`; to drop this warning, set tracking.enabled to false"
        )
        return NullTracker()
    return BackgroundTracker(backend, where=params.uri, warn=warn)


class NullTracker:
    """Records nothing."""

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None: ...

    def trace(self, call: Mapping[str, Any]) -> None: ...

    def tag(self, key: str, value: str) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None: ...

    def finish(self, status: str, metrics: Mapping[str, float]) -> None: ...

    def link(self) -> str | None:
        return None


class Backend(Tracker, Protocol):
    """A tracker that may raise anything and take its time."""

    def check(self) -> None:
        """Raises if the backend cannot be reached or does not know the run."""
        ...


class BackgroundTracker:
    """The one boundary between a run and its record: calls return at once, and no failure of the backend gets through.

    One worker thread makes the calls in their order; `finish` waits until it is done. After a failure the backend is
    asked whether it still knows the run. If so, that one call is missing from the record; if not, no more are made.

    Args:
        backend: where the record goes. Only the worker thread calls it, but for `link`, and for `trace`, which only notes the call.
        where: its address, for messages.
        warn: told of each kind of failure once, in the thread of the run, by the next call of any method.
        connect: seconds that `finish` waits for the answer to `start`.
        patience: seconds that `finish` waits for any later call.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        where: str,
        warn: Callable[[str], None],
        connect: float = CONNECT_S,
        patience: float = PATIENCE_S,
    ) -> None:
        self._backend, self._where, self._warn = backend, without_password(where), warn
        self._connect, self._patience = connect, patience
        self._jobs: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._refused: set[str] = set()
        self._done = 0
        self._out = threading.Event()
        # A daemon, so that a backend that never answers cannot keep the process alive.
        self._worker = threading.Thread(target=self._work, name="papo-tracking", daemon=True)

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._worker.start()
        self._put("start", partial(self._backend.start, name, dict(params), dict(tags)))

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self._put(f"stage {stage}", partial(self._backend.stage, stage, round_, dict(manifest)))

    def trace(self, call: Mapping[str, Any]) -> None:
        # Not by the queue: a judge makes more calls than may wait, and may make them before the record is opened.
        if self._out.is_set():
            return
        try:
            self._backend.trace(call)
        except Exception as error:  # as in `_attempt`
            self._refuse("trace", _brief(error))

    def tag(self, key: str, value: str) -> None:
        self._put(f"tag {key}", partial(self._backend.tag, key, value))

    def artifact(self, path: Path) -> None:
        self._put(f"artifact {path.name}", partial(self._backend.artifact, path))

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None:
        self._put(f"policy {name}", partial(self._backend.policy, path, name, dict(metrics)))

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        self._put("finish", partial(self._backend.finish, status, dict(metrics)))
        self._drain()
        self._out.set()
        self._tell()

    def link(self) -> str | None:
        self._tell()
        return None if self._out.is_set() and not self._done else self._backend.link()

    def _put(self, what: str, call: Callable[[], None]) -> None:
        self._tell()
        if self._out.is_set() or not self._worker.is_alive():
            return
        if self._jobs.qsize() >= WAITING:
            self._give_up(f"{WAITING} calls are waiting")
        self._jobs.put((what, call))

    def _drain(self) -> None:
        """Waits for the worker as long as it gets on: no single call may take longer than its limit."""
        self._jobs.put(None)
        if self._out.is_set():
            return
        before = -1
        while self._worker.is_alive() and self._done != before:
            before = self._done
            self._worker.join(self._patience if self._done else self._connect)
        if self._worker.is_alive():
            self._give_up(f"no answer in {self._patience if self._done else self._connect:.0f} s")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._out.is_set():
                self._attempt(*job)

    def _attempt(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
            self._done += 1
        except Exception as error:  # MLflow raises anything, and the record stops no run
            if not self._done or self._unreachable():
                self._give_up(_brief(error))
            else:
                self._refuse(what, _brief(error))

    def _unreachable(self) -> bool:
        try:
            self._backend.check()
        except Exception:
            return True
        return False

    def _give_up(self, why: str) -> None:
        if not self._out.is_set():
            self._out.set()
            self._messages.put(f"MLflow is unreachable at {self._where}: {why}; the run goes on without it")

    def _refuse(self, what: str, why: str) -> None:
        if what not in self._refused:
            self._refused.add(what)
            self._messages.put(f"MLflow did not record {what}: {why}; the run and the rest of its record go on")

    def _tell(self) -> None:
        while not self._messages.empty():
            self._warn(self._messages.get())


def without_password(text: str) -> str:
    """`text` with what stands between `//` and `@` in a URI left out."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _brief(error: BaseException) -> str:
    """One line: what the system said, where the chain of errors leads to that, else the error's own words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            error = cause
        cause = cause.__cause__ or cause.__context__
    line = " ".join(str(error).split()) or type(error).__name__
    return without_password(line if len(line) <= 300 else f"{line[:297]}...")
