"""A run made again from its record: its params, its code and its data, in a workspace of its own, and what came out otherwise."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

from papo.engines.versioning import Dvc, git_worktree
from papo.errors import DamagedError, MissingInputError, SetupError, StageError, UserError
from papo.lineage.describe import code_by_stage, step_record
from papo.lineage.difference import changed, compare_steps
from papo.lineage.find import REPRODUCTION, Known
from papo.lineage.record import RunRecord, environment, patch_file, read_record
from papo.store.files import digest, read_json, replacing, write_json
from papo.store.layout import Workspace
from papo.store.manifest import PACKAGE, Manifest

DIGESTS = """
import json
from papo.pipeline import CODE
from papo.store.manifest import code_digest
print(json.dumps({stage: code_digest(named) for stage, named in CODE.items()}))
"""


def reproduce(known: Known, workspace: Path | None = None) -> dict[str, Any]:
    """Runs the pipeline again as the record says, without MLflow and DVC, and compares digests by stage.

    Args:
        workspace: a new folder, or one of an earlier try that was interrupted; None: runs/reproduce-<id>.

    Returns:
        As `compare_steps`, the first of each pair being what is on record; `of`, `workspace`, `code` in words, `environment`: what
        differs.

    Raises:
        UserError: the folder holds something else, or the reproduction is done.
        SetupError: the code of the run cannot be had.
        MissingInputError: a file that the params name cannot be had as it was.
        StageError: the pipeline did not get to its end.
    """
    record = known.record
    target = Workspace(workspace if workspace is not None else Path("runs") / f"reproduce-{record.id}")
    with _code(known) as (code, words):
        _claim(target, record)
        _place_sources(record, target)
        _take_verdicts(record, target)
        values = record.params | {"tracking": {"enabled": False}}
        (target.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "papo", "run", "--no-dvc", "--name", f"reproduction of {record.id}"]
        # What it says goes where its errors go: 2 is that also where sys.stderr is no file, as under a notebook.
        done = subprocess.run(command, cwd=target.root, env=_environment(code), stdout=2, check=False)
    if done.returncode:
        raise StageError(
            f"the run could not be made again: `papo run` ended with {done.returncode}",
            where=str(target.root),
            fix="see what it said above; the same command goes on from there",
        )
    found = _compared(known, target) | {"of": record.id, "workspace": str(target.root), "code": words}
    write_json(target.root / REPRODUCTION, found | {"done": True})
    return found


def _compared(known: Known, target: Workspace) -> dict[str, Any]:
    record = known.record
    made = [step_record(Manifest.read(_output(step.stage, step.round, target)), target) for step in record.steps]
    found = compare_steps(record.steps, made)
    own = [read_record(path) for path in target.records.glob("*.json")]
    here = own[0].environment if own else environment()
    known_both = record.environment.keys() & here.keys()
    return found | {
        "environment": {k: pair for k, pair in changed(record.environment, here).items() if k in known_both}
    }


def _output(stage: str, round_: int | None, workspace: Workspace) -> Path:
    """The output that has the manifest of a step beside it."""
    tables = {"rollout": "rollouts", "score_orm": "orm", "score_prm": "prm", "advantage": "advantages"}
    if stage in tables:
        return workspace.table(round_ or 0, tables[stage])
    if stage == "train":
        return workspace.policy(round_ or 0)
    outputs = {
        "prepare": workspace.problems,
        "warmstart": workspace.warmstart,
        "evaluate": workspace.evaluation / "metrics.json",
        "report": workspace.report,
    }
    return outputs[stage]


def _claim(target: Workspace, record: RunRecord) -> None:
    """Marks the folder as one for this reproduction.

    Raises:
        UserError: it holds something else, or is done.
    """
    mark = target.root / REPRODUCTION
    fix = "name a new folder with --workspace, or delete this one"
    if mark.is_file():
        known = read_json(mark)
        if known.get("of") != record.id:
            raise UserError(f"the folder has a reproduction of {known.get('of')}", where=str(target.root), fix=fix)
        if known.get("done"):
            raise UserError("this reproduction has been made", where=str(target.root), fix=fix)
    elif target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir())):
        raise UserError("the folder holds something else", where=str(target.root), fix=fix)
    write_json(mark, {"of": record.id, "done": False})


# ---- code ----


@contextmanager
def _code(known: Known) -> Iterator[tuple[Path, str]]:
    """The folder that holds the package as the run had it, and where it is from in words."""
    record = known.record
    differing = [stage for stage, code in record.code.items() if code_by_stage().get(stage) != code]
    if not differing:
        yield PACKAGE.parent, "as it is here: every stage has the code that the run had"
        return
    commit = (record.last.commit or "").removesuffix("+changes")
    if not commit:
        raise SetupError(
            f"the code of {', '.join(differing)} is not what the run had, and its record names no commit",
            where=str(known.path),
            fix="install the papo that made the run, and run this command with it",
        )
    patch = _patch(known)
    root = Path(record.checkout) if Path(record.checkout).is_dir() else Path()
    with git_worktree(root, commit, patch) as folder:
        made = subprocess.run(
            [sys.executable, "-c", DIGESTS], env=_environment(folder), cwd=folder, capture_output=True, text=True, check=False
        )  # fmt: skip
        there = json.loads(made.stdout) if made.returncode == 0 else {}
        if wrong := [stage for stage, code in record.code.items() if there.get(stage) != code]:
            raise SetupError(
                f"at commit {commit[:12]} the code of {', '.join(wrong)} is not what the run had",
                where=record.checkout,
                fix="the run used files that git does not track, or another installed papo; check out what it used, and run this "
                "command there",
            )
        also = " with the changes that the record keeps" if patch is not None else ""
        yield folder, f"commit {commit[:12]}{also}, in a worktree of its own"


def _patch(known: Known) -> bytes | None:
    """What differed from the commit.

    Raises:
        SetupError: it was not kept, or is not what was kept.
    """
    start = known.record.last
    if start.diff is None:
        return None
    path = patch_file(known.path.parent, start.diff)
    if not start.kept or not path.is_file():
        raise SetupError(
            f"the run had changes beside commit {start.commit}, which are not kept: digest {start.diff[:12]}",
            where=str(path),
            fix="bring the checkout to where `git diff HEAD --binary --full-index` has that SHA-256, and run this command there",
        )
    if digest(path) != start.diff:
        raise DamagedError("the changes beside the commit are no longer what was kept", where=str(path))
    return path.read_bytes()


def _environment(code: Path) -> dict[str, str]:
    further = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = str(code.resolve())
    path = os.pathsep.join([own, *(name for name in further if Path(name).resolve() != PACKAGE.parent.resolve())])
    return os.environ | {"PYTHONPATH": path}


# ---- data ----


def _place_sources(record: RunRecord, target: Workspace) -> None:
    """Puts the files that the params name where the run finds them, each with the digest on record.

    Raises:
        MissingInputError: one cannot be had as it was.
    """
    for name, recorded in record.sources.items():
        there = target.root / name  # an absolute name stays where it is
        if there.exists() and digest(there) == recorded:
            continue
        inside = there.resolve().is_relative_to(target.root.resolve())
        if not (inside and any(_bring(record, name, origin, there, recorded) for origin in _origins(record))):
            raise MissingInputError(
                f"{name} is not there as the run had it: digest {recorded[:12]}",
                where=str(there if not inside else Path(record.checkout) / name),
                fix="bring it back, for instance by `git checkout` or `dvc pull` of the version that the run had",
            )


def _origins(record: RunRecord) -> list[Path]:
    return list(dict.fromkeys([Path(record.checkout).resolve(), Path().resolve()]))


def _bring(record: RunRecord, name: str, origin: Path, there: Path, recorded: str) -> bool:
    """Copies a source from a checkout, from the record itself or by DVC, whichever has it as it was."""
    path = origin / name
    there.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and digest(path) == recorded:
        if path.is_dir():
            shutil.copytree(path, there, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, there)
    elif name == record.params["score_prm"]["rubric"] and record.judge.text is not None:
        there.write_bytes(record.judge.text.encode())
    elif not (origin / ".dvc").is_dir() or not Dvc(origin).restore(name, there, commit=_commit(record)):
        return False
    return digest(there) == recorded


def _commit(record: RunRecord) -> str | None:
    return record.last.commit.removesuffix("+changes") if record.last.commit is not None else None


def _take_verdicts(record: RunRecord, target: Workspace) -> None:
    """Copies the verdicts that the run's judge gave: they are what it scored with, and were paid for."""
    if record.judge.name != "model":
        return
    name = record.params["score_prm"]["store"] or ".papo/verdicts.sqlite"
    kept, copy = Path(record.checkout) / name, target.root / name
    if not kept.is_file() or copy.exists() or Path(name).is_absolute():
        return
    with (
        replacing(copy) as temporary,  # a copy that was ended half-way would be taken for whole
        closing(sqlite3.connect(f"file:{kept}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(temporary)) as out,
    ):
        source.backup(out)
