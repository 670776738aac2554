"""Scoring by Ray: on a cluster of two nodes the scores are those of one process, whoever dies meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forks import with_tests
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from spreading import Waiting, verify

from flows.pipeline import train_eval
from flows.spread import open_spread
from papo.engines.protocols import Verdict, VerifyItem
from papo.engines.verifiers import make_verifier
from papo.errors import PapoError, ServerDownError, SetupError
from papo.params import RayParams, ScoreOrmParams
from papo.schemas import Grading
from papo.store.files import digest
from papo.store.manifest import Manifest

ROOT = Path(__file__).parents[2]
MEGABYTES = 2**20


def opened(address: str) -> None:
    with open_spread(RayParams(address=address)):
        pass


# ---- without a cluster ----


def test_ray_is_imported_in_one_file_and_only_when_it_is_asked_for() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("papo", "flows")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) (ray|prefect_ray)\b", path.read_text(), re.MULTILINE)
    ]
    assert found == ["flows/spread.py"]
    code = "import sys, flows.spread; print('ray' in sys.modules, 'prefect_ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


def test_without_a_cluster_in_the_params_nothing_is_spread() -> None:
    with open_spread(None) as spread:
        assert spread is None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:99999"])
def test_a_head_that_does_not_answer_is_told_with_its_address_at_the_start(address: str) -> None:
    with pytest.raises(ServerDownError, match="no Ray head answers") as caught:
        opened(address)
    assert caught.value.where == f"run.ray.address = {address}"
    assert "ray start --head" in caught.value.fix


@pytest.mark.parametrize(
    ("raised", "error", "what"),
    [
        (ConnectionError("Could not find any running Ray instance."), ServerDownError, "there is no Ray cluster"),
        (RuntimeError("Version mismatch: Ray: 2.59.0\n Python: 3.12.1"), SetupError, r"Python: 3\.12\.1"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told(
    raised: Exception, error: type[PapoError], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: object, **__: object) -> None:
        raise raised

    import ray

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(error, match=what) as caught:
        opened("auto")
    assert caught.value.where == "run.ray.address = auto"
    assert caught.value.fix


def test_a_missing_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SetupError, match="needs Ray") as caught:
        opened("local")
    assert caught.value.fix == "pip install 'papo[ray]'"


# ---- a cluster of two nodes on this machine ----


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with one CPU each, and a driver for as long as the module lasts."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", with_tests()["PYTHONPATH"])  # where a node finds `spreading`
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        from ray.cluster_utils import Cluster

        # Without the parts of a dashboard that nobody looks at: a raylet ends itself when their start takes more than 15 s.
        patch.setattr("ray._private.utils.get_dashboard_dependency_error", lambda: ImportError("not wanted"))
        node = {"num_cpus": 1, "object_store_memory": 80 * MEGABYTES, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(**node)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            import ray

            ray.shutdown()
            cluster.shutdown()


def verified(cluster: Any, verifier: Any, items: list[VerifyItem]) -> tuple[list[Verdict], list[int]]:
    """Verdicts and the steps of the progress, of a flow that verifies by the cluster, an item a chunk."""
    found: tuple[list[Verdict], list[int]] = verify(cluster.address, verifier, items)
    return found


@pytest.mark.ops
def test_a_run_scored_by_ray_is_the_run_of_one_process(cluster: Any, checkout: Path, server: str) -> None:
    ray = f"run.ray={{address: '{cluster.address}', chunk: 1}}"
    alone = train_eval(variant="prm", workspace="alone", dvc=False, overrides=("run.overlap=false",))
    state = train_eval(variant="prm", workspace="spread", dvc=False, overrides=(ray,), return_state=True)
    spread = state.result()
    assert spread.evaluation == alone.evaluation
    tables = ("orm.parquet", "prm.parquet", "advantages.parquet", "policy")
    for path in (f"artifacts/rounds/0/{name}" for name in tables):
        one, other = (checkout / name / path for name in ("alone", "spread"))
        assert digest(one) == digest(other), path
        first, second = Manifest.read(one), Manifest.read(other)
        assert (first.identity, first.versions) == (second.identity, second.versions)
    again = train_eval(variant="prm", workspace="spread", dvc=False)
    assert again.ran == 0  # where it is scored makes nothing be done again

    def tasks() -> set[str]:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        with get_client(sync_client=True) as client:
            return {run.name for run in client.read_task_runs(flow_run_filter=chosen, limit=200)}

    deadline = time.monotonic() + 60
    while not {"verify 0", "judge 0"} <= tasks() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert {"verify 0", "judge 0", "score_orm 0"} <= tasks()  # the chunks are tasks of the flow run


@pytest.mark.ops
def test_what_the_sandbox_of_a_node_lacks_is_that_error_and_no_wall_of_text(cluster: Any, server: str) -> None:
    absent = next((name for name in ("docker", "podman") if shutil.which(name) is None), None)
    if absent is None:
        pytest.skip("both docker and podman are installed: no sandbox is lacking")
    without = ScoreOrmParams.model_validate({"sandbox": {"runtime": absent, "image": "none"}})
    items = [VerifyItem("assert f(1) == 1", "```python\ndef f(x): return x\n```", Grading(kind="code"))]
    with pytest.raises(SetupError, match=f"{absent} is not installed") as caught:
        verified(cluster, partial(make_verifier, without), items)
    assert "PATH, on the machine" in caught.value.where
    assert "Traceback" not in str(caught.value)


@pytest.mark.ops
def test_a_node_with_another_version_is_refused_at_the_start(
    cluster: Any, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.spread.metadata", SimpleNamespace(version=lambda name: "0.0"))  # here, not on the nodes
    with pytest.raises(SetupError, match=r"has math-verify [1-9.0]+ for 0\.0") as caught:
        verified(cluster, partial(make_verifier, ScoreOrmParams()), [])
    assert "requirements.lock" in caught.value.fix


ITEMS = [VerifyItem(str(n), str(n - n % 3)) for n in range(6)]
VERDICTS = [Verdict(float(n % 3 == 0), str(n - n % 3), "ok") for n in range(6)]


@pytest.mark.ops
@pytest.mark.parametrize("killed", ["worker", "node"])
def test_a_killed_worker_or_node_changes_nothing(killed: str, cluster: Any, server: str, tmp_path: Path) -> None:
    """Last, as the second node is gone then."""
    (second,), ended = cluster.worker_nodes, threading.Event()

    def begun() -> list[list[str]]:
        return [path.name.split() for path in tmp_path.iterdir() if " " in path.name]

    def kill() -> str:
        deadline = time.monotonic() + 120
        while not (there := [name for name in begun() if name[2] == second.node_id]):
            assert not ended.wait(0.1), "the second node was given nothing"
            assert time.monotonic() < deadline, "the second node was given nothing"
        if killed == "worker":
            os.kill(int(there[0][1]), signal.SIGKILL)
        else:
            cluster.remove_node(second, allow_graceful=False)
        (tmp_path / "go").touch()
        return there[0][0]

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        try:
            verdicts, done = verified(cluster, partial(Waiting, tmp_path), ITEMS)
        finally:
            ended.set()
        lost = killing.result()
    assert verdicts == VERDICTS
    assert done == [1] * len(ITEMS)  # none counted twice
    assert len([name for name in begun() if name[0] == lost]) == 2  # begun again, in another process
    assert len(begun()) == len(ITEMS) + 1
