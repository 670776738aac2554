"""The list of steps, and what is said where a step cannot run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from papo.errors import MissingInputError, ParamsError
from papo.params import load_params
from papo.pipeline import CODE, ROUND_STAGES, STAGES, Step, run_step, steps
from papo.store.layout import Workspace
from papo.store.manifest import Context

ROOT = Path(__file__).parents[1]


def test_the_steps_of_a_run_in_order() -> None:
    params = load_params(ROOT / "params.yaml", overrides=["run.rounds=2"])
    assert [str(step) for step in steps(params)] == [
        "prepare", "warmstart",
        "rollout 0", "score_orm 0", "score_prm 0", "advantage 0", "train 0",
        "rollout 1", "score_orm 1", "score_prm 1", "advantage 1", "train 1",
        "evaluate", "report",
    ]  # fmt: skip


def test_a_step_knows_its_command() -> None:
    assert Step("score_orm", 3).command == "papo score-orm --round 3"
    assert Step("prepare").command == "papo prepare"


def test_every_stage_has_its_code() -> None:
    assert set(CODE) == set(STAGES)
    assert all(f"stages/{stage}.py" in code for stage, code in CODE.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_round_is_needed_exactly_where_there_are_rounds(stage: str, checkout: Path) -> None:
    wrong = Step(stage) if stage in ROUND_STAGES else Step(stage, 0)
    message = "needs --round" if stage in ROUND_STAGES else "takes no --round"
    with pytest.raises(ParamsError, match=f"{stage} {message}"):
        run_step(wrong, load_params(), Workspace(checkout), Context())


@pytest.mark.parametrize("round_", [-1, 1, 100])
def test_only_rounds_of_the_run(round_: int, checkout: Path) -> None:
    with pytest.raises(ParamsError, match=f"there is no round {round_}: run.rounds is 1") as caught:
        run_step(Step("rollout", round_), load_params(), Workspace(checkout), Context())
    assert "use 0 to 0" in caught.value.fix


LOST: dict[str, tuple[Step, str]] = {
    "data/problems/traces.parquet": (Step("warmstart"), "papo prepare"),
    "data/problems/train.parquet": (Step("rollout", 0), "papo prepare"),
    "artifacts/warmstart": (Step("rollout", 0), "papo warmstart"),
    "artifacts/rounds/0/rollouts.parquet": (Step("score_orm", 0), "papo rollout --round 0"),
    "artifacts/rounds/0/orm.parquet": (Step("score_prm", 0), "papo score-orm --round 0"),
    "artifacts/rounds/0/prm.parquet": (Step("advantage", 0), "papo score-prm --round 0"),
    "artifacts/rounds/0/advantages.parquet": (Step("train", 0), "papo advantage --round 0"),
    "artifacts/rounds/0/policy": (Step("evaluate"), "papo train --round 0"),
    "data/problems/eval/sums-hard.parquet": (Step("evaluate"), "papo prepare"),
    "artifacts/rounds/0/advantages.manifest.json": (Step("report"), "papo advantage --round 0"),
    "artifacts/rounds/0/policy.manifest.json": (Step("report"), "papo train --round 0"),
    "artifacts/evaluation/metrics.json": (Step("report"), "papo evaluate"),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_missing_input_names_the_command_that_makes_it(
    lost: str, tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_copy()
    monkeypatch.chdir(folder)
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    step, command = LOST[lost]
    with pytest.raises(MissingInputError) as caught:
        run_step(step, load_params(), Workspace(Path()), Context())
    assert caught.value.where == lost
    assert f"run `{command}` first" in caught.value.fix


@pytest.mark.parametrize("round_", [1, 2])
def test_the_next_round_needs_the_policy_of_the_one_before(
    round_: int, tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_copy())
    params = load_params(overrides=["run.rounds=3"])
    if round_ == 1:
        shutil.rmtree("artifacts/rounds/0/policy")
    with pytest.raises(MissingInputError) as caught:
        run_step(Step("rollout", round_), params, Workspace(Path()), Context())
    assert f"`papo train --round {round_ - 1}`" in caught.value.fix
