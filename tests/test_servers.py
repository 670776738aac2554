"""infra/servers for real: Postgres behind Prefect and MLflow, an S3 store behind MLflow and DVC, each as its script starts it.

Prefect's and MLflow's servers run with a root that they cannot write to, as in their containers, where bubblewrap is there.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import requests
from checkout import TINY, Checkout
from servers.postgres import binaries, needs_postgres
from servers.processes import serving
from servers.stack import Stack, running

from papo.engines.tracking import make_tracker
from papo.params import TrackingParams
from papo.store.files import digest

# Starting them all takes half a minute, and many on a busy machine.
pytestmark = [pytest.mark.ops, pytest.mark.timeout(2400), needs_postgres]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running() as result:
        yield result


@pytest.fixture(scope="module")
def trained(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after a run of its deployment `train-eval` by a worker."""
    params = TINY | {"run": {"rounds": 1}, "tracking": {"enabled": True, "uri": stack.mlflow}}
    checkout = Checkout(tmp_path_factory.mktemp("trained"), params=params)
    with serving(stack.worker(checkout.folder)):
        stack.prefect(checkout.folder, "deploy", "--name", "train-eval")
        stack.prefect(checkout.folder, "deployment", "run", "papo/train-eval", "--watch")
    return checkout


@pytest.fixture
def worker_signs_in(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    user, password = stack.as_user("papo-worker")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setenv("NO_PROXY", "*")


def no_warning(message: str) -> None:
    pytest.fail(f"warned: {message}")


# ---- who may reach what ----


def test_only_this_machine_reaches_them(stack: Stack) -> None:
    for name, server in stack.servers.items():
        listening = {
            (connection.laddr.ip, connection.laddr.port)
            for process in server.family()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert ("127.0.0.1", stack.ports[name]) in listening
        assert {address for address, _ in listening} == {"127.0.0.1"}, name


def test_no_command_line_and_no_log_has_a_secret_and_a_server_has_its_own_only(stack: Stack) -> None:
    own = {
        "postgres": set(),
        "prefect": {"PREFECT_DB_PASSWORD", "PREFECT_AUTH"},
        "mlflow": {"MLFLOW_DB_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"},
    }
    for name, server in stack.servers.items():
        looked = 0
        for process in server.family():
            try:
                words, variables = " ".join(process.cmdline()), " ".join(process.environ().values())
            except psutil.NoSuchProcess:
                continue  # such as Postgres' for a connection that has just been closed
            looked += 1
            for secret, value in stack.secrets.items():
                assert value not in words, f"{secret} in the command line of {name}"
                assert (value in variables) <= (secret in own[name]), f"{secret} in the environment of {name}"
        assert looked
        log = server.log.read_text()
        assert not [secret for secret, value in stack.secrets.items() if value in log], name


def test_a_role_of_postgres_enters_its_own_databases_only(stack: Stack) -> None:
    own = {"prefect": {"prefect"}, "mlflow": {"mlflow", "mlflow_auth"}}
    secrets = {"prefect": "PREFECT_DB_PASSWORD", "mlflow": "MLFLOW_DB_PASSWORD"}
    for role, secret in secrets.items():
        for database in ("prefect", "mlflow", "mlflow_auth", "postgres", "template1"):
            if database in own[role]:
                stack.connect(database, role, stack.secrets[secret]).close()
            else:
                with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
                    stack.connect(database, role, stack.secrets[secret])
        for password in ("wrong", "", role):
            with pytest.raises(psycopg2.OperationalError, match=r"password authentication failed|no password supplied"):
                stack.connect(role, role, password)
    rights = "rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls"
    found = stack.rows("postgres", f"SELECT rolname, {rights} FROM pg_roles WHERE rolname IN ('prefect', 'mlflow')")
    assert sorted(found) == [("mlflow", False), ("prefect", False)]


def test_each_server_keeps_its_tables_in_its_own_database(stack: Stack) -> None:
    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    found = {name: {row[0] for row in stack.rows(name, tables)} for name in ("prefect", "mlflow", "mlflow_auth")}
    assert {"flow_run", "work_pool", "deployment"} <= found["prefect"]
    assert {"runs", "metrics", "experiments"} <= found["mlflow"]
    assert {"users"} <= found["mlflow_auth"]


def test_prefect_answers_to_who_has_the_secret_and_to_nobody_else(stack: Stack) -> None:
    url, right = stack.servers["prefect"].url, stack.secrets["PREFECT_AUTH"]
    for given, status in ((None, 401), ("papo:wrong", 401), (right, 200)):
        headers = {"Authorization": "Basic " + base64.b64encode(given.encode()).decode()} if given else {}
        session = requests.Session()
        session.trust_env = False
        reply = session.post(f"{url}/api/flows/filter", json={}, headers=headers, timeout=60)
        assert reply.status_code == status, given


# ---- MLflow ----


def test_mlflow_refuses_a_bad_password_and_a_foreign_name(stack: Stack) -> None:
    session = requests.Session()
    session.trust_env = False
    url = f"{stack.mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=papo"
    for auth in (None, ("admin", "password1234"), ("papo-worker", "wrong"), ("nobody", "wrong")):
        assert session.get(url, auth=auth, timeout=60).status_code == 401, auth
    worker = stack.as_user("papo-worker")
    assert session.get(url, auth=worker, timeout=60).status_code == 200
    assert session.get(url, auth=worker, headers={"Host": "mlflow:5000"}, timeout=60).status_code == 200
    assert session.get(url, auth=worker, headers={"Host": "evil.example"}, timeout=60).status_code == 403


@pytest.mark.usefixtures("worker_signs_in")
def test_a_worker_writes_a_run_whose_policy_is_in_the_store_and_loads_back_byte_for_byte(
    stack: Stack, trained: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    policy, report = trained.folder / "artifacts/warmstart", tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>")
    tracker = make_tracker(TrackingParams(uri=stack.mlflow), outbox=tmp_path / "outbox", warn=no_warning)
    tracker.start("papo-seed0", {"run.seed": 0}, {"papo.lineage": "abc"})
    manifest = {"metrics": {"accuracy": 0.5}, "seconds": 1.0, "rows": 8, "outputs": {"a.parquet": "0" * 64}}
    tracker.stage("advantage", 0, manifest)
    tracker.artifact(report)
    tracker.policy(policy, "final", {"sums": 0.5})
    tracker.finish("FINISHED", {"sums/final/avg_at_k": 0.5})

    client = mlflow.MlflowClient(stack.mlflow)
    experiment = client.get_experiment_by_name("papo")
    assert experiment is not None
    (parent,) = client.search_runs(
        [experiment.experiment_id], "tags.`papo.lineage` = 'abc' and tags.`papo.kind` = 'run'"
    )
    assert (parent.info.status, parent.data.metrics["accuracy"]) == ("FINISHED", 0.5)
    assert parent.info.artifact_uri.startswith("mlflow-artifacts:/"), "clients have no credentials of the store"
    (model,) = client.search_logged_models([experiment.experiment_id], f"source_run_id = '{parent.info.run_id}'")
    stored = stack.store.keys("mlflow/")
    weights = (policy / "model.safetensors").stat().st_size
    assert [
        size for name, size in stored.items() if f"{model.model_id}/" in name and name.endswith("model.safetensors")
    ] == [weights]
    assert any(name.endswith("report/index.html") for name in stored)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow)
    loaded = Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(tmp_path / "back")))
    (back,) = loaded.rglob("model.safetensors")
    assert digest(back) == digest(policy / "model.safetensors")


