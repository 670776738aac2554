"""Every variant's signals on real groups of four responses to 1,319 problems."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = ROOT.parent / "shared/data/gsm8k_sampled_G4.jsonl"

pytestmark = pytest.mark.skipif(not GROUPS.is_file(), reason="the real groups are not beside this checkout")


@pytest.fixture(scope="module")
def found() -> Any:
    spec = importlib.util.spec_from_file_location("signals_by_variant", ROOT / "tests/benchmarks/signals_by_variant.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.signals_of(GROUPS)


def test_the_outcome_alone_is_silent_in_every_group_that_is_not_mixed(found: Any) -> None:
    assert found["orm"]["groups"] == 1319
    assert found["orm"]["zero_advantage_share"] == pytest.approx(1 - 731 / 1319)
    assert found["orm"]["process_advantage_share"] == 0
    assert "prm_mean" not in found["orm"]


@pytest.mark.parametrize("variant", ["papo", "fullnorm", "convex", "gdpo", "capo"])
def test_the_process_score_wakes_all_correct_groups(found: Any, variant: str) -> None:
    assert found[variant]["zero_advantage_share_all_correct"] < found["orm"]["zero_advantage_share_all_correct"]


def test_papo_leaves_all_wrong_groups_alone_and_keeps_the_order(found: Any) -> None:
    papo, orm = found["papo"], found["orm"]
    assert papo["zero_advantage_share_all_wrong"] == orm["zero_advantage_share_all_wrong"]
    assert papo["inversions"] == 0  # lam = 1 is below lam_max of groups of 4, 1.73
    assert papo["advantage_mean_correct"] == pytest.approx(orm["advantage_mean_correct"])  # A_proc sums to 0 over C
    assert found["prm"]["inversions"] > 0


def test_what_is_measured_on_the_responses_is_the_same_for_all(found: Any) -> None:
    for name in ("accuracy", "length_mean", "verification_share", "groups_two_correct_share"):
        assert len({signals[name] for signals in found.values()}) == 1
    assert all(0.03 < found[v]["judge_failure_share"] < 0.07 for v in found if v != "orm")
