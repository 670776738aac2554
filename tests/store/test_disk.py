"""A disk that fills up, for real: the command says so, writes nothing half, and goes on when there is space."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from papo.cli import main
from papo.store.files import digest


def results(disk: Path) -> set[str]:
    return {str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file() and ".papo" not in path.parts}


@pytest.mark.parametrize(
    ("command", "inputs", "output"),
    [
        (["prepare"], [], "data/problems"),
        (["warmstart"], ["data"], "artifacts/warmstart"),
        (["rollout", "--round", "0"], ["data", "artifacts/warmstart"], "artifacts/rounds/0/rollouts.parquet"),
    ],
    ids=["prepare", "warmstart", "rollout"],
)
def test_a_full_disk_loses_nothing(
    small_disk: Path, fill: Callable[[Path], Path], started_checkout: Path, capsys: pytest.CaptureFixture[str],
    command: list[str], inputs: list[str], output: str,
) -> None:  # fmt: skip
    for name in inputs:
        shutil.copytree(started_checkout / name, small_disk / name)
    filler = fill(small_disk)
    before = results(small_disk)

    assert main([*command, "--workspace", str(small_disk)]) == 2
    message = capsys.readouterr().err
    assert "papo: the disk is full" in message
    assert f"where: {small_disk}" in message
    assert "free space" in message
    assert results(small_disk) == before

    filler.unlink()
    assert main([*command, "--workspace", str(small_disk)]) == 0
    assert digest(small_disk / output) == digest(started_checkout / output)
