"""A run as the record sees it, and all that MLflow has of an experiment, for comparison."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from papo.engines.protocols import Tracker

STAGES = ("rollout", "score_orm", "score_prm", "advantage", "train")


def manifest(stage: str, round_: int | None, *, metrics: int = 20, history: int = 0) -> dict[str, Any]:
    step = round_ or 0
    return {
        "stage": stage,
        "round": round_,
        "params": {"temperature": 1.0, "of": stage},
        "inputs": {"before": f"{step:064x}"},
        "outputs": {f"{stage}.parquet": f"{step + 1:064x}"},
        "rows": 384,
        "counts": {"ok": 384},
        "metrics": {f"{stage}_{index}": step + index / 100 for index in range(metrics)},
        "history": [{"step": float(index), "loss": 1.0 / (index + 1)} for index in range(history)],
        "seconds": 1.5,
    }


def call(number: int, round_: int) -> dict[str, Any]:
    return {
        "key": f"{number:02x}" + "0" * 62,
        "name": "judge",
        "inputs": {"system": "You judge.", "user": f"Response {number}"},
        "outputs": {"text": '{"score": 0.5}'},
        "attributes": {
            "model": "judge-7b",
            "status": "ok",
            "round": round_,
            "prompt_tokens": 7,
            "completion_tokens": 4,
        },
        "started": 1_700_000_000.25 + 100 * round_ + number,
        "seconds": 1.5,
    }


def record(
    tracker: Tracker,
    *,
    rounds: int,
    lineage: str,
    traces: int = 0,
    files: Path | None = None,
    policy: Path | None = None,
) -> Iterator[str]:
    """Every call that a run makes, one after another."""
    tracker.start("a run", {"run.rounds": rounds, "seed": 7}, {"papo.lineage": lineage, "papo.workspace": "/here"})
    yield "start"
    for round_ in range(rounds):
        for stage in STAGES:
            if stage == "score_prm":
                for number in range(traces):
                    tracker.trace(call(number, round_))
            tracker.stage(stage, round_, manifest(stage, round_, history=30 if stage == "train" else 0))
            yield stage
    tracker.stage("evaluate", None, manifest("evaluate", None))
    if files is not None:
        tracker.artifact(files)
    if policy is not None:
        tracker.policy(policy, "final", {"accuracy": 0.5})
        time.sleep(0.01)  # two points recorded in one millisecond are one to MLflow, and would hide that one is doubled
    tracker.tag("papo.dvc_lock", "d00")
    yield "evaluate"
    tracker.finish("FINISHED", {"accuracy": 0.5})
    yield "finish"


def expected_points(rounds: int) -> int:
    """Points of `record` in the child runs of the five stages and of evaluate."""
    return rounds * (len(STAGES) * 23 + 30) + 23


def everything(uri: str, experiment: str) -> dict[str, Any]:
    """All that MLflow has of an experiment, without what it makes up itself: ids, and where artifacts lie."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    place = [found.experiment_id]
    runs = client.search_runs(place, max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in runs}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return {
        "runs": sorted((_run(client, run, names) for run in runs), key=lambda run: (run["name"], str(run["start"]))),
        "traces": sorted(
            (
                trace.info.request_time,
                trace.info.request_preview,
                trace.info.tags["papo.round"],
                [span.inputs["user"] for span in trace.data.spans],
            )
            for parent in parents
            for trace in client.search_traces(locations=place, run_id=parent.info.run_id, max_results=500)
        ),
        "models": sorted(
            (model.name, str(model.status), [(metric.key, metric.value) for metric in model.metrics or []])
            for model in client.search_logged_models(place)
        ),
    }


def _run(client: Any, run: Any, names: dict[str, str]) -> dict[str, Any]:
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("papo.")}
    whole = client.get_run(run.info.run_id)
    return {
        "name": run.info.run_name,
        "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
        "status": run.info.status,
        "start": run.info.start_time,
        "end": run.info.end_time,
        "params": run.data.params,
        "tags": tags,
        "points": sorted(
            (point.key, point.step, point.value, point.timestamp)
            for key in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, key)
        ),
        "datasets": sorted(
            (item.dataset.name, item.dataset.digest, item.tags[0].value)
            for item in (whole.inputs.dataset_inputs if whole.inputs else [])
        ),
        "models": len(whole.outputs.model_outputs) if whole.outputs else 0,
        "artifacts": sorted(_artifacts(client, run.info.run_id)),
    }


def _artifacts(client: Any, run: str, path: str | None = None) -> Iterator[tuple[str, int | None]]:
    for item in client.list_artifacts(run, path):
        if item.is_dir:
            yield from _artifacts(client, run, item.path)
        else:
            yield item.path, item.file_size
