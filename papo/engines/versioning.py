"""git and DVC: which version of the data belongs to which params and code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from papo.errors import SetupError


def git_commit(root: Path) -> str | None:
    """The commit of the checkout, with `+changes` where files differ from it; None where there is no git or no commit."""
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def git_diff(root: Path) -> bytes | None:
    """How the checkout differs from its commit, as `git apply` takes it; None where it does not, or there is no commit."""
    try:
        command = ["git", "-C", str(root), "diff", "HEAD", "--binary", "--full-index"]
        return subprocess.run(command, check=True, capture_output=True).stdout or None
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def git_show(root: Path, commit: str, name: str) -> str | None:
    """A file as it was in a commit; None where it was not, or there is no such commit."""
    try:
        return _git(root, "show", f"{commit}:{name}")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


@contextmanager
def git_worktree(root: Path, commit: str, patch: bytes | None = None) -> Iterator[Path]:
    """The files of a commit, and what differed from it, in a folder of their own until the block ends.

    Raises:
        SetupError: git does not have the commit, or the patch does not apply.
    """
    with tempfile.TemporaryDirectory(prefix="papo-code-") as scratch:
        folder = Path(scratch) / "checkout"
        try:
            _git(root, "worktree", "add", "--detach", "--quiet", str(folder), commit)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()[-300:]
            fix = "run `git fetch`, or take a checkout that has it"
            raise SetupError(f"git cannot check out {commit}: {said}", where=str(root.resolve()), fix=fix) from None
        try:
            if patch is not None:
                command = ["git", "-C", str(folder), "apply", "--whitespace=nowarn", "-"]
                done = subprocess.run(command, input=patch, capture_output=True, check=False)
                if done.returncode:
                    said = done.stderr.decode(errors="replace").strip()[-300:]
                    raise SetupError(f"what differed from {commit} does not apply: {said}", where=str(root.resolve()))
            yield folder
        finally:
            _git(root, "worktree", "remove", "--force", str(folder))


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
        command = [sys.executable, "-m", "dvc", "commit", "--force"]  # --quiet keeps its errors to itself
        done = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return "recorded: `dvc status` is clean"
        return f"not recorded: `dvc commit` said {done.stderr.strip()[-500:]}"

    def restore(self, name: str, target: Path, *, commit: str | None = None) -> bool:
        """Copies a version of a file or folder that DVC tracks from its cache, or from its remote, to `target`; whether it could.

        Args:
            name: its path in the checkout, as `<name>.dvc` or dvc.lock has it.
            commit: also look at what these said in that commit.
        """
        for content in self._tracked(name, commit):
            if self._copy(content, target):
                return True
        if not (self._root / f"{name}.dvc").is_file():
            return False
        environment = os.environ | {"DVC_NO_ANALYTICS": "true"}
        command = [sys.executable, "-m", "dvc", "fetch", "--quiet", f"{name}.dvc"]
        subprocess.run(command, cwd=self._root, env=environment, capture_output=True, check=False)
        return any(self._copy(content, target) for content in self._tracked(name, commit))

    def _tracked(self, name: str, commit: str | None) -> list[str]:
        """MD5s that DVC has, or had in the commit, for `name`."""
        files = (f"{name}.dvc", "dvc.lock")
        texts = [path.read_text() for file in files if (path := self._root / file).is_file()]
        texts += [text for file in files if commit and (text := git_show(self._root, commit, file))]
        found: list[str] = []
        for text in texts:
            content = yaml.safe_load(text) or {}
            own = [item | {"path": name} for item in content.get("outs", [])]
            entries = [item for stage in content.get("stages", {}).values() for item in stage.get("deps", [])]
            found += [item["md5"] for item in [*own, *entries] if item.get("path") == name and "md5" in item]
        return list(dict.fromkeys(found))

    def _copy(self, md5: str, target: Path) -> bool:
        path = self._root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        if not path.is_file():
            return False
        if md5.endswith(".dir"):
            return all(self._copy(item["md5"], target / item["relpath"]) for item in json.loads(path.read_text()))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return True
