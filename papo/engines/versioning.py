"""git and DVC: which version of the data belongs to which params and code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from papo.errors import SetupError


def git_commit(root: Path) -> str | None:
    """The commit of the checkout, with `+changes` where files differ from it; None where there is no git or no commit."""
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


class Dvc:
    """Records what the stages made outside `dvc repro`, by the same functions, as if DVC had run them."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def check(self) -> None:
        """
        Raises:
            SetupError: no git, no git checkout, no .dvc folder or no dvc.yaml.
        """
        where = str(self._root.resolve())
        try:
            _git(self._root, "rev-parse", "--git-dir")
        except FileNotFoundError:
            raise SetupError("git is not installed", where=where, fix="install git, or pass --no-dvc") from None
        except subprocess.CalledProcessError:
            raise SetupError("not a git checkout", where=where, fix="run `git init`, or pass --no-dvc") from None
        if not (self._root / ".dvc").is_dir():
            raise SetupError("there is no .dvc folder", where=where, fix="run `dvc init`, or pass --no-dvc")
        if not (self._root / "dvc.yaml").is_file():
            raise SetupError("there is no dvc.yaml", where=where, fix="run `papo dvc`, or pass --no-dvc")

    def commit(self) -> str:
        """Runs `dvc commit --force`, after which `dvc status` is clean and `dvc repro` has nothing to do; says how it went."""
        environment = os.environ | {"DVC_NO_ANALYTICS": "true"}
        command = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet"]
        done = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return "recorded: `dvc status` is clean"
        return f"not recorded: `dvc commit` said {done.stderr.strip()[-500:]}"
