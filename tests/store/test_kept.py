"""Rows kept by what decides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from papo.schemas import TRACES
from papo.store.kept import kept_rows

ROWS = [{"prompt": "a", "completion": "b"}]


def never() -> list[dict[str, Any]]:
    raise AssertionError("asked again")


def test_made_once_for_each_identity(tmp_path: Path) -> None:
    assert kept_rows(tmp_path / "kept", TRACES, {"a": 1}, lambda: ROWS) == ROWS
    assert kept_rows(tmp_path / "kept", TRACES, {"a": 1}, never) == ROWS
    with pytest.raises(AssertionError, match="asked again"):
        kept_rows(tmp_path / "kept", TRACES, {"a": 2}, never)


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    kept_rows(tmp_path, TRACES, {"a": "\ud800"}, lambda: ROWS)
    (path,) = tmp_path.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:50])
    assert kept_rows(tmp_path, TRACES, {"a": "\ud800"}, lambda: ROWS) == ROWS
    assert kept_rows(tmp_path, TRACES, {"a": "\ud800"}, never) == ROWS


def test_what_fails_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        kept_rows(tmp_path, TRACES, {}, never)
    assert kept_rows(tmp_path, TRACES, {}, lambda: ROWS) == ROWS
