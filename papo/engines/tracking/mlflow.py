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

from papo.engines.tracking.delivery import absolute
from papo.engines.tracking.outbox import key_of
from papo.engines.tracking.traces import PER_ROUND, Call, trace, trace_id
from papo.engines.tracking.troubles import without_password
from papo.params import TrackingParams

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # else it reports on tables it creates, and at length on what is tried again
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox tries again, and knows what had been stored without an answer
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""Defaults; what the environment already says stays."""

METRICS_PER_BATCH, PARAMS_PER_BATCH, SPANS_PER_BATCH = 1000, 100, 10
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH, DIGEST_LENGTH = 6000, 8000, 250, 36

LINEAGE, KIND, RECORD = "papo.lineage", "papo.kind", "papo.record"
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
    """Implements `Backend` against one MLflow server or database. Raises what MLflow raises.

    The runs of a record are known by their tag `papo.record`. A point (metric, step) that a run has is not written a second time, and as
    each point has the time at which it was recorded, MLflow takes the same one twice for one.
    """

    def __init__(self, params: TrackingParams) -> None:
        prepare()
        self.at = time.time()
        self._uri = absolute(params.uri)
        self._database = Path(self._uri.removeprefix("sqlite:///")) if self._uri.startswith("sqlite:///") else None
        self._experiment_name = params.experiment
        self._name = ""
        self._experiment = self._parent = ""
        self._tags: dict[str, str] = {}
        self._children: dict[str, str] = {}
        self._params: dict[str, set[str]] = {}
        self._points: dict[str, set[tuple[str, int]]] = {}
        self._made = False

    def open(self, record: str, name: str, tags: Mapping[str, str], run: str) -> str:
        """Finds or creates the parent run.

        Args:
            tags: `papo.lineage`, and whatever else says where the run comes from (commit, workspace, flow run id).
            run: the id of the parent run, if it is known; another run of the record that is empty is deleted.
        """
        from mlflow import MlflowClient

        self._name = name
        self._tags = {key: value[:TAG_LENGTH] for key, value in tags.items()} | {RECORD: record}
        if self._database is not None:
            self._database.parent.mkdir(parents=True, exist_ok=True)
        self._client: MlflowClient = MlflowClient(self._uri)  # creates the tables of a new database, in 3 to 8 s
        self._experiment = self._find_experiment()
        parents, children = self._recorded()
        if (known := _chosen(parents, run) if parents else self._unfinished()) is not None:
            self._take_up(known, children)
        else:
            made = self._client.create_run(
                self._experiment, start_time=self._now(), run_name=name, tags={KIND: "run", **self._tags}
            )
            self._parent = made.info.run_id
            self._params[self._parent], self._points[self._parent] = set(), set()
            self._made = True
        return self._parent

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Writes params that the run does not have, and tags; a run that had ended goes on.

        Args:
            params: flat; a value that is no string is written as JSON, as params.yaml has it.
        """
        self._tags |= {key: value[:TAG_LENGTH] for key, value in tags.items()}
        if not self._made:
            self._client.log_batch(self._parent, tags=_tag_entities(self._tags))
            for run in (self._parent, *self._children.values()):
                self._client.update_run(run, status="RUNNING")
        self._made = False
        self._log_params(self._parent, params)

    def check(self) -> None:
        self._client.get_run(self._parent)

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        """Writes a manifest to the stage's child run: `metrics` at step `round_`, `history` as `steps/..`, datasets."""
        from mlflow.entities import DatasetInput

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

    def tag(self, key: str, value: str) -> None:
        self._client.set_tag(self._parent, key, value[:TAG_LENGTH])

    def artifact(self, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self._parent, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self._parent, str(path))

    def policy(self, path: Path, name: str, metrics: Mapping[str, float], step: int) -> None:
        """Writes a policy as a model that `mlflow.transformers.load_model` loads, unless the run has it already.

        The weights are copied, not loaded; the requirements are those of this environment, not inferred by loading.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model

        name = re.sub(r"""[/:.%"']""", "-", name)
        entry, whole = self._policy(name)
        if whole:
            return
        entry = entry or self._client.create_logged_model(
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
        outputs = self._client.get_run(self._parent).outputs
        if entry.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self._client.log_outputs(self._parent, [LoggedModelOutput(entry.model_id, step=step)])
        points = list(
            _entities(((key, value, step) for key, value in metrics.items()), self._now(), model_id=entry.model_id)
        )
        self._client.log_batch(self._parent, metrics=points)
        # They are points of the run as well, which `finish` must not write a second time.
        self._known(self._parent).update((point.key, point.step) for point in points)
        self._client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)

    def finish(self, status: str, metrics: Mapping[str, float], step: int) -> None:
        """Writes the final metrics and ends the run and its stages as FINISHED, FAILED or KILLED."""
        self._log_points(self._parent, [(key, value, step) for key, value in metrics.items()])
        self._drop_doubles(*self._recorded())
        for run in (*self._children.values(), self._parent):
            self._client.set_terminated(run, status=status, end_time=self._now())

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
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment_name)
        if found is None:
            artifacts = (self._database.parent / "mlartifacts").as_uri() if self._database else None
            try:
                return str(self._client.create_experiment(self._experiment_name, artifact_location=artifacts))
            except MlflowException:
                # Another run may have made it meanwhile.
                if (found := self._client.get_experiment_by_name(self._experiment_name)) is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise ValueError(f"experiment {self._experiment_name} (id {found.experiment_id}) is deleted")
        return str(found.experiment_id)

    def _recorded(self) -> tuple[list[Run], list[Run]]:
        """The parent runs and the child runs of this record: one, and one a stage, unless a call was stored whose answer was lost."""
        condition = f"tags.`{RECORD}` = {_quoted(self._tags[RECORD])}"
        found = self._client.search_runs([self._experiment], condition, max_results=1000)
        # Not by the parent: a run of an ablation has one, too.
        stages = [run for run in found if run.data.tags.get(KIND) == "stage"]
        return [run for run in found if run not in stages], stages

    def _unfinished(self) -> Run | None:
        """A run of the same lineage that was recorded before records had ids."""
        if not (wanted := key_of(self._tags)):
            return None
        conditions = [f"tags.`{key}` = {_quoted(value)}" for key, value in (wanted | {KIND: "run"}).items()]
        found = self._client.search_runs(
            [self._experiment],
            " and ".join([*conditions, "attributes.status != 'FINISHED'"]),
            max_results=100,
            order_by=["attributes.start_time DESC"],
        )
        return next((run for run in found if RECORD not in run.data.tags), None)

    def _take_up(self, run: Run, children: Sequence[Run]) -> None:
        """Goes on with a run and its children; their points are looked up when one is written."""
        self._parent = run.info.run_id
        if RECORD not in run.data.tags:
            children = self._client.search_runs(
                [self._experiment], f"tags.`{PARENT}` = {_quoted(self._parent)}", max_results=1000
            )
            for member in (run, *children):
                self._client.set_tag(member.info.run_id, RECORD, self._tags[RECORD])
        for child in sorted(children, key=_fullness):  # the fullest last, so that it stays
            if child.data.tags[PARENT] == self._parent:
                self._children[child.info.run_name] = child.info.run_id
        self._params = {member.info.run_id: set(member.data.params) for member in (run, *children)}

    def _drop_doubles(self, parents: Sequence[Run], children: Sequence[Run]) -> None:
        """Deletes the empty runs that calls left whose answer was lost."""
        own = {self._parent, *self._children.values()}
        for run in (*parents, *children):
            if run.info.run_id not in own and not _fullness(run):
                self._client.delete_run(run.info.run_id)

    def _child(self, stage: str, manifest: Mapping[str, Any]) -> str:
        if stage not in self._children:
            run = self._client.create_run(
                self._experiment,
                start_time=self._now() - round(1000 * manifest["seconds"]),
                tags=self._tags | {KIND: "stage", PARENT: self._parent},
                run_name=stage,
            )
            self._children[stage] = run.info.run_id
            self._params[run.info.run_id], self._points[run.info.run_id] = set(), set()
        self._log_params(self._children[stage], dict(_flat(manifest.get("params", {}))))
        return self._children[stage]

    def _known(self, run: str) -> set[tuple[str, int]]:
        """The (metric, step) that a run has."""
        if run not in self._points:
            self._points[run] = {
                (point.key, point.step)
                for key in self._client.get_run(run).data.metrics
                for point in self._client.get_metric_history(run, key)
            }
        return self._points[run]

    def _log_params(self, run: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        known = self._params[run]
        entities = (Param(_key(key), _text(value)) for key, value in params.items() if _key(key) not in known)
        for batch in _batches(entities, PARAMS_PER_BATCH):
            self._client.log_batch(run, params=batch)
            known |= {param.key for param in batch}

    def _log_points(self, run: str, points: Iterable[tuple[str, float, int]]) -> None:
        """One batch, or as few as the limit allows, of the (key, value, step) that the run does not have."""
        known = self._known(run)
        new = {(_key(key), step): value for key, value, step in points if (_key(key), step) not in known}
        entities = _entities(((key, value, step) for (key, step), value in new.items()), self._now())
        for batch in _batches(entities, METRICS_PER_BATCH):
            self._client.log_batch(run, metrics=batch)
            known |= {(point.key, point.step) for point in batch}

    def traces(self, round_: int | None, calls: Sequence[Call]) -> None:
        """Writes the calls of a round, as many as there is room for. The span of a trace that is there is written over."""
        from mlflow.tracing.client import TracingClient

        there = self._traces_of(round_)
        room = PER_ROUND - len(there)
        chosen = []
        for call in calls:
            if (known := trace_id(call, self._parent) in there) or room > 0:
                chosen.append(call)
                room -= not known
        tags = {LINEAGE: self._tags[LINEAGE]} if LINEAGE in self._tags else {}
        # Not MlflowClient.start_trace: its spans go to the global tracking URI, and its failures to a log.
        client = TracingClient(self._uri)
        for batch in _batches(chosen, SPANS_PER_BATCH):
            made = [trace(call, run=self._parent, experiment=self._experiment, tags=tags) for call in batch]
            for info, _ in made:
                if info.trace_id not in there:
                    client.start_trace(info)
            client.log_spans(self._experiment, [span for _, span in made])

    def _traces_of(self, round_: int | None) -> set[str]:
        condition = None if round_ is None else f"tags.`papo.round` = '{round_}'"
        found = self._client.search_traces(
            locations=[self._experiment], run_id=self._parent, filter_string=condition,
            include_spans=False, max_results=PER_ROUND,
        )  # fmt: skip
        return {one.info.trace_id for one in found}

    def _policy(self, name: str) -> tuple[Any, bool]:
        """The entry of a policy of this run, if there is one, and whether it is whole; further ones that are not are deleted."""
        found = self._client.search_logged_models([self._experiment], f"source_run_id = {_quoted(self._parent)}")
        named = sorted((model for model in found if model.name == name), key=lambda model: str(model.status) != "READY")
        for double in named[1:]:
            if str(double.status) != "READY":
                self._client.delete_logged_model(double.model_id)
        return (named[0], str(named[0].status) == "READY") if named else (None, False)

    def _now(self) -> int:
        """When what is being delivered was recorded, in milliseconds."""
        return int(self.at * 1000)


def prepare() -> None:
    """Imports MLflow, quietly.

    In the thread of the run, before another asks for it: two threads that import at once can see half a module.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # only so that it is there


def _chosen(runs: Sequence[Run], known: str) -> Run:
    """The one of several runs of a record that was gone on with."""
    return max(runs, key=lambda run: (run.info.run_id == known, _fullness(run), run.info.run_id))


def _fullness(run: Run) -> int:
    return len(run.data.params) + len(run.data.metrics)


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


def _entities(points: Iterable[tuple[str, float, int]], at: int, *, model_id: str | None = None) -> Iterator[Metric]:
    from mlflow.entities import Metric

    return (Metric(_key(key), float(value), at, step, model_id=model_id) for key, value, step in points)


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
