"""A table is read only if it is whole and what its schema says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo.errors import DataError, MissingInputError
from papo.schemas import KEY, ORM, PRM, TABLES, TRACES, Table
from papo.store.tables import read_columns, read_rows, read_table, write_rows, write_table

ROW = {
    "round": 0, "problem_id": "a", "sample_index": 1, "orm_score": None, "extracted": None, "status": "timeout", "detail": None,
    "second_opinion": None, "second_opinion_status": "not_asked",
}  # fmt: skip


def stored(folder: Path, **change: Any) -> Path:
    path = folder / "orm.parquet"
    write_rows(path, ORM, [ROW | {"orm_score": 1.0, "status": "ok"}, ROW | change])
    return path


def written_by_others(path: Path, frame: pa.Table) -> Path:
    pq.write_table(frame, path)
    return path


def test_rows_come_back_as_they_were_with_nulls(tmp_path: Path) -> None:
    path = stored(tmp_path)
    assert read_rows(path, ORM) == [ROW | {"orm_score": 1.0, "status": "ok"}, ROW]
    assert read_columns(path, ORM, "status", "orm_score") == [
        {"status": "ok", "orm_score": 1.0},
        {"status": "timeout", "orm_score": None},
    ]
    assert read_table(path, ORM).schema.metadata == {b"papo.table": b"orm", b"papo.version": b"2"}


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = stored(tmp_path / "a").read_bytes()
    assert stored(tmp_path / "b").read_bytes() == first


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.parquet", TRACES, [])
    assert read_rows(tmp_path / "t.parquet", TRACES) == []


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_keys_may_never_be_null(table: Table) -> None:
    assert not table.nullable & {*KEY, "status"}
    assert table.nullable <= {name for name, _ in table.columns}


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="the table orm is not there") as caught:
        read_table(tmp_path / "orm.parquet", ORM)
    assert caught.value.where == str(tmp_path / "orm.parquet")


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -9])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = stored(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="not a whole Parquet file") as caught:
        read_table(path, ORM)
    assert caught.value.where == str(path)
    assert "run the stage" in caught.value.fix


def test_a_file_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_table(path, ORM)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pa.Table.from_pylist([ROW]).drop_columns(["status"]), "lacks the column status"),
        (pa.Table.from_pylist([ROW | {"sample_index": "first"}]), "a column does not fit the table orm"),
        (pa.Table.from_pylist([ROW | {"status": ["ok"]}]), "a column does not fit the table orm"),
        (pa.Table.from_pylist([ROW, ROW | {"problem_id": None}]), "column problem_id .* is null in 1 rows"),
        (pa.Table.from_pylist([ROW | {"sample_index": 2**40}]), "a column does not fit the table orm"),
    ],
    ids=["missing column", "wrong type", "list for string", "null", "number too large"],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, frame: pa.Table, message: str) -> None:
    path = written_by_others(tmp_path / "orm.parquet", frame)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, ORM)
    assert str(path) in caught.value.where


def test_the_row_with_the_null_is_named(tmp_path: Path) -> None:
    path = written_by_others(tmp_path / "o.parquet", pa.Table.from_pylist([ROW, ROW, ROW | {"status": None}]))
    with pytest.raises(DataError) as caught:
        read_table(path, ORM)
    assert caught.value.where.endswith("row 2")


def test_columns_of_others_are_dropped_and_ours_put_in_order(tmp_path: Path) -> None:
    frame = pa.Table.from_pylist([{"note": "x"} | dict(reversed(ROW.items()))])
    path = written_by_others(tmp_path / "orm.parquet", frame)
    assert read_table(path, ORM).column_names == [name for name, _ in ORM.columns]


def test_another_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds the table orm, not prm"):
        read_table(stored(tmp_path), PRM)


def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has version 2 of the table orm; this papo reads version 3"):
        read_table(stored(tmp_path), replace(ORM, version=3))


@pytest.mark.parametrize("change", [{"status": None}, {"sample_index": "first"}, {"orm_score": "high"}])
def test_bad_rows_are_not_written(tmp_path: Path, change: dict[str, Any]) -> None:
    before = stored(tmp_path).read_bytes()
    with pytest.raises(DataError, match="table orm"):
        stored(tmp_path, **change)
    assert (tmp_path / "orm.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["orm.parquet"]


def test_a_frame_with_nulls_is_not_written(tmp_path: Path) -> None:
    frame = pa.Table.from_pylist([ROW | {"problem_id": None}], schema=ORM.schema)
    with pytest.raises(DataError, match="column problem_id"):
        write_table(tmp_path / "orm.parquet", ORM, frame)
    assert list(tmp_path.iterdir()) == []
