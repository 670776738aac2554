"""Estimates against hand-computed values, enumeration and scipy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # scipy has no types

from papo.core.statistics import (
    Estimate,
    avg_at_k,
    maj_at_k,
    paired_bootstrap,
    paired_bootstrap_of_values,
    pass_at_k,
)
from papo.errors import DataError, ParamsError

NAN = math.nan
IDS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
CORRECT = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]  # means 1, 1/4, 1/2


def test_avg_at_k_by_hand() -> None:
    found = avg_at_k(CORRECT, IDS)
    error = stats.sem([1, 0.25, 0.5])
    assert found.value == pytest.approx(7 / 12)
    assert found.standard_error == pytest.approx(error)
    assert (found.low, found.high) == (0.0, 1.0)  # cut: t with 2 degrees of freedom reaches beyond
    assert found[4:] == (3, 12, 0)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(
    ("problems", "precision"), [(2, 1e-9), (3, 1e-9), (4, 0.05), (10, 1e-3), (30, 1e-5), (500, 1e-9)]
)
def test_interval_is_student_t(problems: int, precision: float, confidence: float) -> None:
    solved = np.arange(problems) % 2
    samples = 2000  # most samples fail, so that the interval is not cut
    correct = np.zeros((problems, samples))
    correct[:, : samples // 2] = 1
    correct[:, 0] = solved
    found = avg_at_k(correct.ravel(), np.repeat(np.arange(problems), samples), confidence=confidence)
    low, high = stats.t.interval(confidence, problems - 1, found.value, found.standard_error)
    assert (found.high - found.value) == pytest.approx(high - found.value, rel=precision)
    assert (found.value - found.low) == pytest.approx(found.value - low, rel=precision)


def test_clustering_by_problem_is_wider_than_counting_every_sample() -> None:
    correct = np.repeat([1, 0, 1, 0, 1, 0], 8)
    found = avg_at_k(correct, np.repeat(np.arange(6), 8))
    assert found.standard_error > 2 * stats.sem(correct)


def test_interval_covers() -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(30), 4)
    hits = 0
    for _ in range(400):
        correct = rng.random(120) < np.repeat(rng.beta(1, 1, 30), 4)
        found = avg_at_k(correct, ids)
        hits += found.low <= 0.5 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_missing_scores_are_excluded_or_wrong() -> None:
    correct, ids = [1, NAN, 0, 1, NAN], ["a", "a", "b", "b", "c"]
    assert avg_at_k(correct, ids)[:1] + avg_at_k(correct, ids)[4:] == (0.75, 2, 3, 2)
    wrong = avg_at_k(correct, ids, missing="wrong")
    assert wrong.value == pytest.approx(1 / 3)
    assert wrong[4:] == (3, 5, 2)


def test_one_problem_has_no_interval() -> None:
    found = avg_at_k([1, 0], ["a", "a"])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert math.isnan(found.standard_error)


def test_equal_problems_leave_a_point() -> None:
    assert avg_at_k([1, 1], ["a", "b"]) == Estimate(1.0, 1.0, 1.0, 0.0, 2, 2, 0)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k: int) -> None:
    groups = [CORRECT[:4], CORRECT[4:8], CORRECT[8:]]
    values = [np.mean([max(chosen) for chosen in itertools.combinations(group, k)]) for group in groups]
    found = pass_at_k(CORRECT, IDS, k)
    assert found.value == pytest.approx(np.mean(values))
    assert found.standard_error == pytest.approx(stats.sem(values))


def test_pass_at_k_with_many_samples_is_the_binomial_ratio() -> None:
    correct = np.arange(1000) < 3
    assert pass_at_k(correct, [0] * 1000, 100).value == pytest.approx(1 - math.comb(997, 100) / math.comb(1000, 100))


def test_pass_at_1_is_avg_at_k() -> None:
    assert pass_at_k(CORRECT, IDS, 1) == pytest.approx(avg_at_k(CORRECT, IDS))


def test_pass_at_k_refuses_too_few_samples() -> None:
    with pytest.raises(DataError, match="1 problems have fewer than 3 scored samples"):
        pass_at_k([1, 0, NAN, 1, 0, 0], ["a"] * 3 + ["b"] * 3, 3)
    assert pass_at_k([1, 0, NAN, 1, 0, 0], ["a"] * 3 + ["b"] * 3, 3, missing="wrong").value == 1.0
    with pytest.raises(ParamsError, match="k is 0"):
        pass_at_k([1], ["a"], 0)


@pytest.mark.parametrize(
    ("answers", "correct", "value"),
    [
        (["7", "7", "3"], [1, 1, 0], 1.0),
        (["7", "3", "3"], [1, 0, 0], 0.0),
        (["7", "3"], [1, 0], 0.5),  # a fair tie-break
        (["7", "3", "3", "7", "1"], [1, 0, 0, 1, 0], 0.5),
        (["7", None, None, None], [1, 0, 0, 0], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        (["7", "3", "3"], [1, NAN, NAN], 1.0),  # unscored samples do not vote
    ],
)
def test_maj_at_k_by_hand(answers: list[str | None], correct: list[float], value: float) -> None:
    assert maj_at_k(answers, correct, ["a"] * len(answers)).value == value


def test_maj_at_k_votes_within_a_problem() -> None:
    found = maj_at_k(["7", "7", "3", "3", "3", "7"], [1, 1, 0, 1, 1, 0], ["a", "a", "a", "b", "b", "b"])
    assert found == Estimate(1.0, 1.0, 1.0, 0.0, 2, 6, 0)
    with pytest.raises(DataError, match="1 answers for 2 samples"):
        maj_at_k(["7"], [1, 0], ["a", "a"])


def two_policies(problems: int = 200) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(1)
    ease = rng.random(problems) * 0.8
    ids = np.repeat(np.arange(problems), 4)
    return rng.random(ids.size) < np.repeat(ease + 0.15, 4), rng.random(ids.size) < np.repeat(ease, 4), ids


def test_paired_bootstrap_agrees_with_scipy() -> None:
    candidate, baseline, ids = two_policies()
    found = paired_bootstrap(candidate, ids, baseline, ids, seed=3)
    differences = candidate.reshape(-1, 4).mean(1) - baseline.reshape(-1, 4).mean(1)
    scipys = stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert found.value == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(scipys.standard_error, rel=0.05)
    assert found.low == pytest.approx(scipys.confidence_interval.low, abs=0.004)
    assert found.high == pytest.approx(scipys.confidence_interval.high, abs=0.004)
    assert found[4:] == (200, 1600, 0)
    assert found.standard_error < math.hypot(
        avg_at_k(candidate, ids).standard_error, avg_at_k(baseline, ids).standard_error
    )


def test_paired_bootstrap_is_seeded_and_blind_to_the_order_of_rows() -> None:
    candidate, baseline, ids = two_policies(30)
    found = paired_bootstrap(candidate, ids, baseline, ids, seed=3, resamples=700)
    order = np.random.default_rng(2).permutation(ids.size)
    assert paired_bootstrap(candidate[order], ids[order], baseline, ids, seed=3, resamples=700) == found
    assert paired_bootstrap(candidate, ids, baseline, ids, seed=4, resamples=700) != found
    mirrored = paired_bootstrap(baseline, ids, candidate, ids, seed=3, resamples=700)
    assert mirrored.value == pytest.approx(-found.value)


def test_paired_bootstrap_drops_problems_that_one_policy_has_no_score_for() -> None:
    found = paired_bootstrap([1, 1, NAN], ["a", "b", "c"], [0, 0, 1, 1], ["b", "a", "a", "c"], seed=0, resamples=50)
    assert found.value == 0.75
    assert found[4:] == (2, 5, 1)
    single = paired_bootstrap([1], ["a"], [0, 1], ["a", "a"], seed=0)
    assert single[:3] == (0.5, -1.0, 1.0)
    assert math.isnan(single.standard_error)


def test_the_bootstrap_of_values_is_that_of_the_means_where_the_values_are_means() -> None:
    candidate, baseline, ids = two_policies(40)
    means = [dict(enumerate(scores.reshape(-1, 4).mean(1).tolist())) for scores in (candidate, baseline)]
    expected = paired_bootstrap(candidate, ids, baseline, ids, seed=3, resamples=700)
    found = paired_bootstrap_of_values(*means, seed=3, resamples=700)
    assert found == expected._replace(samples=80)
    del means[0][7]
    assert paired_bootstrap_of_values(*means, seed=3, resamples=700)[4:] == (39, 78, 1)
    with pytest.raises(DataError, match="no problem has values of both"):
        paired_bootstrap_of_values({"a": 1.0}, {"b": 1.0}, seed=0)
    with pytest.raises(ParamsError, match="resamples is 1"):
        paired_bootstrap_of_values({"a": 1.0}, {"a": 1.0}, seed=0, resamples=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], ["a"], [1, 0], ["a", "b"]), "the candidate did not answer problem 'b'"),
        (([1, 0], ["a", "b"], [1], ["a"]), "the baseline did not answer problem 'b'"),
        (([1, 0], ["a"], [1], ["a"]), "problem_ids has 1 values"),
        (([NAN], ["a"], [1], ["a"]), "no problem has scored samples of both"),
    ],
)
def test_paired_bootstrap_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired_bootstrap(*arguments, seed=0)


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(ParamsError, match="confidence is 95"):
        avg_at_k([1], ["a"], confidence=95)
    with pytest.raises(ParamsError, match="unknown missing 'zero'"):
        avg_at_k([1], ["a"], missing="zero")
    with pytest.raises(ParamsError, match="resamples is 1"):
        paired_bootstrap([1], ["a"], [1], ["a"], seed=0, resamples=1)
    with pytest.raises(DataError, match="no sample has a score"):
        avg_at_k([NAN], ["a"])
    with pytest.raises(DataError, match=r"correct\[0\] is 0.5"):
        avg_at_k([0.5], ["a"])
