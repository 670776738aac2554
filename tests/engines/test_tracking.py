"""The record of a run: against a real SQLite database, and what an outage does to the run (nothing)."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from papo.engines.protocols import Tracker
from papo.engines.tracking import ABLATION, BackgroundTracker, NullTracker, make_tracker, without_password
from papo.engines.tracking.ablation import record_ablation
from papo.engines.tracking.outbox import Outbox, Record
from papo.params import Params, TrackingParams
from papo.track import sync, waiting_runs

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
    outbox = tmp_path_factory.mktemp("outbox")
    tracker = make_tracker(TrackingParams(uri=uri, experiment="first"), outbox=outbox, warn=no_warning)
    tracker.start("first", {}, {})
    tracker.finish("FINISHED", {})
    return uri


@pytest.fixture
def client(database: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(database)


_experiments = count()


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / ".papo/outbox"


@pytest.fixture
def params(database: str) -> TrackingParams:
    """Of an experiment of the test's own."""
    return TrackingParams(uri=database, experiment=f"experiment-{next(_experiments)}")


def test_an_ablation_has_its_runs_below_it_by_the_names_of_its_arms(
    client: MlflowClient, params: TrackingParams, tmp_path: Path
) -> None:
    experiment = client.create_experiment("arms")
    known = params.model_copy(update={"experiment": "arms"})
    tags = {"papo.kind": "run", ABLATION: "claims-1", "papo.workspace": "/runs/ablations/claims/papo-gullible-seed0"}
    mine = client.create_run(experiment, run_name="papo-seed0", tags=tags).info.run_id
    other = client.create_run(experiment, run_name="papo-seed0", tags=tags | {ABLATION: "lam-1"}).info.run_id
    for whole in (False, True):
        told = {"name": "claims", "description": "All hold.", "facts": {"plan": "claims"}, "report": tmp_path}
        record_ablation(known, "claims-1", **told, metrics={"runs": 1.0}, whole=whole)
    (parent,) = client.search_runs([experiment], "tags.`papo.kind` = 'ablation'")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"] == "All hold."
    child = client.get_run(mine)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.run_name == "papo-gullible-seed0"
    assert client.get_run(other).info.run_name == "papo-seed0"


def records(outbox: Path) -> list[Record]:
    """What stands in the only journal of an outbox."""
    [journal] = Outbox(outbox).journals()
    found = list(journal.read())
    assert all(isinstance(item, Record) for item in found)
    return [item for item in found if isinstance(item, Record)]


def waiting(outbox: Path) -> int:
    return sum(one.records for one in waiting_runs([outbox]))


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


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
    client: MlflowClient, params: TrackingParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outbox: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # beats explicit parents in MLflow's fluent functions
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>")
    (tmp_path / "plot.svg").write_text("<svg/>")

    tracker = make_tracker(params, outbox=outbox, warn=no_warning)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".papo", "plot.svg", "report"]
    assert not list(outbox.iterdir()), "nothing stays of what is delivered"
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


def test_calls_of_a_model_become_traces_of_the_run(client: MlflowClient, params: TrackingParams, outbox: Path) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 1.0}), outbox=outbox, warn=no_warning)
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
    client: MlflowClient, params: TrackingParams, outbox: Path
) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 0.5}), outbox=outbox, warn=no_warning)
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


def test_a_share_of_none_keeps_none(client: MlflowClient, params: TrackingParams, outbox: Path) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 0.0}), outbox=outbox, warn=no_warning)
    tracker.start("run", {}, {})
    tracker.trace(call(0) | {"key": "0" * 64})
    tracker.stage("score_prm", 0, manifest("score_prm", 0))
    tracker.finish("FINISHED", {})
    [parent], _ = runs(client, params)
    assert not traces(client, parent)


