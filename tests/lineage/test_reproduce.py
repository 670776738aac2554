"""A run made again from its record; what cannot be had as it was is said before anything runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import TINY, Checkout
from servers.chat import chat_process

from papo.cli import main
from papo.errors import MissingInputError, PapoError, SetupError, StageError, UserError
from papo.lineage import show
from papo.lineage.describe import code_by_stage
from papo.lineage.find import REPRODUCTION, find
from papo.lineage.record import JudgeRecord, RunRecord, Start
from papo.lineage.reproduce import reproduce
from papo.store.faults import watching
from papo.store.files import digest, read_json, write_json

NAME = "aaaaaaaaaaaa-20260101-000000-0001"
RUBRIC = Path(__file__).parents[2] / "papo/rubrics/levels.yaml"

Put = Callable[..., RunRecord]


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the run itself, which ends with an error."""
    run = subprocess.run

    def fail(command: list[str], **options: Any) -> Any:
        if command[1:4] == ["-m", "papo", "run"]:
            return subprocess.CompletedProcess(command, 3)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", fail)


@pytest.mark.usefixtures("no_run")
def test_params_and_sources_are_placed_and_the_run_started(put: Put) -> None:
    Path("problems.jsonl").write_text("{}\n")
    judge = JudgeRecord(name="model", text="name: mine\r\n")
    record = put(
        "runs/one", NAME, code=code_by_stage(), sources={"problems.jsonl": digest(Path("problems.jsonl"))}, judge=judge
    )
    with pytest.raises(StageError, match="ended with 3"):
        reproduce(find(NAME))
    target = Path(f"runs/reproduce-{NAME}")
    assert (target / "problems.jsonl").read_text() == "{}\n"
    params = yaml.safe_load((target / "params.yaml").read_text())
    assert params == record.params | {"tracking": {"enabled": False}}
    with pytest.raises(StageError):  # interrupted, it may go on
        reproduce(find(NAME))
    write_json(target / REPRODUCTION, {"of": NAME, "done": True})
    with pytest.raises(UserError, match="has been made"):
        reproduce(find(NAME))
    write_json(target / REPRODUCTION, {"of": "another", "done": False})
    with pytest.raises(UserError, match="a reproduction of another"):
        reproduce(find(NAME))


@pytest.mark.usefixtures("no_run")
def test_a_rubric_is_kept_by_the_record_itself(put: Put, tmp_path: Path) -> None:
    text = "name: mine\r\nä\n"
    Path("mine.yaml").write_bytes(text.encode())
    record = put(
        ".",
        NAME,
        code=code_by_stage(),
        sources={"mine.yaml": digest(Path("mine.yaml"))},
        judge=JudgeRecord(name="model", text=text),
    )
    record.params["score_prm"]["rubric"] = "mine.yaml"
    put(".", NAME, **{name: getattr(record, name) for name in ("code", "sources", "judge", "params")})
    Path("mine.yaml").write_text("another")
    with pytest.raises(StageError):
        reproduce(find(NAME), tmp_path / "again")
    assert (tmp_path / "again/mine.yaml").read_bytes() == text.encode()


@pytest.mark.usefixtures("no_run")
def test_a_copy_of_verdicts_that_was_ended_half_way_is_not_taken_for_whole(put: Put) -> None:
    record = put(".", NAME, code=code_by_stage(), judge=JudgeRecord(name="model"))
    kept, copy = (Path(folder, ".papo/verdicts.sqlite") for folder in (record.checkout, f"runs/reproduce-{NAME}"))
    kept.parent.mkdir()
    with contextlib.closing(sqlite3.connect(kept)) as database:
        database.execute("CREATE TABLE verdicts AS SELECT 1 AS verdict")
        database.commit()

    def ends(point: str, path: Path | None, detail: str) -> None:
        if point == "written" and path is not None and path.name == copy.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(ends):
        reproduce(find(NAME))
    assert not copy.exists()
    with pytest.raises(StageError, match="ended with 3"):
        reproduce(find(NAME))
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert database.execute("SELECT verdict FROM verdicts").fetchall() == [(1,)]


