"""Errors that a person can cause or meet, and the exit code each one ends a command with.

    PapoError
    ├── UserError                 exit 2: the input is wrong; nothing was started, nothing is lost
    │   ├── ParamsError           params.yaml, a preset or --set
    │   ├── DataError             a problem set or a table: content, columns, schema version, truncation
    │   │   └── DamagedError      a file that is no longer what was written
    │   ├── CheckpointError       a policy that is none, or not the one that was asked for
    │   ├── MissingInputError     a stage whose predecessor has not run
    │   ├── BusyError             another run holds this checkout
    │   └── SetupError            git, DVC, disk, a missing optional dependency
    └── StageError                exit 1: the stage ran and could not finish
        ├── FailedRowsError       more rows failed than the stage allows
        ├── ServerDownError       a server that the stage asks does not answer; the stage can be started again
        ├── BudgetError           the stage has spent what it may
        ├── NotFiniteError        loss or gradient are not finite in too many steps
        └── AlarmError            exit 3: an alarm ended the run, as `on_alarm` says; what is done is kept
            ├── ToldToStopError   exit 3: the person who was asked said so
            └── UnansweredError   exit 4: a person has to say whether it goes on, and none could be asked

Every message answers three questions: what is wrong, where, and what to do about it.

`retry` of a class says whether time alone may mend it, so that whoever runs a stage may start it again with nothing changed. Only a server
that is down, or a process of one that died, is such a case (ServerDownError): the input stays wrong, a full disk stays full, money that is
spent stays spent, and rows that failed have been tried again by the stage itself.
"""

from __future__ import annotations


class PapoError(Exception):
    """Base of every error that papo raises on purpose.

    Args:
        what: what is wrong, in one sentence.
        where: the file, key, row or command concerned.
        fix: what the person can do.
    """

    exit_code = 1
    retry = False

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return printable("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def printable(text: str) -> str:
    """Without what would steer a terminal or hide in it: a model, or a data set, may say anything."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def _rebuild(cls: type[PapoError], what: str, where: str, fix: str) -> PapoError:
    return cls(what, where=where, fix=fix)


class UserError(PapoError):
    """The input is wrong; nothing was half-written."""

    exit_code = 2


class ParamsError(UserError):
    """An unknown key, a wrong type or a value out of bounds in the params."""


class DataError(UserError):
    """A problem set or table that cannot be used."""


class DamagedError(DataError):
    """A file that is no longer what was written."""


class CheckpointError(UserError):
    """A checkpoint path or id that holds no usable policy."""


class MissingInputError(UserError):
    """An input of the stage is not there: its predecessor has not run."""


class BusyError(UserError):
    """Another run is going on in this checkout."""


class SetupError(UserError):
    """The machine lacks something: git, DVC, disk space, an optional dependency."""


class StageError(PapoError):
    """A stage started and could not finish."""


class FailedRowsError(StageError):
    """The share of failed rows is above the limit of the stage."""


class ServerDownError(StageError):
    """A server that the stage asks does not answer; started again later, the stage goes on with what it has."""

    retry = True


class BudgetError(StageError):
    """The next call could cost more than is left; what was paid for is kept."""


class NotFiniteError(StageError):
    """Loss or gradient are not finite in too many steps of a round."""


class AlarmError(StageError):
    """An alarm ended the run before it was done; the last good policy is named in artifacts/last_good.json."""

    exit_code = 3


class ToldToStopError(AlarmError):
    """A person was asked about an alarm and said to stop here."""


class UnansweredError(AlarmError):
    """An alarm is for a person to decide, and there was none to ask."""

    exit_code = 4
