"""`papo track`: deliveries that are killed at any moment, servers that come and go, and databases that refuse."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers.mlflow import MlflowServer
from tracked import everything, expected_points, record

from papo.engines.tracking import make_tracker
from papo.engines.tracking.outbox import Outbox
from papo.engines.tracking.troubles import trouble
from papo.params import TrackingParams
from papo.track import Delivered, outboxes_of, sync, waiting_runs

NOWHERE = "http://127.0.0.1:9"


def no_warning(message: str) -> None:
    pytest.fail(f"warned: {message}")


def recorded(workspace: Path, *, rounds: int = 2, policy: Path | None = None, uri: str = NOWHERE) -> Path:
    """The outbox of a run whose server was away."""
    outbox = workspace / ".papo/outbox"
    files = workspace / "report"
    files.mkdir(parents=True)
    (files / "index.html").write_text("<p>")
    params = TrackingParams(uri=uri, judge_traces=1.0)
    tracker = make_tracker(params, outbox=outbox, warn=lambda message: None)
    for _ in record(tracker, rounds=rounds, lineage="abc", traces=12, files=files, policy=policy):
        pass
    return outbox


def synced(outbox: Path, uri: str, **given: Any) -> list[Delivered]:
    options = {"to": uri, "experiment": None, "say": no_warning, "progress": lambda *line: None} | given
    return list(sync([outbox], TrackingParams(uri=uri), **options))


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from papo.engines.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = tmp_path_factory.mktemp("made") / "policy"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# One process that has MLflow imported and forks: each child delivers, and is killed at a moment or after so many calls that write.
KILLER = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    from papo.engines.tracking.mlflow import prepare
    from papo.params import TrackingParams
    from papo.track import sync, waiting_runs
    prepare()
    import mlflow.store.tracking.sqlalchemy_store, mlflow.tracking.client, mlflow.tracing.client
    if sys.argv[4] == "calls":
        import mlflow.transformers
    from mlflow import MlflowClient
    from mlflow.tracing.client import TracingClient
    outbox, uri, seed, at_calls = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "calls"
    draw = random.Random(seed)
    WRITES = [(MlflowClient, name) for name in ("create_experiment", "create_run", "log_batch", "log_inputs", "set_tag", "update_run",
        "log_artifact", "log_artifacts", "create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model",
        "set_terminated", "delete_run")] + [(TracingClient, "start_trace"), (TracingClient, "log_spans")]

    def die_after(calls):
        left = [calls]
        def wrapped(method):
            def call(*arguments, **named):
                result = method(*arguments, **named)
                left[0] -= 1
                if left[0] == 0:  # it is stored, and nobody heard of it
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return call
        for owner, name in WRITES:
            setattr(owner, name, wrapped(getattr(owner, name)))

    deaths = 0
    for attempt in range(400):
        if not list(outbox.glob("*.jsonl")):
            break
        children = []
        for _ in range(2 if attempt % 5 == 4 else 1):  # now and then two at once
            child = os.fork()
            if not child:
                if at_calls:
                    # Taking a run up writes to each of its seven runs first: beyond that only every seventh gets on.
                    die_after(1 + attempt % 9 if attempt % 7 else 9 + attempt // 7 % 6)
                list(sync([outbox], TrackingParams(uri=uri), to=uri, experiment=None, say=print, progress=print))
                os._exit(0)
            children.append(child)
        if not at_calls:
            time.sleep(draw.uniform(0.01, 0.2 + attempt / 30))
            for child in children:
                os.kill(child, signal.SIGKILL)
        for child in children:
            deaths += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print("deaths", deaths)
    """
)


