"""What a run does about alarms: it stops, asks or goes on; what it leaves on disk and on the record; how it is taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers.chat import chat_process

from papo.cli import main
from papo.decisions import read_decisions
from papo.engines.tracking import NullTracker
from papo.errors import AlarmError, DataError, NotFiniteError, ToldToStopError, UnansweredError
from papo.params import load_params
from papo.pipeline import lineage, steps
from papo.session import Session, Summary
from papo.store.files import digest, read_json, read_sealed, write_json, write_sealed
from papo.store.layout import Workspace, manifest_path
from papo.store.manifest import Context
from papo.watch import Answer, Ask, Question

# Every round is exhausted under these.
RING = ("alarms.exhausted_share=0", "alarms.patience=1")
STOP, PAUSE = "on_alarm.signal_exhaustion=stop", "on_alarm.signal_exhaustion=pause"


class Recorder(NullTracker):
    """A tracker that keeps what it was told."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.ends: list[str] = []
        self.policies: dict[str, Path] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    def start(self, name: str, params: Any, tags: Any) -> None:
        self.tags |= tags

    def stage(self, stage: str, round_: int | None, manifest: Any) -> None:
        self.metrics[stage] = manifest["metrics"]

    def tag(self, key: str, value: str) -> None:
        self.tags[key] = value

    def policy(self, path: Path, name: str, metrics: Any) -> None:
        self.policies[name] = path

    def finish(self, status: str, metrics: Any) -> None:
        self.ends.append(status)