def test_a_worker_is_no_administrator(stack: Stack) -> None:
    other = stack.ask("experiments/create", "admin", name="of someone else").json()["experiment_id"]
    run = stack.ask("runs/create", "admin", experiment_id=other).json()["run"]["info"]["run_id"]
    papo = stack.ask("experiments/get-by-name?experiment_name=papo", "papo-worker").json()["experiment"][
        "experiment_id"
    ]
    refused: list[tuple[str, dict[str, Any]]] = [
        ("users/create", {"username": "friend", "password": "a-long-password"}),
        ("users/update-admin", {"username": "papo-worker", "is_admin": True}),
        ("experiments/delete", {"experiment_id": other}),
        ("experiments/delete", {"experiment_id": papo}),
        ("experiments/update", {"experiment_id": other, "new_name": "mine"}),
        ("runs/create", {"experiment_id": other}),
        ("runs/log-metric", {"run_id": run, "key": "a", "value": 1.0, "timestamp": 1}),
        ("runs/delete", {"run_id": run}),
        (f"experiments/get?experiment_id={other}", {}),
        (f"runs/get?run_id={run}", {}),
    ]
    got = {f"{path} {body}": stack.ask(path, "papo-worker", **body).status_code for path, body in refused}
    assert set(got.values()) == {403}, got
    assert stack.ask("runs/log-metric", "admin", run_id=run, key="a", value=1.0, timestamp=1).status_code == 200