@pytest.mark.parametrize("name", ["gone.jsonl", "../outside.jsonl", "/nowhere/problems.jsonl"])
@pytest.mark.usefixtures("no_run")
def test_a_data_file_that_is_missing_is_named(put: Put, name: str) -> None:
    put(".", NAME, code=code_by_stage(), sources={name: "5" * 64})
    with pytest.raises(MissingInputError, match=f"{name} is not there as the run had it: digest 555555555555"):
        reproduce(find(NAME))


@pytest.mark.usefixtures("no_run")
def test_a_data_file_that_was_changed_comes_back_from_dvc(put: Put) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    for command in (["init", "-q"], ["add", "-q", "problems.jsonl"]):
        Path("problems.jsonl").write_text("as it was\n")
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True, capture_output=True)
    put(".", NAME, code=code_by_stage(), sources={"problems.jsonl": digest(Path("problems.jsonl"))})
    Path("problems.jsonl").unlink()
    Path("problems.jsonl").write_text("changed\n")
    with pytest.raises(StageError):
        reproduce(find(NAME))
    assert Path(f"runs/reproduce-{NAME}/problems.jsonl").read_text() == "as it was\n"
    shutil.rmtree(".dvc/cache")
    with pytest.raises(MissingInputError):
        reproduce(find(NAME), Path("another"))


def test_a_folder_that_holds_something_else_is_left_alone(put: Put, tmp_path: Path) -> None:
    put(".", NAME, code=code_by_stage())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        reproduce(find(NAME), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "names no commit"),
        ({"commit": "0" * 40}, "git cannot check out"),
        ({"commit": "0" * 40 + "+changes", "diff": "7" * 64}, "which are not kept: digest 777777777777"),
        ({"commit": "0" * 40 + "+changes", "diff": "7" * 64, "kept": True}, "which are not kept"),
    ],
)
def test_code_that_cannot_be_had_is_said_before_anything_is_written(
    put: Put, start: Callable[..., Start], changes: dict[str, Any], said: str
) -> None:
    put(".", NAME, code=code_by_stage() | {"train": "8" * 64}, starts=[start(**changes)])
    with pytest.raises(SetupError, match=said):
        reproduce(find(NAME))
    assert not Path("runs").exists()


def test_a_patch_that_was_changed_is_not_applied(put: Put, start: Callable[..., Start]) -> None:
    put(".", NAME, code={"train": "8" * 64}, starts=[start(commit="0" * 40, diff="7" * 64, kept=True)])
    patch = Path(f"artifacts/runs/diffs/{'7' * 16}.patch")
    patch.parent.mkdir()
    patch.write_text("something")
    with pytest.raises(PapoError, match="no longer what was kept"):
        reproduce(find(NAME))


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_it_is_byte_equal(
    put: Put, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], equal: bool, code: int
) -> None:
    first = None if equal else {"step": "rollout 0", "outputs": ["rollouts.parquet"], "why": ["input seed: 0 -> 1"]}
    found = {"byte_equal": equal, "first": first, "compared": 3, "differing": [] if equal else ["rollout 0"], "only_a": [],
             "only_b": [], "not_compared": {}, "environment": {"torch": ("1", "2")}, "of": NAME, "workspace": "w",
             "code": "here"}  # fmt: skip
    put(".", NAME)
    monkeypatch.setattr(show, "reproduce", lambda known, workspace: found)
    assert main(["reproduce", NAME]) == code
    said = capsys.readouterr().out
    assert ("byte-equal" in said) == equal
    assert ("first that differs: rollout 0 (rollouts.parquet)" in said) != equal
    assert "torch" in said


# ---- real runs ----