@pytest.mark.ops
@pytest.mark.parametrize("where", ["calls", "moments"])
def test_a_delivery_that_is_killed_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, where: str
) -> None:
    policy = request.getfixturevalue("policy") if where == "calls" else None
    rounds = 6 if where == "calls" else 2
    outbox = recorded(tmp_path / "runs", policy=policy, rounds=rounds)
    twin = tmp_path / "twin/.papo/outbox"
    shutil.copytree(outbox, twin)
    undisturbed, killed = (f"sqlite:///{tmp_path}/{name}/mlflow.db" for name in ("one", "other"))
    assert [result.why for result in synced(twin, undisturbed)] == [""]
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "one/mlflow.db", tmp_path / "other/mlflow.db")  # saves the making of the tables
    with sqlite3.connect(tmp_path / "other/mlflow.db") as database:
        database.execute("UPDATE experiments SET name = 'undisturbed' WHERE name = 'papo'")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(outbox), killed, "7", where], capture_output=True, text=True, check=True
    )
    deaths = int(done.stdout.split("deaths ")[1])
    assert deaths >= (30 if where == "calls" else 8)
    assert not list(outbox.iterdir())
    found, wanted = everything(killed, "papo"), everything(undisturbed, "papo")
    assert found == wanted
    assert sum(len(run["points"]) for run in wanted["runs"] if run["parent"]) == expected_points(rounds)
    (whole,) = (run for run in wanted["runs"] if not run["parent"])
    assert [point[:3] for point in whole["points"] if point[0] == "accuracy"] == [("accuracy", rounds - 1, 0.5)]
    assert (len(wanted["traces"]), len(wanted["models"]), len(wanted["runs"])) == (
        12 * rounds,
        int(where == "calls"),
        7,
    )


@pytest.mark.ops
def test_a_server_that_is_killed_and_frozen_while_a_run_records_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    draw = random.Random(3)
    warnings: list[str] = []
    with MlflowServer(tmp_path / "server") as server:
        params = TrackingParams(uri=server.url, judge_traces=1.0)
        tracker = make_tracker(params, outbox=tmp_path / ".papo/outbox", warn=warnings.append)
        tracker._pauses = (0.1, 0.5)  # type: ignore[union-attr]  # minutes are not the point here
        blocked = 0.0
        calls = record(tracker, rounds=6, lineage="abc", traces=12)
        for number in range(32):
            began = time.perf_counter()
            next(calls)
            blocked = max(blocked, time.perf_counter() - began)
            time.sleep(draw.uniform(0, 0.3))
            if number in (4, 17):
                server.kill()
            if number in (8, 21):
                server.start()
            if number in (11, 25):
                server.freeze()
                time.sleep(5)
                server.thaw()
        assert blocked < 1.0, "a call of the run waits for no server"
        for _ in calls:
            pass
        outbox = tmp_path / ".papo/outbox"
        if list(outbox.iterdir()):
            assert [result.why for result in synced(outbox, server.url)] == [""]
        found = everything(server.url, "papo")
    assert any("the run goes on, and its record waits on the disk" in line for line in warnings)
    assert [run["status"] for run in found["runs"]] == ["FINISHED"] * 7
    points = [point[:2] for run in found["runs"] if run["parent"] for point in run["points"]]
    assert len(points) == expected_points(6)
    for run in found["runs"]:
        assert len({point[:2] for point in run["points"]}) == len(run["points"])
    assert len(found["traces"]) == 72


@pytest.mark.ops
def test_a_server_with_auth_says_which_variables_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MlflowServer(tmp_path / "server", password="a long password") as server:
        outbox = recorded(tmp_path / "run", rounds=1, uri=server.url)
        [result] = synced(outbox, server.url)
        assert result.waiting > 5
        assert "401" in result.why
        assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in result.why
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not this one")
        assert "401" in synced(outbox, server.url)[0].why
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a long password")
        assert [result.why for result in synced(outbox, server.url)] == [""]
        assert len(everything(server.url, "papo")["runs"]) == 7


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with MLflow's tables."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").create_experiment("papo", artifact_location=f"{path.parent}/artifacts")
    return path


