"""A whole run: DVC agrees, a second one has nothing to do, a change reruns only what it concerns, the record is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from papo.cli import main
from papo.engines.tracking import NullTracker
from papo.errors import BusyError, SetupError
from papo.params import load_params
from papo.pipeline import Step, run_step, steps
from papo.schemas import EVALUATION, PROBLEMS
from papo.session import Session, Summary, lineage, share_start
from papo.store.files import digest, read_json, read_sealed, write_sealed
from papo.store.layout import Workspace, manifest_path
from papo.store.lock import exclusive
from papo.store.manifest import Context
from papo.store.tables import read_rows, write_rows

STEPS = 9
OTHER = "report.title=another run"


def dvc(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


class Recorder(NullTracker):
    """A tracker that keeps the names of its calls."""

    def __init__(self, fail: BaseException | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.tags: dict[str, str] = {}
        self.artifacts: list[str] = []
        self.metrics: dict[str, dict[str, float]] = {}
        self.traced: list[Mapping[str, Any]] = []
        self._fail = fail

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        if self._fail is not None:
            raise self._fail
        self.tags.update(tags)
        self.calls.append(("start", name))

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self.calls.append(("stage", stage, round_))
        self.metrics[stage] = dict(manifest["metrics"])

    def trace(self, call: Mapping[str, Any]) -> None:
        self.traced.append(call)

    def tag(self, key: str, value: str) -> None:
        self.tags[key] = value

    def artifact(self, path: Path) -> None:
        assert path.exists()
        self.artifacts.append(path.as_posix())

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None:
        self.calls.append(("policy", name, sorted(metrics)))

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        self.calls.append(("finish", status, sorted(metrics)))
        self.metrics["run"] = dict(metrics)


@pytest.fixture
def here(tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the checkout after its run."""
    folder = tiny_copy()
    monkeypatch.chdir(folder)
    return folder


def test_an_alarm_is_said_recorded_and_summed_up(here: Path) -> None:
    said: list[str] = []
    params = load_params(overrides=["alarms.exhausted_share=0", "alarms.patience=1"])
    context = Context(work=here / ".papo", warn=said.append)
    shutil.rmtree(here / "artifacts/rounds/0/policy")
    for name in ("advantages.parquet", "advantages.manifest.json"):
        (here / "artifacts/rounds/0" / name).unlink()
    recorder = Recorder()
    with Session(params, Workspace(here), name="a run", tracker=recorder, context=context) as run:
        for step in steps(params):
            run.step(step)
        summary = run.finish()
    (alarm,) = summary.alarms
    assert (alarm.name, alarm.round) == ("signal_exhaustion", 0)
    assert said == [f"alarm in round 0, signal_exhaustion: {alarm.evidence}"]
    assert recorder.tags["papo.alarms"] == "signal_exhaustion from round 0"
    recorded = recorder.metrics["advantage"]
    assert (recorded["alarms"], recorded["alarm_signal_exhaustion"], recorded["alarm_collapse"]) == (1, 1, 0)


def test_what_a_model_that_judges_cost_is_summed_up_recorded_and_reported(here: Path) -> None:
    params, workspace = load_params(), Workspace(here)
    whole = Context(work=here / ".papo")

    def run_all() -> tuple[Summary, Recorder]:
        recorder = Recorder()
        with Session(params, workspace, name="a run", tracker=recorder, context=whole) as run:
            run.context.trace({"key": "0"})
            for step in steps(params):
                run.step(step)
            return run.finish(), recorder

    recorded = here / ".papo/recorded"
    recorded.unlink()
    summary, recorder = run_all()
    assert (summary.judging, recorder.traced) == ({}, [{"key": "0"}])
    assert not [name for name in recorder.metrics["run"] if name.startswith("judge_")]

    # As if a model had been asked: the round is found done, and its cost counts.
    path = manifest_path(workspace.table(0, "prm"))
    manifest = read_sealed(path)
    cost = {"calls": 6.0, "calls_failed": 1.0, "prompt_tokens": 900.0, "completion_tokens": 100.0, "cost": 0.5}
    write_sealed(path, manifest | {"metrics": manifest["metrics"] | cost | {"not_asked_saved": 2.5}})
    summary, recorder = run_all()
    assert summary.judging == manifest["metrics"] | cost | {"not_asked_saved": 2.5}
    judged = {name: value for name, value in recorder.metrics["run"].items() if name.startswith("judge_")}
    assert judged == {"judge_calls": 6, "judge_tokens": 1000, "judge_cost": 0.5, "judge_saved_by_not_asking": 2.5}
    assert "What judging cost" in (workspace.report / "index.html").read_text()


