"""A store of verdicts that is not there yet, for the tests of the store and of the ledger in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from papo.store.verdicts import VerdictStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept/verdicts.sqlite"


@pytest.fixture
def store(path: Path, warned: list[str]) -> Iterator[VerdictStore]:
    with VerdictStore.open(path, warn=warned.append) as opened:
        yield opened
