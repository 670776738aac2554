"""dvc.yaml says what the stages depend on and make, no less and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from papo.dvcfile import PARAMS, PLOTS, render
from papo.params import UNDECIDING, Params, load_params
from papo.pipeline import CODE, ROUND_STAGES, STAGES
from papo.stages.report import PLOTTED
from papo.store.layout import Workspace

ROOT = Path(__file__).parents[1]
DEFAULT = load_params(ROOT / "params.yaml")


def stages(params: Params = DEFAULT) -> dict[str, Any]:
    """Stage -> its definition, of dvc.yaml."""
    written = yaml.safe_load(render(params))["stages"]
    return {name: stage.get("do", stage) for name, stage in written.items()}


def test_the_committed_file_is_that_of_the_committed_params() -> None:
    assert (ROOT / "dvc.yaml").read_text() == render(DEFAULT), "run `papo dvc`"


def test_every_stage_is_there_in_order() -> None:
    assert tuple(stages()) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_code(stage: str) -> None:
    code = {dep for dep in stages()[stage]["deps"] if dep.startswith("papo/")}
    named = set().union(*CODE.values()) if stage == "report" else set(CODE[stage])  # the report names the lineage
    assert code == {f"papo/{path}" for path in named}
    assert all((ROOT / dep).exists() for dep in code)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_params_that_exist(stage: str) -> None:
    assert stages()[stage]["params"] == PARAMS[stage]
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key in PARAMS[stage]:
        value: Any = DEFAULT
        written: Any = committed
        for part in key.split("."):
            value = getattr(value, part)
            assert part in written, f"DVC looks for {key} in params.yaml"
            written = written[part]
        assert value is not None


def test_a_stage_depends_on_its_own_section() -> None:
    assert all(stage in keys for stage, keys in PARAMS.items())
    assert not any(key.startswith(UNDECIDING) for keys in PARAMS.values() for key in keys)


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_is_that_of_the_stage(stage: str) -> None:
    rounds = " --round ${item.k}" if stage in ROUND_STAGES else ""
    assert stages()[stage]["cmd"] == f"papo {stage.replace('_', '-')}{rounds}"


def test_what_a_stage_needs_another_makes() -> None:
    """Every file that is a dependency is an output, or lies in one, or holds some."""
    made = [Path(out) for stage in stages().values() for out in stage["outs"]]
    made.append(Path("${item.policy}"))
    made.append(Path("${item.state}"))
    for name, stage in stages().items():
        for dep in stage["deps"]:
            path = Path(dep)
            concrete = [path, Path(re.sub(r"/\d+/", "/${item.k}/", dep))]
            assert dep.startswith("papo/") or any(
                one.is_relative_to(out) or out.is_relative_to(one) for one in concrete for out in made
            ), f"{name} needs {dep}"


def test_rounds_hand_on_policy_and_optimizer_state() -> None:
    params = load_params(ROOT / "params.yaml", overrides=["run.rounds=3"])
    (variables,) = yaml.safe_load(render(params))["vars"]
    here = Workspace(Path())
    assert [item["k"] for item in variables["rounds"]] == [0, 1, 2]
    assert [item["policy"] for item in variables["rounds"]] == [str(here.policy(k - 1)) for k in range(3)]
    assert [item["state"] for item in variables["rounds"][1:]] == [str(here.trainer(k - 1)) for k in (1, 2)]


def test_evaluation_depends_on_the_policies_it_evaluates() -> None:
    params = load_params(ROOT / "params.yaml", overrides=["run.rounds=6", "evaluate.every=2"])
    deps = stages(params)["evaluate"]["deps"]
    policies = [dep for dep in deps if dep.startswith("artifacts/")]
    assert policies == ["artifacts/warmstart", *(f"artifacts/rounds/{k}/policy" for k in (1, 3, 5))]


def test_the_plots_name_columns_that_the_report_always_writes() -> None:
    assert {column for columns in PLOTS.values() for column in columns} <= set(PLOTTED)


def test_rollouts_that_are_kept_by_their_advantage_depend_on_what_decides_it() -> None:
    rollout = DEFAULT.rollout.model_copy(update={"max_prompts": 96})
    found = stages(DEFAULT.model_copy(update={"rollout": rollout}))["rollout"]
    others = ("score_orm", "score_prm", "advantage")
    assert {f"papo/{path}" for stage in others for path in CODE[stage]} < set(found["deps"])
    assert {*PARAMS["rollout"], *others, "advantage.variant"} == set(found["params"])
    assert set(stages()["rollout"]["params"]) == set(PARAMS["rollout"])
