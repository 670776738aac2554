"""A table is read only if it is whole and what its schema says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo.errors import DamagedError, DataError, MissingInputError
from papo.schemas import KEY, ORM, PRM, TABLES, TRACES, Table
from papo.store import tables
from papo.store.tables import (
    read_columns,
    read_parts,
    read_rows,
    read_sealed_table,
    read_table,
    table_digest,
    write_parts,
    write_rows,
    write_sealed_rows,
    write_table,
)

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


def numbered(count: int) -> list[dict[str, Any]]:
    return [ROW | {"problem_id": f"p{number // 4}", "sample_index": number} for number in range(count)]


def test_parts_are_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = numbered(10)
    write_rows(tmp_path / "whole.parquet", ORM, rows)
    monkeypatch.setattr(tables, "GROUP_ROWS", 4)
    for name, size in (("threes", 3), ("ones", 1), ("all", 10)):
        parts = [rows[at : at + size] for at in range(0, 10, size)]
        assert write_parts(tmp_path / f"{name}.parquet", ORM, parts) == 10
    written = {(tmp_path / f"{name}.parquet").read_bytes() for name in ("threes", "ones", "all")}
    assert len(written) == 1  # however it was made
    assert pq.read_metadata(tmp_path / "all.parquet").num_row_groups == 3
    for name in ("whole", "all"):
        read = list(read_parts(tmp_path / f"{name}.parquet", ORM, "sample_index", rows=3))
        assert max(map(len, read)) == 3
        assert pa.concat_tables(read)["sample_index"].to_pylist() == list(range(10))
        assert read_rows(tmp_path / f"{name}.parquet", ORM) == rows


def test_a_part_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 2)
    before = stored(tmp_path).read_bytes()

    def parts(good: int) -> Iterator[list[dict[str, Any]]]:
        yield from ([row] for row in numbered(good))
        raise DataError("the last part cannot be made")

    for good in (0, 1, 2, 7):
        with pytest.raises(DataError, match="the last part"):
            write_parts(tmp_path / "orm.parquet", ORM, parts(good))
        assert (tmp_path / "orm.parquet").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["orm.parquet"]


def test_the_row_with_a_null_is_counted_through_all_parts(tmp_path: Path) -> None:
    path = written_by_others(tmp_path / "o.parquet", pa.Table.from_pylist([*numbered(5), ROW | {"status": None}]))
    with pytest.raises(DataError) as caught:
        list(read_parts(path, ORM, rows=2))
    assert caught.value.where.endswith("row 5")


def test_columns_as_arrays(tmp_path: Path) -> None:
    frame = read_table(stored(tmp_path), ORM)
    assert tables.numbers(frame, "orm_score")[0] == 1.0
    assert np.isnan(tables.numbers(frame, "orm_score")[1])
    path = tmp_path / "t.parquet"
    write_rows(path, TRACES, [{"prompt": text, "completion": ""} for text in "bab"])
    found, texts = tables.codes(pa.concat_tables(list(read_parts(path, TRACES, rows=1))), "prompt")
    assert (found.tolist(), texts) == ([0, 1, 0], ["b", "a"])


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


TRACE_ROWS = [{"prompt": f"{number} + 1 = ?", "completion": f"{number + 1}"} for number in range(9)]


def flips(path: Path, bits: int) -> Iterator[int]:
    """Each place of a file, while a bit of the byte there is another one."""
    whole, chance = path.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        for bit in chance.sample(range(8), bits):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            yield place
    path.write_bytes(whole)


def test_no_bit_of_a_page_is_another_one_unnoticed_and_every_error_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "traces.parquet"
    write_rows(path, TRACES, TRACE_ROWS)
    whole, footer = read_table(path, TRACES), pq.read_metadata(path).serialized_size + 8
    pages, other, refused = path.stat().st_size - footer, [], 0
    for place in flips(path, 2):
        try:
            found = read_table(path, TRACES)
        except DataError:
            refused += 1
        else:
            # What the footer says beside the pages is seen by the digests of manifests and seals alone.
            if place < pages and not found.equals(whole):
                other.append(place)
    assert other == []
    assert refused > pages


def test_no_bit_of_a_sealed_table_or_of_its_digest_is_another_one_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "traces.parquet"
    write_sealed_rows(path, TRACES, TRACE_ROWS)
    whole = read_sealed_table(path, TRACES)
    assert whole.to_pylist() == TRACE_ROWS
    assert read_table(path, TRACES) == whole
    for _ in flips(path, 1):
        with pytest.raises(DamagedError):
            read_sealed_table(path, TRACES)
    seal = path.with_suffix(".sha256.json")
    for _ in flips(seal, 1):
        with suppress(DamagedError):
            assert read_sealed_table(path, TRACES) == whole  # a blank that is another blank
    seal.unlink()
    with pytest.raises(DamagedError, match="digest cannot be read"):
        read_sealed_table(path, TRACES)


def test_the_digest_of_the_rows_is_of_what_they_say_in_the_columns_that_count(tmp_path: Path) -> None:
    first, other = stored(tmp_path / "a"), stored(tmp_path / "b", detail="slow")
    assert table_digest(first) != table_digest(other)
    assert table_digest(first, without=["detail"]) == table_digest(other, without=["detail"])
    again = tmp_path / "c.parquet"
    pq.write_table(pq.read_table(first), again, compression="snappy")
    assert again.read_bytes() != first.read_bytes()
    assert table_digest(again) == table_digest(first)
    pq.write_table(pq.read_table(first).take([1, 0]), again)
    assert table_digest(again) != table_digest(first)
    again.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        table_digest(again)
    with pytest.raises(MissingInputError):
        table_digest(tmp_path / "none.parquet")
