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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from papo.errors import DamagedError, DataError, MissingInputError, SetupError
from papo.store.faults import reached


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write; it takes the place of `path` only when the block ends without an error.

    Works for a file and for a folder. What was written is synced to the disk before the rename, the parent folder after it.

    Raises:
        SetupError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        # What killed runs left: nobody else writes `path`, for its workspace is locked.
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            _remove(left)
        reached("write", path)
        yield temporary
        reached("written", path)
        _sync_tree(temporary)
        if path.is_dir():
            reached("remove", path)
            shutil.rmtree(path)
        reached("rename", path)
        temporary.replace(path)
        reached("renamed", path)
        _sync(path.parent)
        reached("kept", path)
    except BaseException as error:
        with suppress(OSError):  # a disk that takes no write does not let go of a file either
            _remove(temporary)
        if (named := disk_error(error, path)) is error:
            raise
        raise named from error


def make_folder(path: Path) -> None:
    """The folder and those above it, synced, so that what is stored in it outlives the machine's losing power."""
    if path.is_dir():
        return
    make_folder(path.parent)
    reached("mkdir", path)
    path.mkdir(exist_ok=True)
    _sync(path.parent)


def clear_folder(path: Path) -> None:
    """Removes a folder as far as that can be done; what is left of it is in nobody's way."""
    with suppress(OSError):
        reached("remove", path)
        shutil.rmtree(path, ignore_errors=True)


def disk_error(error: BaseException, path: Path) -> BaseException:
    """The SetupError of a full or read-only disk; any other error as it is."""
    number = _system_error(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return SetupError("the disk is full", where=str(path), fix="free space and start again; finished rows are kept")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return SetupError("cannot write here", where=str(path), fix="check the folder's permissions")
    return error


def _system_error(error: BaseException) -> int | None:
    """The number of an error of the system; safetensors and shutil have it only in the text of their own errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else None


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


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """As `write_json`, with the digest of what is written."""
    # Through text, as it is read back: keys that are numbers are texts then.
    plain = json.loads(json.dumps(value, allow_nan=False))
    write_json(path, {**plain, "digest": _seal(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        MissingInputError, DataError: it is absent, not JSON, or not what was written.
    """
    value = read_json(path)
    # One that was written before there were digests has none.
    if not isinstance(value, dict) or ("digest" in value and value.pop("digest") != _seal(value)):
        fix = "delete it and run the stage again"
        raise DamagedError("its digest is not that of what was written", where=str(path), fix=fix)
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    reached("fsync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        reached("remove", path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
