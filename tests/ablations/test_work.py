"""Doing the runs of a plan: order, budget, failures, and what a second start does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ablations.made import TINY_PLAN, Made, even, make_run, plan
from checkout import TINIEST

from papo.ablations import work as module
from papo.ablations.command import metrics_of, open_ablation
from papo.ablations.plan import Run, expand
from papo.ablations.work import Budget, Place, look, make_start, take_start, work
from papo.cli import main
from papo.errors import ParamsError
from papo.lineage.describe import code_by_stage
from papo.store.layout import Workspace, manifest_path


@pytest.fixture(autouse=True)
def _here(checkout: Path) -> None:
    """In a folder with a params.yaml."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)


def test_each_run_is_done_once_two_at_a_time_seed_by_seed(tmp_path: Path) -> None:
    runs, made, said = expand(plan(seeds=2)), Made(Place(tmp_path)), list[str]()
    work(runs, made.place, jobs=2, budget=Budget(), begin=made.begin, say=said.append)
    assert made.begun == [run.name for run in runs]
    assert [name[-1] for name in made.begun] == ["0"] * 3 + ["1"] * 3
    assert made.at_once == 2
    assert said[0] == "6 runs: 0 done, 6 to do, 2 at a time"
    again = Made(made.place)
    work(runs, made.place, jobs=2, budget=Budget(), begin=again.begin, say=said.append)
    assert again.begun == []


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    runs, said = expand(plan(seeds=2)), list[str]()
    made = Made(Place(tmp_path), **{"papo-steps-seed0": "failed", "orm-steps-seed1": "stopped"})
    work(runs, made.place, jobs=1, budget=Budget(), begin=made.begin, say=said.append)
    assert len(made.begun) == 6
    assert [one.state for one in (look(run, made.place) for run in runs)] == [
        "done",
        "failed",
        "done",
        "stopped",
        "done",
        "done",
    ]
    assert any(line.startswith("papo-steps-seed0 failed: as it was told") for line in said)
    again = Made(made.place)
    work(runs, made.place, jobs=1, budget=Budget(), begin=again.begin, say=said.append)
    assert again.begun == ["papo-steps-seed0", "orm-steps-seed1"]


def test_a_run_that_ends_without_a_record_says_why_in_its_log(tmp_path: Path) -> None:
    (run,) = expand(plan(seeds=1, axes={"v": {"one": {}}}, compare=[]))
    place = Place(tmp_path)

    def begin(run: Run) -> Callable[[], bool]:
        place.workspace(run).root.mkdir()
        (place.workspace(run).root / "ablation.log").write_text("papo: no such thing\n\n")
        return lambda: True

    work([run], place, jobs=1, budget=Budget(), begin=begin, say=lambda _: None)
    assert (look(run, place).state, look(run, place).why) == ("failed", "papo: no such thing")


def test_a_budget_of_time_begins_no_run_that_should_not_end_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 30.0))
    runs, made, said = expand(plan(seeds=2)), Made(Place(tmp_path)), list[str]()
    outcome = work(runs, made.place, jobs=1, budget=Budget(minutes=4.0), begin=made.begin, say=said.append)
    took = clock[0] / len(made.begun)
    assert 0 < len(made.begun) < 6
    assert clock[0] <= 240.0 < clock[0] + took
    assert f"{6 - len(made.begun)} runs are left for the next start" in outcome.stopped
    rest = Made(made.place)
    second = work(runs, made.place, jobs=1, budget=Budget(), begin=rest.begin, say=said.append)
    assert second.stopped == ""
    assert made.begun + rest.begun == [run.name for run in runs]


def test_a_budget_of_money_counts_what_runs_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(money=10.0)
    assert budget.refuses(0) == ""  # nothing is known of what a run costs
    for _ in range(2):
        budget.ended(1.0, 3.0)
    assert budget.refuses(0) == ""  # 6 + 3
    assert "a run costs some 3.00, and 6.00 of 10 are spent" in budget.refuses(1)
    budget.ended(1.0, 4.0)
    assert budget.refuses(0)


@pytest.mark.parametrize("given", [{"minutes": 0.0}, {"money": -1.0}, {"minutes": float("inf")}])
def test_a_budget_that_cannot_be_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ParamsError, match=r"is (0|-1|inf)"):
        Budget(**given)


def test_a_start_that_is_another_one_now_takes_the_place_of_the_old(tmp_path: Path) -> None:
    source, target = Workspace(tmp_path / "start"), Workspace(tmp_path / "run")
    for text in ("first", "second"):
        for output in (source.problems, source.warmstart):
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            (output / "content").write_text(text)
            manifest_path(output).unlink(missing_ok=True)  # files are replaced, never written in place: they are linked
            manifest_path(output).write_text(json.dumps(text))
        take_start(source, target)
        assert (target.warmstart / "content").read_text() == text
        assert (target.problems / "content").read_text() == text