@pytest.fixture
def here(tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of a run of one round that has yet to compute the advantages of it."""
    folder = tiny_copy()
    monkeypatch.chdir(folder)
    for name in ("rounds/0/advantages.parquet", "rounds/0/policy", "rounds/0/trainer", "evaluation", "report"):
        path = folder / "artifacts" / name
        manifest_path(path).unlink(missing_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "artifacts/evaluation.manifest.json").unlink(missing_ok=True)
    return folder


def command(*overrides: str) -> list[str]:
    return ["run", "--no-dvc", *(part for one in (*RING, *overrides) for part in ("--set", one))]


def run_all(folder: Path, tracker: Recorder, *overrides: str, ask: Ask | None = None, go_on: bool = False) -> Summary:
    params, context = load_params(overrides=[*RING, *overrides]), Context(work=folder / ".papo")
    session = Session(params, Workspace(folder), name="a run", tracker=tracker, context=context, ask=ask, go_on=go_on)
    with session:
        for step in steps(params):
            session.run(step)
        return session.finish()


def trained(folder: Path) -> bool:
    return (folder / "artifacts/rounds/0/policy").exists()


def test_an_alarm_stops_the_run_before_it_trains_on_the_round(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(STOP)) == 3
    said = capsys.readouterr().err
    assert "papo: an alarm has stopped this run: signal_exhaustion in round 0: " in said
    assert "the last good policy is warmstart in artifacts/warmstart" in said
    assert "--go-on" in said
    assert (here / "artifacts/rounds/0/advantages.parquet").is_file()
    assert not trained(here)
    good = read_json(here / "artifacts/last_good.json")
    assert good["digest"] == digest(here / "artifacts/warmstart")
    assert (good["round"], good["folder"]) == (-1, "artifacts/warmstart")
    assert good["alarms"].startswith("signal_exhaustion in round 0: ")


def test_the_same_command_says_that_the_run_was_stopped_and_does_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(STOP)) == 3
    capsys.readouterr()
    left = digest(here / "artifacts")
    assert main(command(STOP)) == 3
    said = capsys.readouterr().err
    assert "papo: this run was stopped by an alarm at 20" in said
    assert "signal_exhaustion in round 0: " in said
    assert "--go-on" in said
    assert digest(here / "artifacts") == left


def test_a_run_that_was_killed_before_it_could_say_that_it_stops_still_stops(here: Path) -> None:
    assert main(command(STOP)) == 3
    (here / ".papo/alarms.json").unlink()
    assert main(command(STOP)) == 3
    assert not trained(here)


def test_going_on_accepts_the_alarm_and_repeats_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(STOP)) == 3
    assert main([*command(STOP), "--go-on"]) == 0
    shown = capsys.readouterr()
    assert "3 steps ran, 6 had been done before" in shown.out
    assert "accepted in round 0 by " in shown.err
    page = (here / "artifacts/report/index.html").read_text()
    assert "It was accepted in round 0 by " in page
    # Once accepted it stays so, without the option; and a run that has ended has nothing to stop.
    assert main(command(STOP)) == 0
    assert main(["alarms", *command(STOP)[2:]]) == 0
    shown = capsys.readouterr()
    assert "accepted in" in " ".join(shown.out.split())
    assert "stop: signal_exhaustion" in shown.out


def test_what_is_accepted_is_accepted_for_this_run_only(here: Path) -> None:
    assert main(command(STOP)) == 3
    assert main([*command(STOP), "--go-on"]) == 0
    assert main(command(STOP, "advantage.lam=0.5")) == 3


def test_an_alarm_of_another_name_stops_a_run_that_has_accepted_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("alarms.judge_failure_share=0", "on_alarm.judge_outage=stop")
    shutil.rmtree(here / ".papo", ignore_errors=True)
    params = load_params(overrides=[*RING, STOP, *other])
    assert main(command(STOP, *other)) == 3
    assert "signal_exhaustion" in capsys.readouterr().err
    record = here / ".papo/alarms.json"
    content = read_json(record)
    stopped = content[lineage(params)]["stopped"]
    # As if only one of them had rung when the person accepted.
    stopped["alarms"] = [one for one in stopped["alarms"] if one["name"] == "signal_exhaustion"]
    write_json(record, content)
    assert main([*command(STOP, *other), "--go-on"]) == 3
    said = capsys.readouterr().err
    assert "an alarm has stopped this run: judge_outage in round 0" in said


def test_with_the_policy_warn_a_stopped_run_goes_on(here: Path) -> None:
    assert main(command(STOP)) == 3
    assert main(command()) == 0


def test_a_run_that_has_ended_is_not_stopped_by_what_rang_in_it(here: Path) -> None:
    assert main(command()) == 0
    assert main(command(STOP)) == 0


def test_the_policy_changes_no_result_and_not_the_lineage(here: Path) -> None:
    assert lineage(load_params(overrides=[STOP])) == lineage(load_params())
    assert main(command()) == 0
    report = digest(here / "artifacts/report")
    shutil.rmtree(here / "artifacts/report")
    assert main(command(STOP)) == 0
    assert digest(here / "artifacts/report") == report


def test_an_alarm_that_does_not_exist_is_refused_with_the_nearest(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("on_alarm.colapse=stop")) == 2
    assert "did you mean on_alarm.collapse?" in capsys.readouterr().err
    assert main(command("on_alarm.collapse=halt")) == 2
    assert "'warn', 'pause' or 'stop'" in capsys.readouterr().err


def test_the_record_says_why_the_run_ended_and_has_the_last_good_policy(here: Path) -> None:
    tracker = Recorder()
    with pytest.raises(AlarmError):
        run_all(here, tracker, STOP)
    assert tracker.ends == ["FAILED"]
    assert tracker.tags["papo.end"].startswith("an alarm has stopped this run: signal_exhaustion in round 0: ")
    assert tracker.tags["papo.end"] in tracker.tags["mlflow.note.content"]
    assert tracker.tags["papo.last_good"].startswith("warmstart, digest ")
    assert tracker.policies == {"last-good-warmstart": here / "artifacts/warmstart"}
    again = Recorder()
    run_all(here, again, STOP, go_on=True)
    assert again.ends == ["FINISHED"]
    assert again.tags["papo.end"].startswith("finished; signal_exhaustion accepted in round 0 by ")
    assert again.metrics["train"]["alarm_non_finite_loss"] == 0.0


def test_nobody_to_ask_ends_the_run_with_a_code_of_its_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(PAUSE)) == 4
    said = capsys.readouterr().err
    assert "a person has to say whether this run goes on, and none did: signal_exhaustion" in said
    assert "--go-on" in said
    assert not trained(here)
    assert main(command(PAUSE)) == 4
    assert main([*command(PAUSE), "--go-on"]) == 0


def test_a_person_who_says_go_on_is_asked_once(here: Path) -> None:
    asked: list[Question] = []

    def ask(question: Question) -> Answer:
        asked.append(question)
        assert not trained(here)
        return Answer(True, "a person", "seen it")

    tracker = Recorder()
    summary = run_all(here, tracker, PAUSE, ask=ask)
    (question,) = asked
    assert question.good.policy == "warmstart"
    assert not question.again
    assert summary.accepted["signal_exhaustion"].endswith("seen it")
    assert tracker.ends == ["FINISHED"]
    assert "a person" in tracker.tags["papo.end"]


def test_a_person_who_says_stop_here_is_asked_again_by_the_same_command(here: Path) -> None:
    answers = [Answer(False, "a person"), Answer(True, "a person")]
    tracker = Recorder()
    with pytest.raises(ToldToStopError, match="a person said to stop here: signal_exhaustion") as caught:
        run_all(here, tracker, PAUSE, ask=lambda question: answers.pop(0))
    assert caught.value.exit_code == 3
    assert tracker.ends == ["KILLED"]
    assert not trained(here)
    run_all(here, tracker, PAUSE, ask=lambda question: answers.pop(0))
    assert answers == []


def test_an_answer_that_never_comes_leaves_nothing_decided(here: Path) -> None:
    def interrupted(question: Question) -> Answer:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(here, Recorder(), PAUSE, ask=interrupted)
    params = load_params(overrides=[*RING, PAUSE])
    assert read_decisions(Workspace(here), lineage(params)).stopped is None
    with pytest.raises(UnansweredError):
        run_all(here, Recorder(), PAUSE)


def test_the_last_good_policy_can_be_evaluated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--policy", "last-good"]) == 2
    assert "no alarm has left a last good policy" in capsys.readouterr().err
    assert main(command(STOP)) == 3
    assert main(["evaluate", "--policy", "last-good", "--k", "1"]) == 0
    (here / "artifacts/last_good.json").write_text("[]")
    assert main(["evaluate", "--policy", "last-good", "--k", "1"]) == 2


def test_going_on_where_nothing_was_stopped_is_only_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(), "--go-on"]) == 0
    assert "there is nothing to accept" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"x": {"stopped": {}}}'])
def test_a_damaged_record_of_decisions_is_refused(here: Path, content: str) -> None:
    (here / ".papo/alarms.json").write_text(content)
    with pytest.raises(DataError):
        run_all(here, Recorder(), STOP)


def test_a_judge_that_is_down_stops_the_run_or_waits_for_a_person(here: Path, keyless: None) -> None:
    (here / "artifacts/rounds/0/prm.manifest.json").unlink()
    down = "score_prm.model={model: m, base_url: 'http://127.0.0.1:9/v1', tries: 1, breaker: 1, timeout_s: 2}"
    judged = ("advantage.variant=prm", "score_prm.judge=model", down, "run.overlap=false")
    assert main(["run", "--no-dvc", *(part for one in judged for part in ("--set", one))]) == 1
    stop = [*judged, "on_alarm.judge_outage=stop"]
    said = [part for one in stop for part in ("--set", one)]
    assert main(["run", "--no-dvc", *said]) == 3
    assert main(["run", "--no-dvc", *said]) == 3
    assert main(["run", "--no-dvc", *said, "--go-on"]) == 3  # tried again, and still down
    asked: list[Question] = []

    def ask(question: Question) -> Answer:
        asked.append(question)
        return Answer(len(asked) < 3, "a person")

    with pytest.raises(ToldToStopError):
        run_all(here, Recorder(), *judged, "on_alarm.judge_outage=pause", ask=ask)
    assert len(asked) == 3  # each time it was found down
    assert all(question.again for question in asked)


def test_a_judge_that_came_back_while_a_person_was_asked_is_asked_again(here: Path, keyless: None) -> None:
    """The server fails the first request of each question, and one failure is taken for a server that is down."""
    with chat_process(fault="503", when="first", reply="servers.replies:levels") as server:
        model = f"score_prm.model={{model: m, base_url: '{server.url}', tries: 1, breaker: 1, concurrency: 1}}"
        judged = ("advantage.variant=prm", "score_prm.judge=model", model, "run.overlap=false")
        asked: list[Question] = []

        def ask(question: Question) -> Answer:
            asked.append(question)
            return Answer(True, "a person")

        summary = run_all(here, Recorder(), *judged, "on_alarm.judge_outage=pause", ask=ask)
        seen = server.seen
    assert asked
    assert seen.requests.total() == 2 * seen.billed.total() > 0
    assert summary.accepted["judge_outage"].startswith("started again in round 0 by a person")


def test_training_that_is_not_finite_is_an_alarm(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def train(self, job: Any, progress: Any) -> Any:
            raise NotFiniteError("loss or gradient are not finite in 3 of 3 steps", fix="look at the rows")

    monkeypatch.setattr("papo.engines.training.make_trainer", lambda *args, **kwargs: Broken())
    assert main(["run", "--no-dvc"]) == 1
    tracker = Recorder()
    with pytest.raises(AlarmError, match="non_finite_loss in round 0: loss or gradient are not finite in 3 of 3 steps"):
        run_all(here, tracker, "on_alarm.non_finite_loss=stop")
    assert tracker.policies == {"last-good-warmstart": here / "artifacts/warmstart"}


def test_steps_that_were_not_applied_stop_the_run_before_the_next_round(here: Path) -> None:
    assert main(command()) == 0
    policy = manifest_path(Workspace(here).policy(0))
    manifest = read_sealed(policy)
    manifest["metrics"]["broken"] = 1.0
    write_sealed(policy, manifest)
    metrics = manifest_path(Workspace(here).evaluation / "metrics.json")
    metrics.unlink()
    stop = [part for one in ("on_alarm.non_finite_loss=stop",) for part in ("--set", one)]
    assert main(["run", "--no-dvc", *stop]) == 3
    assert not metrics.exists()
    assert "1 of 1 optimizer steps were not applied" in json.dumps(read_json(here / "artifacts/last_good.json"))
    assert main(["run", "--no-dvc", *stop, "--go-on"]) == 0
    assert "non finite loss" in (here / "artifacts/report/index.html").read_text()


def test_papo_run_asks_in_the_terminal_that_it_has(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["perhaps\n", "y\n"]

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return lines.pop(0) if lines else ""

    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(command(PAUSE)) == 0
    assert lines == []
    assert main(command(PAUSE, "advantage.lam=0.5")) == 4  # its end: nobody is there any more


@pytest.mark.ops
def test_mlflow_says_why_a_run_ended_keeps_its_last_good_policy_and_has_one_run_of_it(here: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.transformers import load_model

    uri = f"sqlite:///{here}/mlflow.db"
    recorded = ("tracking.enabled=true", f"tracking.uri={uri}")
    assert main(command(STOP, *recorded)) == 3
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("papo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`papo.kind` = 'run'")
    assert run.info.status == "FAILED"
    assert run.data.tags["papo.end"].startswith("an alarm has stopped this run: signal_exhaustion in round 0: ")
    assert run.data.tags["papo.last_good"].startswith("warmstart, digest ")
    assert "--go-on" in run.data.tags["mlflow.note.content"]
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.name == "last-good-warmstart"
    assert load_model(model.artifact_location)("1+1=?\n", max_new_tokens=1)
    assert main([*command(STOP, *recorded), "--go-on"]) == 0
    (run,) = client.search_runs([experiment.experiment_id], "tags.`papo.kind` = 'run'")
    assert run.info.status == "FINISHED"
    assert run.data.tags["papo.end"].startswith("finished; signal_exhaustion accepted in round 0 by ")
    assert {one.name for one in client.search_logged_models([experiment.experiment_id])} == {model.name, "final"}