def test_alarms_of_a_workspace(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alarms", "--set", "alarms.exhausted_share=0", "--set", "alarms.patience=1"]) == 0
    assert "1 round; ringing in the last one: signal_exhaustion" in capsys.readouterr().out
    assert main(["alarms", "--workspace", "elsewhere"]) == 2
    message = capsys.readouterr().err
    assert "no round has signals yet" in message
    assert "papo advantage --round 0" in message


def test_policies_compared_by_hand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, other = load_params().evaluate.benchmarks
    command = ["evaluate", "--policy", "final", "--against", "warmstart", "--benchmark", benchmark, "--k", "3"]
    before = digest(here / "artifacts/evaluation/metrics.json")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("avg@k", "maj@k", "difference", "warmstart", "final-against-warmstart"))
    found = read_json(here / "artifacts/comparisons/final-against-warmstart/metrics.json")
    assert other not in found
    metrics = found[benchmark]
    assert set(metrics) == {"warmstart", "final", "gain"}
    assert metrics["final"]["k"] == 3
    assert digest(here / "artifacts/evaluation/metrics.json") == before
    assert main(["evaluate", "--policy", "artifacts/warmstart"]) == 0
    assert list(read_json(here / "artifacts/comparisons/warmstart/metrics.json")[benchmark]) == ["artifacts/warmstart"]