def test_nothing_is_written_while_a_judge_waits(client: MlflowClient, params: TrackingParams, outbox: Path) -> None:
    tracker = make_tracker(params.model_copy(update={"judge_traces": 1.0}), outbox=outbox, warn=no_warning)
    tracker.start("run", {}, {})
    tracker.trace(call(0, 1))
    tracker.stage("score_prm", 0, manifest("score_prm", 0))
    tracker.stage("advantage", 1, manifest("advantage", 1))
    assert [record.kind for record in records(outbox)] == ["start", "stage", "stage"]
    tracker.stage("score_prm", 1, manifest("score_prm", 1))
    tracker.finish("FINISHED", {})
    assert len(traces(client, runs(client, params)[0][0])) == 1


def test_a_run_that_is_taken_up_writes_no_trace_twice_and_keeps_to_the_limit(
    client: MlflowClient, params: TrackingParams, outbox: Path
) -> None:
    params = params.model_copy(update={"judge_traces": 1.0})

    def start(numbers: range, end: str) -> list[int]:
        tracker = make_tracker(params, outbox=outbox, warn=no_warning)
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


def test_datasets_carry_digests_that_lead_from_stage_to_stage(
    client: MlflowClient, params: TrackingParams, outbox: Path
) -> None:
    tracker = make_tracker(params, outbox=outbox, warn=no_warning)
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


def test_many_and_long_params_and_metrics(client: MlflowClient, params: TrackingParams, outbox: Path) -> None:
    flat = Params().flat() | {f"many.{index}": index for index in range(250)} | {"long": "x" * 9000, "no": None}
    history = [{"step": float(step), "loss": 1.0, "grad_norm": 2.0} for step in range(700)]
    tracker = make_tracker(params, outbox=outbox, warn=no_warning)
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
    client: MlflowClient, params: TrackingParams, end: str | None, outbox: Path
) -> None:
    tags = {"papo.lineage": "o'clock", "papo.workspace": "/here"}
    history = [{"step": 1.0, "loss": 0.5}]
    first = make_tracker(params, outbox=outbox, warn=no_warning)
    first.start("run", {"seed": 1}, tags)
    first.stage("train", 0, manifest("train", 0, metrics={"loss": 0.5}, history=history))
    if end is None:  # killed: nothing ends the run
        wait_until(lambda: waiting(outbox) == 0)
    else:
        first.finish(end, {})

    second = make_tracker(params, outbox=outbox, warn=no_warning)
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

    third = make_tracker(params, outbox=outbox, warn=no_warning)
    third.start("run", {}, tags)
    third.finish("FINISHED", {})
    assert len(runs(client, params)[0]) == 2, "a finished run is not taken up"


