"""The record of a run: against a real SQLite database, and what an outage does to the run (nothing)."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from papo.engines.protocols import Tracker
from papo.engines.tracking import BackgroundTracker, NullTracker, make_tracker, without_password
from papo.params import Params, TrackingParams

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, Trace

DIGESTS = {name: name * 64 for name in "abcdef"}
POLICY_STEPS = 5


def no_warning(message: str) -> None:
    pytest.fail(f"warned: {message}")


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite database with MLflow's tables, which take seconds to make."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/record/mlflow.db"
    tracker = make_tracker(TrackingParams(uri=uri, experiment="first"), warn=no_warning)
    tracker.start("first", {}, {})
    tracker.finish("FINISHED", {})
    return uri


@pytest.fixture
def client(database: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(database)


_experiments = count()


@pytest.fixture
def params(database: str) -> TrackingParams:
    """Of an experiment of the test's own."""
    return TrackingParams(uri=database, experiment=f"experiment-{next(_experiments)}")


def manifest(stage: str, round_: int | None, **changes: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "round": round_,
        "params": {"clip_low": 0.2, "nested": {"none": None}},
        "inputs": {"round": round_, "rollouts": DIGESTS["a"], "policies": {"final": DIGESTS["b"]}, "variant": "papo"},
        "outputs": {f"{stage}.parquet": DIGESTS["c"]},
        "rows": 384,
        "counts": {"ok": 380, "timeout": 4},
        "metrics": {},
        "history": [],
        "seconds": 2.5,
        **changes,
    }


def runs(client: MlflowClient, params: TrackingParams) -> tuple[list[Run], dict[str, Run]]:
    """The parent runs of an experiment, and its child runs by name."""
    experiment = client.get_experiment_by_name(params.experiment)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert len({run.info.run_name for run in children}) == len(children), "a stage has two child runs"
    return parents, {run.info.run_name: run for run in children}


def points(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def test_a_run_is_a_parent_and_a_child_a_stage(
    client: MlflowClient, params: TrackingParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # beats explicit parents in MLflow's fluent functions
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>")
    (tmp_path / "plot.svg").write_text("<svg/>")

    tracker = make_tracker(params, warn=no_warning)
    tracker.start("papo-seed0", {"a.b": "text"}, {"papo.lineage": "abc", "papo.git_commit": "f00"})
    for round_ in (0, 1):
        signals = {"accuracy": 0.5 + round_ / 10, "lam": 1.0, "odd name%": 3.0}
        tracker.stage("advantage", round_, manifest("advantage", round_, metrics=signals))
        steps = [{"step": step, "loss": round((10 * round_ + step) / 10, 1)} for step in (1.0, 2.0, 3.0)]
        tracker.stage("train", round_, manifest("train", round_, metrics={"loss": 0.2}, history=steps))
    tracker.stage("warmstart", None, manifest("warmstart", None, history=[{"step": 50.0, "loss": 1.5}]))
    tracker.stage("evaluate", None, manifest("evaluate", None, metrics={"sums-hard/final/avg_at_k": 0.9}))
    tracker.artifact(report)
    tracker.artifact(tmp_path / "plot.svg")
    tracker.tag("papo.dvc_lock", "d00")
    tracker.finish("FINISHED", {"final": 0.9})

    [parent], children = runs(client, params)
    assert (parent.info.run_name, parent.info.status) == ("papo-seed0", "FINISHED")
    assert {"papo.lineage": "abc", "papo.git_commit": "f00", "papo.dvc_lock": "d00"}.items() <= parent.data.tags.items()
    assert set(children) == {"advantage", "train", "warmstart", "evaluate"}
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.data.tags["papo.lineage"], child.info.status) == ("abc", "FINISHED")
        assert child.info.end_time - child.info.start_time >= 2500

    assert parent.data.params == {"a.b": "text"}
    assert children["train"].data.params == {"clip_low": "0.2", "nested.none": "null"}
    assert points(client, children["advantage"], "accuracy") == [(0, 0.5), (1, 0.6)]
    assert points(client, children["advantage"], "odd name_") == [(0, 3.0), (1, 3.0)]
    assert points(client, children["advantage"], "counts/timeout") == [(0, 4.0), (1, 4.0)]
    assert points(client, children["advantage"], "seconds") == [(0, 2.5), (1, 2.5)]
    assert points(client, children["train"], "loss") == [(0, 0.2), (1, 0.2)]
    series = [(0, 0.1), (1, 0.2), (2, 0.3), (3, 1.1), (4, 1.2), (5, 1.3)]
    assert points(client, children["train"], "steps/loss") == series
    assert points(client, children["warmstart"], "steps/loss") == [(50, 1.5)]

    assert points(client, parent, "accuracy") == [(0, 0.5), (1, 0.6)]
    assert points(client, parent, "train/loss") == [(0, 0.2), (1, 0.2)]
    assert set(parent.data.metrics) == {"accuracy", "train/loss", "evaluate/sums-hard/final/avg_at_k", "final"}

    assert sorted(file.path for file in client.list_artifacts(parent.info.run_id)) == ["plot.svg", "report"]
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "report")] == ["report/index.html"]
    assert "/record/mlartifacts/" in parent.info.artifact_uri, "artifacts lie beside the database"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.svg", "report"], "nothing lands where the run is"
    assert "papo-seed0" in str(tracker.link())
    assert f"mlflow ui --backend-store-uri {params.uri}" in str(tracker.link())