def test_a_benchmark_that_the_run_does_not_have_is_read_on_its_own(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [row["prompt"] for row in read_rows(here / "data/problems/train.parquet", PROBLEMS)]
    rows = [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in range(5)]
    rows += [{"question": train[0], "answer": "#### 1"}]
    Path("some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "evaluate",
        "--policy",
        "warmstart",
        "--benchmark",
        "gsm8k=some.jsonl",
        "--benchmark",
        load_params().evaluate.benchmarks[0],
        "--k",
        "1",
    ]
    before = digest(here / "data/problems")
    assert main(command) == 0
    said = capsys.readouterr()
    assert "gsm8k has 6 problems, 1319 are in a whole copy: some.jsonl" in said.err
    assert "1 training problems are those of gsm8k" in said.err
    table = read_rows(here / "data/benchmarks/gsm8k.parquet", PROBLEMS)
    assert len(table) == 6
    assert table[1]["prompt"].startswith("1 and 1?\n\nThink step by step")
    metrics = read_json(here / "artifacts/comparisons/warmstart/metrics.json")
    assert {name: policies["warmstart"]["avg_at_k"]["problems"] for name, policies in metrics.items()}["gsm8k"] == 6
    assert digest(here / "data/problems") == before
    assert main(command) == 0
    assert "whole copy" not in capsys.readouterr().err  # read once


def test_the_best_of_the_evaluated_rounds_is_the_final_policy(here: Path) -> None:
    (benchmark, *_) = load_params().evaluate.benchmarks
    chosen = ["--set", f"evaluate={{checkpoint: best, choose_on: {benchmark}, every: 1}}"]
    assert main(["evaluate", "--policy", "final", *chosen]) == 2  # which one it is, an evaluation has to say
    (here / "artifacts/evaluation/metrics.json").unlink()
    assert main(["evaluate", "--policy", "final", *chosen]) == 2
    assert main(["evaluate", *chosen]) == 0
    metrics = read_json(here / "artifacts/evaluation/metrics.json")
    assert metrics[benchmark]["gain"]["of"] == "round-0"
    assert main(["report", *chosen]) == 0
    assert "Final (after round 0)" in (here / "artifacts/report/index.html").read_text()
    assert main(["evaluate", "--policy", "final", "--against", "warmstart", *chosen]) == 0


def test_pass_rates_of_a_reference_policy(here: Path) -> None:
    assert main(["pass-rates", "--k", "3", "--out", "rates.parquet"]) == 0
    measured = read_rows(Path("rates.parquet"), PROBLEMS)
    before = read_rows(here / "data/problems/train.parquet", PROBLEMS)
    assert [row | {"pass_rate": None} for row in measured] == [row | {"pass_rate": None} for row in before]
    tries = read_rows(here / "artifacts/comparisons/pass-rates-warmstart/train.parquet", EVALUATION)
    assert len(tries) == 3 * len(before)
    for row in measured:
        scores = [one["orm_score"] for one in tries if one["problem_id"] == row["problem_id"]]
        assert row["pass_rate"] == pytest.approx(sum(scores) / 3)
    assert main(["pass-rates", "--k", "0"]) == 2


def test_measured_pass_rates_make_the_tiers_of_the_next_run(here: Path) -> None:
    assert main(["pass-rates", "--k", "2", "--out", "rates.parquet"]) == 0
    measured = read_rows(Path("rates.parquet"), PROBLEMS)
    for number, row in enumerate(measured):  # the tiny policy solves none
        row["pass_rate"] = (number % 6) / 5
    write_rows(Path("rates.parquet"), PROBLEMS, measured)
    again = ["--workspace", "again", "--set", "prepare.source=rates.parquet", "--set", "prepare.holdout=3"]
    again += ["--set", "prepare.tiers={per_tier: 1, pass_rate: pass_rate}", "--set", "evaluate.benchmarks=[holdout]"]
    assert main(["prepare", *again, "--set", "prepare.prompt_template='Solve {prompt}'"]) == 0
    rows = read_rows(Path("again/data/problems/train.parquet"), PROBLEMS)
    assert (
        sorted(row["tier"] for row in rows) == ["0-0.125", "0.125-0.375", "0.375-0.625", "0.625-0.875", "0.875-1"][1:]
    )
    known = {row["problem_id"]: row for row in measured}
    for row in rows:  # the same problems, worded once
        assert row == known[row["problem_id"]] | {"tier": row["tier"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "fnal"], "there is no policy 'fnal'"),
        (["--policy", "round-7"], "an input of this stage is not there"),
        (["--policy", "final", "--against", "final"], "final against itself"),
        (["--against", "final"], "--against needs --policy"),
        (["--policy", "final", "--benchmark", "nowhere"], "there is no benchmark nowhere"),
        (["--policy", "final", "--benchmark", "gsm8k=nowhere.jsonl"], "there is no such file"),
        (["--policy", "final", "--benchmark", "gsm8k="], "--benchmark gsm8k="),
        (["--benchmark", "gsm8k=some.jsonl"], "--benchmark gsm8k=some.jsonl needs --policy"),
        (["--benchmark", "gsm8k"], "gsm8k is not made by prepare"),
        (["--policy", "final", "--k", "0"], "evaluate.samples_per_problem"),
    ],
)
def test_policies_that_cannot_be_compared(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def session(folder: Path, tracker: Recorder, *overrides: str) -> Session:
    params = load_params(overrides=overrides)
    return Session(params, Workspace(folder), name="a run", tracker=tracker, context=Context(work=folder / ".papo"))


def test_dvc_status_is_clean_after_a_run(tiny_run: Path) -> None:
    assert dvc(tiny_run, "status") == "Data and pipelines are up to date.\n"


def test_a_run_makes_what_dvc_describes(tiny_run: Path) -> None:
    lock = yaml.safe_load((tiny_run / "dvc.lock").read_text())
    outs = [out["path"] for stage in lock["stages"].values() for out in stage["outs"]]
    assert len(lock["stages"]) == STEPS
    assert all((tiny_run / out).exists() for out in outs)
    assert len(set(outs)) == len(outs)


def test_a_run_leaves_nothing_half(tiny_run: Path) -> None:
    left = [path for path in tiny_run.rglob("*") if path.name.endswith(".tmp") or path.parts[-2:-1] == ("work",)]
    assert left == []
    assert not (tiny_run / ".papo/lock.json").exists()


def test_a_second_run_has_nothing_to_do(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_run)
    before = (tiny_run / "dvc.lock").read_text()
    assert main(["run"]) == 0
    assert f"0 steps ran, {STEPS} had been done before" in capsys.readouterr().out
    assert (tiny_run / "dvc.lock").read_text() == before


def skipped(folder: Path, *overrides: str, until: str) -> dict[str, bool]:
    """Step -> had it been done before, up to the step `until`."""
    params = load_params(overrides=overrides)
    found: dict[str, bool] = {}
    for step in steps(params):
        found[str(step)] = run_step(step, params, Workspace(folder), Context(work=folder / ".papo")).skipped
        if str(step) == until:
            break
    return found


def test_another_lam_leaves_data_warm_start_and_the_scores_of_round_0_alone(here: Path) -> None:
    assert skipped(here, "advantage.lam=0.5", until="advantage 0") == {
        "prepare": True, "warmstart": True, "rollout 0": True, "score_orm 0": True, "score_prm 0": True, "advantage 0": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "first"),
    [("score_orm.timeout_s=5", "score_orm 0"), ("advantage.variant=prm", "score_prm 0"), ("rollout.temperature=0.9", "rollout 0"),
     ("report.title=x", "report")],
)  # fmt: skip
def test_a_change_reruns_from_the_stage_it_concerns(here: Path, override: str, first: str) -> None:
    found = skipped(here, override, until=first)
    assert [step for step, done in found.items() if not done] == [first]