def test_the_users_are_set_up_once_and_a_new_password_counts(stack: Stack) -> None:
    assert stack.serve("mlflow-users").stdout == "nothing to do\n"
    new = stack.serve("mlflow-users", MLFLOW_WORKER_PASSWORD="another-long-password")
    assert new.stdout == "user papo-worker has the password of the environment\n", new.stderr
    assert stack.ask("experiments/get-by-name?experiment_name=papo", "papo-worker").status_code == 401
    assert stack.serve("mlflow-users").returncode == 0
    assert stack.ask("experiments/get-by-name?experiment_name=papo", "papo-worker").status_code == 200
    wrong = stack.serve("mlflow-users", MLFLOW_ADMIN_PASSWORD="wrong")
    assert wrong.returncode != 0
    assert "as admin: HTTP 401" in wrong.stderr


# ---- a run ----


def test_a_deployment_runs_on_a_worker_with_all_of_them(stack: Stack, trained: Checkout) -> None:
    assert (trained.folder / "artifacts/report/index.html").is_file()
    assert "Data and pipelines are up to date" in trained.dvc("status").stdout
    assert stack.rows("prefect", "SELECT state_type::text FROM flow_run") == [("COMPLETED",)]
    found = stack.rows(
        "mlflow",
        "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE key = 'papo.flow_run' AND run_uuid IN "
        "(SELECT run_uuid FROM tags WHERE key = 'papo.kind' AND value = 'run')",
    )
    assert found == [("FINISHED",)]


def test_dvc_shares_a_run_through_the_store(stack: Stack, trained: Checkout, tmp_path: Path) -> None:
    shared, fresh = trained.folder, tmp_path / "fresh"
    environment = stack.store.client_environment | {"DVC_NO_ANALYTICS": "true"}

    def run(*command: str, cwd: Path = shared) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    dvc = (sys.executable, "-m", "dvc")
    run(*dvc, "remote", "add", "--default", "store", "s3://papo/dvc")
    run("git", "add", "-A")
    run("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "--message", "a run")
    run(*dvc, "push")
    config = (shared / ".dvc/config").read_text()
    assert "s3://papo/dvc" in config
    assert not [value for value in stack.store.variables.values() if value in config], "credentials are no config"

    run("git", "clone", "--quiet", str(shared), str(fresh))
    assert not (fresh / "artifacts/rounds").exists()
    run(*dvc, "pull", cwd=fresh)
    assert "up to date" in run(*dvc, "status", cwd=fresh)
    for name in ("data/problems", "artifacts/warmstart", "artifacts/rounds", "artifacts/report"):
        assert digest(fresh / name) == digest(shared / name), name


# ---- what goes wrong, and what is done now and then ----


def test_postgres_comes_back_from_kill_9_and_both_servers_go_on(stack: Stack) -> None:
    stack.servers["postgres"].kill()
    assert stack.ask("experiments/get-by-name?experiment_name=papo", "papo-worker").status_code >= 400
    (stack.folder / "postgres.log").write_text("")
    stack.servers["postgres"].start()
    assert stack.ask("experiments/get-by-name?experiment_name=papo", "papo-worker").status_code == 200
    token = base64.b64encode(stack.secrets["PREFECT_AUTH"].encode()).decode()
    session = requests.Session()
    session.trust_env = False
    url = f"{stack.servers['prefect'].url}/api/flows/filter"
    until = time.monotonic() + 60
    while session.post(url, json={}, headers={"Authorization": f"Basic {token}"}, timeout=60).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.5)


def test_a_dump_holds_the_record(stack: Stack) -> None:
    tools = binaries()
    assert tools is not None
    environment = stack.environment | {
        "PGHOST": "127.0.0.1", "PGPORT": str(stack.ports["postgres"]), "PGUSER": "postgres",
        "PGPASSWORD": stack.secrets["POSTGRES_PASSWORD"],
    }  # fmt: skip

    def run(*command: str | Path, **variables: str) -> str:
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    dump = stack.folder / "mlflow.dump"
    run(tools / "pg_dump", "--format=custom", f"--file={dump}", "mlflow")
    run(tools / "createdb", "--owner=mlflow", "restored")
    run(tools / "pg_restore", "--dbname=restored", "--exit-on-error", dump)
    points = "SELECT run_uuid, key, value, step FROM metrics ORDER BY 1, 2, 4"
    assert stack.rows("restored", points) == stack.rows("mlflow", points) != []


def test_upgrade_finds_databases_of_this_version_as_they_have_to_be(stack: Stack) -> None:
    versions = {
        "prefect": "SELECT version_num FROM alembic_version",
        "mlflow": "SELECT version_num FROM alembic_version",
        "mlflow_auth": "SELECT version_num FROM alembic_version_auth",
    }
    before = {name: stack.rows(name, statement) for name, statement in versions.items()}
    done = stack.serve("upgrade")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: stack.rows(name, statement) for name, statement in versions.items()} == before
    refused = stack.serve("upgrade", PREFECT_DB_PASSWORD="wrong")
    assert refused.returncode != 0
    assert "password authentication failed" in refused.stderr + refused.stdout
