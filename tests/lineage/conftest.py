"""Records as a run writes them, without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from papo.lineage.record import JudgeRecord, RunRecord, Start, StepRecord, Tracking, this_process
from papo.params import Params
from papo.store.files import write_json
from papo.store.layout import Workspace


def start_of(**changes: Any) -> Start:
    at = changes.pop("at", "2026-01-01T00:00:00Z")
    given = {"at": at, "ended": "2026-01-01T00:10:00Z", "how": "finished", **this_process(), **changes}
    return Start.model_validate(given)


def step_of(stage: str, round_: int | None = None, **changes: Any) -> StepRecord:
    given = {"identity": "1" * 64, "params": {}, "inputs": {}, "code": "2" * 64, "outputs": {"out": "3" * 64}, "rows": 1,
             "seconds": 1.5, "made": True}  # fmt: skip
    return StepRecord.model_validate({"stage": stage, "round": round_, **given, **changes})


def record_of(workspace: Path, name: str = "aaaaaaaaaaaa-20260101-000000-0001", **changes: Any) -> RunRecord:
    given: dict[str, Any] = {
        "lineage": name[:12],
        "name": "a run",
        "workspace": str(workspace),
        "checkout": str(Path.cwd()),
        "params": Params().model_dump(mode="json", exclude={"tracking"}),
        "starts": [start_of()],
        "code": {},
        "files": {},
        "judge": JudgeRecord(name="steps"),
        "environment": {"python": "3.11.0"},
        "tracking": Tracking(enabled=False, uri="sqlite:///mlflow.db", experiment="papo"),
    }
    return RunRecord(id=name, **(given | changes))


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunRecord]:
    """Writes a record as that of a workspace; the current folder is empty."""
    monkeypatch.chdir(tmp_path)

    def put(workspace: str, name: str, **changes: Any) -> RunRecord:
        record = record_of(Path(workspace).resolve(), name, **changes)
        write_json(Workspace(Path(workspace)).records / f"{name}.json", record.model_dump(mode="json"))
        return record

    return put


@pytest.fixture
def step() -> Callable[..., StepRecord]:
    return step_of


@pytest.fixture
def start() -> Callable[..., Start]:
    return start_of
