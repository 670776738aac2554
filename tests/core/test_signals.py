"""The signals of a round on a batch small enough to count by hand."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from papo.core.advantages import Advantages, compute_advantages
from papo.core.signals import STATUSES, round_signals, verification_flags
from papo.errors import DataError
from papo.schemas import PRM_STATUSES

NAN = math.nan

# a: two right, one of them weak; b: all right, alike; c: all wrong; d: one right, one unknown.
BATCH: dict[str, Any] = {
    "group_ids": ["a"] * 4 + ["b"] * 2 + ["c"] * 2 + ["d"] * 2,
    "orm_scores": [1, 1, 0, 0, 1, 1, 0, 0, 1, NAN],
    "prm_scores": [1, 0, NAN, NAN, 0.5, 0.5, NAN, NAN, NAN, NAN],
    "completion_lengths": [30, 10, 100, 20, 10, 20, 10, 10, 10, 80],
    "truncated": [0, 0, 1, 0, 0, 0, 0, 0, 0, 1],
    "prm_statuses": [
        "ok",
        "ok",
        "not_asked",
        "not_asked",
        "ok",
        "ok",
        "not_asked",
        "not_asked",
        "timeout",
        "not_asked",
    ],
}


def signals(lam: float = 1.0, variant: str = "papo", **change: Any) -> dict[str, float]:
    batch = BATCH | change
    scores = (batch["orm_scores"], batch["prm_scores"], batch["group_ids"])
    return round_signals(
        **{"advantages": compute_advantages(*scores, variant=variant, lam=lam), "variant": variant, "lam": lam, **batch}
    )


def test_every_signal_by_hand() -> None:
    out, proc = math.sqrt(0.75), math.sqrt(0.5)
    expected = {
        "responses": 10,
        "groups": 4,
        "lam": 1,
        "accuracy": 5 / 9,
        "outcome_missing_share": 0.1,
        "zero_advantage_share": 0.6,
        "zero_advantage_share_all_correct": 0.4,  # b, and d whose other response is unknown
        "zero_advantage_share_all_wrong": 0.2,
        "zero_advantage_share_other": 0.0,
        "groups_two_correct_share": 0.5,
        "groups_process_active_share": 0.25,
        "advantage_mean_correct": 2 * out / 5,
        "advantage_min_correct": 0.0,
        "advantage_mean_wrong": -out / 2,
        "advantage_min_wrong": -out,
        "negative_correct_share": 0.0,
        "outcome_alignment": 1.0,
        "inversions": 0,
        "outcome_advantage_share": 4 * out / (4 * out + 2 * proc),
        "process_advantage_share": 2 * proc / (4 * out + 2 * proc),
        "lam_max": math.sqrt(3),
        "lam_max_exceeded": 0,
        "prm_mean": 0.5,
        "prm_mean_correct": 0.5,
        "prm_correct_0": 0.25,
        "prm_correct_half": 0.5,
        "prm_correct_1": 0.25,
        "judge_failure_share": 0.2,
        "judge_failure_share_timeout": 0.2,
        "judge_failure_share_refused": 0,
        "judge_failure_share_unparsable": 0,
        "judge_failure_share_error": 0,
        "judge_failure_share_too_long": 0.0,
        "judge_failure_share_rate_limited": 0.0,
        "length_mean": 30,
        "length_p95": 91,
        "length_max": 100,
        "truncated_share": 0.2,
        "length_prm_correlation": 200 / math.sqrt(2 * 100 + 2 * 25) / math.sqrt(0.5) / 20,
        "verification_share": 0.3,
        "verification_share_correct": 0.4,
    }
    found = signals(verification=np.array([1, 1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=bool))
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in found.values())


def test_too_large_a_lam_shows() -> None:
    orm, prm = [1] * 6 + [0] * 2, [1, 1, 1, 1, 1, 0, NAN, NAN]
    found = round_signals(
        orm_scores=orm,
        prm_scores=prm,
        group_ids=[7] * 8,
        advantages=compute_advantages(orm, prm, [7] * 8, lam=2.0),
        completion_lengths=[5] * 8,
        truncated=[False] * 8,
        prm_statuses=["ok"] * 6 + ["not_asked"] * 2,
        lam=2.0,
    )
    assert found["lam_max"] == pytest.approx(1.058, abs=1e-3)
    assert (found["lam_max_exceeded"], found["inversions"], found["negative_correct_share"]) == (1, 1, 1 / 6)
    assert "length_prm_correlation" not in found  # all lengths are alike


def penalised(given: list[float], **change: Any) -> dict[str, float]:
    """Right, right, wrong, wrong, by `orm` with these penalties."""
    orm, without, ids = [1, 1, 0, 0], [NAN] * 4, [0] * 4
    free = compute_advantages(orm, without, ids, variant="orm")
    return round_signals(
        orm_scores=orm,
        prm_scores=without,
        group_ids=ids,
        advantages=compute_advantages(orm, without, ids, variant="orm", penalties=given),
        completion_lengths=[5] * 4,
        truncated=[False] * 4,
        prm_statuses=["not_asked"] * 4,
        variant="orm",
        **{"penalties": given, "unpenalised": free.outcome} | change,
    )


def test_penalties_by_hand() -> None:
    """1, 1/2, 0, -1/2 have the mean 1/4 and the deviation sqrt 5/12; right is 1 above wrong, as without penalties, where it is sqrt 1/3."""
    found = penalised([0, -0.5, 0, -0.5])
    assert (found["overlong_share"], found["overlong_penalty_mean"]) == (0.5, -0.25)
    assert (found["accuracy"], found["inversions"]) == (0.5, 0)
    assert found["advantage_mean_correct"] == pytest.approx(0.5 / math.sqrt(5 / 12), rel=1e-5)
    assert found["outcome_alignment"] == pytest.approx(math.sqrt((1 / 3) / (5 / 12)), rel=1e-5)


def test_a_reward_that_prefers_short_to_right_shows() -> None:
    found = penalised([-2, -2, 0, 0])
    assert (found["accuracy"], found["inversions"], found["negative_correct_share"]) == (0.5, 2, 1)
    assert found["outcome_alignment"] == pytest.approx(-1, rel=1e-5)


def test_penalties_of_nobody_are_zero_and_without_penalties_there_is_no_such_signal() -> None:
    assert penalised([0, 0, 0, 0])["overlong_share"] == 0.0
    assert not any(name.startswith("overlong") for name in signals())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unpenalised": None}, "penalties without the outcome advantages"),
        ({"unpenalised": [0.0]}, "unpenalised has 1 values for 4 responses"),
        ({"penalties": [0, 0, 0, 0.5]}, r"penalties\[3\] is 0.5"),
        ({"penalties": [0, 0, 0, NAN]}, r"penalties\[3\] is nan"),
    ],
)
def test_penalties_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        penalised([0, 0, 0, 0], **change)


@pytest.mark.parametrize("score", [2 / 3, 0.1])
def test_no_correlation_out_of_rounding(score: float) -> None:
    assert "length_prm_correlation" not in signals(prm_scores=[score] * 10)


def alignment(variant: str, prm: list[float], lam: float = 1.0) -> float:
    """Of a group with three correct responses of five, and one that is all correct."""
    orm, ids = [1, 1, 1, 0, 0, 1, 1], [0] * 5 + [1] * 2
    return round_signals(
        orm_scores=orm,
        prm_scores=prm,
        group_ids=ids,
        advantages=compute_advantages(orm, prm, ids, variant=variant, lam=lam),
        completion_lengths=[5] * 7,
        truncated=[False] * 7,
        prm_statuses=["ok"] * 7,
        variant=variant,
        lam=lam,
    )["outcome_alignment"]


def test_how_much_the_reward_prefers_correct_responses() -> None:
    assert alignment("prm", [1, 1, 1, 0, 0, 0, 1]) == pytest.approx(1)
    assert alignment("prm", [0, 0, 0, 1, 1, 0, 1]) == pytest.approx(-1)
    # Scores 1 0 0 | 0 1: means 1/3 and 1/2, over std sqrt(0.3); the outcome has the same std and a lead of 1.
    assert alignment("prm", [1, 0, 0, 0, 1, 0, 1]) == pytest.approx(-1 / 6, rel=1e-5)
    # A_proc sums to 0 over the correct responses, so that no lam and no judge moves it.
    assert alignment("papo", [1, 0, 0.5, 0, 1, 0, 1], lam=0.3) == pytest.approx(1)
    assert alignment("papo", [0, 0, 1, 0, 1, 0, 1], lam=5.0) == pytest.approx(1)


def test_shares_follow_the_weights_of_the_variant() -> None:
    assert signals(variant="orm")["process_advantage_share"] == 0.0
    assert signals(variant="prm")["outcome_advantage_share"] == 0.0
    assert signals(variant="convex", lam=1.0)["process_advantage_share"] == 0.0
    assert "lam_max" not in signals(variant="fullnorm")


def test_activity_is_counted_for_every_variant() -> None:
    assert signals(variant="orm")["groups_process_active_share"] == 0.25


def test_signals_without_data_are_left_out() -> None:
    nothing = signals(
        orm_scores=[0] * 10, prm_scores=[NAN] * 10, prm_statuses=["not_asked"] * 10, group_ids=list(range(10))
    )
    absent = {
        "advantage_mean_correct",
        "advantage_min_correct",
        "negative_correct_share",
        "outcome_alignment",
        "prm_mean",
        "prm_mean_correct",
        "prm_correct_0",
        "judge_failure_share",
        "judge_failure_share_timeout",
        "length_prm_correlation",
        "outcome_advantage_share",
        "lam_max",
        "verification_share",
    }
    assert absent.isdisjoint(nothing)
    assert all(math.isfinite(value) for value in nothing.values())
    assert nothing["zero_advantage_share_all_wrong"] == 1.0


def test_an_empty_round() -> None:
    empty: dict[str, Any] = {name: [] for name in BATCH}
    assert round_signals(**empty, advantages=Advantages(*[np.zeros(0)] * 3)) == {
        "responses": 0.0,
        "groups": 0.0,
        "lam": 1.0,
        "inversions": 0.0,
        "lam_max_exceeded": 0.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prm_statuses": ["failed"] * 10}, "unknown status 'failed'"),
        ({"prm_statuses": ["ok"]}, "prm_statuses has shape"),
        ({"completion_lengths": [1] * 9}, "completion_lengths has 9 values for 10"),
        ({"completion_lengths": [NAN] * 10}, r"completion_lengths\[0\] is nan"),
        ({"truncated": [2] * 10}, r"truncated\[0\] is 2"),
        ({"verification": [True]}, "verification has 1 values"),
        ({"advantages": Advantages(*[np.zeros(3)] * 3)}, "advantages has 3 values"),
    ],
)
def test_malformed_data_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        signals(**change)


@pytest.mark.parametrize(
    "text",
    [
        "Let's check: 3 + 4 = 7.",
        "Let\N{RIGHT SINGLE QUOTATION MARK}s check our answer.",
        "We verify this by hand.",
        "Verification follows.",
        "I double-check the sum.",
        "To double check, add again.",
        "As a sanity check, put n = 1.",
        "Re-checking the last step gives 9.",
        "Substituting x = 3 back into the equation gives 0.",
        "Plug it back in.",
        "Substitute x = 2 into the original equation.",
        "So x = 5.\nCheck: 5 - 2 = 3",
        "Checking whether 7 is prime.",
        "5 * 5 = 25 \N{CHECK MARK}",
        r"25 = 25 $\checkmark$",
        "3 * 4 = 12, so the area is 12. And again 3*4 = 12.",
    ],
)
def test_verification_is_seen(text: str) -> None:
    assert verification_flags([text]).tolist() == [True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 7.",
        "Ann cashes a check of 50 dollars.",
        "They play checkers on a checkered board.",
        "She gets $12 back.",
        "We substitute x = 3 and get 9. Then we go back to the start.",
        "3 * 4 = 12, 3 + 4 = 7, 12 - 7 = 5.",
        "x = 3 and then x = 3.",
    ],
)
def test_plain_steps_are_not_verification(text: str) -> None:
    assert verification_flags([text]).tolist() == [False]


@pytest.mark.parametrize(
    "text",
    ["1" * 40_000, "1+" * 20_000, "plug a " * 6_000, "1 " * 20_000, "check" * 8_000, "\n" * 40_000, "- \n" * 15_000],
)
def test_degenerate_texts_take_linear_time(text: str) -> None:
    start = time.process_time()
    verification_flags([text])
    assert time.process_time() - start < 2.0


def test_every_status_that_a_judge_can_give_is_counted() -> None:
    assert set(STATUSES) == set(PRM_STATUSES)
    shares = {status: 1 / len(PRM_STATUSES[2:]) for status in PRM_STATUSES[2:]}
    count = len(shares)
    found = signals(
        orm_scores=[1] * count, prm_scores=[NAN] * count, prm_statuses=list(shares), group_ids=["a"] * count,
        completion_lengths=[1] * count, truncated=[0] * count,
    )  # fmt: skip
    assert {status: found[f"judge_failure_share_{status}"] for status in shares} == pytest.approx(shares)
