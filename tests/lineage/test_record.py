"""The record of a run on disk: complete, whole after a kill, one for a run however often it is started."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from papo.cli import main
from papo.engines.tracking import NullTracker
from papo.errors import DamagedError
from papo.lineage.record import RunRecord, Start, read_record
from papo.params import load_params
from papo.pipeline import lineage, steps
from papo.session import Session
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.manifest import Context

OTHER = "report.title=another run"


@pytest.fixture
def here(tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the checkout after its run."""
    folder = tiny_copy()
    monkeypatch.chdir(folder)
    return folder


def records(folder: Path = Path()) -> list[RunRecord]:
    return sorted(map(read_record, Workspace(folder).records.glob("*.json")), key=lambda record: record.starts[0].at)


def session(*overrides: str, warn: Callable[[str], None] = lambda message: None) -> Session:
    context = Context(work=Path(".papo"), warn=warn)
    params = load_params(overrides=overrides)
    return Session(params, Workspace(Path()), name="a run", tracker=NullTracker(), context=context)


def run_all(run: Session) -> str:
    with run:
        for step in steps(run.params):
            run.step(step)
        return run.finish().run


def test_a_run_leaves_a_record_of_all_that_it_was_made_of(here: Path) -> None:
    (record,) = records()
    params = load_params()
    assert record.state == "finished"
    assert record.lineage == lineage(params)
    assert record.id.startswith(record.lineage)
    assert [step.name for step in record.steps] == [str(step) for step in steps(params)]
    assert record.params == params.model_dump(mode="json", exclude={"tracking"})
    train = record.step("train 0")
    assert train is not None
    assert train.outputs["policy"] == digest(here / "artifacts/rounds/0/policy")
    assert record.data["data/problems/train.parquet"] == digest(here / "data/problems/train.parquet")
    assert record.evaluation == json.loads((here / "artifacts/evaluation/metrics.json").read_text())
    assert record.dvc_lock == digest(here / "dvc.lock")
    assert {"python", "torch", "cpu", "OMP_NUM_THREADS", "torch threads"} <= record.environment.keys()
    assert record.last.ran + record.last.found == len(record.steps)


def test_the_id_is_told_at_the_end_and_the_lineage_stands_in_the_report(here: Path) -> None:
    assert run_all(session()) == records()[0].id
    assert f"papo lineage {records()[0].lineage}" in (here / "artifacts/report/index.html").read_text()


def test_a_run_that_has_nothing_to_do_is_noted_and_adds_no_record(here: Path) -> None:
    before = records()
    run_all(session())
    run_all(session())
    (after,) = records()
    assert len(after.checks) == 2
    assert after.model_copy(update={"checks": []}) == before[0]


def test_a_stage_that_is_made_anew_after_the_end_opens_another_record(here: Path) -> None:
    (here / "artifacts/evaluation/metrics.json").unlink()
    run_all(session())
    first, second = records()
    assert (first.lineage, first.checks) == (second.lineage, [])
    made = [step.name for step in second.steps if step.made]
    assert made == ["evaluate"]  # and the same metrics make the same report
    assert len(second.steps) == len(first.steps)


@pytest.mark.parametrize(
    ("error", "how", "why"),
    [(ValueError("a key"), "failed", "ValueError"), (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
     (SystemExit(143), "stopped", "SystemExit")],
)  # fmt: skip
def test_a_run_that_ended_early_says_how_and_the_next_start_goes_on_with_its_record(
    here: Path, error: BaseException, how: str, why: str
) -> None:
    def run() -> None:
        with session(OTHER) as opened:
            opened.step(next(steps(opened.params)))
            raise error

    with pytest.raises(type(error)):
        run()
    broken = records()[-1]
    assert (broken.state, broken.last.why, [step.name for step in broken.steps]) == (how, why, ["prepare"])
    assert run_all(session(OTHER)) == broken.id
    whole = records()[-1]
    assert (whole.id, whole.state, len(records())) == (broken.id, "finished", 2)
    assert [start.how for start in whole.starts] == [how, "finished"]
    assert [step.name for step in whole.steps if step.made] == ["report"]


def test_a_record_that_cannot_be_written_is_said_once_and_stops_nothing(here: Path) -> None:
    said: list[str] = []
    for path in (here / "artifacts/runs").iterdir():
        path.unlink()
    (here / "artifacts/runs").rmdir()
    (here / "artifacts/runs").write_text("a file")
    run_all(session(OTHER, warn=said.append))
    assert len(said) == 1
    assert "the record of this run cannot be written" in said[0]


def test_a_damaged_record_is_left_alone_and_a_new_one_begun(here: Path) -> None:
    (path,) = (here / "artifacts/runs").glob("*.json")
    path.write_bytes(path.read_bytes()[:1000])
    new = run_all(session())
    assert path.stat().st_size == 1000
    assert read_record(here / f"artifacts/runs/{new}.json").state == "finished"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"id": 1}', b"\xff\xfe", b'{"schema_version": 1, "further": 2}']
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="not the record of a run"):
        read_record(path)
    with pytest.raises(DamagedError, match="cannot be read"):
        read_record(tmp_path)


def test_a_process_that_is_gone_was_killed(put: Callable[..., RunRecord], start: Callable[..., Start]) -> None:
    def state(**changes: Any) -> str:
        return put(".", "aaaaaaaaaaaa-1", starts=[start(ended=None, how=None, **changes)]).state

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert state() == "running"
    assert state(pid=ended.pid) == "killed"
    assert state(process_began=1.0) == "killed"  # its number was given to another process
    assert state(boot="another") == "killed"
    assert state(machine="another") == "unknown"


def test_what_differs_from_the_commit_is_kept(here: Path) -> None:
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "add", ".gitignore", "params.yaml"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    with (here / "params.yaml").open("a") as stream:
        stream.write("# another line\n")
    with pytest.raises(ValueError, match="bad"), session(OTHER):
        raise ValueError("bad")
    last = records()[-1].last
    diff = subprocess.run(["git", "diff", "HEAD", "--binary", "--full-index"], check=True, capture_output=True).stdout
    assert b"another line" in diff
    assert last.commit is not None
    assert last.commit.endswith("+changes")
    assert (last.diff, last.kept) == (hashlib.sha256(diff).hexdigest(), True)
    assert (here / f"artifacts/runs/diffs/{last.diff[:16]}.patch").read_bytes() == diff


@pytest.mark.ops
def test_a_killed_run_is_on_record_as_killed_and_then_as_finished(
    checkout: Path, start_papo: Callable[..., subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_papo("run", "--no-dvc", cwd=checkout)
    try:
        deadline = time.monotonic() + 240
        while not (checkout / "artifacts/warmstart.manifest.json").is_file():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert records()[0].state == "running"
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=60)
    (killed,) = records()
    assert (killed.state, killed.last.how, killed.last.ended) == ("killed", None, None)
    assert main(["lineage", "."]) == 0
    assert f"{killed.id}, killed" in capsys.readouterr().out
    assert main(["run", "--no-dvc"]) == 0
    (whole,) = records()
    assert (whole.id, whole.state, len(whole.starts)) == (killed.id, "finished", 2)
    assert [step.name for step in whole.steps] == [str(step) for step in steps(load_params())]