def test_other_code_or_params_make_a_run_open_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = expand(plan(seeds=1, axes={"v": {"one": {}}}, compare=[]))
    make_run(run, Place(tmp_path), even)
    assert look(run, Place(tmp_path)).state == "done"
    (other,) = expand(plan(seeds=1, axes={"v": {"one": {"advantage.lam": 0.5}}}, compare=[]))
    assert other.name == run.name
    assert look(other, Place(tmp_path)).state == "open"


def test_the_start_of_another_plan_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = expand(plan(seeds=1, axes={"v": {"one": {}}}, compare=[]))
    there, here = (Place(tmp_path / name).start(run) for name in ("other", "this"))
    there.warmstart.mkdir(parents=True)
    (there.warmstart / "content").write_text("learned")
    manifest_path(there.warmstart).write_text("{}")
    stages: list[str] = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: stages.append(command[3]) or done)
    make_start(run, Place(tmp_path / "this"), say=lambda _: None)
    assert (here.warmstart / "content").read_text() == "learned"
    assert stages == ["prepare", "warmstart"]  # which say whether it is what they would make


@pytest.mark.parametrize(("stage", "state"), [("report", "done"), ("train", "open")])
def test_only_the_code_of_the_report_may_be_another(stage: str, state: str, tmp_path: Path) -> None:
    (run,) = expand(plan(seeds=1, axes={"v": {"one": {}}}, compare=[]))
    make_run(run, Place(tmp_path), even)
    (path,) = Place(tmp_path).workspace(run).records.glob("*.json")
    changed = json.loads(path.read_text()) | {"lineage": "0" * 12, "code": code_by_stage() | {stage: "another"}}
    path.write_text(json.dumps(changed))
    assert look(run, Place(tmp_path)).state == state


@pytest.mark.slow
def test_a_person_runs_a_plan_kills_it_and_goes_on(checkout: Path) -> None:
    """With real runs: a budget that allows one, kill -9 in the middle, then the rest; every run is made once."""
    (checkout / "params.yaml").write_text(yaml.safe_dump(TINIEST))
    (checkout / "tiny.yaml").write_text(yaml.safe_dump(TINY_PLAN))
    command = [sys.executable, "-m", "papo", "ablate", "tiny.yaml", "--jobs", "1"]
    first = subprocess.run([*command, "--minutes", "0.01"], capture_output=True, text=True, check=False)
    assert first.returncode == 5, first.stdout + first.stderr
    assert "runs are left for the next start" in first.stderr
    root = checkout / "runs/ablations/tiny"
    done = list(root.glob("*/artifacts/report/index.html"))
    assert len(done) == 1
    before = done[0].stat().st_mtime_ns
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (root / "papo-seed0/.papo/lock.json").exists():
        time.sleep(0.1)
        assert killed.poll() is None
    killed.kill()
    killed.communicate()
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    assert done[0].stat().st_mtime_ns == before
    content = json.loads((root / "report/results.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["done"] * 4
    assert content["saved"]["starts"] == 1
    assert content["saved"]["nights"] >= 2
    assert (root / "report/index.html").is_file()
    assert "no difference larger than 2 points" in last.stdout or "undecided" in last.stdout
    # The results alone, again: nothing is begun.
    assert main(["ablate", "tiny.yaml", "--results"]) == 0
    assert main(["ablate", "tiny.yaml", "--seeds", "3", "--results"]) == 5


def test_what_a_person_can_get_wrong(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "tiny.yaml").write_text(yaml.safe_dump(TINY_PLAN))
    for words, told in (
        (["nosuch"], "there is no ablation plan 'nosuch'"),
        (["tiny.yaml", "--jobs", "0"], "--jobs is 0"),
        (["tiny.yaml", "--seeds", "0"], "--seeds is 0"),
        (["tiny.yaml", "--minutes", "-1"], "minutes is -1"),
        (["tiny.yaml", "--set", "advantage.lamda=1"], "did you mean advantage.lam?"),
    ):
        assert main(["ablate", *words]) == 2
        assert told in capsys.readouterr().err
    assert main(["ablate", "tiny.yaml", "--results"]) == 1
    assert "no run of tiny is done" in capsys.readouterr().err


def test_names_of_metrics_are_ones_that_mlflow_takes(checkout: Path, tmp_path: Path) -> None:
    from papo.ablations.results import gather

    (checkout / "tiny.yaml").write_text(
        yaml.safe_dump(TINY_PLAN | {"compare": [{"against": {"variant": "orm"}, "measures": ["accuracy/sums-hard"]}]})
    )
    ablation = open_ablation("tiny.yaml", root=tmp_path / "root")
    for run in ablation.runs:
        make_run(run, ablation.place, even)
    found = metrics_of(gather("tiny", ablation.plan, ablation.runs, ablation.place))
    assert "accuracy/sums-hard/papo - orm/low" in found
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./: ") for key in found)
