"""Who holds a claim, and whether it still can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from papo.store.owners import check_owner, end, lives, new_owner

NAME_ITSELF = "from papo.store.owners import new_owner; print(new_owner(), flush=True); input()"


def with_fields(owner: str, **change: str) -> str:
    return ":".join((dict(zip(("pid", "started", "place", "nonce"), owner.split(":"), strict=True)) | change).values())


def test_two_owners_of_one_process_are_two_and_both_live() -> None:
    first, second = new_owner(), new_owner()
    assert first != second
    assert lives(first) is True
    assert lives(second) is True


def test_one_that_was_ended_in_its_process_does_not_live() -> None:
    first, second = new_owner(), new_owner()
    end([first])
    assert lives(first) is False
    assert lives(second) is True


def test_a_process_that_was_killed_does_not_live_even_before_its_parent_notices() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", NAME_ITSELF], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        assert lives(owner) is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lives(owner) is False  # it is still in the table of processes
    assert lives(owner) is False


def test_a_process_that_has_the_number_of_another_is_not_that_one() -> None:
    owner = new_owner()
    assert lives(with_fields(owner, started=str(int(owner.split(":")[1]) - 1))) is False


def test_a_number_that_no_process_can_have_does_not_live() -> None:
    assert lives(with_fields(new_owner(), pid=str(10**12))) is False


def test_of_a_process_elsewhere_nothing_can_be_seen() -> None:
    assert lives(with_fields(new_owner(), place="0" * 16)) is None


@pytest.mark.parametrize("owner", ["", "me", "1:2:3", "x:1:y:z", "1:x:y:z", "0:1:y:z", "-1:1:y:z", "1:2:3:4:5"])
def test_what_is_no_owner_is_refused_and_does_not_live(owner: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of many kinds, each with its own words
        check_owner(owner)
    assert lives(owner) is False
