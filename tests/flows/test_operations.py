"""What a night can bring, on a real Prefect server with process workers: cancelled, killed, hanging and waiting runs."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import yaml
from checkout import TINIEST

from .processes import free_port, started, until, webhook

# Starting ten processes takes minutes on a busy machine.
pytestmark = [pytest.mark.ops, pytest.mark.timeout(2400)]

REPOSITORY = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
DEAD_AFTER_S = 110
"""A process that hangs in native code sends no heartbeat, and has sent the last one up to 30 s before; the guard ends it after 60 s."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Night:
    checkout: Path
    logs: Path
    environment: dict[str, str]
    api: httpx.Client
    messages: list[str]
    open: ExitStack
    workers: dict[str, psutil.Process] = field(default_factory=dict)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def setup(self, *arguments: str) -> str:
        done = self.python("-m", "flows.setup", "--dead-after", str(DEAD_AFTER_S), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def worker(self, name: str) -> None:
        command = [*PREFECT, "worker", "start", "--pool", "papo", "--name", name]
        process = started(command, cwd=self.logs, environment=self.environment, log=self.logs / name)
        self.workers[name] = psutil.Process(self.open.enter_context(process).pid)

    def submit(self, workspace: str, *, hold: str = "", name: str = "train-eval", **parameters: Any) -> str:
        root = self.checkout / workspace
        root.mkdir(parents=True, exist_ok=True)
        if hold:
            (root / "hold-train").write_text(hold)
        deployment = self.api.get(f"/deployments/name/papo/{name}").json()["id"]
        body = {"parameters": {"workspace": workspace, **parameters}}
        return str(self.post(f"/deployments/{deployment}/create_flow_run", body)["id"])

    def post(self, path: str, body: Any) -> Any:
        """The answer; a server on SQLite that has much to do says at times that its database is locked."""
        body |= {"idempotency_key": uuid4().hex} if path.endswith("create_flow_run") else {}
        answer = until(
            lambda: found if (found := self.api.post(path, json=body)).is_success else None, seconds=60, what=path
        )
        return answer.json()

    def set_state(self, run: str, **state: str) -> None:
        assert self.post(f"/flow_runs/{run}/set_state", {"state": state})["status"] == "ACCEPT"

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/flow_runs/{run}").json()
        return found

    def states(self, run: str) -> list[tuple[str, datetime, str]]:
        """Name, time and message of each, the oldest first."""
        states = self.api.get("/flow_run_states/", params={"flow_run_id": run}).json()
        found = ((one["name"], datetime.fromisoformat(one["timestamp"]), one["message"] or "") for one in states)
        return sorted(found, key=lambda state: state[1])

    def message(self, run: str, name: str) -> str:
        return next(message for found, _, message in self.states(run) if found == name)

    def running(self, run: str) -> list[tuple[datetime, datetime]]:
        """From when to when it was in the state Running."""
        states = self.states(run)
        return [(since, after[1]) for (name, since, _), after in pairwise(states) if name == "Running"]

    def ended(self, run: str, *, seconds: float = 400) -> str:
        """The type of the state that it ends in."""
        until(
            lambda: self.run(run)["state_type"] in ENDED,
            seconds=seconds,
            what=f"{run} ends",
            seen=lambda: self.said(run),
        )
        return str(self.run(run)["state_type"])

    def in_state(self, run: str, name: str, *, seconds: float = 400) -> None:
        """It has been in a state of that name."""
        until(
            lambda: name in [found for found, *_ in self.states(run)],
            seconds=seconds,
            what=f"{run} is {name}",
            seen=lambda: self.said(run),
        )

    def held(self, workspace: str) -> list[int]:
        """The processes of a run that hangs: its own, and two that it started."""
        path = self.checkout / workspace / "held"
        found: list[int] = until(
            lambda: path.is_file() and json.loads(path.read_text()), seconds=400, what="a run hangs"
        )
        return found

    def let_go(self, workspace: str) -> None:
        for name in ("hold-train", "held"):
            (self.checkout / workspace / name).unlink()

    def said(self, run: str) -> str:
        return "\n".join(
            [str(self.states(run)), *(path.read_text()[-3000:] for path in self.logs.iterdir() if path.is_file())]
        )


def processes_of(run: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(numbers: list[int]) -> bool:
    def lives(number: int) -> bool:
        try:
            return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return not any(map(lives, numbers))


def digests(workspace: Path) -> dict[str, Any]:
    """The outputs of every stage by digest."""
    return {
        str(path.relative_to(workspace)): json.loads(path.read_text())["outputs"]
        for path in sorted(workspace.glob("*/**/*.manifest.json"))
        if "report" not in path.name  # it shows times
    }


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    checkout, logs = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("logs")
    for name in ("flows", "papo", "infra"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "prefect.yaml", checkout)
    shutil.copy(Path(__file__).with_name("holding.py"), checkout)
    with (checkout / "flows/__init__.py").open("a") as package:
        package.write("\nimport holding\n")
    tracking = {"enabled": True, "uri": f"sqlite:///{checkout}/mlflow.db"}
    (checkout / "params.yaml").write_text(yaml.safe_dump(TINIEST | {"tracking": tracking}))
    port = free_port()
    with webhook() as (hook, messages), ExitStack() as services:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        environment = {key: value for key, value in inherited.items() if "proxy" not in key.lower()} | {
            "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PAPO_NOTIFY": hook,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        server = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        services.enter_context(started(server, cwd=checkout, environment=environment, log=logs / "server"))
        api = services.enter_context(httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30, trust_env=False))
        until(lambda: api.get("/health").is_success, seconds=400, what="the server is healthy")
        yield Night(checkout, logs, environment, api, messages, services)


def test_setting_up_says_what_it_did_and_a_second_time_changes_nothing(night: Night) -> None:
    first, second = night.setup(), night.setup()
    assert "work pool papo: made, of the type process" in first
    assert "queue gpu: made, with a limit of 1" in first
    assert first.count("made\n") == 3  # the automations
    *lines, forgotten, _ = second.splitlines()
    assert len(lines) == 6
    assert forgotten == "runs that crashed and were forgotten: none"
    assert all("there already" in line for line in lines), second
    assert {item["name"] for item in night.api.post("/deployments/filter", json={}).json()} == {
        "train-eval",
        "nightly-ablations",
        "evaluate",
    }
    looked = night.python("-m", "flows.setup", "--check")
    assert looked.returncode == 2
    (wrong,) = (line for line in looked.stdout.splitlines() if line.startswith("WRONG"))
    assert "no worker takes runs of the pool 'papo'" in wrong
    assert "prefect worker start --pool papo" in looked.stdout


def test_a_crash_that_the_server_forgot_is_found_by_whoever_asks_next(night: Night) -> None:
    forgotten = night.submit("forgotten")
    night.set_state(forgotten, type="CRASHED")
    asked = (
        "from flows.restarts import restart_forgotten as again; print(len(again()), len(again(0.0)), len(again(0.0)))"
    )
    done = night.python("-c", asked)
    assert done.stdout.split() == ["0", "1", "0"], done.stderr
    assert night.run(forgotten)["state_name"] == "Restarting"
    night.set_state(forgotten, type="CANCELLED")


def test_runs_that_are_killed_cancelled_or_hang_end_as_they_should_and_go_on_where_they_stopped(night: Night) -> None:
    undisturbed = subprocess.Popen(
        [sys.executable, "-m", "papo", "run", "--no-dvc", "--workspace", "undisturbed"],
        cwd=night.checkout, env=night.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    night.setup("--gpus", "4")
    night.worker("first")
    assert undisturbed.wait(timeout=400) == 0
    dead = night.submit("dead", hold="python")
    pids = night.held("dead")
    assert os.getpgid(pids[0]) != os.getpgid(night.workers["first"].pid)
    night.workers["first"].kill()
    for process in processes_of(dead):  # its guard, too, as when the machine is gone
        process.kill()
    killed = datetime.now(UTC)
    night.let_go("dead")

    # Without MLflow: in native code it might hang while it holds the database that all share.
    overrides = ["flow.timeouts={train: 0.5}", "tracking.enabled=false"]
    hanging = night.submit("hanging", hold="native", overrides=overrides)
    cancelled = night.submit("cancelled", hold="python")
    night.worker("second")
    processes = night.held("cancelled")
    night.set_state(cancelled, type="CANCELLING")
    assert night.ended(cancelled) == "CANCELLED"
    until(lambda: gone(processes) and not processes_of(cancelled), seconds=60, what="no process of it is left")
    with sqlite3.connect(night.checkout / "mlflow.db") as database:
        ours = "select run_uuid from tags where key = 'papo.workspace' and value like '%/cancelled'"
        found = database.execute(f"select status from runs where run_uuid in ({ours}) and name like '%-seed0'")
        assert found.fetchall() == [("KILLED",)]
    night.let_go("cancelled")
    night.set_state(cancelled, type="SCHEDULED", name="AwaitingRetry")

    native = night.held("hanging")
    night.let_go("hanging")
    night.in_state(hanging, "Crashed")
    assert night.message(hanging, "Crashed").startswith("train 0 did not end within 0.5 min (flow.timeouts)")
    until(lambda: gone(native), seconds=60, what="no process of the run that hung is left")

    night.in_state(dead, "Crashed")
    assert night.message(dead, "Crashed").startswith(f"no heartbeat for {DEAD_AFTER_S} s")
    (crashed,) = (since for name, since, _ in night.states(dead) if name == "Crashed")
    assert (crashed - killed).total_seconds() < DEAD_AFTER_S + 60
    expected = digests(night.checkout / "undisturbed")
    assert len(expected) == 8
    for run, workspace, name in (
        (cancelled, "cancelled", "AwaitingRetry"),
        (hanging, "hanging", "Restarting"),
        (dead, "dead", "Restarting"),
    ):
        night.in_state(run, "Completed")
        night.in_state(run, name)
        assert night.run(run)["run_count"] > 1
        assert digests(night.checkout / workspace) == expected
    told = "\n".join(night.messages)
    for words in ("was cancelled", "crashed", "was started again and goes on where it stopped", "/runs/flow-run/"):
        assert words in told, told


def test_one_run_at_a_time_trains_whatever_becomes_of_a_worker(night: Night) -> None:
    """A worker is killed while another run waits; its run ends with it, at once."""
    night.setup("--gpus", "1")
    night.worker("third")
    first = night.submit("orphaned", hold="python")
    processes = night.held("orphaned")
    waiting = night.submit("dead")
    (worker,) = (
        one for one in night.workers.values() if one.is_running() and processes[0] in map(pid, one.children(True))
    )
    worker.kill()
    night.let_go("orphaned")
    until(lambda: gone(processes) and not processes_of(first), seconds=90, what="no process of it is left")
    night.in_state(first, "Crashed")
    compared = night.submit("dead", name="evaluate", benchmarks=["tiny"], samples=2)
    for run in (first, waiting, compared):
        night.in_state(run, "Completed")
    spans = sorted(night.running(first) + night.running(waiting))
    assert len(spans) >= 3
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), spans
    assert night.run(compared)["name"] == "evaluate final against warmstart"
    assert night.run(compared)["work_queue_name"] == "default"
    assert digests(night.checkout / "orphaned") == digests(night.checkout / "undisturbed")


def pid(process: psutil.Process) -> int:
    return process.pid
