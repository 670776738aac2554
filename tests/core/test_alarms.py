"""Alarms: when each rings, when it stays silent, and what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from papo.core.alarms import ALARMS, TRAINING_ALARMS, Alarm, Limits, alarms, fired, last_good, onset, onsets, trained
from papo.params import AlarmsParams, OnAlarmParams

REFERENCE = Path(__file__).parents[3] / "shared/reference"

# A round in which nothing is wrong.
CALM = {
    "responses": 400.0, "accuracy": 0.5, "outcome_missing_share": 0.0, "zero_advantage_share": 0.2, "inversions": 0.0,
    "outcome_alignment": 1.0, "prm_mean": 0.6, "judge_failure_share": 0.0, "length_mean": 100.0,
}  # fmt: skip


def course(**signals: list[float]) -> list[dict[str, float]]:
    """A calm round for each value of the signals given."""
    return [{**CALM, **dict(zip(signals, values, strict=True))} for values in zip(*signals.values(), strict=True)]


def names(history: list[dict[str, float]], **limits: int) -> list[str]:
    return [alarm.name for alarm in alarms(history, Limits(**limits))]


def test_silent_without_rounds_without_signals_and_when_calm() -> None:
    assert alarms([]) == []
    assert alarms([{}, {}, {}, {}]) == []
    assert fired([CALM] * 20) == []


@pytest.mark.parametrize(
    ("shares", "rings"),
    [([0.6, 0.6, 0.6], True), ([0.59, 0.7, 0.7], False), ([0.9, 0.9], False), ([0.1, 0.9, 0.9, 0.9], True)],
)
def test_exhaustion_needs_rounds_in_a_row(shares: list[float], rings: bool) -> None:
    assert ("signal_exhaustion" in names(course(zero_advantage_share=shares))) is rings


def test_exhaustion_says_where_the_zeros_are() -> None:
    history = course(zero_advantage_share=[0.7, 0.7, 0.75])
    history[-1] |= {"zero_advantage_share_all_correct": 0.7, "zero_advantage_share_all_wrong": 0.05}
    (alarm,) = alarms(history)
    assert alarm.evidence == (
        "75% of the responses have no advantage, and at least 70% in 3 rounds (in all-correct groups 70%, in all-wrong ones 5%)"
    )


@pytest.mark.parametrize(
    ("scores", "accuracy", "alignment", "rings"),
    [
        ([0.4, 0.46], [0.3, 0.3], 0.3, True),
        ([0.4, 0.44], [0.3, 0.3], 0.3, False),  # the score has not risen enough
        ([0.4, 0.6], [0.3, 0.46], 0.3, False),  # accuracy rises with it
        ([0.4, 0.6], [0.3, 0.35], 0.3, True),  # but not as fast
        ([0.4, 0.6], [0.3, 0.3], 0.4, False),  # the reward still prefers correct responses
        ([0.4, 0.6], [0.3, 0.19], 1.0, True),  # and yet accuracy falls as the score climbs
        ([0.4, 0.6], [0.3, 0.21], 1.0, False),
        ([0.6, 0.4], [0.3, 0.1], 0.0, False),  # a judge that sees the fall is not gamed
    ],
)
def test_reward_hacking(scores: list[float], accuracy: list[float], alignment: float, rings: bool) -> None:
    history = course(prm_mean=scores, accuracy=accuracy, outcome_alignment=[alignment] * 2)
    assert ("reward_hacking" in names(history)) is rings


def test_reward_hacking_looks_back_no_further_than_its_window() -> None:
    slow = course(prm_mean=[0.4, 0.415, 0.43, 0.445, 0.46], accuracy=[0.3] * 5, outcome_alignment=[0.0] * 5)
    assert "reward_hacking" in names(slow, window=4)
    assert "reward_hacking" not in names(slow, window=3)


def test_reward_hacking_says_what_it_saw() -> None:
    history = course(prm_mean=[0.5, 0.4, 0.6], accuracy=[0.3, 0.3, 0.2], outcome_alignment=[0.3, 0.2, -0.2])
    assert alarms(history)[0] == Alarm(
        "reward_hacking",
        2,
        "since round 1 the judge's score rose by 0.20 and accuracy changed by -0.10; the reward prefers correct to wrong "
        "responses -0.20 times as much as the outcome does",
    )


@pytest.mark.parametrize(
    ("accuracy", "rings"),
    [
        ([0.6, 0.6, 0.6, 0.3, 0.3, 0.3], True),
        ([0.6, 0.6, 0.6, 0.6, 0.6, 0.1], False),  # one bad batch
        ([0.6, 0.6, 0.6, 0.42, 0.42, 0.42], False),
        ([0.09, 0.09, 0.09, 0.045, 0.045, 0.045], False),  # half of next to nothing is noise
        ([0.6, 0.6], False),
    ],
)
def test_collapse_is_a_fall_of_the_average(accuracy: list[float], rings: bool) -> None:
    assert ("collapse" in names(course(accuracy=accuracy))) is rings


@pytest.mark.parametrize(
    ("lengths", "accuracy", "rings"),
    [
        ([100.0, 160.0], [0.5, 0.5], True),
        ([100.0, 159.0], [0.5, 0.5], False),
        ([100.0, 200.0], [0.5, 0.55], False),  # longer and better
        ([200.0, 100.0, 160.0], [0.5, 0.5, 0.5], True),
        ([160.0, 100.0], [0.5, 0.5], False),
        ([0.0, 0.0], [0.5, 0.5], False),
    ],
)
def test_length_inflation(lengths: list[float], accuracy: list[float], rings: bool) -> None:
    assert ("length_inflation" in names(course(length_mean=lengths, accuracy=accuracy))) is rings


def test_judge_outage_names_the_causes() -> None:
    assert names([CALM | {"judge_failure_share": 0.09}]) == []
    (alarm,) = alarms(
        [CALM | {"judge_failure_share": 0.3, "judge_failure_share_timeout": 0.2, "judge_failure_share_error": 0.1}]
    )
    assert alarm == Alarm("judge_outage", 0, "30% of the judge's calls gave no verdict: timeout 20%, error 10%")


def test_rank_inversions_count_among_correct_responses() -> None:
    assert names([CALM | {"inversions": 9.0}]) == []  # of 200
    (alarm,) = alarms([CALM | {"inversions": 10.0, "lam": 1.0, "lam_max": 0.691, "lam_max_exceeded": 1.0}])
    assert alarm.name == "rank_inversions"
    assert alarm.evidence == (
        "10 of 200 correct responses do not outrank every wrong one of their group: lam 1 is above lam_max 0.691; "
        "lower it or set guard rank"
    )


def test_logprob_mismatch_goes_by_the_mean() -> None:
    history = course(logprob_difference_mean=[0.049, 0.051], logprob_difference_max=[0.9, 0.5])
    assert alarms(history[:1]) == []
    (alarm,) = alarms(history)
    assert alarm == Alarm(
        "logprob_mismatch", 1, "the sampler's log-probs are 0.051 from the trainer's on average, and up to 0.5"
    )


def test_each_round_is_judged_as_it_was_seen_then() -> None:
    history = course(judge_failure_share=[0.0, 0.2, 0.2, 0.0, 0.2])
    raised = fired(history)
    assert [alarm.round for alarm in raised] == [1, 2, 4]
    assert [alarm.round for alarm in onsets(raised)] == [1, 4]
    assert fired(history[:3]) == raised[:2]


def test_steps_that_were_not_applied_ring_with_the_training_of_their_round() -> None:
    assert "non_finite_loss" not in names([CALM, trained(CALM, {}, 8)])
    history = [CALM, trained(CALM, {"broken": 2.0, "loss": 0.1}, 8)]
    assert names(history) == ["non_finite_loss"]
    assert names(history, broken_steps=3) == []
    (alarm,) = alarms(history)
    assert alarm.evidence == "2 of 8 optimizer steps were not applied, because loss or gradient were not finite"


def test_an_alarm_rings_since_the_round_after_the_last_in_which_it_did_not() -> None:
    raised = fired(course(judge_failure_share=[0.2, 0.0, 0.2, 0.2, 0.2]))
    assert onset(raised, "judge_outage") == 2
    assert onset(raised[:1], "judge_outage") == 0


def test_a_collapse_goes_back_to_the_policy_behind_the_best_rounds() -> None:
    # Rounds 2 to 4 are the best three; round 3, their middle, was sampled from the policy of round 2.
    history = course(accuracy=[0.20, 0.28, 0.30, 0.33, 0.32, 0.20, 0.10, 0.02])
    (alarm,) = [one for one in onsets(fired(history)) if one.name == "collapse"]
    good = last_good(history, "collapse", alarm.round)
    assert (alarm.round, good.round) == (7, 2)
    assert good.why == "it sampled round 3, around which accuracy was at its best, 0.32 over 3 rounds"
    # What comes after the onset says nothing about which was the best before it.
    assert last_good([*history, *course(accuracy=[0.9, 0.9, 0.9])], "collapse", alarm.round) == good


def test_a_collapse_counts_only_rounds_whose_accuracy_is_known() -> None:
    history = course(accuracy=[0.5, 0.5, 0.1])
    del history[1]["accuracy"]
    assert last_good(history, "collapse", 2, Limits(patience=1)).round == -1
    assert last_good([{}, {}], "collapse", 1).round == -1


@pytest.mark.parametrize(
    ("name", "since", "round_"),
    [
        ("length_inflation", 5, 3),  # the policy of round 4 sampled round 5, and shows it
        ("reward_hacking", 1, -1),
        ("reward_hacking", 0, -1),
        ("judge_outage", 5, 4),  # a round's scores say nothing against the policy that it was sampled from
        ("signal_exhaustion", 0, -1),
        ("logprob_mismatch", 3, 2),
        ("rank_inversions", 3, 2),
        ("non_finite_loss", 3, 2),
    ],
)
def test_the_last_good_policy_is_the_last_that_the_alarm_says_nothing_against(
    name: str, since: int, round_: int
) -> None:
    good = last_good([CALM] * (since + 1), name, since)
    assert good.round == round_
    assert good.why


def test_the_params_are_the_limits() -> None:
    assert AlarmsParams().model_dump() == dataclasses.asdict(Limits())
    assert set(ALARMS) == {
        "signal_exhaustion", "reward_hacking", "collapse", "length_inflation", "judge_outage", "logprob_mismatch", "rank_inversions",
        "non_finite_loss",
    }  # fmt: skip
    assert set(OnAlarmParams.model_fields) == {*ALARMS, "wait_hours"}
    assert set(TRAINING_ALARMS) < set(ALARMS)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published 3B curves are not beside this checkout")
def test_silent_on_the_published_curves_of_orm_and_papo() -> None:
    training = json.loads((REFERENCE / "papo_3b_training.json").read_text())
    evaluation = json.loads((REFERENCE / "papo_3b_eval.json").read_text())
    for run in ("3B-ORM", "3B-PA-GRPO"):
        curves = [zip(training[run]["reward"], training[run]["response_length"], strict=True)]
        curves += [
            zip(values, evaluation[run]["response_length/mean"], strict=True)
            for name, values in evaluation[run].items()
            if name.startswith("val-core/")
        ]
        assert len(curves) > 5
        for curve in curves:
            history = [
                {name: value for name, value in (("accuracy", accuracy), ("length_mean", length)) if value is not None}
                for accuracy, length in curve
            ]
            assert len(history) > 100
            assert fired(history) == []
