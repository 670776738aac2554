"""Which run a person means: by its id or lineage, its workspace, a flow run, an MLflow run, a policy or any other output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from papo.errors import DamagedError, UserError
from papo.lineage.record import RunRecord, read_record
from papo.store.files import digest
from papo.store.layout import Workspace, manifest_path

REPRODUCTION = "reproduction.json"
"""Marks a workspace whose run was made again by `papo reproduce`."""

SHORTEST = 4
LISTED = 12


@dataclass(frozen=True)
class Known:
    """A record and its file; `because` says how a person's word led to it."""

    path: Path
    record: RunRecord
    because: str = ""

    @property
    def workspace(self) -> Workspace:
        """Where the file lies now: a workspace may have been moved since."""
        return Workspace(self.path.parents[2])


@dataclass(frozen=True)
class Found:
    """All records that can be read, the oldest first, and what is wrong with the others."""

    known: list[Known]
    damaged: list[str]


AskMlflow = Callable[[str], Mapping[str, str]]
"""Tags of the MLflow run with this id; empty where there is none."""


def known_runs(*further: Path) -> Found:
    """Those of this folder, of the folders under runs/, and of the `further` workspaces."""
    folders = [Path(), *sorted(path for path in Path("runs").glob("*") if path.is_dir()), *further]
    paths = {path.resolve(): path for folder in folders for path in Workspace(folder).records.glob("*.json")}
    known, damaged = [], []
    for path in paths.values():
        try:
            known.append(Known(path, read_record(path)))
        except DamagedError as error:
            damaged.append(f"{path}: {error.what}")
    return Found(sorted(known, key=lambda one: one.record.starts[0].at), damaged)


def find(name: str, *, mlflow: AskMlflow = lambda run: {}) -> Known:
    """The one run that a person means.

    Args:
        name: a workspace (its last run), an output such as a policy's folder, or the first digits of an id of the run, its lineage, its
            flow run, its MLflow run, or of an output's digest.

    Raises:
        UserError: none, or several; the message lists those that are known, or that it may be.
        DamagedError: the workspace has only records that cannot be read.
    """
    path = Path(name)
    if name and path.is_dir() and Workspace(path).records.is_dir():
        return _last_of(path)
    found = known_runs(*_workspaces_above(path))
    matches = _by_path(path, found.known) if _is_output(path) else _by_id(name.lower(), found.known)
    if not matches and re.fullmatch("[0-9a-f]{32}", name):
        matches = _by_tags(mlflow(name), found.known)
    # What was made again has the lineage and the digests of what it was made from.
    first = [one for one in matches if not (one.workspace.root / REPRODUCTION).is_file()]
    matches = first if len(first) == 1 else matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"{name} may be {len(matches)} runs:\n{_list(matches)}",
            where="RUN",
            fix="name more digits of the id, or the workspace",
        )
    shown = f"those known here:\n{_list(found.known)}" if found.known else "none is known here"
    if found.damaged:
        shown += "\n" + "\n".join(f"  cannot be read: {line}" for line in found.damaged)
    raise UserError(
        f"there is no run {name!r}; {shown}",
        where="RUN",
        fix="name one by the first digits of its id, or by its workspace; `papo lineage` lists them",
    )


def _last_of(folder: Path) -> Known:
    paths = sorted(Workspace(folder).records.glob("*.json"))
    known = [one for one in known_runs(folder).known if one.path.resolve() in {path.resolve() for path in paths}]
    if not known:
        if paths:
            read_record(paths[-1])  # says what is wrong with it
        raise UserError(f"no run is on record in {folder}", where="RUN", fix="run `papo run` there, or name another")
    last = max(known, key=lambda one: one.record.last.at)
    because = "the workspace" if len(known) == 1 else f"the last of {len(known)} runs in the workspace"
    return Known(last.path, last.record, because)


def _workspaces_above(path: Path) -> list[Path]:
    return [above for above in path.resolve().parents if Workspace(above).records.is_dir()] if path.exists() else []


def _by_id(name: str, known: Iterable[Known]) -> list[Known]:
    if len(name) < SHORTEST:
        return []
    matches = [_because(one, why) for one in known if (why := _id_of(one.record, name))]
    if exact := [one for one in matches if one.record.id == name]:
        return exact
    return matches or _by_output(name, known)


def _id_of(record: RunRecord, name: str) -> str | None:
    if record.id.startswith(name):
        return "its id" if len(name) > len(record.lineage) else "its lineage"
    return "its flow run" if any((start.flow_run or "").startswith(name) for start in record.starts) else None


def _is_output(path: Path) -> bool:
    """Whether a path may be what a stage made; another folder may hold anything, and is not read for its digest."""
    return path.is_file() or (
        path.is_dir() and ((path / "config.json").is_file() or manifest_path(path.resolve()).is_file())
    )


def _by_path(path: Path, known: Iterable[Known]) -> list[Known]:
    """Runs with this output; the last one of the workspace that it lies in, where there is such."""
    matches = _by_output(digest(path), known)
    here = [one for one in matches if path.resolve().is_relative_to(one.workspace.root.resolve() / "artifacts")]
    return here[-1:] or matches


def _by_output(name: str, known: Iterable[Known]) -> list[Known]:
    """Runs with an output of this digest; only the one that made it, where others took it over or made it again later."""
    found = [
        (one, step.made, f"{output} of {step.name}")
        for one in known
        for step in one.record.steps
        for output, content in step.outputs.items()
        if content.startswith(name)
    ]
    first = {one.record.id: _because(one, why) for one, made, why in found if made}
    every = {one.record.id: _because(one, why) for one, _, why in found}
    return list((first if len(first) == 1 else every).values())


def _by_tags(tags: Mapping[str, str], known: Iterable[Known]) -> list[Known]:
    return [_because(one, "its MLflow run") for one in known if one.record.id == tags.get("papo.run_id")]


def _because(one: Known, why: str) -> Known:
    return Known(one.path, one.record, why)


def _list(known: list[Known]) -> str:
    lines = [f"  {one.record.id}  {one.record.name}, {one.record.state}, {one.workspace.root}" for one in known]
    more = [f"  and {len(lines) - LISTED} older ones"] if len(lines) > LISTED else []
    return "\n".join([*lines[-LISTED:], *more])
