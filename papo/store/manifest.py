"""What a stage did, and whether it has to do it again.

A stage's identity is the digest of its params, its plain inputs (round, seed), the content of its input files and the code it is made
of. The manifest is written last, so a manifest whose identity and output digests agree says: nothing to do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

import papo
from papo.errors import DataError, PapoError
from papo.schemas import Table
from papo.store.faults import reached
from papo.store.files import clear_folder, digest, disk_error, make_folder, read_sealed, write_sealed
from papo.store.layout import manifest_path
from papo.store.tables import read_sealed_table, write_sealed_rows

PACKAGE = Path(papo.__file__).parent

P = TypeVar("P")
R = TypeVar("R")


class Manifest(BaseModel):
    """The record of one run of a stage, beside its first output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    stage: str
    round: int | None
    identity: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    code: str
    outputs: dict[str, str]
    rows: int
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    versions: dict[str, str] = {}
    seconds: float
    skipped: bool = False

    @classmethod
    def read(cls, output: Path) -> Manifest:
        """The manifest beside `output`.

        Raises:
            MissingInputError, DataError: it is absent or damaged.
        """
        path = manifest_path(output)
        try:
            return cls.model_validate(read_sealed(path))
        except ValidationError as error:
            raise DataError(
                f"not a manifest of this version: {error.error_count()} fields are wrong",
                where=str(path),
                fix="delete it and run the stage again",
            ) from None


