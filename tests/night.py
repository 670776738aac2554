"""A night in fast motion: ten runs on a Prefect server with Postgres and two workers, and what a night can bring meanwhile.

    python tests/night.py FOLDER        # prints the course and the end of each run

One worker is killed, MLflow's server is killed and stays away for a while, Prefect's server is killed and started again, and one run
has a learning rate of 0.01, so that its accuracy collapses and the alarm stops it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from checkout import Checkout
from servers.postgres import Postgres, postgres
from servers.processes import Server, clean_environment
from servers.services import mlflow_server, prefect_server

from flows.restarts import FORGOTTEN_S
from flows.setup import RESTART_AFTER_S

PARAMS: dict[str, Any] = {
    "run": {"rounds": 2},
    "prepare": {
        "sums": {
            "train": {"min_terms": 2, "max_terms": 3, "problems": 64},
            "eval": {"short": {"min_terms": 2, "max_terms": 3, "problems": 16}},
            "traces": 4000,
        }
    },
    "warmstart": {"steps": 150},
    "rollout": {"prompts_per_round": 12, "max_new_tokens": 48},
    "train": {"minibatch_prompts": 4},
    "evaluate": {"benchmarks": ["short"], "samples_per_problem": 2, "max_new_tokens": 48},
}
COLLAPSING = ("train.learning_rate=0.01", "run.rounds=6", "alarms.patience=1", "on_alarm.collapse=stop")
COLLAPSED = "runs/night-4"
ENDED = {"COMPLETED", "FAILED", "CANCELLED"}
"""A run that crashed is started again."""
GUARDED_S = 10.0
"""From a run's state Running to its guard; of what dies before, only the heartbeat tells."""
NIGHT_S = 1500.0


def queue() -> list[dict[str, Any]]:
    """The parameters of the ten runs: the checkout's own, with DVC, and nine beside it."""
    beside = [
        {"workspace": f"runs/night-{k}", "variant": "orm" if k % 2 else "papo", "seed": k, "dvc": False}
        for k in range(1, 10)
    ]
    for parameters in beside:
        if parameters["workspace"] == COLLAPSED:
            parameters["overrides"] = list(COLLAPSING)
    return [{"workspace": "."}, *beside]