def call(number: int, round_: int = 0, **change: Any) -> dict[str, Any]:
    """A model's call; the keys of the numbers 0 to 255 are spread evenly."""
    attributes = {"model": "judge-7b", "rubric": "levels/1", "status": "ok", "tries": 1, "prompt_tokens": 700,
                  "completion_tokens": 40, "cost": 0.25, "round": round_, "variant": "papo", "vote": 0}  # fmt: skip
    return {
        "key": f"{number:02x}" + "5" * 62,
        "name": "judge",
        "inputs": {"system": "You judge.", "user": f"Response {number}"},
        "outputs": {"text": '{"score": 0.5}'},
        "attributes": attributes | change,
        "started": 1_700_000_000.25 + number,
        "seconds": 1.5,
    }


def traces(client: MlflowClient, run: Run) -> list[Trace]:
    found = client.search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id, max_results=500)
    return sorted(found, key=lambda trace: trace.info.request_time)


def test_calls_of_a_model_become_traces_of_the_run(client: MlflowClient, params: TrackingParams) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 1.0}), warn=no_warning)
    tracker.trace(call(0))  # before the record is opened
    tracker.start("run", {}, {"papo.lineage": "abc"})
    odd = "half a pair: \ud800, nothing: \0, kana: \u3042"
    failed = {"inputs": {"system": "", "user": odd}, "outputs": {"text": None}}
    tracker.trace(call(1, status="timeout", cost=None) | failed)
    tracker.stage("score_prm", 0, manifest("score_prm", 0, metrics={"calls": 2.0, "cost": 0.5, "prompt_tokens": 9.0}))
    tracker.finish("FINISHED", {})

    [parent], _ = runs(client, params)
    assert parent.data.metrics == {"score_prm/calls": 2.0, "score_prm/cost": 0.5}
    first, second = traces(client, parent)
    tags = {"papo.lineage": "abc", "papo.round": "0", "papo.variant": "papo", "papo.status": "ok"}
    assert first.info.tags.items() >= tags.items()
    times = (first.info.request_time, first.info.execution_duration)
    assert (first.info.state.value, *times) == ("OK", 1_700_000_000_250, 1500)
    assert first.info.token_usage == {"input_tokens": 700, "output_tokens": 40, "total_tokens": 740}
    assert (first.info.request_preview, first.info.response_preview) == ("Response 0", '{"score": 0.5}')
    [span] = first.data.spans
    assert (span.name, span.inputs) == ("judge", {"system": "You judge.", "user": "Response 0"})
    assert span.outputs == {"text": '{"score": 0.5}'}
    assert (span.start_time_ns, span.end_time_ns) == (1_700_000_000_250_000_000, 1_700_000_001_750_000_000)
    told = [span.get_attribute(name) for name in ("model", "rubric", "tries", "cost", "vote")]
    assert told == ["judge-7b", "levels/1", 1, 0.25, 0]
    assert (second.info.state.value, second.info.tags["papo.status"]) == ("ERROR", "timeout")
    assert second.data.spans[0].inputs["user"] == odd
    found = client.search_traces(locations=[parent.info.experiment_id], filter_string="tags.`papo.status` = 'timeout'")
    assert [trace.info.trace_id for trace in found] == [second.info.trace_id]


