"""Typed Parquet: written whole, read only if columns, types, version and keys are what the schema says.

What takes no more than PART_ROWS rows at a time (`read_parts`, `write_parts`) takes no more memory for a million of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from papo.errors import DamagedError, DataError, MissingInputError
from papo.schemas import Table
from papo.store.files import digest, read_json, replacing, write_json

GROUP_ROWS = 65_536
"""Rows of a group in a file, whoever wrote it, so that the same rows are the same bytes."""

PART_ROWS = 16_384
"""Rows that are held as Python objects at a time, where a table is worked on in parts."""

ROWS_AT_ONCE = 50_000


def write_rows(path: Path, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """As `write_table`, from a list of mappings.

    Raises:
        DataError: a value does not fit its column, or a null where none may be.
    """
    write_table(path, table, _frame(path, table, rows))


def write_table(path: Path, table: Table, frame: pa.Table) -> None:
    """Writes `frame` atomically, and reads footer and row count back before the file takes its place."""
    write_parts(path, table, [frame])


def write_parts(path: Path, table: Table, parts: Iterable[pa.Table | Sequence[Mapping[str, Any]]]) -> int:
    """As `write_table` or `write_rows` of all parts together, of which no more than one group is held; the number of rows.

    The first group is complete before anything is written. What a part raises while it is made leaves the file as it was.
    """
    groups = _groups(path, table, parts)
    first = next(groups)
    with replacing(path) as temporary:
        return _write(temporary, table, chain([first], groups), path)


def _write(temporary: Path, table: Table, groups: Iterable[pa.Table], path: Path) -> int:
    rows = 0
    with pq.ParquetWriter(temporary, table.schema, compression="zstd", write_page_checksum=True) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=GROUP_ROWS)
            rows += len(group)
    written = pq.read_metadata(temporary).num_rows
    if written != rows:
        raise DataError(f"{written} rows on disk, {rows} written", where=str(path), fix="check the disk")
    return rows


def write_sealed_rows(path: Path, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """As `write_rows`, with the file's digest beside it, for a table that no manifest tells of. The digest is there before the table is."""
    groups = _groups(path, table, [rows])
    first = next(groups)
    with replacing(path) as temporary:
        _write(temporary, table, chain([first], groups), path)
        write_json(_seal(path), {"sha256": digest(temporary)})


def read_sealed_table(path: Path, table: Table) -> pa.Table:
    """As `read_table`, of what `write_sealed_rows` wrote.

    Raises:
        DamagedError: it is not what was written.
    """
    fix = "delete it and run the stage that makes it again"
    try:
        written = read_json(_seal(path))
    except (MissingInputError, DataError) as error:
        raise DamagedError(f"its digest cannot be read: {error.what}", where=str(path), fix=fix) from None
    if written != {"sha256": digest(path)}:
        raise DamagedError("its digest is not that of what was written", where=str(path), fix=fix)
    return read_table(path, table)


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256.json")


def _groups(path: Path, table: Table, parts: Iterable[pa.Table | Sequence[Mapping[str, Any]]]) -> Iterator[pa.Table]:
    """The rows in groups of GROUP_ROWS, the last of which may be smaller; one empty group where there are none."""
    held: list[pa.Table] = []
    rows, any_yet = 0, False
    for part in parts:
        frame = part if isinstance(part, pa.Table) else _frame(path, table, part)
        _check_nulls(frame, table, path)
        held.append(frame)
        rows += len(frame)
        while rows >= GROUP_ROWS:
            whole = pa.concat_tables(held)
            yield whole.slice(0, GROUP_ROWS).combine_chunks()
            held, rows, any_yet = [whole.slice(GROUP_ROWS)], rows - GROUP_ROWS, True
    if rows or not any_yet:
        yield pa.concat_tables(held).combine_chunks() if held else table.schema.empty_table()