def test_a_run_of_another_workspace_or_lineage_is_not_taken_up(
    client: MlflowClient, params: TrackingParams, outbox: Path
) -> None:
    for lineage, workspace in (("abc", "/here"), ("abc", "/there"), ("abd", "/here")):
        tracker = make_tracker(params, outbox=outbox, warn=no_warning)
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
    client: MlflowClient, params: TrackingParams, policy: Path, monkeypatch: pytest.MonkeyPatch, outbox: Path
) -> None:
    import mlflow.transformers

    monkeypatch.chdir(policy.parent.parent)
    for _ in range(2):  # the second time as the same run, taken up
        tracker = make_tracker(params, outbox=outbox, warn=no_warning)
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
        self.at = 0.0
        self.fails, self._gone, self._hangs = fails, gone, hangs
        self.reached, self.released = threading.Event(), threading.Event()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._hangs:
            self.reached.set()
            self.released.wait(30)
        if name == self.fails:
            error = ConnectionError if self._gone else ValueError
            raise error(f"no {name} at http://user:secret@host/")

    def open(self, record: str, name: str, tags: Mapping[str, str], run: str) -> str:
        self._call("open")
        return "id"

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._call("start")

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self._call("stage")

    def traces(self, round_: int | None, calls: Sequence[Mapping[str, Any]]) -> None:
        self._call("traces")

    def tag(self, key: str, value: str) -> None:
        self._call("tag")

    def artifact(self, path: Path) -> None:
        self._call("artifact")

    def policy(self, path: Path, name: str, metrics: Mapping[str, float], step: int) -> None:
        self._call("policy")

    def finish(self, status: str, metrics: Mapping[str, float], step: int) -> None:
        self._call("finish")

    def check(self) -> None:
        self.calls.append("check")
        if self._gone and self.fails:
            raise ConnectionError("gone")

    def link(self) -> str | None:
        return "there"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a report and a policy."""
    for name in ("report", "policy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def use(tracker: Tracker, files: Path) -> None:
    """Every call a run makes; `stage`, `artifact` and `policy` twice."""
    tracker.start("run", {}, {})
    for round_ in (0, 1):
        tracker.stage("train", round_, manifest("train", round_))
    for _ in range(2):
        tracker.artifact(files / "report")
        tracker.policy(files / "policy", "final", {})
    tracker.tag("papo.key", "value")
    tracker.link()
    tracker.finish("FINISHED", {})


EVERYTHING = ["start", "stage", "stage", "artifact", "policy", "artifact", "policy", "tag", "finish"]


def background(recorder: Recorder, outbox: Path, warn: Callable[[str], None], **limits: Any) -> BackgroundTracker:
    params = TrackingParams(uri="http://me:pw@host")
    limits = {"pauses": (0.05, 0.1)} | limits
    return BackgroundTracker(lambda params: recorder, params, outbox=Outbox(outbox), warn=warn, **limits)


def test_calls_reach_the_backend_in_order_and_do_not_wait_for_it(outbox: Path) -> None:
    recorder = Recorder(hangs="start")
    tracker = background(recorder, outbox, no_warning)
    tracker.start("run", {}, {})
    tracker.stage("train", 0, manifest("train", 0))
    tracker.tag("papo.key", "value")
    assert recorder.calls in ([], ["open"], ["open", "start"])
    recorder.released.set()
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["open", "start", "stage", "tag", "finish"]
    tracker.tag("papo.key", "late")
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["open", "start", "stage", "tag", "finish"], "nothing follows the end"


@pytest.mark.parametrize("fails", ["open", "start", "stage", "finish"])
def test_an_outage_is_told_once_and_the_record_waits(outbox: Path, files: Path, fails: str) -> None:
    warnings: list[str] = []
    recorder = Recorder(fails=fails, gone=True)
    tracker = background(recorder, outbox, warnings.append)
    use(tracker, files)
    left = {"open": 9, "start": 9, "stage": 8, "finish": 1}[fails]
    [journal] = outbox.glob("*.jsonl")
    told, end = warnings
    assert told.startswith("MLflow is unreachable at http://***@host: ")
    assert "the run goes on, and its record waits on the disk. To do: see whether it runs there" in told
    assert end == f"{left} records wait in {journal}; `papo track sync` delivers them"
    assert end in str(tracker.link())
    assert "secret" not in told
    assert "pw@" not in journal.read_text()


def test_a_record_is_delivered_in_the_middle_of_a_run_once_the_server_is_back(outbox: Path, files: Path) -> None:
    warnings: list[str] = []
    recorder = Recorder(fails="open", gone=True)
    tracker = background(recorder, outbox, warnings.append)
    tracker.start("run", {}, {})
    tracker.stage("train", 0, manifest("train", 0))
    wait_until(lambda: len(recorder.calls) > 2)
    recorder.fails = ""
    wait_until(lambda: recorder.calls[-1] == "stage")
    tracker.finish("FINISHED", {})
    assert recorder.calls[-4:] == ["open", "start", "stage", "finish"]
    assert len(warnings) == 1
    assert not list(outbox.iterdir())


def test_the_next_run_of_the_workspace_delivers_what_the_last_one_left(outbox: Path, files: Path) -> None:
    use(background(Recorder(fails="open", gone=True), outbox, lambda message: None), files)
    recorder = Recorder()
    tracker = background(recorder, outbox, no_warning)
    tracker.start("run", {}, {})
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["open", "start", "open", *EVERYTHING, "finish"] or (
        sorted(recorder.calls) == sorted(["open", "start", "finish", "open", *EVERYTHING])
    )
    assert not list(outbox.iterdir())


def test_a_run_with_nothing_to_record_delivers_what_the_last_one_left(outbox: Path, files: Path) -> None:
    use(background(Recorder(fails="open", gone=True), outbox, lambda message: None), files)
    recorder = Recorder()
    tracker = background(recorder, outbox, no_warning)
    tracker.settle()
    assert recorder.calls == ["open", *EVERYTHING]
    assert tracker.link() is None


def test_pauses_grow_while_the_server_is_away(outbox: Path) -> None:
    recorder = Recorder(fails="open", gone=True)
    tracker = background(recorder, outbox, lambda message: None, pauses=(0.05, 10.0))
    tracker.start("run", {}, {})
    for _ in range(10):
        tracker.tag("papo.key", "value")
        time.sleep(0.1)
    assert 3 <= recorder.calls.count("open") <= 6, (
        "after 0, 0.05, 0.15, 0.35, 0.75 seconds, whatever is recorded meanwhile"
    )
    began = time.monotonic()
    tracker.finish("FINISHED", {})
    assert time.monotonic() - began < 1, "the end of a run waits for no pause"


@pytest.mark.parametrize("fails", ["stage", "artifact", "policy", "finish"])
def test_one_refused_call_does_not_end_the_record(outbox: Path, files: Path, fails: str) -> None:
    warnings: list[str] = []
    recorder = Recorder(fails=fails)
    use(background(recorder, outbox, warnings.append), files)
    heard = [call for call in recorder.calls if call not in ("check", "open")]
    assert [call for index, call in enumerate(heard) if call not in heard[:index]] == [
        call for index, call in enumerate(EVERYTHING) if call not in EVERYTHING[:index]
    ]
    *refused, end = warnings
    assert len(refused) == EVERYTHING.count(fails)
    assert all(warning.startswith(f"MLflow did not record {fails}") for warning in refused)
    assert end.startswith(f"{len(refused)} records wait")
    assert "secret" not in str(warnings)


def test_a_trace_that_cannot_be_kept_is_told_once_and_stops_nothing(outbox: Path) -> None:
    warnings: list[str] = []
    recorder = Recorder()
    tracker = background(recorder, outbox, warnings.append)
    tracker.start("run", {}, {})
    for number in range(3):
        tracker.trace(call(number) | {"key": "no hex"})
    tracker.finish("FINISHED", {})
    assert recorder.calls == ["open", "start", "finish"]
    assert len(warnings) == 1
    assert "has no trace in MLflow" in warnings[0]


def test_traces_that_are_refused_leave_the_rest_of_the_record(
    client: MlflowClient, params: TrackingParams, monkeypatch: pytest.MonkeyPatch, outbox: Path
) -> None:
    from mlflow.tracing.client import TracingClient

    def refuse(*arguments: object) -> None:
        raise ValueError("too large")

    warnings: list[str] = []
    tracker = make_tracker(params.model_copy(update={"judge_traces": 1.0}), outbox=outbox, warn=warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr(TracingClient, "log_spans", refuse)
        tracker.start("run", {}, {})
        tracker.trace(call(0))
        tracker.stage("score_prm", 0, manifest("score_prm", 0, metrics={"calls": 1.0}))
        tracker.stage("train", 0, manifest("train", 0, metrics={"loss": 0.5}))
        tracker.finish("FINISHED", {})
    [journal] = outbox.glob("*.jsonl")
    told = f"MLflow did not record traces: too large; it waits in {journal}, and `papo track sync` tries it again"
    assert warnings == [told, f"1 records wait in {journal}; `papo track sync` delivers them"]
    [parent], children = runs(client, params)
    assert (parent.info.status, children["score_prm"].data.metrics["calls"]) == ("FINISHED", 1.0)
    assert parent.data.metrics == {"score_prm/calls": 1.0, "train/loss": 0.5}

    [result] = sync([outbox], params, to=None, experiment=None, say=no_warning, progress=lambda *line: None)
    assert (result.delivered, result.waiting, result.why) == (1, 0, "")
    [trace] = traces(client, runs(client, params)[0][0])
    assert len(trace.data.spans) == 1
    assert not list(outbox.iterdir())


def test_warnings_are_given_in_the_thread_of_the_run(outbox: Path, files: Path) -> None:
    threads: set[int] = set()
    use(background(Recorder(fails="stage"), outbox, lambda message: threads.add(threading.get_ident())), files)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("hangs", ["start", "policy"])
def test_a_backend_that_never_answers_does_not_hold_the_end_of_a_run(outbox: Path, files: Path, hangs: str) -> None:
    warnings: list[str] = []
    recorder = Recorder(hangs=hangs)
    began = time.monotonic()
    use(background(recorder, outbox, warnings.append, connect=0.2, patience=0.2), files)
    assert time.monotonic() - began < 5
    left = {"start": 9, "policy": 5}[hangs]
    assert [warning.split(" in ")[0] for warning in warnings] == [f"{left} records wait"]
    recorder.released.set()


def test_an_unreachable_server_only_warns(outbox: Path, files: Path) -> None:
    warnings: list[str] = []
    tracker = make_tracker(TrackingParams(uri="http://127.0.0.1:9"), outbox=outbox, warn=warnings.append)
    began = time.monotonic()
    use(tracker, files)
    assert time.monotonic() - began < 20
    refused = f"[Errno {errno.ECONNREFUSED}] Connection refused"
    assert warnings[0].startswith(f"MLflow is unreachable at http://127.0.0.1:9: {refused}; the run goes on")
    [journal] = outbox.glob("*.jsonl")
    assert warnings[1:] == [f"9 records wait in {journal}; `papo track sync` delivers them"]
    assert tracker.link() == warnings[1]


def test_a_database_that_cannot_be_made_only_warns(tmp_path: Path, outbox: Path, files: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    warnings: list[str] = []
    use(make_tracker(TrackingParams(uri=uri), outbox=outbox, warn=warnings.append), files)
    assert len(warnings) == 2
    assert "the run goes on" in warnings[0]


@pytest.mark.parametrize("broken", ["folder", "full"])
def test_an_outbox_that_cannot_be_written_is_told_once_and_what_mlflow_takes_is_recorded(
    tmp_path: Path, files: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = tmp_path / "place/outbox"
    if broken == "folder":
        (tmp_path / "place").write_text("a file")
    else:
        monkeypatch.setattr("papo.engines.tracking.outbox.OUTBOX_BYTES", 500)
    warnings: list[str] = []
    recorder = Recorder()
    use(background(recorder, outbox, warnings.append), files)
    assert recorder.calls == ["open", *EVERYTHING]
    [warning] = warnings
    assert "cannot be written" in warning
    assert "the run goes on" in warning
    recorder = Recorder(fails="open", gone=True)
    use(background(recorder, outbox, warnings.append), files)
    assert "records of this run are lost" in "".join(warnings)


def test_disabled_tracking_is_silent(outbox: Path, tmp_path: Path) -> None:
    tracker = make_tracker(TrackingParams(enabled=False), outbox=outbox, warn=no_warning)
    use(tracker, tmp_path)
    assert isinstance(tracker, NullTracker)
    assert tracker.link() is None


@pytest.fixture
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)


@pytest.mark.usefixtures("without_mlflow")
def test_missing_mlflow_is_told_with_what_to_do(outbox: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = make_tracker(TrackingParams(), outbox=outbox, warn=warnings.append)
    use(tracker, tmp_path)
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
        ("postgresql://db/mlflow?user=papo&password=pw", "postgresql://db/mlflow?user=papo&password=***"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
