"""git and DVC in small real checkouts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from papo.engines.versioning import Dvc, git_commit
from papo.errors import SetupError


@pytest.fixture(autouse=True)
def _own_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the settings of this machine nor a checkout above the temporary folder play a part."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.org")


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def committed(root: Path) -> Path:
    git(root, "init")
    (root / "file").write_text("one")
    git(root, "add", "file")
    git(root, "commit", "-m", "first")
    return root


def test_the_commit_of_a_checkout_and_a_mark_where_files_differ(tmp_path: Path) -> None:
    commit = git_commit(committed(tmp_path))
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "new").write_text("not tracked")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == commit + "+changes"


def test_no_commit_without_git_without_a_checkout_and_without_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_commit(tmp_path) is None
    git(tmp_path, "init")
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_what_dvc_needs_is_asked_for_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Dvc(tmp_path)
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        with pytest.raises(SetupError, match="git is not installed"):
            record.check()
    with pytest.raises(SetupError, match="not a git checkout"):
        record.check()
    git(tmp_path, "init")
    with pytest.raises(SetupError, match=r"no .dvc folder"):
        record.check()
    (tmp_path / ".dvc").mkdir()
    with pytest.raises(SetupError, match=r"no dvc.yaml") as caught:
        record.check()
    assert caught.value.where == str(tmp_path)
    assert "--no-dvc" in caught.value.fix
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    record.check()


def test_commit_records_outputs_that_were_made_outside_dvc(tmp_path: Path) -> None:
    committed(tmp_path)
    dvc(tmp_path, "init", "--quiet")
    (tmp_path / "dvc.yaml").write_text("stages:\n  copy:\n    cmd: cp file copy\n    deps: [file]\n    outs: [copy]\n")
    assert "copy" in dvc(tmp_path, "status")
    (tmp_path / "copy").write_text("one")
    assert Dvc(tmp_path).commit() == "recorded: `dvc status` is clean"
    assert "up to date" in dvc(tmp_path, "status")
    (tmp_path / "copy").unlink()
    said = Dvc(tmp_path).commit()
    assert said.startswith("not recorded: `dvc commit` said ERROR: failed to commit")
    assert "copy" in said