def test_tracking_changes_nothing(here: Path) -> None:
    assert all(skipped(here, "tracking.uri=sqlite:///other.db", until="report").values())


def run_all(run: Session) -> Summary:
    with run:
        for step in steps(run.params):
            run.step(step)
        return run.finish()


def test_a_run_is_recorded_whole_also_where_its_steps_had_been_done_before(here: Path) -> None:
    shutil.rmtree("artifacts/report")
    tracker = Recorder()
    run = session(here, tracker)
    summary = run_all(run)
    assert (summary.ran, summary.skipped) == (1, STEPS - 1)
    begin, *stages, policy, finish = tracker.calls
    assert begin == ("start", "a run")
    assert stages == [("stage", step.stage, step.round) for step in steps(run.params)]
    assert policy == ("policy", "final", ["sums-hard", "sums-in-range"])
    assert finish[:2] == ("finish", "FINISHED")
    assert {"overhead_share", "sums-hard/warmstart/avg_at_k"} <= set(finish[2])
    assert tracker.artifacts == [(here / name).as_posix() for name in ("data/problems/card.json", "artifacts/report")]
    assert tracker.tags["papo.lineage"] == lineage(run.params)
    assert tracker.tags["papo.workspace"] == str(here.resolve())
    assert tracker.tags["papo.run_id"] == summary.run
    assert summary.report.is_file()
    assert set(summary.evaluation) == {"sums-in-range", "sums-hard"}


def test_a_run_that_is_done_and_on_the_record_opens_no_other(here: Path) -> None:
    run_all(session(here, Recorder()))
    tracker = Recorder()
    assert run_all(session(here, tracker)).ran == 0
    assert tracker.calls == []