def test_a_share_of_the_calls_is_kept_and_no_more_than_a_hundred_a_round(
    client: MlflowClient, params: TrackingParams
) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 0.5}), warn=no_warning)
    tracker.start("run", {}, {})
    for number in reversed(range(256)):  # in whatever order the replies come
        tracker.trace(call(number))
    for number in range(100, 256):
        tracker.trace(call(number, 1))
    for round_ in (0, 1):
        tracker.stage("score_prm", round_, manifest("score_prm", round_))
    tracker.finish("FINISHED", {})

    [parent], _ = runs(client, params)
    users: dict[str, list[str]] = {"0": [], "1": []}
    for trace in traces(client, parent):
        users[trace.info.tags["papo.round"]].append(trace.data.spans[0].inputs["user"])
    assert users["0"] == [f"Response {number}" for number in range(100)]
    assert users["1"] == [f"Response {number}" for number in range(100, 128)]


def test_a_share_of_none_keeps_none(client: MlflowClient, params: TrackingParams) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 0.0}), warn=no_warning)
    tracker.start("run", {}, {})
    tracker.trace(call(0) | {"key": "0" * 64})
    tracker.stage("score_prm", 0, manifest("score_prm", 0))
    tracker.finish("FINISHED", {})
    [parent], _ = runs(client, params)
    assert not traces(client, parent)


def test_nothing_is_written_while_a_judge_waits(client: MlflowClient, params: TrackingParams) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 1.0}), warn=no_warning)
    tracker.start("run", {}, {})
    tracker.trace(call(0, 1))
    tracker.stage("score_prm", 0, manifest("score_prm", 0))
    tracker.stage("advantage", 1, manifest("advantage", 1))
    assert isinstance(tracker, BackgroundTracker)
    tracker._jobs.put(("look", lambda: seen.append(len(traces(client, runs(client, params)[0][0])))))
    seen: list[int] = []
    tracker.stage("score_prm", 1, manifest("score_prm", 1))
    tracker.finish("FINISHED", {})
    assert seen == [0]
    assert len(traces(client, runs(client, params)[0][0])) == 1


