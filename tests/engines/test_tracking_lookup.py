"""The runs of a record are found in MLflow by their tag; a database that is not there is not made."""

from __future__ import annotations

from pathlib import Path

import pytest

from papo.engines.tracking.lookup import Lookup
from papo.errors import SetupError
from papo.params import TrackingParams


def test_a_record_leads_to_its_runs_and_a_run_to_its_record(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    params = TrackingParams(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="one")
    client = MlflowClient(params.uri)
    experiment = client.create_experiment("one")
    tags = {"papo.run_id": "the-record"}
    parent = client.create_run(experiment, run_name="a run", tags=tags).info.run_id
    client.create_run(experiment, run_name="prepare", tags=tags | {"papo.kind": "stage", "mlflow.parentRunId": parent})
    client.create_run(experiment, run_name="another", tags={"papo.run_id": "another-record"})
    found = Lookup(params).runs("the-record")
    assert (found.keys(), found["run"]) == ({"experiment", "run", "prepare"}, parent)
    for name in ("run", "prepare"):
        assert Lookup(params).tags(found[name])["papo.run_id"] == "the-record"
    assert Lookup(params).runs("another") == {}
    assert Lookup(params.model_copy(update={"experiment": "none"})).runs("the-record") == {}
    assert Lookup(params).tags("0" * 32) == {}


def test_a_database_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    lookup = Lookup(TrackingParams(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    with pytest.raises(SetupError, match="there is no such MLflow database"):
        lookup.runs("the-record")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_said_without_its_password() -> None:
    lookup = Lookup(TrackingParams(uri="http://me:hidden@127.0.0.1:9"))
    with pytest.raises(SetupError, match="MLflow cannot be asked") as caught:
        lookup.runs("the-record")
    assert "hidden" not in str(caught.value)
