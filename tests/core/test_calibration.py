"""The measures of a judge against scikit-learn, scipy and values by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from papo.core.calibration import (
    FirstErrors,
    Measured,
    agreement,
    auc,
    cohen_kappa,
    confusion,
    first_errors,
    intervals,
    krippendorff_alpha,
    nearest_level,
    partial_correlation,
    partial_slope,
)
from papo.errors import DataError, ParamsError

LEVELS = (0.0, 0.5, 1.0)
RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, 3, 400)
NOISY = np.clip(np.asarray(LEVELS)[LABELS] + RNG.normal(0, 0.4, 400).round(1), 0, 1)


def counts(rows: list[list[int]]) -> Any:
    return np.array(rows, dtype=np.intp)


def test_a_score_counts_as_the_nearest_level_and_a_tie_as_the_higher() -> None:
    scores = [-3, 0, 0.2, 0.25, 0.5, 0.74, 0.75, 1, 9]
    assert nearest_level(scores, LEVELS).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert nearest_level([0, 0.49, 0.5, 1], (0.0, 1.0)).tolist() == [0, 0, 1, 1]
    assert nearest_level([0.3, 2], (1.0,)).tolist() == [0, 0]


@pytest.mark.parametrize("levels", [(), (1.0, 0.0), (0.0, 0.0)])
def test_levels_ascend(levels: tuple[float, ...]) -> None:
    with pytest.raises(ParamsError, match="ascending"):
        nearest_level([0.5], levels)


def test_a_missing_score_is_refused_rather_than_counted() -> None:
    with pytest.raises(DataError, match="missing"):
        nearest_level([0.5, math.nan], LEVELS)


def test_kappa_by_hand() -> None:
    # 20 and 15 of 50 agree; chance agreement is 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    table = counts([[20, 5], [10, 15]])
    assert agreement(table) == pytest.approx(0.7)
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert cohen_kappa(table, "linear") == pytest.approx(0.4)
    assert cohen_kappa(counts([[5, 0], [0, 5]])) == 1.0
    assert cohen_kappa(counts([[0, 5], [5, 0]])) == -1.0


def test_confusion_and_both_kappas_are_those_of_scikit_learn() -> None:
    verdicts = nearest_level(NOISY, LEVELS)
    table = confusion(LABELS, verdicts, 3)
    assert table.tolist() == metrics.confusion_matrix(LABELS, verdicts).tolist()
    assert agreement(table) == pytest.approx(metrics.accuracy_score(LABELS, verdicts))
    assert cohen_kappa(table) == pytest.approx(metrics.cohen_kappa_score(LABELS, verdicts))
    linear = metrics.cohen_kappa_score(LABELS, verdicts, weights="linear")
    assert cohen_kappa(table, "linear") == pytest.approx(linear)
    assert linear > metrics.cohen_kappa_score(LABELS, verdicts)


def test_a_verdict_that_is_never_given_has_a_column_of_its_own() -> None:
    table = confusion(np.array([0, 2, 2]), np.array([0, 2, 0]), 3)
    assert table.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    assert cohen_kappa(table) == pytest.approx(metrics.cohen_kappa_score([0, 2, 2], [0, 2, 0]))


def test_kappa_of_one_class_or_of_nothing_is_none() -> None:
    assert cohen_kappa(counts([[3, 4], [0, 0]])) is None
    assert cohen_kappa(counts([[7, 0], [0, 0]])) is None
    assert cohen_kappa(counts([[0, 0], [0, 0]])) is None
    assert agreement(counts([[0, 0], [0, 0]])) is None
    assert cohen_kappa(counts([[3, 0], [4, 0]])) == 0.0  # one verdict for all is chance
    with pytest.raises(ParamsError, match="unknown weights"):
        cohen_kappa(counts([[1, 0], [0, 1]]), "quadratic")


def test_auc_of_two_levels_is_the_area_under_the_curve() -> None:
    labels = (LABELS > 0).astype(np.intp)
    assert auc(labels, NOISY) == pytest.approx(metrics.roc_auc_score(labels, NOISY))
    assert auc(np.array([0, 0, 1, 1]), [0.1, 0.5, 0.5, 0.9]) == pytest.approx(3.5 / 4)


def test_auc_of_several_levels_is_that_of_somers() -> None:
    assert auc(LABELS, NOISY) == pytest.approx((stats.somersd(LABELS, NOISY).statistic + 1) / 2)


def test_auc_of_constant_scores_is_chance_and_of_one_class_none() -> None:
    assert auc(np.array([0, 1, 1]), [0.5, 0.5, 0.5]) == 0.5
    assert auc(np.array([1, 1]), [0.1, 0.2]) is None
    assert auc(np.array([], dtype=np.intp), []) is None


def residuals(values: Any) -> Any:
    dummies = (LABELS[:, None] == np.arange(3)).astype(float)
    return values - dummies @ np.linalg.lstsq(dummies, values, rcond=None)[0]


def test_partial_correlation_is_pearsons_of_the_residuals() -> None:
    lengths = 20.0 * LABELS + RNG.normal(0, 5, 400)
    scores = NOISY + 0.01 * lengths
    found = partial_correlation(scores, lengths, LABELS)
    assert found == pytest.approx(stats.pearsonr(residuals(scores), residuals(lengths)).statistic)
    slope = partial_slope(scores, lengths, LABELS)
    line = stats.linregress(residuals(lengths), residuals(scores)).slope
    assert slope == pytest.approx(line * residuals(lengths).std())


def test_what_the_label_explains_is_no_bias() -> None:
    # Good responses are long and score high; among equals length makes no difference.
    labels = np.repeat([0, 1], 4)
    lengths = [1, 2, 3, 4, 11, 12, 13, 14]
    scores = [0, 0.5, 0.5, 0, 0.5, 1, 1, 0.5]
    assert np.corrcoef(lengths, scores)[0, 1] > 0.5
    assert partial_correlation(scores, lengths, labels) == pytest.approx(0.0)
    assert partial_correlation([0, 0, 1, 1, 0, 0, 1, 1], lengths, labels) == pytest.approx(0.8944, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1 / 3])
def test_a_score_that_never_differs_within_a_label_has_no_correlation_and_no_slope(value: float) -> None:
    labels = np.repeat([0, 1], 50)
    lengths = np.arange(100)
    assert partial_correlation(value + labels * 0.3, lengths, labels) is None
    assert partial_slope(value + labels * 0.3, lengths, labels) == 0.0
    assert partial_correlation(np.arange(100), np.full(100, value), labels) is None
    assert partial_slope(np.arange(100), np.full(100, value), labels) is None
    assert partial_correlation([], [], np.array([], dtype=np.intp)) is None


def test_alpha_is_that_of_the_worked_example() -> None:
    # Three coders, fifteen units, half of the values missing; alpha for interval data is 0.811.
    coders = ["*****34121133*3", "1*213343*******", "**21344*21133*4"]
    units = [[float(c[at]) for c in coders if c[at] != "*"] for at in range(15)]
    assert krippendorff_alpha(units) == pytest.approx(0.811, abs=5e-4)


def test_alpha_by_hand_and_at_its_ends() -> None:
    # D_o = (2 * 1^2 / 1) / 4, D_e = 2 * (3 pairs of 0 and 1) / 12
    assert krippendorff_alpha([[0, 1], [1, 1], [0.3]]) == pytest.approx(1 - (2 / 4) / (6 / 12))
    assert krippendorff_alpha([[0, 0], [1, 1]]) == 1.0
    assert krippendorff_alpha([[0.1, 0.1], [0.1, 0.1, 0.1]]) is None
    assert krippendorff_alpha([[0], [1]]) is None


def test_first_wrong_steps() -> None:
    named = [2, 3, 0, 1, 0, None, 4]
    labelled = [2, 2, 0, 0, 5, 1, None]
    assert first_errors(named, labelled) == FirstErrors(5, 1 / 3, 1 / 2, 2 / 5)
    assert first_errors([None], [3]) == FirstErrors(0, None, None, None)
    assert first_errors([0, 0], [1, 2]).none_right is None
    with pytest.raises(DataError, match="2 named first errors for 1"):
        first_errors([1, 2], [1])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        values = np.repeat(rng.normal(0, 1, 40), 3) + rng.normal(0, 0.1, 120)
        clusters = np.repeat(np.arange(40), 3).tolist()
        found = intervals({"mean": lambda rows, v=values: float(v[rows].mean())}, clusters, seed=trial, resamples=200)
        low, high = found["mean"].low, found["mean"].high
        assert low is not None
        assert high is not None
        hits += low <= 0.0 <= high
    assert 0.88 <= hits / 100 <= 0.99


def test_responses_to_one_problem_are_drawn_together() -> None:
    values = np.repeat(np.arange(10.0), 8)
    measure = {"mean": lambda rows: float(values[rows].mean())}
    together = intervals(measure, np.repeat(np.arange(10), 8).tolist(), seed=1)["mean"]
    apart = intervals(measure, list(range(80)), seed=1)["mean"]
    assert together.value == apart.value == 4.5
    assert together.high is not None
    assert apart.high is not None
    assert together.high - 4.5 > 2 * (apart.high - 4.5)


def test_the_same_seed_gives_the_same_interval() -> None:
    measure = {"mean": lambda rows: float(NOISY[rows].mean())}
    first, again, other = (intervals(measure, list(range(400)), seed=seed, resamples=100) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_a_measure_that_is_seldom_defined_has_no_interval() -> None:
    def seldom(rows: Any) -> float | None:
        return 1.0 if len(set(rows.tolist())) == 10 else None

    found = intervals({"seldom": seldom, "never": lambda _: None}, list(range(10)), seed=0, resamples=100)
    assert found == {"seldom": Measured(1.0), "never": Measured(None)}
    assert intervals({"one": lambda _: 1.0}, ["a", "a"], seed=0)["one"] == Measured(1.0)
    with pytest.raises(ParamsError, match="resamples is 1"):
        intervals({}, ["a"], seed=0, resamples=1)
    with pytest.raises(ParamsError, match="confidence 1"):
        intervals({}, ["a"], seed=0, confidence=1.0)


@pytest.mark.parametrize(
    ("measured", "beyond"),
    [
        (Measured(0.5, 0.4, 0.6), True),
        (Measured(-0.5, -0.6, -0.4), True),
        (Measured(0.5), True),
        (Measured(0.3, 0.2, 0.4), False),
        (Measured(0.5, -0.1, 0.9), False),
        (Measured(None), False),
    ],
)
def test_beyond_a_limit_is_in_size_and_beyond_chance(measured: Measured, beyond: bool) -> None:
    assert measured.beyond(0.3) is beyond