def test_a_run_that_is_taken_up_writes_no_trace_twice_and_keeps_to_the_limit(
    client: MlflowClient, params: TrackingParams
) -> None:
    params = params.model_copy(update={"judge_traces": 1.0})

    def start(numbers: range, end: str) -> list[int]:
        tracker = make_tracker(params, warn=no_warning)
        tracker.start("run", {}, {"papo.lineage": "abc"})
        for number in numbers:
            tracker.trace(call(number))
        if end == "FINISHED":  # else the judge's stage fails
            tracker.stage("score_prm", 0, manifest("score_prm", 0))
        tracker.finish(end, {})
        [parent], _ = runs(client, params)
        return [trace.info.request_time // 1000 - 1_700_000_000 for trace in traces(client, parent)]

    assert start(range(40), "FAILED") == list(range(40))
    assert start(range(20, 60), "FAILED") == list(range(60))
    assert start(range(256), "FINISHED") == list(range(100))


def test_datasets_carry_digests_that_lead_from_stage_to_stage(client: MlflowClient, params: TrackingParams) -> None:
    tracker = make_tracker(params, warn=no_warning)
    tracker.start("run", {}, {})
    tracker.stage("rollout", 0, manifest("rollout", 0, inputs={}, outputs={"rollouts.parquet": DIGESTS["a"]}))
    tracker.stage("advantage", 0, manifest("advantage", 0))
    tracker.finish("FINISHED", {})

    _, children = runs(client, params)
    inputs = {stage: client.get_run(child.info.run_id).inputs for stage, child in children.items()}
    found = {
        (stage, item.dataset.name, item.dataset.digest, item.tags[0].value)
        for stage, of_stage in inputs.items()
        for item in (of_stage.dataset_inputs if of_stage else [])
    }
    assert found == {
        ("rollout", "rollouts", "a" * 36, "output"),
        ("advantage", "rollouts", "a" * 36, "input"),
        ("advantage", "policies.final", "b" * 36, "input"),
        ("advantage", "advantage", "c" * 36, "output"),
    }


def test_many_and_long_params_and_metrics(client: MlflowClient, params: TrackingParams) -> None:
    flat = Params().flat() | {f"many.{index}": index for index in range(250)} | {"long": "x" * 9000, "no": None}
    history = [{"step": float(step), "loss": 1.0, "grad_norm": 2.0} for step in range(700)]
    tracker = make_tracker(params, warn=no_warning)
    tracker.start("run", flat, {"papo.note": "y" * 9000})
    tracker.stage("train", 0, manifest("train", 0, history=history))
    tracker.finish("FINISHED", {})

    [parent], children = runs(client, params)
    assert parent.data.params.keys() == flat.keys()
    assert (len(parent.data.params["long"]), parent.data.params["no"]) == (6000, "null")
    assert (parent.data.params["prepare.sums.train.problems"], parent.data.params["many.249"]) == ("2048", "249")
    assert len(points(client, children["train"], "steps/loss")) == 700


@pytest.mark.parametrize("end", [None, "FAILED", "KILLED"])
def test_an_unfinished_run_is_taken_up_without_doubles(
    client: MlflowClient, params: TrackingParams, end: str | None
) -> None:
    tags = {"papo.lineage": "o'clock", "papo.workspace": "/here"}
    history = [{"step": 1.0, "loss": 0.5}]
    first = make_tracker(params, warn=no_warning)
    first.start("run", {"seed": 1}, tags)
    first.stage("train", 0, manifest("train", 0, metrics={"loss": 0.5}, history=history))
    if end is None:  # killed: nothing ends the run
        assert isinstance(first, BackgroundTracker)
        first._drain()
    else:
        first.finish(end, {})

    second = make_tracker(params, warn=no_warning)
    second.start("run", {"seed": 2, "new": 3}, tags | {"papo.flow_run": "f"})
    for round_ in (0, 1):
        second.stage("train", round_, manifest("train", round_, metrics={"loss": 0.5}, history=history))
    second.stage("evaluate", None, manifest("evaluate", None))
    second.finish("FINISHED", {"final": 1.0})

    [parent], children = runs(client, params)
    assert (parent.info.status, parent.data.tags["papo.flow_run"]) == ("FINISHED", "f")
    assert parent.data.params == {"seed": "1", "new": "3"}
    assert points(client, children["train"], "loss") == [(0, 0.5), (1, 0.5)]
    assert points(client, children["train"], "steps/loss") == [(0, 0.5), (1, 0.5)]
    assert points(client, parent, "train/loss") == [(0, 0.5), (1, 0.5)]
    assert {child.info.status for child in children.values()} == {"FINISHED"}

    third = make_tracker(params, warn=no_warning)
    third.start("run", {}, tags)
    third.finish("FINISHED", {})
    assert len(runs(client, params)[0]) == 2, "a finished run is not taken up"


def test_a_run_of_another_workspace_or_lineage_is_not_taken_up(client: MlflowClient, params: TrackingParams) -> None:
    for lineage, workspace in (("abc", "/here"), ("abc", "/there"), ("abd", "/here")):
        tracker = make_tracker(params, warn=no_warning)
        tracker.start("run", {}, {"papo.lineage": lineage, "papo.workspace": workspace})
        tracker.stage("prepare", None, manifest("prepare", None))
        tracker.finish("FAILED", {})
    experiment = client.get_experiment_by_name(params.experiment)
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 6


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from papo.engines.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **shape,
        )
    )
    path = tmp_path_factory.mktemp("policy") / "artifacts" / "warmstart"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_policy_loads_again_and_generates(
    client: MlflowClient, params: TrackingParams, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.transformers

    monkeypatch.chdir(policy.parent.parent)
    for _ in range(2):  # the second time as the same run, taken up
        tracker = make_tracker(params, warn=no_warning)
        tracker.start("run", {}, {"papo.lineage": "abc"})
        # A relative path with one slash looks like the name of a model on the hub.
        tracker.policy(Path("artifacts/warmstart"), "round:1", {"sums-hard": 0.25})
        tracker.finish("FAILED", {})

    [parent], _ = runs(client, params)
    [model] = client.search_logged_models([parent.info.experiment_id])
    assert (model.name, str(model.status), model.source_run_id) == ("round-1", "READY", parent.info.run_id)
    assert [(metric.key, metric.value) for metric in model.metrics or []] == [("sums-hard", 0.25)]
    outputs = client.get_run(parent.info.run_id).outputs
    assert outputs is not None
    assert [output.model_id for output in outputs.model_outputs] == [model.model_id]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", params.uri)
    pipeline = mlflow.transformers.load_model(model.model_uri)
    [answer] = pipeline("1+1=?\n", max_new_tokens=POLICY_STEPS, do_sample=False)
    assert answer["generated_text"].startswith("1+1=?\n")
    assert len(answer["generated_text"]) > len("1+1=?\n")


class Recorder:
    """A backend that notes its calls, and raises or hangs where it is told to."""

    def __init__(self, *, fails: str = "", gone: bool = False, hangs: str = "") -> None:
        self.calls: list[str] = []
        self._fails, self._gone, self._hangs = fails, gone, hangs
        self.reached, self.released = threading.Event(), threading.Event()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._hangs:
            self.reached.set()
            self.released.wait(30)
        if name == self._fails:
            raise ConnectionError(f"no {name} at http://user:secret@host/")

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._call("start")

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self._call("stage")

    def trace(self, call: Mapping[str, Any]) -> None:
        self._call("trace")

    def tag(self, key: str, value: str) -> None:
        self._call("tag")

    def artifact(self, path: Path) -> None:
        self._call("artifact")

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None:
        self._call("policy")

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        self._call("finish")

    def check(self) -> None:
        self.calls.append("check")
        if self._gone:
            raise OSError("gone")

    def link(self) -> str | None:
        return "there"


def use(tracker: Tracker) -> None:
    """Every call a run makes; `stage`, `artifact` and `policy` twice."""
    tracker.start("run", {}, {})
    for round_ in (0, 1):
        tracker.stage("train", round_, manifest("train", round_))
    for _ in range(2):
        tracker.artifact(Path("report"))
        tracker.policy(Path("policy"), "final", {})
    tracker.tag("papo.key", "value")
    tracker.link()
    tracker.finish("FINISHED", {})


EVERYTHING = ["start", "stage", "stage", "artifact", "policy", "artifact", "policy", "tag", "finish"]


def background(recorder: Recorder, warn: Callable[[str], None], **limits: float) -> BackgroundTracker:
    return BackgroundTracker(recorder, where="http://me:pw@host", warn=warn, **limits)


def test_calls_reach_the_backend_in_order_and_do_not_wait_for_it() -> None:
    recorder = Recorder(hangs="start")
    tracker = background(recorder, no_warning)
    tracker.start("run", {}, {})
    tracker.stage("train", 0, manifest("train", 0))
    tracker.tag("papo.key", "value")
    assert recorder.calls in ([], ["start"])
    recorder.released.set()
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["start", "stage", "tag", "finish"]
    tracker.tag("papo.key", "late")
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["start", "stage", "tag", "finish"], "nothing follows the end"


@pytest.mark.parametrize(("fails", "calls"), [("start", ["start"]), ("stage", ["start", "stage", "check"])])
def test_an_outage_is_told_once_and_ends_the_record_not_the_run(fails: str, calls: list[str]) -> None:
    warnings: list[str] = []
    recorder = Recorder(fails=fails, gone=True)
    use(background(recorder, warnings.append))
    assert recorder.calls == calls
    assert warnings == [
        f"MLflow is unreachable at http://***@host: no {fails} at http://***@host/; the run goes on without it"
    ]


@pytest.mark.parametrize("fails", ["stage", "artifact", "policy", "finish"])
def test_one_refused_call_does_not_end_the_record(fails: str) -> None:
    warnings: list[str] = []
    recorder = Recorder(fails=fails)
    use(background(recorder, warnings.append))
    assert [call for call in recorder.calls if call != "check"] == EVERYTHING
    [warning] = warnings
    assert warning.startswith(f"MLflow did not record {fails}")
    assert "secret" not in warning


def test_a_trace_that_cannot_be_kept_is_told_once_and_stops_nothing() -> None:
    warnings: list[str] = []
    recorder = Recorder(fails="trace")
    tracker = background(recorder, warnings.append)
    tracker.start("run", {}, {})
    for number in range(3):
        tracker.trace(call(number))
    tracker.finish("FINISHED", {})
    assert sorted(recorder.calls) == ["finish", "start", "trace", "trace", "trace"]
    assert warnings == [
        "MLflow did not record trace: no trace at http://***@host/; the run and the rest of its record go on"
    ]
    tracker.trace(call(3))
    assert recorder.calls.count("trace") == 3, "nothing follows the end"


def test_traces_that_are_refused_leave_the_rest_of_the_record(
    client: MlflowClient, params: TrackingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracing.client import TracingClient

    def refuse(*arguments: object) -> None:
        raise ValueError("too large")

    monkeypatch.setattr(TracingClient, "log_spans", refuse)
    warnings: list[str] = []
    tracker = make_tracker(params.model_copy(update={"judge_traces": 1.0}), warn=warnings.append)
    tracker.start("run", {}, {})
    tracker.trace(call(0))
    tracker.stage("score_prm", 0, manifest("score_prm", 0, metrics={"calls": 1.0}))
    tracker.stage("train", 0, manifest("train", 0, metrics={"loss": 0.5}))
    tracker.finish("FINISHED", {})
    assert warnings == ["MLflow did not record stage score_prm: too large; the run and the rest of its record go on"]
    [parent], children = runs(client, params)
    assert (parent.info.status, children["score_prm"].data.metrics["calls"]) == ("FINISHED", 1.0)
    assert parent.data.metrics == {"score_prm/calls": 1.0, "train/loss": 0.5}


def test_a_backend_that_falls_far_behind_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papo.engines.tracking.WAITING", 3)
    warnings: list[str] = []
    recorder = Recorder(hangs="start")
    tracker = background(recorder, warnings.append)
    tracker.start("run", {}, {})
    assert recorder.reached.wait(10)
    for round_ in range(6):
        tracker.stage("train", round_, manifest("train", round_))
    recorder.released.set()
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["start"]
    assert len(warnings) == 1
    assert "3 calls are waiting" in warnings[0]


def test_warnings_are_given_in_the_thread_of_the_run() -> None:
    threads: set[int] = set()
    use(background(Recorder(fails="stage"), lambda message: threads.add(threading.get_ident())))
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("hangs", ["start", "policy"])
def test_a_backend_that_never_answers_does_not_hold_the_end_of_a_run(hangs: str) -> None:
    warnings: list[str] = []
    recorder = Recorder(hangs=hangs)
    began = time.monotonic()
    use(background(recorder, warnings.append, connect=0.2, patience=0.2))
    assert time.monotonic() - began < 5
    assert [warning.split(":")[-1] for warning in warnings] == [" no answer in 0 s; the run goes on without it"]
    recorder.released.set()


def test_an_unreachable_server_only_warns() -> None:
    warnings: list[str] = []
    tracker = make_tracker(TrackingParams(uri="http://127.0.0.1:9"), warn=warnings.append)
    began = time.monotonic()
    use(tracker)
    assert time.monotonic() - began < 20
    refused = f"[Errno {errno.ECONNREFUSED}] Connection refused"
    assert warnings == [f"MLflow is unreachable at http://127.0.0.1:9: {refused}; the run goes on without it"]
    assert tracker.link() is None


def test_a_database_that_cannot_be_made_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    use(make_tracker(TrackingParams(uri=f"sqlite:///{tmp_path}/file/mlflow.db"), warn=warnings.append))
    assert len(warnings) == 1
    assert "the run goes on without it" in warnings[0]


def test_disabled_tracking_is_silent() -> None:
    tracker = make_tracker(TrackingParams(enabled=False), warn=no_warning)
    use(tracker)
    assert isinstance(tracker, NullTracker)
    assert tracker.link() is None


@pytest.fixture
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)


@pytest.mark.usefixtures("without_mlflow")
def test_missing_mlflow_is_told_with_what_to_do() -> None:
    warnings: list[str] = []
    tracker = make_tracker(TrackingParams(), warn=warnings.append)
    use(tracker)
    assert isinstance(tracker, NullTracker)
    [warning] = warnings
    assert "pip install mlflow" in warning
    assert "tracking.enabled" in warning


def test_importing_the_engine_does_not_import_mlflow() -> None:
    code = "import sys, papo.engines.tracking, papo.engines.tracking.mlflow; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://papo:pw@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("https://tracking.example/x@y", "https://tracking.example/x@y"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
