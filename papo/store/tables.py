"""Typed Parquet: written whole, read only if columns, types, version and keys are what the schema says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from papo.errors import DataError, MissingInputError
from papo.schemas import Table
from papo.store.files import replacing


def write_rows(path: Path, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """As `write_table`, from a list of mappings.

    Raises:
        DataError: a value does not fit its column, or a null where none may be.
    """
    try:
        frame = pa.Table.from_pylist([dict(row) for row in rows], schema=table.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"rows do not fit the table {table.name}: {error}", where=str(path)) from error
    write_table(path, table, frame)


def write_table(path: Path, table: Table, frame: pa.Table) -> None:
    """Writes `frame` atomically, and reads footer and row count back before the file takes its place."""
    _check_nulls(frame, table, path)
    with replacing(path) as temporary:
        pq.write_table(frame, temporary, compression="zstd")
        written = pq.read_metadata(temporary).num_rows
        if written != len(frame):
            raise DataError(f"{written} rows on disk, {len(frame)} written", where=str(path), fix="check the disk")


def read_table(path: Path, table: Table) -> pa.Table:
    """The Parquet file `path`, checked against `table`.

    Raises:
        MissingInputError: there is no such file.
        DataError: truncated, a column missing or of another type, nulls where none may be, another table or version.
    """
    if not path.is_file():
        raise MissingInputError(
            f"the table {table.name} is not there", where=str(path), fix="run the stage that makes it"
        )
    again = "delete it and run the stage that makes it again"
    try:
        frame = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a whole Parquet file: {error}", where=str(path), fix=again) from None
    metadata = {key.decode(): value.decode() for key, value in (frame.schema.metadata or {}).items()}
    name, version = metadata.get("papo.table"), metadata.get("papo.version")
    if name is not None and name != table.name:
        raise DataError(f"holds the table {name}, not {table.name}", where=str(path), fix="name the right file")
    if name is not None and version != str(table.version):
        raise DataError(
            f"has version {version} of the table {table.name}; this papo reads version {table.version}",
            where=str(path),
            fix=again,
        )
    missing = [column for column, _ in table.columns if column not in frame.column_names]
    if missing:
        raise DataError(f"lacks the column {', '.join(missing)}", where=str(path), fix=again)
    frame = frame.select([column for column, _ in table.columns])
    _check_nulls(frame, table, path)
    try:
        return frame.cast(table.schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(f"a column does not fit the table {table.name}: {error}", where=str(path), fix=again) from None


def read_rows(path: Path, table: Table) -> list[dict[str, Any]]:
    """As `read_table`, as a list of dicts."""
    rows: list[dict[str, Any]] = read_table(path, table).to_pylist()
    return rows


def read_columns(path: Path, table: Table, *columns: str) -> list[dict[str, Any]]:
    """As `read_rows`, only the columns named."""
    rows: list[dict[str, Any]] = read_table(path, table).select(list(columns)).to_pylist()
    return rows


def _check_nulls(frame: pa.Table, table: Table, path: Path) -> None:
    for column, _ in table.columns:
        if column not in table.nullable and frame[column].null_count:
            row = frame[column].is_null().to_pylist().index(True)
            raise DataError(
                f"column {column} of the table {table.name} is null in {frame[column].null_count} rows",
                where=f"{path}, row {row}",
                fix="every row must have it",
            )
