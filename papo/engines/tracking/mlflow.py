"""The record of a run in MLflow: a parent run, a child run a stage, and the policies as models that load again.

Everything goes through `MlflowClient` with explicit ids: neither MLflow's global state nor MLFLOW_RUN_ID in the
environment (which would beat a parent's id) can send a point to another run.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from papo.engines.tracking import without_password
from papo.engines.tracking.traces import PER_ROUND, Sample, trace, trace_id
from papo.params import TrackingParams

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # else it reports on tables it creates and licences it does not find
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # else an outage is noticed after minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""Defaults; what the environment already says stays."""

METRICS_PER_BATCH, PARAMS_PER_BATCH, SPANS_PER_BATCH = 1000, 100, 10
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 6000, 8000, 250, 36

LINEAGE, KIND = "papo.lineage", "papo.kind"
SAME = (LINEAGE, "papo.run", "papo.workspace")  # those of them that are given make two starts one run
PARENT = "mlflow.parentRunId"

MIRRORED = {
    "advantage": (
        "alarms",
        "accuracy",
        "prm_mean",
        "prm_mean_correct",
        "zero_advantage_share",
        "groups_process_active_share",
        "process_advantage_share",
        "negative_correct_share",
        "outcome_alignment",
        "inversions",
        "judge_failure_share",
        "length_mean",
        "truncated_share",
        "length_prm_correlation",
        "verification_share",
    ),
    "train": (
        "loss",
        "grad_norm",
        "clipped_low_share",
        "clipped_high_share",
        "approx_kl",
        "entropy",
        "effective_sample_size",
        "skipped_share",
        "padding_share",
        "tokens_per_second",
    ),
    "score_prm": ("calls", "cost", "cached_share", "cache_saved", "not_asked_saved", "asked_share"),
}
"""Metrics by stage that the parent run shows too, so that the comparison of two runs draws their curves."""


