"""The tree of errors: what a message says, and the exit code it ends a command with."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from papo import errors
from papo.errors import (
    AlarmError,
    BusyError,
    FailedRowsError,
    PapoError,
    StageError,
    ToldToStopError,
    UnansweredError,
    UserError,
)

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, PapoError)]


def test_a_message_says_what_where_and_what_to_do() -> None:
    assert str(UserError("wrong", where="here", fix="mend it")) == "wrong\n  where: here\n  to do: mend it"
    assert str(UserError("wrong")) == "wrong"
    assert str(UserError("wrong", fix="mend it")) == "wrong\n  to do: mend it"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_exit_code_says_whose_turn_it_is(cls: type[PapoError]) -> None:
    own = {AlarmError: 3, ToldToStopError: 3, UnansweredError: 4}
    assert cls.exit_code == own.get(cls, 2 if issubclass(cls, UserError) else 1)
    assert cls in (PapoError, UserError, StageError) or issubclass(cls, UserError) != issubclass(cls, StageError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_outlives_the_way_between_processes(cls: type[PapoError]) -> None:
    error = pickle.loads(pickle.dumps(cls("wrong", where="here", fix="mend it")))
    assert (type(error), error.what, error.where, error.fix) == (cls, "wrong", "here", "mend it")


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    path: list[str] = []
    for indent, name in re.findall(r"^ {4}([│├└─ ]*)(\w+Error)\b", errors.__doc__, re.MULTILINE):
        path[len(indent) // 4 :] = [name]
        drawn[name] = path[-2] if len(path) > 1 else "Exception"
    assert drawn == {cls.__name__: cls.__base__.__name__ for cls in CLASSES if cls.__base__}


def test_an_error_is_caught_as_what_it_is() -> None:
    with pytest.raises(UserError):
        raise BusyError("busy")
    with pytest.raises(StageError):
        raise FailedRowsError("failed")


RETRIED = {"ServerDownError"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_only_what_time_may_mend_is_worth_a_retry(cls: type[PapoError]) -> None:
    assert cls.retry == (cls.__name__ in RETRIED)