@pytest.mark.ops
def test_a_run_is_made_again_from_its_commit_and_what_differed_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    project = Checkout(folder)
    project.set_params(TINY | {"run": {"rounds": 1}})
    changed = folder / "papo/stages/advantage.py"
    committed = changed.read_text()
    changed.write_text(f"{committed}\n# as the run had it\n")
    project.papo("run", "--no-dvc", "--workspace", "runs/one")
    changed.write_text(f"{committed}\nraise AssertionError('not what the run had')\n")
    project.run("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qam", "later")
    # The commands themselves import the stages, so they have to be those of a checkout that works.
    changed.write_text(f"{committed}\n# another\n")
    done = project.papo("reproduce", "runs/one", "--json")
    found = json.loads(done.stdout)
    assert found["byte_equal"]
    assert found["code"].endswith("with the changes that the record keeps, in a worktree of its own")
    assert project.run("git", "worktree", "list").stdout.count("\n") == 1
    assert digest(folder / "runs/one/artifacts/rounds") != digest(
        folder / found["workspace"] / "artifacts/rounds"
    )  # manifests
    record = next((folder / "runs/one/artifacts/runs").glob("*.json"))
    content = read_json(record)
    content["steps"][2]["outputs"]["rollouts.parquet"] = "0" * 64
    write_json(record, content)
    # As if it had been interrupted after its last stage.
    write_json(folder / found["workspace"] / REPRODUCTION, {"of": content["id"], "done": False})
    differing = project.papo("reproduce", "runs/one", ok=False)
    assert differing.returncode == 1
    assert "first that differs: rollout 0 (rollouts.parquet)" in differing.stdout


@contextlib.contextmanager
def rubrics() -> Iterator[tuple[str, str]]:
    """Two files that differ in a line."""
    content = RUBRIC.read_text()
    names = []
    for name, line in (
        ("kind", "In doubt between two levels, take the higher one."),
        ("strict", "In doubt, take the lower one."),
    ):
        text = content.replace("name: levels", f"name: {name}").replace(
            "If you are in doubt between two levels, take the lower one.", line
        )
        assert line in text
        Path(f"{name}.yaml").write_text(text)
        names.append(f"{name}.yaml")
    yield names[0], names[1]


@pytest.mark.ops
@pytest.mark.usefixtures("keyless")
def test_two_runs_with_two_rubrics_differ_from_the_judge_on_and_one_is_made_again_without_a_call(
    started_checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_process(reply="servers.replies:levels") as server, rubrics() as (kind, strict):
        content = yaml.safe_load(Path("params.yaml").read_text())
        content["score_prm"] |= {"judge": "model", "model": {"model": "m", "base_url": server.url}, "rubric": kind}
        content["advantage"]["variant"] = "prm"  # the policy of a tiny run is never right
        Path("params.yaml").write_text(yaml.safe_dump(content))
        assert main(["run", "--no-dvc"]) == 0
        assert main(["run", "--no-dvc", "--workspace", "runs/strict", "--set", f"score_prm.rubric={strict}"]) == 0
        calls = server.seen.requests.total()
        capsys.readouterr()
        assert main(["diff", ".", "runs/strict", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["params"] == {"score_prm.rubric": [kind, strict]}
        assert found["first"]["step"] == "score_prm 0"
        assert [line.split(":")[0] for line in found["first"]["why"]] == ["param rubric", "input rubric"]
        assert "+  - In doubt, take the lower one." in found["judge"]["rubric_text"]
        assert found["judge"]["rubric"] == ["kind/1", "strict/1"]
        assert (found["code"]["stages"], found["data"], found["environment"]) == ([], [], {})
        assert all(row["difference"]["problems"] for row in found["metrics"])
        assert main(["diff", ".", "runs/strict"]) == 0
        said = capsys.readouterr().out
        assert "first that differs: score_prm 0 (prm.parquet)" in said
        assert "+  - In doubt, take the lower one." in said
        Path(strict).unlink()
        assert main(["reproduce", "runs/strict"]) == 0
        assert "byte-equal" in capsys.readouterr().out
        assert server.seen.requests.total() == calls
