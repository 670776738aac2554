"""What of a run goes on its record, as the run has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from papo.calibration import calibrations
from papo.engines.judges.rubrics import RUBRICS, load_rubric, rubric_names
from papo.engines.tracking import without_password
from papo.engines.versioning import git_commit, git_diff
from papo.lineage.record import JudgeRecord, Recorder, StepRecord, Tracking, environment
from papo.params import Params
from papo.pipeline import CODE
from papo.stages.prepare import local_files
from papo.stages.warmstart import local_checkpoint
from papo.store.files import digest, read_json
from papo.store.layout import Workspace
from papo.store.manifest import PACKAGE, Manifest, code_digest
from papo.store.tables import table_digest

PATCH_BYTES = 1_000_000
"""A diff that is longer is named by its digest and not kept."""

HOW_COME_BY = {"prm.parquet": ("cached",)}
"""Columns that say how a row was come by, and not what it is."""


def make_recorder(
    params: Params,
    workspace: Workspace,
    *,
    lineage: str,
    name: str,
    tags: Mapping[str, str],
    warn: Callable[[str], None],
) -> Recorder:
    """The recorder of a run that is about to begin."""
    patch = git_diff(workspace.root)
    kept = patch is not None and len(patch) <= PATCH_BYTES
    start = {
        "commit": git_commit(workspace.root),
        "diff": hashlib.sha256(patch).hexdigest() if patch is not None else None,
        "kept": kept,
        "flow_run": tags.get("papo.flow_run"),
    }
    tracking = params.tracking
    uri = without_password(tracking.uri) if tracking.uri_env is None else f"${tracking.uri_env}"
    known = {
        "lineage": lineage,
        "name": name,
        "workspace": str(workspace.root.resolve()),
        "checkout": str(Path().resolve()),
        "params": params.model_dump(mode="json", exclude={"tracking"}),
        "code": code_by_stage(),
        "files": {file: digest(PACKAGE / file) for file in files_of_code()},
        "sources": {name: digest(path) for name, path in sources(params).items()},
        "judge": _judge(params, workspace),
        "environment": environment(),
        "tracking": Tracking(enabled=tracking.enabled, uri=uri, experiment=tracking.experiment),
    }
    return Recorder(workspace.records, known, start, patch=patch if kept else None, warn=warn)


def code_by_stage() -> dict[str, str]:
    return {stage: code_digest(named) for stage, named in CODE.items()}


def files_of_code(stage: str | None = None) -> list[str]:
    """Files of the package that a stage, or any stage, is made of; those that `code_digest` counts."""
    named = {name for one, names in CODE.items() if stage in (None, one) for name in names}
    files = {
        file
        for name in named
        for file in (PACKAGE / name).rglob("*")
        if (PACKAGE / name).is_dir() and file.suffix in (".py", ".j2")
    }
    return sorted(
        file.relative_to(PACKAGE).as_posix()
        for file in files | {PACKAGE / name for name in named if not (PACKAGE / name).is_dir()}
    )


def sources(params: Params) -> dict[str, Path]:
    """Files and folders of this machine that the params name and results depend on, by the name they have there."""
    found = dict(local_files(params.prepare))
    if (checkpoint := local_checkpoint(params.warmstart)) is not None:
        found[str(params.warmstart.checkpoint)] = checkpoint
    if params.score_prm.judge == "model" and Path(params.score_prm.rubric).is_file():
        found[params.score_prm.rubric] = Path(params.score_prm.rubric)
    return found


def step_record(manifest: Manifest, workspace: Workspace) -> StepRecord:
    """What a manifest says, and the digests of the tables that hold how their rows were come by."""
    content = {}
    by_model = manifest.params.get("judge") == "model"  # no other verdict is taken from a store
    for name in manifest.outputs.keys() & HOW_COME_BY.keys() if by_model else ():
        path = workspace.round(manifest.round or 0) / name
        content[name] = table_digest(path, without=HOW_COME_BY[name])
    facts = manifest.model_dump(exclude={"schema_version", "history", "skipped"})
    return StepRecord(**facts, content=content, made=not manifest.skipped)


def data_digests(workspace: Workspace) -> dict[str, str]:
    """File -> digest, of the problem sets."""
    files = sorted(path for path in workspace.problems.rglob("*.parquet") if path.is_file())
    return {path.relative_to(workspace.root).as_posix(): digest(path) for path in files}


def _judge(params: Params, workspace: Workspace) -> JudgeRecord:
    chosen = params.score_prm
    measured: dict[str, dict[str, Any]] = {}
    for name, path in calibrations(chosen, workspace).items():
        found = read_json(path)
        measured[name] = {"sha256": digest(path)} | {
            key: found[key]["value"] for key in ("agreement", "auc", "length_bias") if key in found
        }
    if chosen.judge != "model" or chosen.model is None or params.advantage.variant == "orm":  # which asks none
        return JudgeRecord(name=chosen.judge, calibrations=measured)
    rubric = load_rubric(chosen.rubric)
    named = chosen.rubric in rubric_names()
    file = RUBRICS / f"{chosen.rubric}.yaml" if named else Path(chosen.rubric)
    return JudgeRecord(
        name=chosen.judge,
        model=chosen.model.model,
        rubric=rubric.label,
        digest=rubric.digest(),
        text=file.read_bytes().decode("utf-8"),
        calibrations=measured,
    )