@dataclass
class Night:
    """What became of it: `course` in seconds since the runs were queued, `runs` as Prefect has them in the end."""

    checkout: Checkout
    mlflow: str
    course: list[tuple[float, str]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def note(self, what: str) -> None:
        self.course.append((time.monotonic() - self.began, what))

    def run(self, workspace: str) -> dict[str, Any]:
        (one,) = (run for run in self.runs if run["parameters"]["workspace"] == workspace)
        return one


@contextmanager
def night(folder: Path) -> Iterator[Night]:
    """Goes on until every run has ended; the servers are there until the `with` ends."""
    with ExitStack() as opened:
        database = opened.enter_context(postgres("prefect", "mlflow"))
        mlflow = opened.enter_context(mlflow_server(folder, database.uri("mlflow"), folder / "mlflow-artifacts"))
        prefect = opened.enter_context(_prefect(folder, database))
        checkout = _checkout(folder, mlflow.url)
        api = opened.enter_context(httpx.Client(base_url=f"{prefect.url}/api", timeout=60, trust_env=False))
        environment = clean_environment(prefect.client_environment | _python(checkout))
        _prefect_command(checkout, environment, [sys.executable, "-m", "flows.setup", "--gpus", "2"])
        workers = [_worker(folder, name, environment) for name in ("one", "two")]
        for worker in workers:
            opened.callback(worker.kill)
        ids = _queue(api)
        happened = Night(checkout, mlflow.url)
        for worker in workers:
            worker.start()
        for due, what, act in (
            (lambda ended, running: ended >= 1 and running >= 2, "a worker is killed", partial(_kill, workers[0])),
            (lambda ended, running: ended >= 2, "MLflow's server is killed", mlflow.kill),
            (lambda ended, running: ended >= 4, "MLflow's server is there again", mlflow.start),
            # Not before the run of the killed worker is to be started again: a server that dies first forgets to (docs/prefect.md).
            (lambda ended, running: ended >= 5 and running == 1, "Prefect's server is killed", prefect.kill),
        ):
            _wait(api, ids, happened, due)
            act()
            happened.note(what)
        prefect.start()
        happened.note("Prefect's server is there again")
        # As the script that starts a server does it: what crashed while the server was away and came back, it may have forgotten.
        while not _ended(api, ids, happened, seconds=FORGOTTEN_S + RESTART_AFTER_S):
            _prefect_command(checkout, environment, [sys.executable, "-m", "flows.setup", "--gpus", "2"])
        happened.note("every run has ended")
        happened.runs = _runs(api, ids)
        yield happened


def _prefect(folder: Path, database: Postgres) -> Any:
    quick = {"PREFECT_SERVER_API_DEFAULT_LIMIT": "200"}
    return prefect_server(folder, database.uri("prefect", driver="postgresql+asyncpg"), environment=quick)


def _checkout(folder: Path, tracking: str) -> Checkout:
    """With problem sets and warm start, which the runs share."""
    (folder / "checkout").mkdir()
    checkout = Checkout(folder / "checkout", params=PARAMS | {"tracking": {"uri": tracking}})
    for stage in ("prepare", "warmstart"):
        checkout.papo(stage)
    return checkout


def _python(checkout: Checkout) -> dict[str, str]:
    return {name: checkout.environment[name] for name in ("PATH", "PYTHONPATH", "DVC_NO_ANALYTICS")}


def _prefect_command(checkout: Checkout, environment: Mapping[str, str], command: list[str]) -> None:
    # By a shell in the folder, as a person does it: prefect.yaml takes the folder from the shell.
    shell = ["bash", "-c", 'cd "$0" && exec "$@"', str(checkout.folder), *command]
    done = subprocess.run(shell, env=dict(environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _worker(folder: Path, name: str, environment: Mapping[str, str]) -> Server:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "papo", "--name", name, "--limit", "1"]
    quick = {"PREFECT_WORKER_QUERY_SECONDS": "2", **environment}
    return Server(command, folder, f"worker-{name}", "", lambda: True, environment=quick)


def _kill(worker: Server) -> None:
    """Only its own process: what it had started is for the guard of the run to end, once it is there."""
    assert worker.process is not None
    time.sleep(GUARDED_S)
    worker.process.kill()


def _queue(api: httpx.Client) -> list[str]:
    deployment = api.get("/deployments/name/papo/train-eval").raise_for_status().json()["id"]
    made = []
    for parameters in queue():
        given = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        made.append(api.post(f"/deployments/{deployment}/create_flow_run", json=given).raise_for_status().json()["id"])
    return made


def _runs(api: httpx.Client, ids: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        api.post("/flow_runs/filter", json={"flow_runs": {"id": {"any_": ids}}}).raise_for_status().json()
    )
    return found


def _states(api: httpx.Client, ids: list[str]) -> list[str]:
    """Empty while the server is away."""
    try:
        return [run["state_type"] for run in _runs(api, ids)]
    except (httpx.TransportError, httpx.HTTPStatusError):
        return []


def _wait(api: httpx.Client, ids: list[str], night: Night, due: Callable[[int, int], bool]) -> None:
    """Until it is due by the number of runs that have ended and that are running."""
    while True:
        states = _states(api, ids)
        if states and "CRASHED" not in states and due(sum(state in ENDED for state in states), states.count("RUNNING")):
            return
        assert time.monotonic() - night.began < NIGHT_S, f"{night.course}, then {states}"
        time.sleep(1.0)


def _ended(api: httpx.Client, ids: list[str], night: Night, *, seconds: float) -> bool:
    """Waits until every run has ended, or until there is none but such and crashed ones for that long."""
    still = time.monotonic()
    while time.monotonic() < still + seconds:
        states = _states(api, ids)
        if set(states) <= ENDED and states:
            return True
        if not set(states) <= ENDED | {"CRASHED"}:
            still = time.monotonic()
        assert time.monotonic() - night.began < NIGHT_S, f"{night.course}, then {states}"
        time.sleep(1.0)
    night.note("only a crashed run is left, which the server forgot")
    return False


def table(night: Night) -> str:
    """The course and the end of each run, as Markdown."""
    lines = ["| after, s | what happened |", "|---|---|", *(f"| {at:.0f} | {what} |" for at, what in night.course), ""]
    lines += ["| run | ended as | attempts | why |", "|---|---|---|---|"]
    for parameters in queue():
        run = night.run(parameters["workspace"])
        why = (run["state"]["message"] or "").splitlines()
        lines.append(
            f"| `{parameters['workspace']}` | {run['state']['name']} | {run['run_count']} | {why[0] if why else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs it, and prints the table."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="papo-night-"))
    folder.mkdir(parents=True, exist_ok=True)
    with night(folder) as happened:
        print(table(happened))  # noqa: T201  what a person ran it for


if __name__ == "__main__":
    main()
