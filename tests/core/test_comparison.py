"""Differences over seeds and problems: by hand, against scipy, and on simulated runs whose truth is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy import special, stats  # type: ignore[import-untyped]  # scipy has no types

from papo.core.comparison import Difference, by_seed, by_seed_and_problem, holm, resampled, verdicts
from papo.core.groups import FloatArray
from papo.errors import DataError, ParamsError

NAN = math.nan


def test_the_mean_squares_by_hand() -> None:
    found = by_seed_and_problem([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    # Every seed and every problem has the mean 0.5: all there is, is what is left.
    assert (found.value, found.between_seeds, found.between_problems) == (0.5, 0.0, 0.0)
    assert found.residual == pytest.approx(0.5)
    assert found.standard_error == 0.0
    crossed = by_seed_and_problem([[0.1, 0.3], [0.2, 0.4], [0.6, 0.8]])
    seeds, problems = np.array([0.2, 0.3, 0.7]), np.array([0.3, 0.5])
    assert crossed.between_seeds == pytest.approx(2 * seeds.var(ddof=1))
    assert crossed.between_problems == pytest.approx(3 * problems.var(ddof=1))
    assert crossed.residual == pytest.approx(0.0)
    assert crossed.standard_error == pytest.approx(math.sqrt(seeds.var(ddof=1) / 3 + problems.var(ddof=1) / 2))
    assert crossed.effect == pytest.approx(0.4 / seeds.std(ddof=1) * (1 - 3 / 7))


def test_one_value_a_seed_has_students_interval() -> None:
    values = [0.1, 0.4, -0.2, 0.3]
    found = by_seed([*values, NAN])
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(values), stats.sem(values)))
    assert found.p_zero() == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    below = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    assert found.p_outside(0.5) == pytest.approx(below)


def test_seeds_that_differ_only_by_a_constant_have_an_interval_of_that() -> None:
    of_seed = np.array([0.0, 0.1, 0.2, 0.5])
    found = by_seed_and_problem(of_seed[:, None] + np.zeros(300))
    low, high = stats.t.interval(0.95, 3, of_seed.mean(), stats.sem(of_seed))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_problem_without_a_value_in_some_seed_is_left_out() -> None:
    whole = by_seed_and_problem([[1.0, 0.0, 0.5], [0.0, 0.5, 0.5]])
    found = by_seed_and_problem([[1.0, NAN, 0.0, 0.5], [0.0, 1.0, 0.5, 0.5]])
    assert found.left_out == 1
    assert found._replace(left_out=0) == whole


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: by_seed_and_problem([[0.0, 1.0]]), "1 seeds and 2 problems"),
        (lambda: by_seed_and_problem([[0.0, NAN], [NAN, 1.0]]), "2 seeds and 0 problems"),
        (lambda: by_seed_and_problem([0.0, 1.0]), "1 dimensions"),
        (lambda: by_seed([NAN, 1.0]), "1 seeds with a value"),
        (lambda: by_seed([math.inf, 1.0]), "infinite"),
        (lambda: verdicts([by_seed([0.0, 1.0])], []), "one margin"),
        (lambda: verdicts([by_seed([0.0, 1.0])], [-0.1]), "at least 0"),
    ],
)
def test_what_says_nothing_is_refused(make: Callable[[], object], what: str) -> None:
    with pytest.raises(DataError, match=what):
        make()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ParamsError, match="confidence"):
        by_seed([0.0, 1.0], confidence=1.0)
    with pytest.raises(ParamsError, match="level"):
        verdicts([], [], level=0.6)
    with pytest.raises(ParamsError, match="resamples"):
        resampled([[0.0, 1.0]], seed=0, resamples=1)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([]) == []


def test_words() -> None:
    clear = by_seed([0.20, 0.21, 0.19, 0.20])
    none = by_seed([0.001, -0.001, 0.0005, -0.0005])
    small = by_seed([0.0100, 0.0101, 0.0099, 0.0100])
    noisy = by_seed([0.3, -0.2, 0.25, -0.1])
    found = verdicts([clear, none, small, noisy], [0.02] * 4)
    assert [one.word for one in found] == ["higher", "same", "higher", "undecided"]
    assert [one.within for one in found] == [False, True, True, False]
    assert found[0].seeds is None
    assert verdicts([by_seed([-0.2, -0.21, -0.19])], [0.02])[0].word == "lower"
    # Without a margin nothing is the same.
    assert verdicts([none], [0.0])[0].word == "undecided"


def test_many_comparisons_ask_for_more_than_one_does() -> None:
    some = by_seed([0.10, 0.02, 0.12, 0.05, 0.09])
    noise = [by_seed(np.roll([0.2, -0.2, 0.1, -0.1, 0.02], turn)) for turn in range(20)]
    assert verdicts([some], [0.0])[0].word == "higher"
    assert verdicts([some, *noise], [0.0] * 21)[0].word == "undecided"


def test_the_seeds_it_asks_for_are_about_enough() -> None:
    rng = np.random.default_rng(3)
    asked, decided = [], 0
    for _ in range(200):
        first = by_seed(rng.normal(0.05, 0.06, 5))
        (verdict,) = verdicts([first], [0.0])
        if verdict.word == "undecided" and verdict.seeds is not None:
            asked.append(verdict.seeds)
    needed = int(np.median(asked))
    for _ in range(200):
        decided += verdicts([by_seed(rng.normal(0.05, 0.06, 5 + needed))], [0.0])[0].word == "higher"
    assert 5 <= needed <= 25  # by the noncentral t: 14 seeds in all give 80 %
    assert decided / 200 > 0.7


def test_what_seeds_cannot_decide_is_said_so() -> None:
    rng = np.random.default_rng(0)
    few_problems = rng.normal(0.02, 0.5, 12)[None, :] + rng.normal(0.0, 0.001, (4, 12))
    few_problems += 0.02 - few_problems.mean()
    (verdict,) = verdicts([by_seed_and_problem(few_problems)], [0.05])
    assert (verdict.word, verdict.seeds) == ("undecided", None)


def simulated(
    rng: np.random.Generator, gains: list[float], seeds: int, of_seed: float, of_problem: float
) -> FloatArray:
    """(arms, S, P) avg@4 of arms whose log-odds differ by a gain, which seeds and problems shift; the first is what others differ from."""
    problems = 160
    hardness = rng.normal(0.3, 1.5, problems)
    odds = [
        hardness + gain + rng.normal(0, of_seed, seeds)[:, None] + rng.normal(0, of_problem, problems)[None, :]
        for gain in gains
    ]
    return rng.binomial(4, special.expit(np.stack(odds))) / 4.0


GAINS = [0.0, 0.0, 0.02, 0.4, -0.4, 1.0]
MARGIN = 0.04


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize(("of_seed", "of_problem"), [(0.2, 0.2), (0.02, 0.3), (0.4, 0.02)])
def test_planted_truths(seeds: int, of_seed: float, of_problem: float) -> None:
    """Over 200 simulated ablations: intervals cover, wrong verdicts stay below the level, and large differences are found."""
    rng = np.random.default_rng(7)
    spread = math.hypot(of_seed, of_problem) * rng.normal(size=200_000)
    at = [float(special.expit(rng.normal(0.3, 1.5, 200_000) + gain + spread).mean()) for gain in GAINS]
    truth = [0.0, *(value - at[0] for value in at[2:])]
    simulations, covered, wrong_sign, wrong_same = 200, 0, 0, 0
    words: list[Counter[str]] = [Counter() for _ in truth]
    for _ in range(simulations):
        arms = simulated(rng, GAINS, seeds, of_seed, of_problem)
        found = [by_seed_and_problem(arm - arms[0]) for arm in arms[1:]]
        told = verdicts(found, [MARGIN] * len(found))
        covered += sum(one.low <= true <= one.high for one, true in zip(found, truth, strict=True))
        # A gain of 0.02 in log-odds is no difference that anybody would miss: only its sign may be wrong.
        wrong_sign += any(
            (one.word == "higher" and true <= 0) or (one.word == "lower" and true >= 0)
            for one, true in zip(told, truth, strict=True)
        )
        wrong_same += any(one.within and abs(true) >= MARGIN for one, true in zip(told, truth, strict=True))
        for counter, one in zip(words, told, strict=True):
            counter[one.word] += 1
    error = 3 * math.sqrt(0.05 * 0.95 / simulations)
    assert covered / (simulations * len(truth)) > 0.93
    assert wrong_sign / simulations < 0.05 + error
    assert wrong_same / simulations < 0.05 + error
    if seeds == 5 and of_seed < 0.3:
        assert words[4]["higher"] > 0.9 * simulations, words


def test_an_interval_over_problems_alone_would_be_wrong() -> None:
    """Why seeds are drawn, too: with seeds that matter, pooling them covers far less than it says."""
    rng = np.random.default_rng(1)
    covered = {"pooled": 0, "both": 0}
    for _ in range(200):
        arms = simulated(rng, [0.0, 0.0], 5, 0.4, 0.02)
        difference = arms[1] - arms[0]
        low, high = stats.t.interval(
            0.95, difference.shape[1] - 1, difference.mean(), stats.sem(difference.mean(axis=0))
        )
        covered["pooled"] += low <= 0.0 <= high
        both = by_seed_and_problem(difference)
        covered["both"] += both.low <= 0.0 <= both.high
    assert covered["pooled"] < 150 < 180 < covered["both"], covered


def test_the_bootstrap_over_both() -> None:
    rng = np.random.default_rng(5)
    differences = rng.normal(0.1, 0.3, (6, 80)) + rng.normal(0, 0.1, 6)[:, None]
    low, high = resampled(differences, seed=0)
    one: Difference = by_seed_and_problem(differences)
    assert low < one.value < high
    # Too narrow for six seeds, by about the root of 5/6 and the quantile of t.
    assert 0.6 < (high - low) / (one.high - one.low) < 0.95
    assert resampled(differences, seed=0) == (low, high) != resampled(differences, seed=1)
    assert resampled([0.1, 0.3], seed=0) == pytest.approx((0.1, 0.3))
