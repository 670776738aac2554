"""The flows on tiny params, in this process, against a server of their own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from ablations.made import TINY_PLAN, Made
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.states import Failed
from servers.chat import chat_process

import flows.notify
import flows.pipeline
from flows.ablations import nightly_ablations
from flows.pipeline import train_eval
from papo.ablations.work import Place, Processes
from papo.errors import ParamsError, StageError
from papo.params import Variant, load_params
from papo.pipeline import STAGES, Step, steps
from papo.session import Session, Summary

from .processes import webhook

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def first(client: SyncPrefectClient, checkout: Path) -> State[Summary]:
    """The end of a first run."""
    return train_eval(dvc=False, return_state=True)


def run_of(client: SyncPrefectClient, state: State[Any]) -> FlowRun:
    return client.read_flow_run(state.state_details.flow_run_id)


def eventually(read: Callable[[], Any], expected: Any) -> None:
    """Task runs reach the server as events, after the flow has ended."""
    deadline = time.monotonic() + 30
    while (found := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found == expected


def tasks_of(client: SyncPrefectClient, state: State[Any]) -> list[TaskRun]:
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    return client.read_task_runs(flow_run_filter=chosen, limit=200)


def artifacts_of(client: SyncPrefectClient, state: State[Any]) -> dict[str, Any]:
    answer = client.request(
        "POST",
        "/artifacts/filter",
        json={"artifacts": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}},
    )
    return {artifact["key"]: artifact for artifact in answer.json()}


def test_a_run_is_a_flow_run_with_a_readable_name(client: SyncPrefectClient, first: State[Summary]) -> None:
    assert first.is_completed(), first.message
    assert run_of(client, first).name == "papo seed0 1 rounds"


def test_each_step_is_a_task_run(client: SyncPrefectClient, first: State[Summary]) -> None:
    expected = {(str(step), "COMPLETED") for step in steps(load_params())}
    assert len(expected) == len(STAGES)
    eventually(lambda: {(run.name, run.state_type.value) for run in tasks_of(client, first)}, expected)


def test_artifacts_show_progress_and_result(client: SyncPrefectClient, first: State[Summary]) -> None:
    artifacts = artifacts_of(client, first)
    assert set(artifacts) == {"papo-progress", "papo-result", "papo-accuracy", "papo-training", "papo-time"}
    assert artifacts["papo-progress"]["data"] == 100.0
    assert artifacts["papo-progress"]["description"] == "1 of 1 rounds"
    assert "**tiny**: warm start avg@2" in artifacts["papo-result"]["data"]
    assert "index.html" in artifacts["papo-result"]["data"]
    assert "whole run" in artifacts["papo-time"]["data"]


def test_a_second_run_finds_everything_done(first: State[Summary]) -> None:
    again = train_eval(dvc=False)
    assert (again.ran, again.skipped) == (0, len(STAGES))


def test_a_stage_whose_server_was_down_is_started_again_and_no_other(
    client: SyncPrefectClient, first: State[Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server fails the first request of each question, and one failure is taken for a server that is down."""
    patient = flows.pipeline.STAGE_TASKS["score_prm"].with_options(retries=8, retry_delay_seconds=[0.1])
    monkeypatch.setitem(flows.pipeline.STAGE_TASKS, "score_prm", patient)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with chat_process(fault="503", when="first", reply="servers.replies:levels") as server:
        model = f"{{model: m, base_url: '{server.url}', tries: 1, breaker: 1, concurrency: 1}}"
        overrides = (
            "score_prm.judge=model",
            f"score_prm.model={model}",
            "score_prm.prices={m: {prompt: 1, completion: 1}}",
            "run.overlap=false",  # what is asked ahead meets failures, too, which the stage then does not
        )
        state = train_eval(variant="prm", overrides=overrides, workspace="judged", dvc=False, return_state=True)
        seen = server.seen
    assert state.is_completed(), state.message
    assert seen.requests.total() == 2 * seen.billed.total() > 0
    assert "Judge: " in artifacts_of(client, state)["papo-result"]["data"]
    runs = len(seen.billed) + 1
    eventually(lambda: {run.name: run.run_count for run in tasks_of(client, state)}.get("score_prm 0"), runs)
    assert {run.run_count for run in tasks_of(client, state) if run.name != "score_prm 0"} == {1}
    assert not flows.pipeline.retry_may_help(None, None, Failed(data=StageError("too many rows failed")))