class MlflowTracker:
    """Implements `Tracker` against one MLflow server or database. Raises what MLflow raises.

    A run that ended early is taken up again by the next with the same `papo.lineage` tag and, where those are given,
    the same `papo.run` and `papo.workspace`. A point (metric, step) that the run has is not written a second time.
    """

    def __init__(self, params: TrackingParams) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Imported here, in the thread of the run: two threads that import at once can see half a module.
        import mlflow  # noqa: F401

        self._database = _sqlite_file(params.uri)
        self._uri = f"sqlite:///{self._database}" if self._database else params.uri
        self._experiment_name = params.experiment
        self._name = ""
        self._experiment = self._parent = ""
        self._tags: dict[str, str] = {}
        self._children: dict[str, str] = {}
        self._points: dict[str, set[tuple[str, int]]] = {}
        self._round = 0
        self._sample = Sample(params.judge_traces)
        self._taken_up = False

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Creates the parent run, or takes up the unfinished one of the same lineage.

        Args:
            params: flat; a value that is no string is written as JSON, as params.yaml has it.
            tags: `papo.lineage`, and whatever else says where the run comes from (commit, workspace, flow run id).
        """
        from mlflow import MlflowClient

        self._name, self._tags = name, {key: value[:TAG_LENGTH] for key, value in tags.items()}
        if self._database is not None:
            self._database.parent.mkdir(parents=True, exist_ok=True)
        self._client: MlflowClient = MlflowClient(self._uri)  # creates the tables of a new database, in 3 to 8 s
        self._experiment = self._find_experiment()
        run = self._unfinished()
        if run is None:
            run = self._client.create_run(self._experiment, run_name=name, tags={KIND: "run", **self._tags})
            self._points[run.info.run_id] = set()
        else:
            self._take_up(run)
        self._parent = run.info.run_id
        self._log_params(self._parent, {key: params[key] for key in params if _key(key) not in run.data.params})

    def check(self) -> None:
        self._client.get_run(self._parent)

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        """Writes a manifest to the stage's child run: `metrics` at step `round_`, `history` as `steps/..`, datasets.

        The traces of a round's calls are written with the manifest of score_prm, when no judge waits for replies.
        """
        from mlflow.entities import DatasetInput

        self._round = max(self._round, round_ or 0)
        child = self._child(stage, manifest)
        step = round_ or 0
        metrics = dict(manifest["metrics"])
        facts = {"seconds": manifest["seconds"], "rows": manifest["rows"]}
        facts |= {f"counts/{name}": count for name, count in manifest.get("counts", {}).items()}
        points = [(key, value, step) for key, value in (metrics | facts).items()]
        self._log_points(child, points + list(_series(manifest.get("history", []), round_)))
        datasets: list[DatasetInput] = list(_datasets(manifest))
        if datasets:
            self._client.log_inputs(child, datasets)
        self._log_points(self._parent, [(key, value, step) for key, value in _mirrored(stage, metrics)])
        if stage == "score_prm":
            self._write_traces(round_)

    def trace(self, call: Mapping[str, Any]) -> None:
        """Keeps the call in memory if it is one of those that are written."""
        self._sample.add(call)

    def tag(self, key: str, value: str) -> None:
        self._client.set_tag(self._parent, key, value[:TAG_LENGTH])

    def artifact(self, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self._parent, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self._parent, str(path))

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None:
        """Writes a policy as a model that `mlflow.transformers.load_model` loads, unless the run has it already.

        The weights are copied, not loaded; the requirements are those of this environment, not inferred by loading.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model

        name = re.sub(r"""[/:.%"']""", "-", name)
        if name in self._policies():
            return
        entry = self._client.create_logged_model(
            self._experiment, name=name, source_run_id=self._parent, tags=self._tags, model_type="policy"
        )
        model = Model(
            artifact_path=entry.artifact_location,
            run_id=self._parent,
            model_uuid=entry.model_id,
            model_id=entry.model_id,
        )
        with tempfile.TemporaryDirectory() as scratch:
            _save_transformers(path, Path(scratch) / "model", model)
            self._client.log_model_artifacts(entry.model_id, str(Path(scratch) / "model"))
        self._client.log_outputs(self._parent, [LoggedModelOutput(entry.model_id, step=self._round)])
        points = [(key, value, self._round) for key, value in metrics.items()]
        self._client.log_batch(self._parent, metrics=list(_entities(points, model_id=entry.model_id)))
        self._client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Writes the final metrics and ends the run and its stages as FINISHED, FAILED or KILLED.

        Calls of a round whose stage did not end get their traces here.
        """
        self._log_points(self._parent, [(key, value, self._round) for key, value in metrics.items()])
        for run in (*self._children.values(), self._parent):
            self._client.set_terminated(run, status=status)
        for round_ in self._sample.rounds():
            self._write_traces(round_)

    def link(self) -> str | None:
        """A URL where a server has one, else the command that shows the run."""
        if self._uri.startswith(("http://", "https://")):
            server = without_password(self._uri).rstrip("/")
            if not self._parent:
                return server
            return f"{server}/#/experiments/{self._experiment}/runs/{self._parent}"
        command = f"mlflow ui --backend-store-uri {without_password(self._uri)}"
        return f"{command}  (experiment {self._experiment_name}, run {self._name})"

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            return str(found.experiment_id)
        artifacts = (self._database.parent / "mlartifacts").as_uri() if self._database else None
        return str(self._client.create_experiment(self._experiment_name, artifact_location=artifacts))

    def _unfinished(self) -> Run | None:
        if LINEAGE not in self._tags:
            return None
        wanted = {key: self._tags[key] for key in SAME if key in self._tags} | {KIND: "run"}
        conditions = [f"tags.`{key}` = {_quoted(value)}" for key, value in wanted.items()]
        found = self._client.search_runs(
            [self._experiment],
            " and ".join([*conditions, "attributes.status != 'FINISHED'"]),
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    def _take_up(self, run: Run) -> None:
        """Goes on with a run and its children: their state, and the points they have."""
        children = self._client.search_runs(
            [self._experiment], f"tags.`{PARENT}` = {_quoted(run.info.run_id)}", max_results=1000
        )
        self._children = {child.info.run_name: child.info.run_id for child in children}
        for member in (run, *children):
            identifier = member.info.run_id
            self._points[identifier] = {
                (point.key, point.step)
                for key in member.data.metrics
                for point in self._client.get_metric_history(identifier, key)
            }
            self._client.update_run(identifier, status="RUNNING")
        self._client.log_batch(run.info.run_id, tags=_tag_entities(self._tags))
        self._taken_up = True

    def _child(self, stage: str, manifest: Mapping[str, Any]) -> str:
        if stage not in self._children:
            run = self._client.create_run(
                self._experiment,
                start_time=_now() - round(1000 * manifest["seconds"]),
                tags=self._tags | {KIND: "stage", PARENT: self._parent},
                run_name=stage,
            )
            self._children[stage] = run.info.run_id
            self._points[run.info.run_id] = set()
            self._log_params(run.info.run_id, dict(_flat(manifest.get("params", {}))))
        return self._children[stage]

    def _log_params(self, run: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entities = (Param(_key(key), _text(value)) for key, value in params.items())
        for batch in _batches(entities, PARAMS_PER_BATCH):
            self._client.log_batch(run, params=batch)

    def _log_points(self, run: str, points: Iterable[tuple[str, float, int]]) -> None:
        """One batch, or as few as the limit allows, of the (key, value, step) that the run does not have."""
        known = self._points[run]
        new = {(_key(key), step): value for key, value, step in points if (_key(key), step) not in known}
        for batch in _batches(_entities((key, value, step) for (key, step), value in new.items()), METRICS_PER_BATCH):
            self._client.log_batch(run, metrics=batch)
            known |= {(point.key, point.step) for point in batch}

    def _write_traces(self, round_: int | None) -> None:
        """Writes the calls of a round that the run does not have, as many as there is room for."""
        from mlflow.tracing.client import TracingClient

        calls = self._sample.take(round_)
        if not calls:
            return
        there = self._traces_of(round_) if self._taken_up else set()
        new = [call for call in calls if trace_id(call, self._parent) not in there][: PER_ROUND - len(there)]
        tags = {LINEAGE: self._tags[LINEAGE]} if LINEAGE in self._tags else {}
        # Not MlflowClient.start_trace: its spans go to the global tracking URI, and its failures to a log.
        client = TracingClient(self._uri)
        for batch in _batches(new, SPANS_PER_BATCH):
            made = [trace(call, run=self._parent, experiment=self._experiment, tags=tags) for call in batch]
            for info, _ in made:
                client.start_trace(info)
            client.log_spans(self._experiment, [span for _, span in made])

    def _traces_of(self, round_: int | None) -> set[str]:
        condition = None if round_ is None else f"tags.`papo.round` = '{round_}'"
        found = self._client.search_traces(
            locations=[self._experiment], run_id=self._parent, filter_string=condition,
            include_spans=False, max_results=PER_ROUND,
        )  # fmt: skip
        return {one.info.trace_id for one in found}

    def _policies(self) -> set[str]:
        """Names of the policies of this run that are whole."""
        found = self._client.search_logged_models([self._experiment], f"source_run_id = {_quoted(self._parent)}")
        return {model.name for model in found if str(model.status) == "READY"}


def _sqlite_file(uri: str) -> Path | None:
    """The absolute path of an SQLite database, so that a later change of folder means nothing; None for other URIs."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _save_transformers(policy: Path, out: Path, model: Any) -> None:
    import mlflow.transformers
    from transformers import TextGenerationPipeline
    from transformers.pipelines import check_task

    # transformers 5 names the class by a string until it is used, which MLflow 3.17 takes for the class itself.
    check_task("text-generation")[1]["impl"] = TextGenerationPipeline
    mlflow.transformers.save_model(
        str(policy.resolve()),  # absolute: a relative path such as artifacts/warmstart is taken for a name on the hub
        str(out),
        task="text-generation",
        mlflow_model=model,
        pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "torch", "transformers", "accelerate")],
    )


