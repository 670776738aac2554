"""What MLflow has of a run, found by the tag `papo.run_id`; read-only, for the commands that look back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from papo.engines.tracking import resolved, without_password
from papo.errors import SetupError
from papo.params import TrackingParams

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID, KIND = "papo.run_id", "papo.kind"


class Lookup:
    """Asks the tracking server or database of the params.

    Every method raises SetupError where it cannot be asked; a database that is not there is not created.
    """

    def __init__(self, params: TrackingParams) -> None:
        self._params = resolved(params)

    def tags(self, run: str) -> Mapping[str, str]:
        """Tags of the run with this id; empty where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self._client().get_run(run).data.tags)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise self._unreachable(error) from None

    def runs(self, record: str) -> dict[str, str]:
        """Name -> id, of the run with this record and of its stages; the run itself is `run`."""
        from mlflow.exceptions import MlflowException

        client = self._client()
        try:
            experiment = client.get_experiment_by_name(self._params.experiment)
            if experiment is None:
                return {}
            found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_ID}` = '{record}'", max_results=1000)
        except MlflowException as error:
            raise self._unreachable(error) from None
        named = {
            (str(one.info.run_name) if one.data.tags.get(KIND) == "stage" else "run"): one.info.run_id for one in found
        }
        return {"experiment": str(experiment.experiment_id), **dict(sorted(named.items()))} if named else {}

    def _client(self) -> MlflowClient:
        from papo.engines.tracking.mlflow import ENVIRONMENT

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        uri = self._params.uri
        if uri.startswith("sqlite:///"):
            file = Path(uri.removeprefix("sqlite:///")).resolve()
            if not file.is_file():
                raise SetupError(
                    "there is no such MLflow database", where=str(file), fix="name it with --set tracking.uri=..."
                )
            uri = f"sqlite:///{file}"
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise SetupError(
                f"MLflow cannot be imported: {error}", where="mlflow", fix="run `pip install mlflow`"
            ) from None
        return MlflowClient(uri)

    def _unreachable(self, error: Exception) -> SetupError:
        said = without_password((str(error).splitlines() or [type(error).__name__])[0][:300])
        where = without_password(self._params.uri)
        return SetupError(f"MLflow cannot be asked: {said}", where=where, fix="start it, or set tracking.uri")
