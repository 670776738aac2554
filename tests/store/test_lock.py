"""One run at a time in a workspace, held by the operating system's lock."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from papo.errors import BusyError, SetupError
from papo.store.faults import watching
from papo.store.layout import Workspace
from papo.store.lock import exclusive

HOLD = """
import sys, time
from pathlib import Path
from papo.store.layout import Workspace
from papo.store.lock import exclusive
with exclusive(Workspace(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds), "the-command"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with hold(tmp_path, 60) as process:
        yield process
        process.kill()


def test_a_second_run_is_told_who_holds_the_workspace(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(BusyError) as caught, exclusive(Workspace(tmp_path)):
        pass
    assert f"process {holder.pid} since {time.strftime('%Y-')}" in caught.value.what
    assert "the-command" in caught.value.what
    assert caught.value.where == str(tmp_path)
    assert "--wait" in caught.value.fix
    assert caught.value.exit_code == 2


def test_a_second_run_that_waits_gets_its_turn(tmp_path: Path) -> None:
    with hold(tmp_path, 0.5), exclusive(Workspace(tmp_path), wait_s=30):
        pass


def test_the_lock_ends_with_the_process_that_holds_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / ".papo/lock.json").exists()
    with exclusive(Workspace(tmp_path)):
        pass


def test_the_lock_ends_with_the_block_even_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), exclusive(Workspace(tmp_path)):
        raise ValueError("bad")
    assert not (tmp_path / ".papo/lock.json").exists()
    with exclusive(Workspace(tmp_path)):
        pass


@pytest.mark.parametrize("note", [None, "", '{"pid": 12', "[]"])
def test_a_holder_whose_note_cannot_be_read_is_busy_all_the_same(
    tmp_path: Path, holder: subprocess.Popen[str], note: str | None
) -> None:
    path = tmp_path / ".papo/lock.json"
    if note is None:
        path.unlink()
    else:
        path.write_text(note)
    with pytest.raises(BusyError, match="another run is going on"), exclusive(Workspace(tmp_path)):
        pass


def test_two_workspaces_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with exclusive(Workspace(tmp_path / "a")), exclusive(Workspace(tmp_path / "b")):
        pass


def test_a_workspace_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError) as caught, exclusive(Workspace(tmp_path / "file")):
        pass
    assert str(tmp_path / "file") in caught.value.where


def test_a_disk_that_takes_no_write_is_named(tmp_path: Path) -> None:
    def refuse(point: str, path: Path | None, detail: str) -> None:
        if point == "lock":
            raise OSError(errno.EROFS, "read-only")

    with watching(refuse), pytest.raises(SetupError) as caught, exclusive(Workspace(tmp_path)):
        pass
    assert caught.value.where == str(tmp_path / ".papo/lock")


def test_a_disk_that_became_read_only_does_not_hide_how_the_run_ended(tmp_path: Path) -> None:
    def refuse(point: str, path: Path | None, detail: str) -> None:
        if point == "remove":
            raise OSError(errno.EROFS, "read-only")

    with watching(refuse), pytest.raises(ValueError, match="the end"), exclusive(Workspace(tmp_path)):
        raise ValueError("the end")
    with exclusive(Workspace(tmp_path)):  # nothing is held
        pass
