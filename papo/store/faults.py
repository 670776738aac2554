"""Points at which a test can end a run or hinder it: around every write, engine call and stage.

Nothing that a person can set switches this on, no param, option or environment variable: only Python that calls `watching` in the same
process, which the package does nowhere. A run that is watched says so. While nobody watches, a point costs one look at a variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Watcher = Callable[[str, Path | None, str], None]
"""Is told the point, the file or folder concerned, and the step where it is no file; whatever it raises is raised at the point."""

_watcher: Watcher | None = None


def reached(point: str, path: Path | None = None, detail: str = "") -> None:
    """Says that a point is reached; a literal, so that the points of the code can be listed."""
    if _watcher is not None:
        _watcher(point, path, detail)


def watched() -> bool:
    return _watcher is not None


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """For tests."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