def _series(history: Sequence[Mapping[str, float]], round_: int | None) -> Iterator[tuple[str, float, int]]:
    """Points of a history, its rows numbered through all rounds; outside the rounds a row's own `step` counts.

    They are kept apart by a prefix from the metrics of the same name, which are one value a round.
    """
    for index, row in enumerate(history):
        step = int(row.get("step", index)) if round_ is None else round_ * len(history) + index
        yield from ((f"steps/{key}", value, step) for key, value in row.items() if key != "step")


def _mirrored(stage: str, metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """What the parent run shows of a stage. The signals of a round keep their names; others get that of their stage."""
    chosen = metrics if stage == "evaluate" else [key for key in MIRRORED.get(stage, ()) if key in metrics]
    for key in chosen:
        yield key if stage == "advantage" else f"{stage}/{key}", metrics[key]


def _datasets(manifest: Mapping[str, Any]) -> Iterator[Any]:
    """A stage's files by name and digest; an output and the input it becomes elsewhere agree in both."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for context, files in (("input", manifest.get("inputs", {})), ("output", manifest.get("outputs", {}))):
        for name, digest in _flat(files):
            if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
                label = name.removesuffix(".parquet").removesuffix(".json")
                source = json.dumps({"uri": name, "sha256": digest})
                dataset = Dataset(label, digest[:DIGEST_LENGTH], source_type="local", source=source)
                yield DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _entities(points: Iterable[tuple[str, float, int]], *, model_id: str | None = None) -> Iterator[Metric]:
    from mlflow.entities import Metric

    now = _now()
    return (Metric(_key(key), float(value), now, step, model_id=model_id) for key, value, step in points)


def _tag_entities(tags: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in tags.items()]


def _key(name: str) -> str:
    """A name of a param or metric with what MLflow does not allow in one replaced."""
    return re.sub(r"[^\w.\-: /]", "_", name)[:KEY_LENGTH]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= PARAM_LENGTH else f"{text[: PARAM_LENGTH - 3]}..."


def _quoted(value: str) -> str:
    """A string of MLflow's search language, which knows no escapes."""
    return f"'{value}'" if "'" not in value else f'"{value}"'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def _now() -> int:
    return int(time.time() * 1000)
