"""Writes that are whole or not there, and digests of what was written."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from papo.errors import DataError, MissingInputError, SetupError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write; it takes the place of `path` only when the block ends without an error.

    Works for a file and for a folder. What was written is synced to the disk before the rename, the parent folder after it.

    Raises:
        SetupError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What killed runs left: nobody else writes `path`, for its workspace is locked.
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            _remove(left)
        yield temporary
        _sync_tree(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as error:
        _remove(temporary)
        if (named := disk_error(error, path)) is error:
            raise
        raise named from error


def disk_error(error: BaseException, path: Path) -> BaseException:
    """The SetupError of a full or read-only disk; any other error as it is."""
    number = _system_error(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return SetupError("the disk is full", where=str(path), fix="free space and start again; finished rows are kept")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return SetupError("cannot write here", where=str(path), fix="check the folder's permissions")
    return error


def _system_error(error: BaseException) -> int | None:
    """The number of an error of the system; libraries in Rust, as safetensors is, have it only in the text of their own errors."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def write_json(path: Path, value: Any) -> None:
    """Atomic JSON with sorted keys, readable by people."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        MissingInputError, DataError: it is absent, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError("there is no such file", where=str(path), fix="run the stage that makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON: {error}", where=str(path), fix="delete it and run the stage again") from None


_digests: dict[tuple[str, int, int, int], str] = {}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the sorted (relative path, SHA-256) pairs of a folder, in hex.

    Remembered in this process by path, inode, size and time of change.

    Raises:
        MissingInputError: there is neither.
    """
    if path.is_dir():
        total = hashlib.sha256()
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            total.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
        return total.hexdigest()
    if not path.is_file():
        raise MissingInputError("there is no such file", where=str(path), fix="run the stage that makes it")
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as stream:
            _digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[key]


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
