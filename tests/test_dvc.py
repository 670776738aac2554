"""The same stages by `dvc repro` and by `papo run`, over the same files: after either, the other has nothing to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import TINY, Checkout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout that `dvc repro` has built from nothing."""
    checkout = Checkout(tmp_path_factory.mktemp("dvc"), params=TINY)
    done = checkout.dvc("repro")
    assert ran(done) == [
        "prepare", "warmstart",
        *(f"{stage}@{k}" for k in range(2) for stage in ("rollout", "score_orm", "score_prm", "advantage", "train")),
        "evaluate", "report",
    ]  # fmt: skip
    return checkout


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", done.stdout)


def test_a_second_repro_runs_nothing(built: Checkout) -> None:
    assert ran(built.dvc("repro")) == []
    assert "up to date" in built.dvc("status").stdout


def test_papo_run_skips_what_dvc_has_made(built: Checkout) -> None:
    done = built.papo("run")
    assert "0 steps ran, 14 had been done before" in done.stdout
    assert "up to date" in built.dvc("status").stdout


def test_a_new_lam_leaves_data_warm_start_and_the_scores_of_round_0_alone(built: Checkout) -> None:
    built.set_params({"advantage": {"lam": 0.25}})
    done = ran(built.dvc("repro"))
    assert not {"prepare", "warmstart", "rollout@0", "score_orm@0", "score_prm@0"} & set(done)
    assert done[0] == "advantage@0"


def test_dvc_repro_runs_nothing_after_papo_run(built: Checkout) -> None:
    built.set_params({"run": {"seed": 7}})
    done = built.papo("run")
    assert "recorded: `dvc status` is clean" in done.stdout
    assert "up to date" in built.dvc("status").stdout
    assert ran(built.dvc("repro")) == []


def test_metrics_params_and_plots_say_something(built: Checkout) -> None:
    metrics = json.loads(built.dvc("metrics", "show", "--json").stdout)
    shown = metrics[""]["data"]["artifacts/report/summary.json"]["data"]
    assert 0 <= shown["sums-in-range/accuracy"] <= 1
    assert "seed" in built.dvc("params", "diff").stdout
    built.dvc("plots", "show", "--out", "plots")
    page = (built.folder / "plots/index.html").read_text()
    for name in ("accuracy", "zero_advantage_share", "length_p95"):
        assert name in page


def test_a_remote_is_one_command_away(built: Checkout, tmp_path: Path) -> None:
    built.dvc("remote", "add", "-d", "store", str(tmp_path / "store"))
    built.dvc("push")
    before = (built.folder / "artifacts/rounds/1/rollouts.parquet").read_bytes()
    built.run("rm", "-rf", "artifacts", "data", ".dvc/cache")
    built.dvc("pull")
    assert (built.folder / "artifacts/rounds/1/rollouts.parquet").read_bytes() == before
    assert "0 steps ran" in built.papo("run").stdout


def test_more_rounds_than_dvc_yaml_has_are_named(built: Checkout) -> None:
    path = built.folder / "params.yaml"
    path.write_text(path.read_text().replace("rounds: 2", "rounds: 3"))
    done = built.papo("dvc", "--check", ok=False)
    assert done.returncode == 2
    assert "papo dvc" in done.stderr
    done = built.dvc("repro", "evaluate", ok=False)
    assert done.returncode != 0
    assert "papo dvc" in done.stderr + done.stdout


def test_a_run_while_another_holds_the_checkout_says_so(built: Checkout) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib\n"
         "from papo.store.layout import Workspace\nfrom papo.store.lock import exclusive\n"
         "with exclusive(Workspace(pathlib.Path())):\n print('held', flush=True); sys.stdin.read()"],
        cwd=built.folder, env=built.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        done = built.papo("advantage", "--round", "0", ok=False)
        assert done.returncode == 2
        assert f"process {other.pid}" in done.stderr
    finally:
        other.communicate("", timeout=30)
    assert (built.folder / "artifacts/rounds/0/advantages.parquet").exists()
