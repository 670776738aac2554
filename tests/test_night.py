"""What a lab finds in the morning after everything went wrong in the night."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from night import COLLAPSED, Night, night, queue
from servers.postgres import needs_postgres

from papo.pipeline import ROUND_STAGES, STAGES
from papo.store.layout import manifest_path

pytestmark = [pytest.mark.ops, pytest.mark.timeout(2400), needs_postgres]

FACTS = ("seconds", "rows")
"""Of the manifest itself; training has a metric of the first name, too, which gives way to it."""

FINE = [run["workspace"] for run in queue() if run["workspace"] != COLLAPSED]


@pytest.fixture(scope="module")
def morning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    with night(tmp_path_factory.mktemp("night")) as happened:
        happened.checkout.papo("track", "sync", "--all")
        yield happened


def test_every_run_ends_as_it_should(morning: Night) -> None:
    assert len(FINE) == 9
    assert {name: morning.run(name)["state"]["name"] for name in FINE} == dict.fromkeys(FINE, "Completed"), (
        morning.course
    )
    stopped = morning.run(COLLAPSED)["state"]
    assert (stopped["type"], stopped["name"]) == ("FAILED", "Stopped by alarm")
    assert "collapse" in stopped["message"]


def test_the_run_of_the_killed_worker_was_begun_again(morning: Night) -> None:
    assert any(run["run_count"] > 1 for run in morning.runs), morning.course


def test_the_stopped_run_has_its_last_good_checkpoint(morning: Night) -> None:
    root = morning.checkout.folder / COLLAPSED
    kept = json.loads((root / "artifacts/last_good.json").read_text())
    assert (root / kept["folder"] / "model.safetensors").is_file()
    assert not (root / "artifacts/report/index.html").exists()


def test_dvc_has_nothing_to_say(morning: Night) -> None:
    assert "up to date" in morning.checkout.dvc("status").stdout


def test_no_run_holds_its_workspace_and_nothing_is_under_way(morning: Night) -> None:
    for name in FINE:
        work = morning.checkout.folder / name / ".papo"
        assert not (work / "lock.json").exists()
        assert not list((work / "work").glob("*")), name


def test_mlflow_has_each_run_once_and_each_point_once(morning: Night) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(morning.mlflow)
    experiment = client.get_experiment_by_name("papo")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in found if run.data.tags["papo.kind"] == "run"]
    children = [run for run in found if run.data.tags["papo.kind"] == "stage"]
    by_workspace = Counter(Path(run.data.tags["papo.workspace"]) for run in parents)
    assert by_workspace == Counter((morning.checkout.folder / run["workspace"]).resolve() for run in queue())
    for parent in parents:
        root = Path(parent.data.tags["papo.workspace"])
        stopped = root == (morning.checkout.folder / COLLAPSED).resolve()
        assert parent.info.status == ("FAILED" if stopped else "FINISHED")
        mine = [run for run in children if run.data.tags["mlflow.parentRunId"] == parent.info.run_id]
        stages = [run.info.run_name for run in mine]
        assert len(stages) == len(set(stages))
        assert stopped or set(stages) == set(STAGES)
        for run in mine:
            assert _points(client, run) == _expected(root, run.info.run_name), (root, run.info.run_name)


def _points(client: Any, run: Any) -> Counter[tuple[str, int, float]]:
    """Those of a stage's own metrics, by round."""
    return Counter(
        (point.key, point.step, point.value)
        for key in run.data.metrics
        if not key.startswith(("steps/", "alarm", "counts/")) and key not in FACTS
        for point in client.get_metric_history(run.info.run_id, key)
    )


def _expected(root: Path, stage: str) -> Counter[tuple[str, int, float]]:
    """What the manifests in the workspace say."""
    if stage in ROUND_STAGES:
        names = {
            "rollout": "rollouts",
            "score_orm": "orm",
            "score_prm": "prm",
            "advantage": "advantages",
            "train": "policy",
        }
        outputs = [path / names[stage] for path in (root / "artifacts/rounds").iterdir()]
    else:
        outputs = [
            root
            / {"prepare": "data/problems", "evaluate": "artifacts/evaluation/metrics.json"}.get(
                stage, f"artifacts/{stage}"
            )
        ]
    expected: Counter[tuple[str, int, float]] = Counter()
    for output in outputs:
        if manifest_path(output).exists():
            manifest = json.loads(manifest_path(output).read_text())
            for key, value in manifest["metrics"].items():
                if key not in FACTS:
                    expected[(key, manifest["round"] or 0, value)] += 1
    return expected