def _frame(path: Path, table: Table, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist([dict(row) for row in rows], schema=table.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"rows do not fit the table {table.name}: {error}", where=str(path)) from error


def read_table(path: Path, table: Table, *columns: str) -> pa.Table:
    """The Parquet file `path`, or only the columns named, checked against `table`.

    Raises:
        MissingInputError: there is no such file.
        DataError: truncated, a column missing or of another type, nulls where none may be, another table or version.
    """
    frames = list(read_parts(path, table, *columns))
    return pa.concat_tables(frames) if frames else _schema_of(table, columns).empty_table()


def read_parts(path: Path, table: Table, *columns: str, rows: int | None = None) -> Iterator[pa.Table]:
    """As `read_table`, by `rows` rows at a time, or PART_ROWS; no part where there are no rows."""
    file = _opened(path, table)
    schema = _schema_of(table, columns)
    done = 0
    try:
        for batch in file.iter_batches(batch_size=rows or PART_ROWS, columns=schema.names):
            yield _fitting(pa.Table.from_batches([batch]), table, schema, path, done)
            done += len(batch)
        if (
            done != file.metadata.num_rows
        ):  # the checksum of a page is not of its header, which says how many rows it has
            raise ValueError(f"{done} rows in its pages, {file.metadata.num_rows} by its footer")
    except (pa.ArrowException, OSError, ValueError) as error:  # as in `_opened`
        raise _not_whole(path, error) from None
    finally:
        file.close()


def _schema_of(table: Table, columns: Sequence[str]) -> pa.Schema:
    schema = table.schema
    if not columns:
        return schema
    return pa.schema([schema.field(name) for name in columns]).with_metadata(schema.metadata)


_AGAIN = "delete it and run the stage that makes it again"


def _not_whole(path: Path, error: Exception) -> DataError:
    return DataError(f"not a whole Parquet file: {error}", where=str(path), fix=_AGAIN)


def _opened(path: Path, table: Table) -> pq.ParquetFile:
    """The file, whose footer says that it is of this table."""
    if not path.is_file():
        raise MissingInputError(
            f"the table {table.name} is not there", where=str(path), fix="run the stage that makes it"
        )
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        names = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:  # a damaged name is no UTF-8, which is a ValueError
        raise _not_whole(path, error) from None
    name, version = metadata.get("papo.table"), metadata.get("papo.version")
    if name is not None and name != table.name:
        raise DataError(f"holds the table {name}, not {table.name}", where=str(path), fix="name the right file")
    if name is not None and version != str(table.version):
        raise DataError(
            f"has version {version} of the table {table.name}; this papo reads version {table.version}",
            where=str(path),
            fix=_AGAIN,
        )
    if missing := [column for column, _ in table.columns if column not in names]:
        raise DataError(f"lacks the column {', '.join(missing)}", where=str(path), fix=_AGAIN)
    return file


def _fitting(frame: pa.Table, table: Table, schema: pa.Schema, path: Path, first: int) -> pa.Table:
    frame = frame.select(schema.names)
    _check_nulls(frame, table, path, first)
    try:
        return frame.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(f"a column does not fit the table {table.name}: {error}", where=str(path), fix=_AGAIN) from None


def read_rows(path: Path, table: Table) -> list[dict[str, Any]]:
    """As `read_table`, as a list of dicts."""
    return read_columns(path, table)


def read_columns(path: Path, table: Table, *columns: str) -> list[dict[str, Any]]:
    """As `read_rows`, only the columns named."""
    return [row for part in read_parts(path, table, *columns) for row in part.to_pylist()]


def table_digest(path: Path, *, without: Sequence[str] = ()) -> str:
    """SHA-256 of the rows of a Parquet file in their order, without the columns named; read in parts, compression does not count.

    Raises:
        MissingInputError, DataError: it is absent, or not a whole Parquet file.
    """
    total = hashlib.sha256()
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name not in without]
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                with pa.BufferOutputStream() as sink:
                    with pa.ipc.new_stream(sink, batch.schema.remove_metadata()) as stream:
                        stream.write_batch(batch.replace_schema_metadata())
                    total.update(sink.getvalue())
    except FileNotFoundError:
        raise MissingInputError("there is no such table", where=str(path), fix="run the stage that makes it") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a whole Parquet file: {error}", where=str(path), fix="run its stage again") from None
    return total.hexdigest()


def numbers(frame: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """A column of numbers, NaN where it is null."""
    return np.asarray(frame[column].to_numpy(), dtype=np.float64)


def codes(frame: pa.Table, column: str) -> tuple[npt.NDArray[np.intp], list[str]]:
    """A column of texts as numbers from 0, in the order in which they first occur, and the texts that these stand for."""
    found = frame[column].combine_chunks().dictionary_encode()
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    texts: list[Any] = found.dictionary.to_pylist()
    return found.indices.to_numpy(zero_copy_only=False).astype(np.intp), texts


def values(frame: pa.Table, column: str) -> list[Any]:
    """A column as Python has it."""
    found: list[Any] = frame[column].to_pylist()
    return found


def lengths(frame: pa.Table, column: str) -> npt.NDArray[np.int64]:
    """How many values each list of a column has."""
    return np.asarray(pc.list_value_length(frame[column]).to_numpy(), dtype=np.int64)


def _check_nulls(frame: pa.Table, table: Table, path: Path, first: int = 0) -> None:
    for column in frame.column_names:
        if column not in table.nullable and frame[column].null_count:
            row = first + frame[column].is_null().to_pylist().index(True)
            raise DataError(
                f"column {column} of the table {table.name} is null in {frame[column].null_count} rows",
                where=f"{path}, row {row}",
                fix="every row must have it",
            )
