"""Rows that are dear to make, kept by everything that decides them: whoever asks for them again reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.errors import DataError
from papo.schemas import Table
from papo.store.faults import reached
from papo.store.tables import read_sealed_table, write_sealed_rows


def kept_rows(
    folder: Path, table: Table, identity: Mapping[str, Any], make: Callable[[], Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of `identity`, made only if `folder` does not have them, or has them damaged.

    Args:
        folder: one file an identity; may be deleted at any time.
        identity: all that the rows depend on, as JSON has it.
    """
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    path = folder / f"{name[:32]}.parquet"
    if path.is_file():
        try:
            return _read(path, table)
        except DataError:
            pass  # made again, and written over
    write_sealed_rows(path, table, make())
    reached("shard stored", path)
    return _read(path, table)


def _read(path: Path, table: Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_sealed_table(path, table).to_pylist()
    return rows
