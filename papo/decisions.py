"""What was decided about the alarms of a run, on disk: that it was stopped, and what a person accepted."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from papo.core.alarms import Alarm
from papo.errors import DataError, MissingInputError
from papo.store.files import read_json, write_json
from papo.store.layout import Workspace


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rung(_Record):
    """An alarm that ended a run, or would have."""

    name: str
    round: int
    evidence: str


class LastGood(_Record):
    """The policy to go back to: its round (-1: the warm start), its name for commands, its folder in the workspace, and why it is it."""

    round: int
    policy: str
    folder: str
    digest: str
    why: str


class Stop(_Record):
    """`why`: the policy said so, a person did, or none could be asked. `again`: a stage had failed, and going on starts it again."""

    alarms: list[Rung]
    good: LastGood
    again: bool
    why: Literal["policy", "person", "unanswered"]
    at: str
    by: str
    note: str = ""


class Accepted(_Record):
    """`for_good`: the alarm does not act again in this run; else a stage that had failed was only started again."""

    alarm: Rung
    for_good: bool
    at: str
    by: str
    note: str = ""

    @property
    def words(self) -> str:
        what = "accepted" if self.for_good else "started again"
        return f"{what} in round {self.alarm.round} by {self.by} at {self.at}{f': {self.note}' if self.note else ''}"


class Decisions(_Record):
    """Of one run: how it was stopped, while it is, and all that was accepted, the latest last."""

    stopped: Stop | None = None
    accepted: list[Accepted] = []

    @property
    def silenced(self) -> set[str]:
        """Alarms that do not act any more."""
        return {one.alarm.name for one in self.accepted if one.for_good}

    @property
    def words(self) -> dict[str, str]:
        """What was decided last, by alarm."""
        return {one.alarm.name: one.words for one in self.accepted}


_BY_RUN = TypeAdapter(dict[str, Decisions])


def read_decisions(workspace: Workspace, run: str) -> Decisions:
    """What was decided about a run, by its lineage; nothing, if nothing was.

    Raises:
        DataError: the file is damaged.
    """
    return _read(workspace).get(run, Decisions())


def write_decisions(workspace: Workspace, run: str, decisions: Decisions) -> None:
    """Takes the place of what was decided about the run before; other runs of the workspace keep theirs."""
    content = {**_read(workspace), run: decisions}
    write_json(workspace.decisions, {name: one.model_dump(mode="json") for name, one in content.items()})


def _read(workspace: Workspace) -> Mapping[str, Decisions]:
    if not workspace.decisions.is_file():
        return {}
    try:
        return _BY_RUN.validate_python(read_json(workspace.decisions))
    except ValidationError as error:
        raise DataError(
            f"not what was decided about alarms: {error.error_count()} fields are wrong",
            where=str(workspace.decisions),
            fix="delete it; a run that an alarm had stopped is stopped anew where it rings",
        ) from None


def read_last_good(workspace: Workspace) -> LastGood:
    """The policy that the last alarm that ended a run of this workspace left as the last good one.

    Raises:
        MissingInputError, DataError: none has, or the file is damaged.
    """
    path = workspace.last_good
    if not path.is_file():
        raise MissingInputError(
            "no alarm has left a last good policy", where=str(path), fix="name warmstart, final, round-<k> or a folder"
        )
    content = read_json(path)
    try:
        return LastGood.model_validate({name: content[name] for name in LastGood.model_fields})
    except (ValidationError, KeyError, TypeError):
        raise DataError(
            "does not name a last good policy", where=str(path), fix="delete it, and name round-<k> or a folder"
        ) from None


def rung(raised: Iterable[Alarm]) -> list[Rung]:
    return [Rung(name=alarm.name, round=alarm.round, evidence=alarm.evidence) for alarm in raised]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """Who runs this process, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in many containers
        return f"user {os.getuid()}"
