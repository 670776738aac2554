"""The embedded default really learns, on two seeds; a gamed judge makes PRM collapse and leaves PAPO standing.

And in a second world, of programs, the readability of those that pass rises where the judge of readability is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkout import Checkout
from sandboxes import sandboxed

from papo.core.alarms import fired

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The default run, as `make demo` makes it but for the flow around it."""
    checkout = Checkout(tmp_path_factory.mktemp("learning"))
    checkout.papo("run", "--no-dvc", "--set", "tracking.enabled=false")
    return checkout


def evaluation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "artifacts/evaluation/metrics.json").read_text())["sums-in-range"]
    return content


def history(folder: Path) -> list[dict[str, float]]:
    rounds = sorted((folder / "artifacts/rounds").iterdir(), key=lambda path: int(path.name))
    return [json.loads((path / "advantages.manifest.json").read_text())["metrics"] for path in rounds]


def signals(folder: Path, name: str) -> list[float]:
    return [row[name] for row in history(folder)]


def beside(checkout: Checkout, name: str, *overrides: str) -> Path:
    """A run in a folder of its own, which shares the problems and the warm start."""
    settings = [part for override in ("tracking.enabled=false", *overrides) for part in ("--set", override)]
    checkout.papo("run", "--workspace", f"runs/{name}", *settings)
    return checkout.folder / "runs" / name


def test_the_warm_start_has_room_to_grow(trained: Checkout) -> None:
    assert 0.40 <= evaluation(trained.folder)["warmstart"]["avg_at_k"]["value"] <= 0.60


def test_papo_learns_on_the_default_seed(trained: Checkout) -> None:
    assert evaluation(trained.folder)["gain"]["value"] >= 0.15
    assert fired(history(trained.folder)) == []


def test_papo_learns_on_another_seed(trained: Checkout) -> None:
    run = beside(trained, "seed1", "run.seed=1")
    assert evaluation(run)["gain"]["value"] >= 0.15
    assert fired(history(run)) == []


def test_updates_clip_against_the_behaviour_policy(trained: Checkout) -> None:
    for path in (trained.folder / "artifacts/rounds").iterdir():
        steps = json.loads((path / "policy.manifest.json").read_text())["history"]
        assert steps[0]["ratio_min"] == pytest.approx(1, abs=1e-4)
        assert steps[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    clipped = [
        step["clipped_low_share"] + step["clipped_high_share"]
        for path in (trained.folder / "artifacts/rounds").iterdir()
        for step in json.loads((path / "policy.manifest.json").read_text())["history"][1:]
    ]
    assert max(clipped) > 0


def test_prm_alone_collapses_under_a_gullible_judge(trained: Checkout) -> None:
    run = beside(trained, "prm", "score_prm.judge=steps-gullible", "advantage.variant=prm")
    accuracy, judge = signals(run, "accuracy"), signals(run, "prm_mean")
    assert accuracy[-1] < max(accuracy) / 3
    assert judge[-1] > 0.9
    half_lost = next(at for at, value in enumerate(accuracy) if value < max(accuracy[: at + 1]) / 2)
    assert min(alarm.round for alarm in fired(history(run)) if alarm.name == "reward_hacking") <= half_lost - 2
    assert evaluation(run)["final"]["avg_at_k"]["value"] < evaluation(run)["warmstart"]["avg_at_k"]["value"] / 3


def test_papo_does_not_collapse_under_the_same_judge(trained: Checkout) -> None:
    run = beside(trained, "papo", "score_prm.judge=steps-gullible", "advantage.variant=papo")
    accuracy = signals(run, "accuracy")
    assert accuracy[-1] > max(accuracy) / 2
    assert evaluation(run)["gain"]["value"] > 0
    assert fired(history(run)) == []


# Less of a warm start and fewer rounds: enough to see the direction.
SHORT = [
    "run.rounds=5",
    "warmstart.steps=600",
    "prepare.programs.traces=10000",
    "evaluate={benchmarks: [programs-in-range], samples_per_problem: 2}",
]


@sandboxed
def test_programs_that_pass_become_readable_and_no_fewer_pass(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    settings = [part for override in ("tracking.enabled=false", *SHORT) for part in ("--set", override)]
    checkout.papo("run", "--preset", "programs", "--workspace", "runs/programs", *settings)
    run = tmp_path / "runs/programs"
    accuracy, readable = signals(run, "accuracy"), signals(run, "prm_mean_correct")
    assert 0.2 < accuracy[0] < 0.75
    assert readable[0] < 0.7
    assert readable[-1] > readable[0] + 0.1
    assert min(accuracy[-2:]) > accuracy[0] - 0.1
    metrics = json.loads((run / "artifacts/evaluation/metrics.json").read_text())["programs-in-range"]
    assert metrics["gain"]["value"] > -0.05
    assert fired(history(run)) == []
