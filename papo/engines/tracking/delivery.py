"""Brings a journal to MLflow: in order, each record until the server has it, and none of them twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from papo.engines.tracking.outbox import FINISHED, Damaged, Journal, Record
from papo.engines.tracking.troubles import REFUSED, DeliveryError, trouble, without_password
from papo.params import TrackingParams

TRIES = 4
"""So often a record is tried that a server which answers does not take; then it waits apart and the others go on."""


class Backend(Protocol):
    """One run in MLflow. May raise anything and take its time; a call that is made again changes nothing."""

    at: float
    """When the record that is being delivered was made, in Unix seconds."""

    def open(self, record: str, name: str, tags: Mapping[str, str], run: str) -> str:
        """Finds the run of a record, or creates it, and says its id, which a later call may give as `run`."""
        ...

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None: ...

    def traces(self, round_: int | None, calls: list[Mapping[str, Any]]) -> None: ...

    def tag(self, key: str, value: str) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def policy(self, path: Path, name: str, metrics: Mapping[str, float], step: int) -> None: ...

    def finish(self, status: str, metrics: Mapping[str, float], step: int) -> None: ...

    def check(self) -> None:
        """Raises if the backend cannot be reached or does not know the run."""
        ...

    def link(self) -> str | None: ...


Opener = Callable[[TrackingParams], Backend]


class Delivery:
    """One journal on its way to one server, for one thread. `refused` says what that server did not take, and why.

    Args:
        params: the server and the experiment.
        open_backend: makes the backend; called again after every trouble, so that what it remembers is what the server has.
        say: told of damaged records.
    """

    def __init__(
        self, journal: Journal, params: TrackingParams, open_backend: Opener, *, say: Callable[[str], None]
    ) -> None:
        self.journal = journal
        self._params, self._open_backend, self._say = params, open_backend, say
        self._target = without_password(params.uri)
        self.progress = journal.progress(self._target)
        self._tries = 0
        self.backend: Backend | None = None

    @property
    def refused(self) -> list[str]:
        return [f"{entry['what']}: {entry['why']}" for entry in self.progress.refused]

    @property
    def waiting(self) -> int:
        return self.journal.waiting(self._target)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether this thread alone delivers the journal now."""
        with self.journal.held() as mine:
            if mine:
                noted = self.journal.progress(self._target)
                if noted.offset > self.progress.offset:  # another process went on
                    self.progress, self.backend = noted, None
            yield mine

    def step(self) -> bool:
        """Delivers one record; False if none waits. To be called while held.

        Raises:
            DeliveryError: nothing can be delivered now.
        """
        item = next(self.journal.read(self.progress.offset), None)
        if item is None and self.journal.unwritten:
            item = self.journal.unwritten[0]
        if item is None:
            return False
        if isinstance(item, Damaged):
            self.journal.set_aside(item)
            self._say(
                f"a damaged record (bytes {item.start} to {item.end} of {self.journal.path}) is set aside in "
                f"{self.journal.damaged.name} and will be missing in MLflow"
            )
        else:
            self._deliver(item)
        self._passed(item)
        return True

    def again(self) -> None:
        """Tries once more what was refused. To be called while held.

        Raises:
            DeliveryError: nothing can be delivered now.
        """
        for entry in list(self.progress.refused):
            item = next(self.journal.read(entry["offset"]), None)
            if isinstance(item, Record):
                try:
                    self._attempt(item)
                except DeliveryError as error:
                    if error.kind != REFUSED:
                        raise
                    entry["why"] = error.what
                    continue
            self.progress.refused.remove(entry)
            self.progress.delivered += 1
            self.journal.note(self._target, self.progress)

    def complete(self) -> bool:
        """Removes the journal if all of it is delivered and the run has ended well. To be called while held."""
        if self.progress.refused or self.waiting or self.journal.status() != FINISHED:
            return False
        self.journal.remove()
        return True

    def _deliver(self, record: Record) -> None:
        while True:
            try:
                self._attempt(record)
            except DeliveryError as error:
                if self.backend is None or error.kind == "locked":
                    raise
                if error.kind not in (REFUSED, "shaky", "down"):
                    self.backend = None
                    raise
                self._check(error)
                if error.kind == REFUSED or self._tries >= TRIES:
                    what = " ".join(str(record.content.get(name, "")) for name in ("stage", "key", "name")).strip()
                    entry = {"offset": record.start, "what": f"{record.kind} {what}".strip(), "why": error.what}
                    self.progress.refused.append(entry)
                    return
                self.backend = None  # it may have been done all the same: what is there is looked at anew
                continue
            self.progress.delivered += 1
            return

    def _check(self, error: DeliveryError) -> None:
        """Counts a try of a record that the server does not take.

        Raises:
            DeliveryError: it takes none now.
        """
        assert self.backend is not None
        try:
            self.backend.check()
        except Exception as gone:  # MLflow raises anything
            self.backend, self._tries = None, 0
            found = self._trouble(gone)
            raise (error if found.kind == REFUSED else found) from gone
        self._tries += 1

    def _attempt(self, record: Record) -> None:
        try:
            backend = self._opened()
            backend.at = record.at
            _call(backend, record, self.journal)
        except DeliveryError:
            raise
        except Exception as error:  # MLflow raises anything, and the record stops no run
            found = self._trouble(error)
            if self.backend is None and found.kind in (REFUSED, "shaky"):
                # The run could not be opened, so that no record can be taken.
                found = DeliveryError("down", f"MLflow cannot record at {self._target}: {found.what}", found.fix)
            raise found from error

    def _opened(self) -> Backend:
        if self.backend is None:
            opening = self.journal.opening() or next(
                (one for one in self.journal.unwritten if one.kind == "start"), None
            )
            content = opening.content if opening else {}
            backend = self._open_backend(self._params)
            backend.at = opening.at if opening else 0.0
            name, tags = content.get("name", self.journal.id), content.get("tags", {})
            self.progress.run = backend.open(self.journal.id, name, tags, self.progress.run)
            self.backend = backend
            self.journal.note(self._target, self.progress)
        return self.backend

    def _passed(self, item: Record | Damaged) -> None:
        self._tries = 0
        if item.end < 0:
            assert isinstance(item, Record)
            self.journal.forget(item)
            return
        self.progress.offset = item.end
        self.journal.note(self._target, self.progress)

    def _trouble(self, error: Exception) -> DeliveryError:
        return trouble(error, uri=self._params.uri, experiment=self._params.experiment)


