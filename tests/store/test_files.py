"""Writes are whole or not there; digests follow the content."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from papo.errors import DamagedError, DataError, MissingInputError, SetupError
from papo.store.faults import watching
from papo.store.files import (
    clear_folder,
    digest,
    disk_error,
    make_folder,
    read_json,
    read_sealed,
    replacing,
    write_json,
    write_sealed,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(path.parent) == ["file"]


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / name).write_text(name)
    assert names(path / "deep") == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "gone")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / "half").write_text("half")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        write()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_what_a_killed_run_left_is_never_mixed_into_the_next_and_goes_away(tmp_path: Path) -> None:
    killed = tmp_path / ".folder.1.tmp"
    mine = tmp_path / f".folder.{os.getpid()}.tmp"  # process numbers come again, in a container nearly always
    for left in (killed, mine):
        left.mkdir()
        (left / "half").write_text("half")
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "whole").write_text("whole")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["whole"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import sys, time; from pathlib import Path; from papo.store.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    write_json(path, {"new": 1})
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "cannot write here"),
     (errno.EACCES, "cannot write here")],
)  # fmt: skip
def test_errors_of_the_disk_name_the_path(tmp_path: Path, number: int, message: str) -> None:
    path = tmp_path / "file"
    with pytest.raises(SetupError, match=message) as caught, replacing(path):
        raise OSError(number, os.strerror(number))
    assert caught.value.where == str(path)
    assert caught.value.exit_code == 2


def test_a_full_disk_as_the_rust_libraries_report_it_is_a_full_disk(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    with pytest.raises(SetupError, match="disk is full"), replacing(tmp_path / "policy"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "input/output error")
    assert disk_error(error, tmp_path) is error


def test_json_is_sorted_and_refuses_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [None]})
    assert path.read_text() == '{\n "a": [\n  null\n ],\n "b": 1\n}\n'
    assert read_json(path) == {"a": [None], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [None], "b": 1}


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(MissingInputError) as missing:
        read_json(path)
    path.write_bytes(b'{"a": 1')
    with pytest.raises(DataError, match="not JSON") as damaged:
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not JSON"):
        read_json(path)
    assert missing.value.where == damaged.value.where == str(path)


def test_the_digest_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    first = digest(path)
    os.utime(path, (1, 1))
    assert digest(path) == first
    path.write_text("two")
    assert digest(path) != first
    path.write_text("one")
    assert digest(path) == first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_the_digest_of_a_folder_is_that_of_names_and_content(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            os.utime(path, (time.time(), len(name)))
        return digest(tmp_path / name)

    first = folder("first", {"a": "1", "sub/b": "2"})
    assert folder("again", {"sub/b": "2", "a": "1"}) == first
    assert folder("content", {"a": "1", "sub/b": "3"}) != first
    assert folder("name", {"a": "1", "sub/c": "2"}) != first
    assert folder("place", {"a": "1", "b": "2"}) != first
    assert folder("more", {"a": "1", "sub/b": "2", "c": ""}) != first


def test_there_is_no_digest_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        digest(tmp_path / "none")


def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What `os.fsync` is called for from now on."""
    found: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(Path(f"/proc/self/fd/{handle}").readlink()))
    return found


def test_the_name_of_a_new_folder_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = synced(monkeypatch)
    make_folder(tmp_path / "a/b")
    assert found == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a/b")
    assert len(found) == 2
    with replacing(tmp_path / "c/file") as temporary:
        temporary.write_text("x")
    assert found[2:] == [tmp_path, temporary, tmp_path / "c"]


def test_a_folder_cannot_be_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError, match="file"):
            make_folder(path)


def test_what_cannot_be_cleared_stays_without_an_error(tmp_path: Path) -> None:
    def refuse(point: str, path: Path | None, detail: str) -> None:
        raise OSError(errno.EROFS, "read-only")

    (tmp_path / "folder").mkdir()
    with watching(refuse):
        clear_folder(tmp_path / "folder")
    assert (tmp_path / "folder").is_dir()
    clear_folder(tmp_path / "folder")
    clear_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_disk_that_becomes_read_only_while_a_file_is_written_is_named(tmp_path: Path) -> None:
    def refuse(point: str, path: Path | None, detail: str) -> None:
        if point in ("fsync", "remove"):
            raise OSError(errno.EROFS, "read-only")

    path = tmp_path / "file"
    with watching(refuse), pytest.raises(SetupError) as caught, replacing(path) as temporary:
        temporary.write_text("x")
    assert caught.value.where == str(path)
    assert not path.exists()


def test_an_error_of_shutil_is_that_of_the_system_in_it(tmp_path: Path) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", target)

    (tmp_path / "from").mkdir()
    (tmp_path / "from/file").write_text("x")
    with pytest.raises(SetupError, match="the disk is full"), replacing(tmp_path / "to") as folder:
        shutil.copytree(tmp_path / "from", folder, copy_function=full)
    assert names(tmp_path) == ["from"]


def test_sealed_json_with_another_byte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"rows": 12, "metrics": {"a": 0.25, "b": 1e-9}, "list": [1, 2]}
    write_sealed(path, {**value, "by number": {1: 2}})
    assert read_sealed(path) == {**value, "by number": {"1": 2}}
    whole = path.read_bytes()
    for place in range(len(whole) - 1):  # the last is a newline
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        if changed[place : place + 1].isspace() and whole[place : place + 1].isspace():
            continue
        try:
            found = read_sealed(path)
        except DataError:
            continue
        assert set(found) - {*value, "by number"}, changed  # `digest` has another name, which the reader does not know
    path.write_text("[]")
    with pytest.raises(DamagedError):
        read_sealed(path)
    write_json(path, value)  # as before there were digests
    assert read_sealed(path) == value
