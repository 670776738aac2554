"""An alarm in a flow run: it waits on its page for a person, or ends in a state that says why; a real server has the pages."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_runs import resume_flow_run

import flows.pause
from flows.pipeline import train_eval
from papo.errors import AlarmError, ToldToStopError, UnansweredError

RING = ("alarms.exhausted_share=0", "alarms.patience=1")
pytestmark = pytest.mark.ops

STOP, PAUSE = "on_alarm.signal_exhaustion=stop", "on_alarm.signal_exhaustion=pause"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setattr(flows.pause, "POLL_S", 0.2)
    with get_client(sync_client=True) as client:
        yield client


def description_of(client: SyncPrefectClient, run: FlowRun) -> str | None:
    """What the page of a paused run says; Prefect pauses the run first, and writes its form then, this last."""
    if run.state is None or not run.state.is_paused():
        return None
    keys = run.state.state_details.run_input_keyset
    assert keys is not None
    try:
        return client.request("GET", f"/flow_runs/{run.id}/input/{keys['description']}").text
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 404:
            raise
        return None


def answered(client: SyncPrefectClient, answer: Callable[[FlowRun], None], **given: Any) -> State[Any]:
    """The end of a run of round 0 whose alarm is answered, by another thread, once its page waits for it."""
    before = {run.id for run in client.read_flow_runs()}
    failed: list[BaseException] = []

    def respond() -> None:
        deadline = time.monotonic() + 180
        try:
            while time.monotonic() < deadline:
                for run in client.read_flow_runs():
                    if run.id not in before and description_of(client, run) is not None:
                        answer(run)
                        return
                time.sleep(0.2)
            raise AssertionError("no flow run waits for an answer")
        except BaseException as error:  # of the thread: raised where the test sees it
            failed.append(error)

    thread = threading.Thread(target=respond)
    thread.start()
    wait = f"on_alarm.wait_hours={240 / 3600}"  # a thread that failed leaves nobody who answers
    state = train_eval(overrides=(*RING, PAUSE, wait), dvc=False, return_state=True, **given)
    thread.join()
    assert not failed, failed
    return state


def run_of(client: SyncPrefectClient, state: State[Any]) -> FlowRun:
    return client.read_flow_run(state.state_details.flow_run_id)


def test_a_person_who_resumes_the_run_with_go_on_lets_it_end(client: SyncPrefectClient, checkout: Path) -> None:
    shown: list[str | None] = []

    def answer(run: FlowRun) -> None:
        shown.append(description_of(client, run))
        with pytest.raises(RuntimeError, match="answer"):
            resume_flow_run(run.id)  # whoever resumes it has to say what he means by it
        with pytest.raises(RuntimeError, match="perhaps"):
            resume_flow_run(run.id, run_input={"answer": "perhaps"})
        resume_flow_run(run.id, run_input={"answer": "go on", "note": "seen it"})

    state = answered(client, answer, workspace="go-on")
    assert state.is_completed(), state.message
    summary = state.result()
    flow_run = state.state_details.flow_run_id
    assert f"by Prefect, flow run {flow_run} at 20" in summary.accepted["signal_exhaustion"]
    assert summary.accepted["signal_exhaustion"].endswith(": seen it")
    (description,) = shown
    assert description is not None
    assert "**signal_exhaustion** rings in round 0: " in description
    assert "`warmstart` in `artifacts/warmstart`" in description


def test_a_person_who_says_stop_here_ends_the_run_cancelled(client: SyncPrefectClient, checkout: Path) -> None:
    def answer(run: FlowRun) -> None:
        command = [sys.executable, "-m", "flows.pause", str(run.id), "stop here", "--note", "enough"]
        environment = os.environ | {"PREFECT_API_URL": str(client.api_url), "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, env=environment, check=True)
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert "does not wait for an answer" in done.stderr

    state = answered(client, answer, workspace="stop-here")
    assert (state.is_cancelled(), state.name) == (True, "Stopped by a person")
    ended = run_of(client, state)
    assert ended.state is not None
    assert (ended.state_type, ended.state_name) == (state.type, "Stopped by a person")
    assert "said to stop here: signal_exhaustion in round 0: " in str(ended.state.message)
    with pytest.raises(ToldToStopError):
        state.result()
    # What was done is there, and the same run with go_on goes on from it.
    again = train_eval(overrides=(*RING, PAUSE), dvc=False, workspace="stop-here", go_on=True)
    assert again.skipped == 6


def test_a_run_that_nobody_answers_in_time_ends_failed_and_says_why(client: SyncPrefectClient, checkout: Path) -> None:
    overrides = (*RING, PAUSE, f"on_alarm.wait_hours={2 / 3600}")
    state = train_eval(overrides=overrides, dvc=False, workspace="late", return_state=True)
    ended = run_of(client, state)
    assert ended.state is not None
    assert (ended.state.is_failed(), ended.state_name) == (True, "Stopped by alarm")
    assert "none did: signal_exhaustion in round 0: " in str(ended.state.message)
    with pytest.raises(UnansweredError):
        state.result()


def test_a_run_that_an_alarm_stops_ends_failed_with_the_evidence(
    client: SyncPrefectClient, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for said in ("an alarm has stopped this run", "this run was stopped by an alarm at 20"):
        state = train_eval(overrides=(*RING, STOP), dvc=False, workspace="stopped", return_state=True)
        ended = run_of(client, state)
        assert ended.state is not None
        assert (ended.state.is_failed(), ended.state_name, ended.run_count) == (True, "Stopped by alarm", 1)
        assert said in str(ended.state.message)
        assert "of the responses have no advantage" in str(ended.state.message)
        assert "the last good policy is warmstart" in str(ended.state.message)
    with pytest.raises(AlarmError):
        train_eval(overrides=(*RING, STOP), dvc=False, workspace="stopped")
    assert "Traceback" not in capfd.readouterr().err


def test_a_judge_that_is_down_is_not_retried_where_it_is_an_alarm_that_stops(
    client: SyncPrefectClient, checkout: Path, keyless: None
) -> None:
    model = "score_prm.model={model: m, base_url: 'http://127.0.0.1:9/v1', tries: 1, breaker: 1, timeout_s: 2}"
    overrides = ("score_prm.judge=model", model, "run.overlap=false", "on_alarm.judge_outage=stop")
    begun = time.monotonic()
    state = train_eval(variant="prm", overrides=overrides, workspace="down", dvc=False, return_state=True)
    assert time.monotonic() - begun < flows.pipeline.RETRIES_S[0]
    assert state.name == "Stopped by alarm"
    assert "judge_outage in round 0: " in str(state.message)


def test_an_exit_code_tells_a_run_that_an_alarm_stopped_from_one_that_failed(checkout: Path, server: str) -> None:
    environment = os.environ | {"PREFECT_API_URL": server, "PREFECT_HOME": str(checkout / "home")}
    settings = [part for one in (*RING, STOP) for part in ("--set", one)]
    command = [sys.executable, "-m", "flows.pipeline", "--no-dvc", "--workspace", "by-hand", *settings]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "\npapo: an alarm has stopped this run: signal_exhaustion in round 0: " in done.stderr