@pytest.mark.timeout(
    200, method="thread"
)  # by default it takes the alarm of which Prefect makes the end of a task's time
def test_a_stage_that_is_not_done_in_time_is_started_again(
    client: SyncPrefectClient, first: State[Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs the first time."""
    patient = flows.pipeline.STAGE_TASKS["report"].with_options(retries=1, retry_delay_seconds=[0.1])
    monkeypatch.setitem(flows.pipeline.STAGE_TASKS, "report", patient)
    step, hung = Session.step, []

    def hanging(session: Session, which: Step) -> Any:
        if which.stage == "report" and not hung:
            hung.append(which)
            time.sleep(300)
        return step(session, which)

    monkeypatch.setattr(Session, "step", hanging)
    state = train_eval(overrides=("flow.timeouts={report: 0.05}",), dvc=False, return_state=True)
    assert state.is_completed(), state.message
    assert hung
    eventually(lambda: {run.name: run.run_count for run in tasks_of(client, state)}.get("report"), 2)


def test_nothing_of_a_result_is_kept_by_prefect(first: State[Summary], server: str) -> None:
    """Of a run that failed it keeps the error; none has failed so far."""
    from prefect.settings import PREFECT_HOME

    assert not list((PREFECT_HOME.value() / "storage").glob("*"))


def test_people_are_told_of_alarms_and_of_a_run_that_failed(
    client: SyncPrefectClient, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a webhook whose address is in a Secret block of Prefect."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with webhook() as (address, messages):
        Secret(value=address).save("lab", overwrite=True)
        monkeypatch.setenv("PAPO_NOTIFY", "secret/lab")
        limits = ("alarms.exhausted_share=0", "alarms.patience=1")
        train_eval(overrides=limits, workspace="alarmed", dvc=False)
        (alarm,) = messages
        assert alarm.startswith("papo: alarm in papo seed0 1 rounds\nsignal_exhaustion from round 0: ")
        nowhere = ("prepare.source=nowhere.jsonl", "prepare.eval_sources={tiny: nowhere.jsonl}")
        state = train_eval(overrides=nowhere, workspace="failed", dvc=False, return_state=True)
        assert state.is_failed()
        assert len(messages) == 2
        assert messages[1].startswith("papo: papo seed0 1 rounds failed\n")
        assert "nowhere.jsonl" in messages[1]
        assert "to do: " in messages[1]
    monkeypatch.setenv("PAPO_NOTIFY", address)  # nobody listens there any more
    assert not flows.notify.send("unheard")


def test_alarms_are_an_artifact_and_in_the_result(client: SyncPrefectClient, first: State[Summary]) -> None:
    """Limits under which every round is exhausted; only the report is made again."""
    limits = ("alarms.exhausted_share=0", "alarms.patience=1")
    artifacts = artifacts_of(client, train_eval(overrides=limits, dvc=False, return_state=True))
    (row,) = json.loads(artifacts["papo-alarms"]["data"])
    assert (row["alarm"], row["from round"]) == ("signal_exhaustion", "0")
    assert f"- alarm from round 0, signal_exhaustion: {row['evidence']}" in artifacts["papo-result"]["data"]


def test_params_that_are_wrong_end_the_flow_failed_with_the_message(
    client: SyncPrefectClient, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = train_eval(overrides=("rollout.group_sise=3",), return_state=True)
    shown = run_of(client, state).state
    assert shown is not None
    assert shown.is_failed()
    assert "did you mean rollout.group_size?" in str(shown.message)
    assert "to do:" in str(shown.message)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(ParamsError):
        state.result()


def test_a_stage_that_cannot_go_on_ends_its_task_and_the_flow_failed(client: SyncPrefectClient, checkout: Path) -> None:
    overrides = ("prepare.source=nowhere.jsonl", "prepare.holdout=2", "evaluate.benchmarks=[holdout]")
    state = train_eval(overrides=overrides, workspace="other", dvc=False, return_state=True)
    assert state.is_failed()
    assert "nowhere.jsonl" in str(state.message)
    eventually(lambda: [(run.name, run.state_type.value) for run in tasks_of(client, state)], [("prepare", "FAILED")])


def test_the_form_of_the_deployment_knows_the_variants() -> None:
    schema = train_eval.parameters.properties
    (variants,) = (option["enum"] for option in schema["variant"]["anyOf"] if "enum" in option)
    assert variants == list(get_args(Variant))
    assert schema["rounds"]["description"] == "run.rounds."
    assert set(nightly_ablations.parameters.properties) == {
        "plan",
        "minutes",
        "money",
        "jobs",
        "seeds",
        "overrides",
        "root",
    }


@pytest.fixture
def made(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Made]]:
    """Runs of ablations are made by rule instead of by training; `tiny.yaml` is a plan of four."""
    (checkout / "tiny.yaml").write_text(yaml.safe_dump(TINY_PLAN))

    def make(**how: str) -> Made:
        runs = Made(Place(checkout / "runs/ablations/tiny"), **how)
        monkeypatch.setattr(Processes, "begin", lambda self, run: runs.begin(run))
        return runs

    yield make
    shutil.rmtree(checkout / "runs/ablations", ignore_errors=True)


def test_a_failing_run_of_an_ablation_is_a_row_and_not_the_end(
    client: SyncPrefectClient, made: Callable[..., Made]
) -> None:
    runs = made(**{"papo-seed1": "failed"})
    state = nightly_ablations(plan="tiny.yaml", jobs=2, return_state=True)
    assert state.is_completed()
    assert state.message == "3 of 4 runs done, 1 failed"
    rows = state.result()
    assert [(row["run"], row["state"]) for row in rows] == [
        ("orm-seed0", "done"), ("papo-seed0", "done"), ("orm-seed1", "done"), ("papo-seed1", "failed"),
    ]  # fmt: skip
    assert rows[3]["error"] == "as it was told"
    assert float(rows[0]["accuracy/tiny"]) > 0
    artifacts = artifacts_of(client, state)
    assert json.loads(artifacts["papo-ablations"]["data"]) == rows
    assert "## Tiny" in artifacts["papo-ablation"]["data"]
    eventually(lambda: sorted(run.state_name for run in tasks_of(client, state)), ["Completed"] * 3 + ["Failed"])
    assert {run.name for run in tasks_of(client, state)} == {run["run"] for run in rows}
    assert runs.at_once == 2


def test_the_next_night_goes_on_where_the_budget_ended_the_first(made: Callable[..., Made]) -> None:
    first = made()
    state = nightly_ablations(plan="tiny.yaml", jobs=1, minutes=0.001, return_state=True)
    assert len(first.begun) == 1
    assert state.message.startswith("1 of 4 runs done, 0 failed; 3 runs are left for the next start")
    second = made()
    state = nightly_ablations(plan="tiny.yaml", jobs=1, return_state=True)
    assert state.message == "4 of 4 runs done, 0 failed"
    assert first.begun + second.begun == ["orm-seed0", "papo-seed0", "orm-seed1", "papo-seed1"]


def test_an_ablation_whose_runs_all_fail_ends_failed(made: Callable[..., Made]) -> None:
    made(**{f"{variant}-seed{seed}": "failed" for variant in ("orm", "papo") for seed in (0, 1)})
    with pytest.raises(StageError, match="no run of tiny is done; orm-seed0 failed: as it was told"):
        nightly_ablations(plan="tiny.yaml")


def test_a_person_at_a_terminal_gets_the_message_and_the_exit_code(checkout: Path, server: str) -> None:
    environment = os.environ | {"PREFECT_API_URL": server, "PREFECT_HOME": str(checkout / "home")}
    command = [sys.executable, "-m", "flows.pipeline", "--set", "run.rounds=0"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "\npapo: the params are not valid:\n  - run.rounds:" in done.stderr
    assert "Traceback" not in done.stderr
