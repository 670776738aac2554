"""What a disk holds after the machine lost power: only what was synced.

Stricter than most file systems: the content of a file is there as of its last fsync, and a name, also one that was removed or renamed, as
of the last fsync of its folder. SQLite syncs by itself, unseen from here; its files stay as they are.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

KEPT = (".sqlite", ".sqlite-wal", ".sqlite-shm", "mlflow.db")


class Power:
    """Notes from now on what is synced below `root`; all that is there now counts as synced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: list[int] = []  # so that no number of a file is given to another one
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            self._note(os.open(folder, os.O_RDONLY), folder)
        for file in (path for path in root.rglob("*") if path.is_file()):
            self._note(os.open(file, os.O_RDONLY), file)
        self._fsync = os.fsync
        os.fsync = self._sync

    def _sync(self, handle: int) -> None:
        self._fsync(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_relative_to(self._root):
            self._note(os.dup(handle), path)

    def _note(self, handle: int, path: Path) -> None:
        self._held.append(handle)
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = {
                entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in os.scandir(path)
            }
        else:
            self._content[found.st_ino] = path.read_bytes()

    def lose(self, *, emptied: bool) -> None:
        """Leaves what was synced; with `emptied`, every name is as it is now and only contents are lost."""
        if emptied:
            for path in self._root.rglob("*"):
                if path.is_file() and not path.name.endswith(KEPT):
                    kept = self._content.get(path.stat().st_ino, b"")
                    path.write_bytes(kept)
            return
        synced: dict[Path, bytes | None] = {}
        self._collect(self._root.stat().st_ino, self._root, synced)
        for path in sorted(self._root.rglob("*"), reverse=True):
            if path not in synced and not path.name.endswith(KEPT):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                else:
                    path.unlink()
        for path, content in synced.items():
            if content is None:
                if path.is_file():
                    path.unlink()
                path.mkdir(parents=True, exist_ok=True)
            elif not path.name.endswith(KEPT) and (not path.is_file() or path.read_bytes() != content):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                path.write_bytes(content)

    def _collect(self, folder: int, path: Path, synced: dict[Path, bytes | None]) -> None:
        for name, (number, is_folder) in self._names.get(folder, {}).items():
            synced[path / name] = None if is_folder else self._content.get(number, b"")
            if is_folder:
                self._collect(number, path / name, synced)
