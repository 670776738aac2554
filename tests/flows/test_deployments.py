"""prefect.yaml on a real server: a process worker runs the deployments from a copy of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from checkout import TINIEST

from .processes import free_port, started, until

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


@dataclass(frozen=True)
class Served:
    """A checkout whose deployments are on a server, and a worker that runs them."""

    checkout: Path
    environment: dict[str, str]
    api: httpx.Client
    worker_log: Path

    def prefect(self, *arguments: str) -> str:
        # By a shell in the folder, as a person does it: prefect.yaml takes the folder from the shell.
        command = ["bash", "-c", 'cd "$0" && exec "$@"', str(self.checkout), *PREFECT, *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.worker_log.read_text()[-3000:]
        return done.stdout

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        query = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found: list[dict[str, Any]] = self.api.post("/flow_runs/filter", json=query).json()
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("flows", "papo", "infra"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "prefect.yaml", checkout)
    (checkout / "params.yaml").write_text(yaml.safe_dump(TINIEST))
    port = free_port()
    logs = tmp_path_factory.mktemp("logs")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        # The copy, where an editable installation would give the original.
        "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    server = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    worker = [*PREFECT, "worker", "start", "--pool", "papo"]
    with (
        started(server, cwd=checkout, environment=environment, log=logs / "server"),
        httpx.Client(base_url=environment["PREFECT_API_URL"], timeout=30) as api,
    ):
        until(lambda: api.get("/health").is_success, seconds=180, what="the server is healthy")
        result = Served(checkout, environment, api, logs / "worker")
        (logs / "worker").touch()
        result.prefect("work-pool", "create", "papo", "--type", "process")
        result.prefect("deploy", "--all")
        with started(worker, cwd=logs, environment=environment, log=logs / "worker"):
            yield result


def test_the_flow_has_its_deployments(served: Served) -> None:
    deployments = served.api.post("/deployments/filter", json={}).json()
    flow = served.api.get("/flows/name/papo").json()["id"]
    assert {(item["name"], item["flow_id"]) for item in deployments} == {
        ("train-eval", flow),
        ("nightly-ablations", flow),
        ("evaluate", flow),
    }
    steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(served.checkout)}}]
    assert all(item["pull_steps"] == steps for item in deployments)


def test_train_eval_runs_in_the_checkout(served: Served) -> None:
    served.prefect("deployment", "run", "papo/train-eval", "--watch", "-p", "rounds=2")
    (run,) = served.runs("train-eval")
    assert (run["state_type"], run["name"]) == ("COMPLETED", "papo seed0 2 rounds")
    assert (served.checkout / "artifacts/rounds/1/policy").is_dir()
    assert (served.checkout / "artifacts/report/index.html").is_file()
    query = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    lines = until(lambda: served.api.post("/logs/filter", json=query).json(), seconds=30, what="log lines of the run")
    assert any(line["name"] == "papo" for line in lines)


def test_the_ablations_are_scheduled_every_night_and_complete(served: Served) -> None:
    def scheduled() -> list[dict[str, Any]]:
        return [run for run in served.runs("nightly-ablations") if run["state_type"] == "SCHEDULED"]

    following = until(scheduled, seconds=120, what="a scheduled run")[0]
    assert following["expected_start_time"][10:16] == "T02:00"
    plan = {
        "title": "Two nights",
        "seeds": 1,
        "base": {"run.rounds": 1},
        "axes": {"variant": {
            "orm": {"advantage.variant": "orm"},
            "papo": {"advantage.variant": "papo"},
            "unreachable": {"advantage.variant": "prm", "score_prm.judge": "model", "score_prm.model": {
                "model": "m", "base_url": "http://127.0.0.1:9/v1", "tries": 1, "breaker": 1, "timeout_s": 2}},
        }},
    }  # fmt: skip
    (served.checkout / "nights.yaml").write_text(yaml.safe_dump(plan))
    given = ["-p", "plan=nights.yaml", "-p", "jobs=1"]
    served.prefect("deployment", "run", "papo/nightly-ablations", "--watch", *given, "-p", "minutes=0.01")
    served.prefect("deployment", "run", "papo/nightly-ablations", "--watch", *given)
    first, second = (run for run in served.runs("nightly-ablations") if run["state_type"] != "SCHEDULED")
    assert first["state"]["message"].startswith("1 of 3 runs done, 0 failed; 2 runs are left for the next start")
    assert (second["state_type"], second["state"]["message"]) == ("COMPLETED", "2 of 3 runs done, 1 failed")
    nights = served.checkout / "runs/ablations/nights"
    content = json.loads((nights / "report/results.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["done", "done", "failed"]
    assert content["runs"][2]["why"]
    assert [run["starts"] for run in content["runs"][:2]] == [1, 1]
    assert (nights / "report/index.html").is_file()
    # They start from the warm start of the checkout, and share it.
    weights = [
        path / "artifacts/warmstart/model.safetensors"
        for path in (served.checkout, nights / "orm-seed0", nights / "papo-seed0")
    ]
    assert len({path.stat().st_ino for path in weights}) == 1