@pytest.mark.parametrize(("error", "status"), [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_that_ends_early_says_so_and_frees_the_workspace(here: Path, error: BaseException, status: str) -> None:
    tracker = Recorder()

    def run() -> None:
        with session(here, tracker, OTHER):
            raise error

    with pytest.raises(type(error)):
        run()
    assert tracker.calls[-1] == ("finish", status, [])
    with exclusive(Workspace(here)):
        pass


def test_a_record_that_cannot_be_opened_frees_the_workspace(here: Path) -> None:
    tracker = Recorder(fail=KeyboardInterrupt())
    unopened = session(here, tracker, OTHER)
    with pytest.raises(KeyboardInterrupt):
        unopened.__enter__()
    with exclusive(Workspace(here)):
        pass


def test_two_runs_at_once(here: Path) -> None:
    tracker = Recorder()
    with session(here, Recorder()), pytest.raises(BusyError), session(here, tracker):
        pass
    assert tracker.calls == []


def test_the_lineage_follows_params_but_not_tracking(here: Path) -> None:
    first = lineage(load_params())
    assert lineage(load_params()) == first
    assert lineage(load_params(overrides=["advantage.lam=0.5"])) != first
    assert lineage(load_params(overrides=["run.seed=1"])) != first
    assert lineage(load_params(overrides=["tracking.experiment=x"])) == first
    assert len(first) == 12


def test_a_run_beside_shares_problems_and_warm_start(here: Path) -> None:
    target = Workspace(here / "runs" / "beside")
    share_start(Workspace(here), target)
    for mine, theirs in ((here / "data/problems", target.problems), (here / "artifacts/warmstart", target.warmstart)):
        assert digest(mine) == digest(theirs)
        assert manifest_path(mine).samefile(manifest_path(theirs))  # linked, not copied
    context = Context(work=target.work)
    assert all(run_step(Step(stage), load_params(), target, context).skipped for stage in ("prepare", "warmstart"))


def test_a_run_beside_with_another_seed_of_its_data_makes_them_and_leaves_ours(here: Path) -> None:
    target = Workspace(here / "runs" / "beside")
    share_start(Workspace(here), target)
    before = digest(here / "data/problems")
    params = load_params(overrides=["prepare.seed=1"])
    assert not run_step(Step("prepare"), params, target, Context(work=target.work)).skipped
    assert digest(here / "data/problems") == before != digest(target.problems)


def test_what_a_run_beside_has_is_kept_and_what_is_unfinished_not_shared(here: Path) -> None:
    target = Workspace(here / "beside")
    target.problems.mkdir(parents=True)
    manifest_path(here / "artifacts/warmstart").unlink()
    share_start(Workspace(here), target)
    assert list(target.problems.iterdir()) == []
    assert not target.warmstart.exists()


def test_other_params_than_those_of_the_file_are_not_recorded_with_dvc(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (here / "dvc.lock").read_text()
    assert main(["run", "--set", "report.title=mine"]) == 0
    shown = capsys.readouterr()
    assert "the params are not those of params.yaml" in shown.err
    assert "not recorded with DVC" in shown.out
    assert f"1 steps ran, {STEPS - 1} had been done before" in shown.out
    assert (here / "dvc.lock").read_text() == before


def test_dvc_is_checked_before_any_work(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(message: str) -> None:
        from papo.commands import open_session

        tracker_off = load_params()
        with pytest.raises(SetupError, match=message), open_session(tracker_off, Workspace(Path())):
            pass
        assert not (checkout / ".papo").exists()

    run("not a git checkout")
    subprocess.run(["git", "init", "--quiet"], check=True)
    run("there is no .dvc folder")
    (checkout / ".dvc").mkdir()
    run("there is no dvc.yaml")
    monkeypatch.setenv("PATH", "")
    run("git is not installed")