def of_revision(path: Path, revision: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def older(path: Path) -> None:
    """By one revision. MLflow brings a database that lacks tables up to date by itself; with all of them it refuses."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    scripts = ScriptDirectory.from_config(_get_alembic_config(f"sqlite:///{path}"))
    head = scripts.get_current_head()
    assert head is not None
    of_revision(path, str(scripts.get_revision(head).down_revision))


def later(path: Path) -> None:
    of_revision(path, "ffffffffffff")


def no_database(path: Path) -> None:
    path.write_text("this is no database" * 100)


def deleted(path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name("papo")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)


@pytest.mark.ops
@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (
            older,
            ["schema of another version", "back it up, then run `mlflow db upgrade", "mlflow db upgrade sqlite:///"],
        ),
        (later, ["schema of another version", "back it up, then run `mlflow db upgrade", "update MLflow instead"]),
        (no_database, ["is no MLflow database", "--to URI"]),
        (deleted, ["experiment papo has been deleted", "mlflow experiments restore", "--experiment NAME"]),
    ],
)
def test_a_database_that_cannot_be_used_keeps_the_record_waiting_and_says_what_to_do(
    tmp_path: Path, database: Path, spoil: Callable[[Path], None], messages: list[str]
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(database, path)
    uri = f"sqlite:///{path}"
    outbox = recorded(tmp_path / "run", rounds=1)
    spoil(path)
    [result] = synced(outbox, uri)
    assert all(message in result.why for message in messages), result.why
    assert result.waiting == waiting_runs([outbox])[0].records > 5
    if spoil is deleted:
        assert [result.why for result in synced(outbox, uri, experiment="another")] == [""]
        assert len(everything(uri, "another")["runs"]) == 7


def test_status_names_each_run_that_waits_by_workspace(tmp_path: Path) -> None:
    for name in ("one", "one/runs/two"):
        recorded(tmp_path / name, rounds=1)
    root = tmp_path / "one"
    from papo.store.layout import Workspace

    assert len(outboxes_of(Workspace(root), below=False)) == 1
    found = waiting_runs(outboxes_of(Workspace(root), below=True))
    assert [one.workspace for one in found] == [root, root / "runs/two"]
    assert {(one.run, one.status, one.target, one.experiment, one.refused) for one in found} == {
        ("a run", "FINISHED", NOWHERE, "papo", 0)
    }
    assert {one.records for one in found} == {len(list(Outbox(root / ".papo/outbox").journals()[0].read()))}


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("API request to endpoint /api failed with error code 401 != 200", "credentials", "MLFLOW_TRACKING_USERNAME"),
        ("API request to endpoint /api failed with error code 403 != 200", "credentials", "grant EDIT"),
        ("API request to endpoint /api failed with error code 503 != 200", "down", "papo track sync"),
        ("Detected out-of-date database schema (found version abc, but expected def)", "schema", "mlflow db upgrade"),
        ("Can't locate revision identified by 'abc'", "schema", "update MLflow"),
        ("(sqlite3.OperationalError) database is locked", "locked", "tried again"),
        ("(sqlite3.OperationalError) attempt to write a readonly database", "disk", "permissions"),
        ("(sqlite3.OperationalError) database or disk is full", "disk", "free space"),
        ("(psycopg2.OperationalError) connection to server failed: Connection refused", "down", "papo track sync"),
        ('password authentication failed for user "papo"', "credentials", "MLFLOW_TRACKING_URI"),
        ("The experiment 1 must be in the 'active' state. Current state is deleted.", "experiment", "restore"),
        ("got unsupported URI 'htp://x/' for model registry data storage", "uri", "sqlite:///FILE"),
        ("Invalid value for metric 'x'", "refused", ""),
    ],
)
def test_a_trouble_says_what_to_do_and_never_a_password(said: str, kind: str, words: str) -> None:
    error = RuntimeError(f"{said} at http://me:secret@host/?password=secret")
    found = trouble(error, uri="http://me:secret@host", experiment="papo")
    assert found.kind == kind
    assert words in found.fix
    assert "secret" not in str(found)
