"""Estimates on 1,319 real problems with four real answers each, against values computed another way: by hand, by enumeration, by scipy."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # scipy has no types

from papo.core.statistics import avg_at_k, maj_at_k, paired_bootstrap, pass_at_k

GROUPS = Path(__file__).parents[3] / "shared/data/gsm8k_sampled_G4.jsonl"

pytestmark = pytest.mark.skipif(not GROUPS.is_file(), reason="the real groups are not beside this checkout")

SAMPLES = 4


class Real(NamedTuple):
    """`groups`: correctness of the four answers to each problem; `answers`: what stands after the last `A:`."""

    groups: list[list[int]]
    answers: list[list[str | None]]

    def flat(self, *places: int) -> tuple[list[int], list[int]]:
        """Correctness and problem of the answers at `places`, all four if none are named."""
        chosen = places or range(SAMPLES)
        return [group[place] for group in self.groups for place in chosen], [
            problem for problem in range(len(self.groups)) for _ in chosen
        ]


@pytest.fixture(scope="module")
def real() -> Real:
    rows = [json.loads(line)["completions"] for line in GROUPS.read_text(encoding="utf-8").splitlines()]
    groups = [[int(answer["correct"]) for answer in row] for row in rows]
    assert {len(group) for group in groups} == {SAMPLES}
    return Real(groups, [[stated(answer["text"]) for answer in row] for row in rows])


def stated(text: str) -> str | None:
    _, mark, answer = text.rpartition("\nA:")
    return answer.strip() if mark else None


def thinned(real: Real, seed: int) -> list[list[float]]:
    """The groups with a third of the scores missing, and one problem without any."""
    lost = np.random.default_rng(seed).random((len(real.groups), SAMPLES)) < 1 / 3
    lost[7] = True
    return np.where(lost, math.nan, np.array(real.groups, dtype=float)).tolist()


def scored(groups: list[list[float]]) -> list[list[float]]:
    kept = [[score for score in group if score == score] for group in groups]
    return [group for group in kept if group]


def sandwich(groups: list[list[float]]) -> tuple[float, float]:
    """Estimate and CR1 standard error, clustered by problem, of a weighted regression on a constant; a sample weighs 1 / n_p."""
    weights = [1 / len(group) for group in groups for _ in group]
    flat = [score for group in groups for score in group]
    mean = math.fsum(w * y for w, y in zip(weights, flat, strict=True)) / math.fsum(weights)
    bread = 1 / math.fsum(weights)
    scores = [math.fsum((y - mean) / len(group) for y in group) for group in groups]
    meat = len(groups) / (len(groups) - 1) * math.fsum(score**2 for score in scores)
    return mean, math.sqrt(bread * meat * bread)


def jackknife(groups: list[list[float]]) -> float:
    """Standard error by leaving out one problem at a time."""
    values = [math.fsum(group) / len(group) for group in groups]
    without = [(math.fsum(values) - value) / (len(values) - 1) for value in values]
    middle = math.fsum(without) / len(without)
    return math.sqrt((len(without) - 1) / len(without) * math.fsum((value - middle) ** 2 for value in without))


def test_avg_at_4_and_its_error_are_those_of_a_clustered_regression_and_of_the_jackknife(real: Real) -> None:
    found = avg_at_k(*real.flat())
    groups = [[float(score) for score in group] for group in real.groups]
    mean, error = sandwich(groups)
    assert found.value == pytest.approx(Fraction(sum(map(sum, real.groups)), 4 * 1319), rel=1e-12)
    assert (found.value, found.standard_error) == pytest.approx((mean, error), rel=1e-10)
    assert found.standard_error == pytest.approx(jackknife(groups), rel=1e-10)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 1318, mean, error), rel=1e-7)
    assert found[4:] == (1319, 5276, 0)


def test_problems_with_one_to_four_scores_weigh_the_same(real: Real) -> None:
    groups = thinned(real, seed=1)
    found = avg_at_k(np.ravel(groups), np.repeat(np.arange(1319), SAMPLES))
    mean, error = sandwich(scored(groups))
    assert {len(group) for group in scored(groups)} == {1, 2, 3, 4}
    assert (found.value, found.standard_error) == pytest.approx((mean, error), rel=1e-10)
    assert found.standard_error == pytest.approx(jackknife(scored(groups)), rel=1e-10)
    assert found.value != pytest.approx(np.nanmean(groups), rel=1e-4)  # the mean over samples is another estimate
    assert found[4:] == (len(scored(groups)), sum(map(len, scored(groups))), int(np.isnan(groups).sum()))
    assert found.problems < 1319


def test_answers_to_one_problem_are_alike_so_that_counting_each_would_be_too_sure(real: Real) -> None:
    correct, problems = real.flat()
    of_samples = stats.sem(correct)
    # By the usual formula 1 + (n - 1) rho, with rho from a one-way analysis of variance.
    groups = np.array(real.groups)
    between = SAMPLES * groups.mean(axis=1).var(ddof=1)
    within = groups.var(axis=1, ddof=1).mean()
    rho = (between - within) / (between + (SAMPLES - 1) * within)
    found = avg_at_k(correct, problems).standard_error / of_samples
    assert found == pytest.approx(math.sqrt(1 + (SAMPLES - 1) * rho), rel=1e-3)
    assert found > 1.2


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_what_all_subsets_of_k_answers_give(real: Real, k: int) -> None:
    values = [
        sum(any(chosen) for chosen in itertools.combinations(group, k)) / math.comb(SAMPLES, k) for group in real.groups
    ]
    found = pass_at_k(*real.flat(), k)
    assert found.value == pytest.approx(math.fsum(values) / 1319, rel=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-10)
    assert (found.low, found.high) == pytest.approx(
        stats.t.interval(0.95, 1318, np.mean(values), stats.sem(values)), rel=1e-7
    )


def test_pass_at_2_of_problems_with_two_to_four_scores_is_what_all_pairs_give(real: Real) -> None:
    groups = [group for group in scored(thinned(real, seed=2)) if len(group) >= 2]
    values = [np.mean([max(pair) for pair in itertools.combinations(group, 2)]) for group in groups]
    ids = [problem for problem, group in enumerate(groups) for _ in group]
    found = pass_at_k([score for group in groups for score in group], ids, 2)
    assert {len(group) for group in groups} == {2, 3, 4}
    assert (found.value, found.standard_error) == pytest.approx((np.mean(values), stats.sem(values)), rel=1e-10)


def test_maj_at_4_is_what_a_count_of_the_votes_gives(real: Real) -> None:
    values, ties = [], 0
    for answers, group in zip(real.answers, real.groups, strict=True):
        votes = Counter(answer for answer in answers if answer is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        ties += len(winners) > 1
        shares = [
            Fraction(sum(score for each, score in zip(answers, group, strict=True) if each == winner), votes[winner])
            for winner in winners
        ]
        values.append(sum(shares, Fraction()) / max(len(winners), 1))
    found = maj_at_k([answer for answers in real.answers for answer in answers], *real.flat())
    assert 0 < ties < 1319
    assert found.value == pytest.approx(float(sum(values) / 1319), rel=1e-12)
    assert found.standard_error == pytest.approx(stats.sem([float(value) for value in values]), rel=1e-10)


# The places of the answers of a candidate and a baseline: 6B finetuned, 6B verified, 175B finetuned, 175B verified.
PAIRS = {"size": ((2, 3), (0, 1)), "verification": ((3,), (0,)), "nearly equal": ((1,), (2,)), "uneven": ((1, 3), (2,))}


@pytest.mark.parametrize("name", PAIRS)
def test_the_paired_interval_is_scipys(real: Real, name: str) -> None:
    first, second = PAIRS[name]
    groups = np.array(real.groups, dtype=float)
    differences = groups[:, first].mean(axis=1) - groups[:, second].mean(axis=1)
    found = paired_bootstrap(*real.flat(*first), *real.flat(*second), seed=5)
    scipys = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=10_000, batch=500, rng=np.random.default_rng(0)
    )
    error = float(differences.std() / math.sqrt(1319))  # what the bootstrap estimates, without drawing
    # Of 10,000 draws: a standard deviation errs by 1/sqrt(2 * 10,000) = 0.7 %, the 2.5 % point by
    # sqrt(0.025 * 0.975 / 10,000) / density(1.96) = 0.027 standard errors. Five times that, and sqrt(2) where both are drawn.
    assert found.value == pytest.approx(float(differences.mean()), abs=1e-12)
    assert found.standard_error == pytest.approx(error, rel=0.035)
    assert found.standard_error == pytest.approx(float(scipys.standard_error), rel=0.05)
    assert found.low == pytest.approx(float(scipys.confidence_interval.low), abs=0.19 * error)
    assert found.high == pytest.approx(float(scipys.confidence_interval.high), abs=0.19 * error)
    # 1,319 differences are enough for the normal interval, too.
    assert (found.low, found.high) == pytest.approx(stats.norm.interval(0.95, found.value, error), abs=0.15 * error)
    assert found[4:] == (1319, 1319 * (len(first) + len(second)), 0)


def test_with_one_answer_each_the_paired_error_is_that_of_the_discordant_pairs(real: Real) -> None:
    better = sum(group[3] > group[0] for group in real.groups)
    worse = sum(group[3] < group[0] for group in real.groups)
    by_hand = math.sqrt(better + worse - (better - worse) ** 2 / 1319) / 1319
    found = paired_bootstrap(*real.flat(3), *real.flat(0), seed=1)
    assert found.value == pytest.approx((better - worse) / 1319)
    assert found.standard_error == pytest.approx(by_hand, rel=0.035)
    unpaired = math.hypot(avg_at_k(*real.flat(3)).standard_error, avg_at_k(*real.flat(0)).standard_error)
    assert found.standard_error < 0.95 * unpaired


def covered(real: Real, problems: int, runs: int, interval: Any, truth: float) -> float:
    """Share of evaluations on `problems` problems, drawn from the real ones, whose interval holds the value of all of them."""
    rng = np.random.default_rng(0)
    groups = np.array(real.groups)
    intervals = (interval(groups[rng.integers(0, len(groups), problems)]) for _ in range(runs))
    return sum(low <= truth <= high for low, high in intervals) / runs


# Three standard errors of the coverage seen in 2,000 runs are 1.5 %; a percentile or t interval over 60 problems lacks up to 1 %.
@pytest.mark.parametrize("estimate", ["avg@4", "pass@2", "paired"])
def test_95_percent_intervals_cover_in_95_percent(real: Real, estimate: str) -> None:
    problems, everyone = 60, np.array(real.groups)
    ids = np.repeat(np.arange(problems), SAMPLES)
    half = np.repeat(np.arange(problems), 2)
    if estimate == "avg@4":
        truth = float(everyone.mean())
        share = covered(real, problems, 2000, lambda drawn: avg_at_k(drawn.ravel(), ids)[1:3], truth)
    elif estimate == "pass@2":
        truth = pass_at_k(*real.flat(), 2).value
        share = covered(real, problems, 2000, lambda drawn: pass_at_k(drawn.ravel(), ids, 2)[1:3], truth)
    else:
        truth = float(everyone[:, 2:].mean() - everyone[:, :2].mean())

        def paired(drawn: Any) -> tuple[float, float]:
            found = paired_bootstrap(drawn[:, 2:].ravel(), half, drawn[:, :2].ravel(), half, seed=0, resamples=1000)
            return found.low, found.high

        share = covered(real, problems, 2000, paired, truth)
    assert 0.925 <= share <= 0.975


def test_an_interval_that_takes_each_answer_for_a_fact_of_its_own_covers_less(real: Real) -> None:
    def by_samples(drawn: Any) -> tuple[float, float]:
        reach = 1.96 * stats.sem(drawn.ravel())
        return drawn.mean() - reach, drawn.mean() + reach

    assert covered(real, 60, 2000, by_samples, float(np.mean(real.groups))) < 0.9
