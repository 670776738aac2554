"""Ways to break what keeps a run whole, each of which the harness has to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def apply(name: str) -> None:
    MUTATIONS[name]()


def _no_fsync() -> None:
    import papo.store.files as files

    files._sync = lambda path: None
    files._sync_tree = lambda path: None


def _no_folder_fsync() -> None:
    import papo.store.files as files

    sync = files._sync
    files._sync = lambda path: None if path.is_dir() else sync(path)


def _written_in_place() -> None:
    """The file is written under its own name."""
    import papo.store.files as files
    import papo.store.tables as tables

    @contextmanager
    def in_place(path: Path) -> Iterator[Path]:
        files.make_folder(path.parent)
        files.reached("write", path)
        yield path
        files.reached("written", path)
        files._sync_tree(path)
        files.reached("kept", path)

    files.replacing = tables.replacing = in_place


def _manifest_first() -> None:
    """The manifest is written, and the work cleared, before the tables of a rollout are there."""
    import papo.stages.rollout as rollout
    from papo.store import faults, tables
    from papo.store.manifest import Task

    waiting: list[Callable[[], None]] = []

    def later(write: Callable[..., None]) -> Callable[..., None]:
        def note(path: Path, *rest: Any) -> None:
            watcher, faults._watcher = faults._watcher, None
            write(path, *rest)  # for a moment, so that the manifest can have its digest
            faults._watcher = watcher
            waiting.append(lambda: write(path, *rest))

        return note

    finish = Task.finish

    def finish_first(task: Task, **rest: Any) -> Any:
        manifest = finish(task, **rest)
        for output in task.outputs if waiting else ():
            output.unlink()
        while waiting:
            waiting.pop(0)()
        return manifest

    rollout.write_table, rollout.write_rows = later(tables.write_table), later(tables.write_rows)
    Task.finish = finish_first


def _digests_not_checked() -> None:
    """What a manifest says of its outputs is believed."""
    import papo.store.manifest as manifest

    def finished(task: manifest.Task) -> manifest.Manifest | None:
        if not manifest.manifest_path(task.outputs[0]).is_file() or not all(out.exists() for out in task.outputs):
            return None
        found = manifest.Manifest.read(task.outputs[0])
        return found.model_copy(update={"skipped": True}) if found.identity == task.identity else None

    manifest.Task._finished = finished


def _seals_not_checked() -> None:
    import papo.engines.training.state as state
    import papo.store.files as files
    import papo.store.kept as kept
    import papo.store.manifest as manifest
    import papo.store.tables as tables

    def unsealed(path: Path) -> dict[str, Any]:
        value: dict[str, Any] = files.read_json(path)
        value.pop("digest", None)
        return value

    files.read_sealed = manifest.read_sealed = state.read_sealed = unsealed
    manifest.read_sealed_table = kept.read_sealed_table = tables.read_table


def _steps_not_checked() -> None:
    import papo.engines.training.state as state

    real = state.digest

    def unchecked(path: Path) -> Any:
        return _Any(real(path)) if path.name in (state.WEIGHTS_FILE, state.STATE_FILE) else real(path)

    state.digest = unchecked


class _Any(str):
    """Equal to every digest."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


MUTATIONS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "no fsync": _no_fsync,
    "no fsync of folders": _no_folder_fsync,
    "written in place": _written_in_place,
    "manifest first": _manifest_first,
    "digests not checked": _digests_not_checked,
    "seals not checked": _seals_not_checked,
    "steps not checked": _steps_not_checked,
}
