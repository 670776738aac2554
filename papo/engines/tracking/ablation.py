"""An ablation in MLflow: a run of its own, with the runs of its arms below it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from papo.engines.tracking import ABLATION, resolved
from papo.engines.tracking.delivery import absolute
from papo.engines.tracking.mlflow import KIND, PARENT, TAG_LENGTH, prepare
from papo.params import TrackingParams

NOTE = "mlflow.note.content"
WORKSPACE = "papo.workspace"


def record_ablation(
    params: TrackingParams,
    ablation: str,
    *,
    name: str,
    description: str,
    metrics: Mapping[str, float],
    facts: Mapping[str, object],
    report: Path,
    whole: bool,
) -> str:
    """Writes the run of an ablation, or what is new of it, and puts the runs with its tag below it; where it is to be seen.

    Args:
        ablation: the value of the tag `papo.ablation` that its runs carry.
        description: shown on its page, as Markdown.
        report: the folder of its page.
        whole: every run is done.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    prepare()
    known = resolved(params)
    client = MlflowClient(absolute(known.uri))
    found = client.get_experiment_by_name(known.experiment)
    experiment = found.experiment_id if found is not None else client.create_experiment(known.experiment)
    mine = client.search_runs([experiment], f"tags.`{ABLATION}` = '{ablation}'", max_results=5000)
    parents = [run for run in mine if run.data.tags.get(KIND) == "ablation"]
    parent = (
        parents[0]
        if parents
        else client.create_run(experiment, run_name=name, tags={KIND: "ablation", ABLATION: ablation})
    )
    run_id = parent.info.run_id
    at = parent.info.start_time
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, at, 0) for key, value in metrics.items()],
        params=[] if parents else [Param(key, str(value)) for key, value in facts.items()],
        tags=[RunTag(NOTE, description[:TAG_LENGTH])],
    )
    client.log_artifacts(run_id, str(report), artifact_path="report")
    for run in mine:
        if run.data.tags.get(KIND) == "run" and run.data.tags.get(PARENT) != run_id:
            client.set_tag(run.info.run_id, PARENT, run_id)
            # By arm and seed, as its workspace is called: runs name themselves by variant and seed, which arms may share.
            client.update_run(run.info.run_id, name=Path(run.data.tags.get(WORKSPACE, run.info.run_name)).name)
    client.set_terminated(run_id, "FINISHED" if whole else "RUNNING")
    if known.uri.startswith(("http://", "https://")):
        return f"{known.uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return f"mlflow ui --backend-store-uri {known.uri}  (experiment {known.experiment}, run {name})"