def _call(backend: Backend, record: Record, journal: Journal) -> None:
    content = record.content
    match record.kind:
        case "start":
            backend.start(content["params"], content["tags"])
        case "stage":
            backend.stage(content["stage"], content["round"], content["manifest"])
        case "traces":
            backend.traces(content["round"], content["calls"])
        case "tag":
            backend.tag(content["key"], content["value"])
        case "artifact":
            backend.artifact(journal.find(content))
        case "policy":
            backend.policy(journal.find(content), content["name"], content["metrics"], content["step"])
        case "finish":
            backend.finish(content["status"], content["metrics"], content["step"])
        case other:
            raise DeliveryError(REFUSED, f"a record of the kind {other!r}, which this papo does not know")


def absolute(uri: str) -> str:
    """`uri`, with the file of an SQLite database as an absolute path, so that a change of folder means nothing."""
    prefix = "sqlite:///"
    return f"{prefix}{Path(uri.removeprefix(prefix)).resolve()}" if uri.startswith(prefix) else uri


def address(recorded: str, params: TrackingParams, to: str | None = None) -> str:
    """The URI to deliver to, with the user and the password that params or the environment have for it, which no journal holds.

    Raises:
        DeliveryError: neither has them.
    """
    if to is not None:
        return absolute(to)
    for known in (params.uri, os.environ.get("MLFLOW_TRACKING_URI", "")):
        if without_password(absolute(known)) == recorded:
            return absolute(known)
    if "***" in recorded:
        raise DeliveryError(
            "credentials",
            f"the user and the password for {recorded} are not kept with the record",
            "set MLFLOW_TRACKING_URI to the whole address, then `papo track sync`",
        )
    return recorded