def _no_progress(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


class Spread(Protocol):
    """Runs work on pieces of `chunk` items in other processes, on this machine or others."""

    @property
    def chunk(self) -> int: ...

    def map(self, name: str, work: Callable[[P], R], pieces: Sequence[P], *, cpus: int) -> Iterator[R]:
        """What `work`, which has to be picklable and to take so many CPUs, makes of each piece, in order; from any thread.

        Raises:
            PapoError: of the work, as it was raised.
            ServerDownError, StageError, SetupError: of the machines.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage is given beside its params and inputs; none of it changes a result.

    `begin` is called with the stage's name when there is something to do, before its time is taken; `say` is told of what takes time,
    `trace` of each call of a model, with what `Tracker.trace` takes; `spread` scores elsewhere, None: in this process.
    """

    work: Path = Path(".papo")
    begin: Callable[[str], None] = lambda stage: None
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _no_progress
    warn: Callable[[str], None] = lambda message: None
    say: Callable[[str], None] = lambda message: None
    trace: Callable[[Mapping[str, Any]], None] = lambda call: None
    spread: Spread | None = None


class Task:
    """One run of a stage: is it done already, its shards, and its manifest.

    Args:
        stage: name of the stage; that of its module.
        params: what of the params the stage depends on, a section or several by name.
        inputs: a dataclass; a Path, or a mapping to Paths, counts by the content it names, everything else by value.
        outputs: files or folders that the stage makes, the manifest beside the first of them.
        code: files and folders of the package that the stage is made of.
    """

    def __init__(
        self,
        stage: str,
        params: BaseModel | Mapping[str, Any],
        inputs: Any,
        outputs: Sequence[Path],
        *,
        code: Sequence[str],
        context: Context,
    ) -> None:
        self.stage, self.context, self.outputs = stage, context, list(outputs)
        self.round: int | None = getattr(inputs, "round", None)
        self._params = _plain(params)
        self._inputs = {field.name: _content(getattr(inputs, field.name)) for field in dataclasses.fields(inputs)}
        self._code = code_digest(code)
        self._started = time.monotonic()

    @cached_property
    def identity(self) -> str:
        parts = {"stage": self.stage, "params": self._params, "inputs": self._inputs, "code": self._code}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def work(self) -> Path:
        """Folder of the shards under way; its name holds the identity, so that old shards are never taken for new ones."""
        name = self.stage if self.round is None else f"{self.stage}-{self.round}"
        return self.context.work / "work" / f"{name}-{self.identity[:16]}"

    def done(self) -> Manifest | None:
        """The manifest, if the stage has run with this identity and its outputs are still what it wrote."""
        if (manifest := self._finished()) is None:
            self.context.begin(self.stage)
            self._started = time.monotonic()
        return manifest

    def _finished(self) -> Manifest | None:
        if not manifest_path(self.outputs[0]).is_file() or not all(output.exists() for output in self.outputs):
            return None
        try:
            manifest = Manifest.read(self.outputs[0])
        except DataError as error:
            self.context.warn(f"{error.what}; {self.stage} runs again")
            return None
        if manifest.identity != self.identity:
            return None
        changed = [out.name for out in self.outputs if digest(out) != manifest.outputs.get(out.name)]
        if changed:
            self.context.warn(f"{', '.join(changed)} changed after {self.stage} wrote it; the stage runs again")
            return None
        return manifest.model_copy(update={"skipped": True})

    def shard(self, index: int, table: Table, make: Callable[[], Sequence[Mapping[str, Any]]]) -> pa.Table:
        """Shard `index`, made only if an earlier run has not finished it."""
        found = self.stored(index, table)
        return self.store(index, table, make()) if found is None else found

    def stored(self, index: int, table: Table) -> pa.Table | None:
        """Shard `index`, if an earlier run has finished it. A damaged one is set aside."""
        path = self._shard(index, table)
        if not path.exists():
            return None
        try:
            return read_sealed_table(path, table)
        except PapoError as error:
            aside = self.context.work / "quarantine" / f"{self.work.name}-{path.name}"
            try:
                make_folder(aside.parent)
                reached("set aside", path)
                path.replace(aside)
            except OSError as problem:
                raise disk_error(problem, path) from problem
            self.context.warn(f"shard {path.name} is damaged ({error.what}); moved to {aside} and made again")
            return None

    def store(self, index: int, table: Table, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Shard `index`, as it is read back."""
        path = self._shard(index, table)
        write_sealed_rows(path, table, rows)
        reached("shard stored", path)
        return read_sealed_table(path, table)

    def _shard(self, index: int, table: Table) -> Path:
        return self.work / f"{table.name}-{index:05d}.parquet"

    def finish(
        self,
        *,
        rows: int,
        counts: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
        history: Sequence[Mapping[str, float]] = (),
        versions: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Writes the manifest, the last act of a stage, and clears the shards."""
        manifest = Manifest(
            stage=self.stage,
            round=self.round,
            identity=self.identity,
            params=self._params,
            inputs=self._inputs,
            code=self._code,
            outputs={output.name: digest(output) for output in self.outputs},
            rows=rows,
            counts=dict(counts or {}),
            metrics={key: float(value) for key, value in (metrics or {}).items()},
            history=[dict(row) for row in history],
            versions=dict(versions or {}),
            seconds=round(time.monotonic() - self._started, 3),
        )
        write_sealed(manifest_path(self.outputs[0]), manifest.model_dump(mode="json", exclude={"skipped"}))
        reached("stage finished", manifest_path(self.outputs[0]))
        clear_folder(self.work)
        return manifest


def code_digest(code: Sequence[str]) -> str:
    """Digest of the files, and of the sources and templates in the folders, of the package that are named."""
    total = hashlib.sha256()
    for name in sorted(code):
        path = PACKAGE / name
        files = sorted(file for file in path.rglob("*") if file.suffix in (".py", ".j2")) if path.is_dir() else [path]
        for file in files:
            total.update(f"{file.relative_to(PACKAGE).as_posix()}\0{digest(file)}\n".encode())
    return total.hexdigest()


def _plain(params: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(params, BaseModel):
        return params.model_dump(mode="json")
    return {key: _plain(value) if isinstance(value, BaseModel | Mapping) else value for key, value in params.items()}


def _content(value: Any) -> Any:
    if isinstance(value, Path):
        return digest(value)
    if isinstance(value, Mapping):
        return {str(key): _content(item) for key, item in value.items()}
    return value
