"""Estimates of an evaluation, each with an interval over problems.

The problem is the unit of sampling: k answers to one problem are not k independent facts. Every estimate is therefore a
mean of one value per problem, v_1 .. v_P, and its standard error is clustered by problem,

    standard_error = sqrt(sum_p (v_p - mean(v))^2 / (P (P - 1))),    interval = mean +- t_{P-1} * standard_error.

A missing score (NaN: the verifier timed out, the gold answer is unreadable) says nothing about the policy. It is left
out; with `missing="wrong"` it counts as not correct; the estimate reports their number either way. A problem without
any scored sample is left out. The interval of a single problem is everything that is possible and its standard error
NaN. When all problems have the same value the interval shrinks to that point: there is no variation to estimate from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.groups import BoolArray, FloatArray, IndexArray, as_outcomes, group_index, is_missing
from papo.errors import DataError, ParamsError

MISSING = ("exclude", "wrong")

_RESAMPLES_AT_ONCE = 500  # bounds the memory of the bootstrap


class Estimate(NamedTuple):
    """A mean over `problems` with its interval; it uses `samples`, and `missing` had no score."""

    value: float
    low: float
    high: float
    standard_error: float
    problems: int
    samples: int
    missing: int


class _Samples(NamedTuple):
    """(N,) scores, problem numbers out of P, and which rows count; `missing` of them had no score."""

    scores: FloatArray
    problem: IndexArray
    problems: int
    scored: BoolArray
    missing: int

    def counts(self) -> FloatArray:
        return np.bincount(self.problem[self.scored], minlength=self.problems).astype(np.float64)

    def solved(self) -> FloatArray:
        scores = np.where(self.scored, self.scores, 0.0)
        return np.bincount(self.problem, scores, minlength=self.problems).astype(np.float64, copy=False)

    def means(self) -> FloatArray:
        """(P,) share of samples that are correct; 0 for a problem without scored samples."""
        return self.solved() / np.maximum(self.counts(), 1.0)


def avg_at_k(
    correct: npt.ArrayLike, problem_ids: Iterable[Any], *, confidence: float = 0.95, missing: str = "exclude"
) -> Estimate:
    """avg@k: the mean over problems of the share of samples that are correct, v_p = c_p / n_p.

    Args:
        correct: (N,) 0 or 1, NaN where missing.
        problem_ids: (N,) ids, in any order; problems may have different numbers of samples.
        confidence: coverage of the interval.
        missing: `exclude`, or `wrong` to count a missing score as not correct.

    Raises:
        DataError: no scored sample, or malformed arrays.
        ParamsError: confidence outside (0, 1), or an unknown `missing`.
    """
    samples = _samples(correct, problem_ids, missing)
    return _estimate(samples.means(), samples, confidence)


def pass_at_k(
    correct: npt.ArrayLike,
    problem_ids: Iterable[Any],
    k: int,
    *,
    confidence: float = 0.95,
    missing: str = "exclude",
) -> Estimate:
    """pass@k, unbiased: the chance that one of k samples is correct (arXiv 2107.03374, Eq. 1).

    With n_p samples of which c_p are correct, v_p = 1 - C(n_p - c_p, k) / C(n_p, k), computed as a product of k ratios
    that neither overflows nor cancels.

    Args and errors as in `avg_at_k`; also:

    Raises:
        DataError: a problem has fewer than k scored samples.
        ParamsError: k < 1.
    """
    if k < 1:
        raise ParamsError(f"k is {k} and must be at least 1", where="pass_at_k")
    samples = _samples(correct, problem_ids, missing)
    counts = samples.counts()
    short = int(np.count_nonzero((counts > 0) & (counts < k)))
    if short:
        raise DataError(
            f"{short} problems have fewer than {k} scored samples; pass@{k} is not defined for them",
            where="pass_at_k",
            fix="Lower k, score the missing samples, or count them as not correct with missing='wrong'.",
        )
    failed = counts - samples.solved()
    all_fail = np.ones(samples.problems)
    for drawn in range(k):
        all_fail *= np.maximum(failed - drawn, 0.0) / np.maximum(counts - drawn, 1)
    return _estimate(1.0 - all_fail, samples, confidence)


def maj_at_k(
    answers: Sequence[str | None],
    correct: npt.ArrayLike,
    problem_ids: Iterable[Any],
    *,
    confidence: float = 0.95,
    missing: str = "exclude",
) -> Estimate:
    """maj@k: whether the most frequent answer among the samples of a problem is correct (arXiv 2203.11171).

    Among t answers tied for the most votes v_p is the share that is correct, which is the expectation over a fair
    tie-break. Answers vote together when they are the same string, so pass them in a canonical form; where the verifier
    judged equal strings differently, their mean counts. An answer of None (nothing extracted) does not vote, and a
    problem with samples but without votes is not solved.

    Args:
        answers: (N,) extracted answers.
        Others as in `avg_at_k`.
    """
    samples = _samples(correct, problem_ids, missing)
    if len(answers) != samples.scores.size:
        raise DataError(f"{len(answers)} answers for {samples.scores.size} samples", where="answers")
    votes = samples.scored & ~np.fromiter((is_missing(answer) for answer in answers), dtype=np.bool_)
    voters = samples.problem[votes]
    ballots = list(zip(voters.tolist(), itertools.compress(answers, votes), strict=True))
    choice, choices = group_index(ballots, length=voters.size, name="answers")
    tally = np.bincount(choice, minlength=choices)
    truth = np.bincount(choice, samples.scores[votes], minlength=choices) / tally
    problem = np.zeros(choices, dtype=np.intp)
    problem[choice] = voters
    most = np.zeros(samples.problems, dtype=np.intp)
    np.maximum.at(most, problem, tally)
    winners = tally == most[problem]
    tied = np.bincount(problem[winners], minlength=samples.problems)
    solved = np.bincount(problem[winners], truth[winners], minlength=samples.problems)
    return _estimate(solved / np.maximum(tied, 1), samples, confidence)


def paired_bootstrap(
    candidate: npt.ArrayLike,
    candidate_ids: Iterable[Any],
    baseline: npt.ArrayLike,
    baseline_ids: Iterable[Any],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
    missing: str = "exclude",
) -> Estimate:
    """Difference of avg@k between two policies on the same problems, candidate minus baseline.

    With d_p the difference of the two means on problem p, value = mean(d). Problems are drawn with replacement
    `resamples` times; the interval is the percentile interval of the means of d and the standard error their standard
    deviation. Pairing removes how hard the problems are, which is most of the variance. The order of the rows does not
    matter, and the policies may have different numbers of samples. A problem on which one policy has no scored sample
    is left out of both.

    Args:
        candidate, baseline: correctness of each sample, 0, 1 or NaN.
        candidate_ids, baseline_ids: their problem ids.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap draws.
        Others as in `avg_at_k`.

    Raises:
        DataError: the policies were evaluated on different problems, or no problem is left.
        ParamsError: as in `avg_at_k`, or resamples < 2.
    """
    if resamples < 2:
        raise ParamsError(f"resamples is {resamples} and must be at least 2", where="paired_bootstrap")
    first, second = _paired_samples(candidate, list(candidate_ids), baseline, list(baseline_ids), missing)
    both = (first.counts() > 0.0) & (second.counts() > 0.0)
    if not both.any():
        raise DataError("no problem has scored samples of both policies", where="paired_bootstrap")
    used = int((first.counts() + second.counts())[both].sum())
    interval = _bootstrapped((first.means() - second.means())[both], seed, resamples, confidence)
    return interval._replace(samples=used, missing=first.missing + second.missing)


def paired_bootstrap_of_values(
    candidate: Mapping[Any, float],
    baseline: Mapping[Any, float],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Estimate:
    """As `paired_bootstrap`, for any metric that has one value a problem, as pass@k and maj@k have.

    Args:
        candidate, baseline: problem id -> value; problems that only one of them has are left out and counted as missing.
        Others as in `paired_bootstrap`; `samples` of the estimate is the number of values.

    Raises:
        DataError: no problem has both values.
        ParamsError: as in `paired_bootstrap`.
    """
    if resamples < 2:
        raise ParamsError(f"resamples is {resamples} and must be at least 2", where="paired_bootstrap_of_values")
    both = candidate.keys() & baseline.keys()
    if not both:
        raise DataError("no problem has values of both policies", where="paired_bootstrap_of_values")
    differences = np.array([candidate[problem] - baseline[problem] for problem in both])
    interval = _bootstrapped(differences, seed, resamples, confidence)
    return interval._replace(samples=2 * len(both), missing=len(candidate.keys() ^ baseline.keys()))


def _bootstrapped(differences: FloatArray, seed: int, resamples: int, confidence: float) -> Estimate:
    """Mean of one value a problem, with its percentile interval; sorted, so that the draws do not depend on the order of the rows."""
    differences = np.sort(differences)
    drawn = _bootstrap_means(differences, resamples, seed)
    tail = (1.0 - _checked_confidence(confidence)) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail]).tolist() if differences.size > 1 else (-1.0, 1.0)
    error = float(drawn.std(ddof=1)) if differences.size > 1 else math.nan
    return Estimate(float(differences.mean()), low, high, error, differences.size, 0, 0)


def _paired_samples(
    candidate: npt.ArrayLike, candidate_ids: list[Any], baseline: npt.ArrayLike, baseline_ids: list[Any], missing: str
) -> tuple[_Samples, _Samples]:
    """The samples of both policies with one numbering of the problems."""
    first, second = _samples(candidate, candidate_ids, missing), _samples(baseline, baseline_ids, missing)
    split = len(candidate_ids)
    number, problems = group_index(candidate_ids + baseline_ids, length=split + len(baseline_ids), name="problem_ids")
    _refuse_unpaired("baseline", np.isin(number[:split], number[split:], invert=True), candidate_ids)
    _refuse_unpaired("candidate", np.isin(number[split:], number[:split], invert=True), baseline_ids)
    return (
        first._replace(problem=number[:split], problems=problems),
        second._replace(problem=number[split:], problems=problems),
    )


def _refuse_unpaired(name: str, absent: BoolArray, ids: Sequence[Any]) -> None:
    if absent.any():
        raise DataError(
            f"the {name} did not answer problem {ids[int(np.argmax(absent))]!r}, which the other policy did",
            where="paired_bootstrap",
            fix="Evaluate both policies on the same problems.",
        )


def _samples(correct: npt.ArrayLike, problem_ids: Iterable[Any], missing: str) -> _Samples:
    if missing not in MISSING:
        raise ParamsError(f"unknown missing {missing!r}", where="missing", fix=f"Choose one of {', '.join(MISSING)}.")
    scores = as_outcomes(correct, "correct")
    problem, problems = group_index(problem_ids, length=scores.size, name="problem_ids")
    unscored = np.isnan(scores)
    if missing == "wrong":
        return _Samples(np.where(unscored, 0.0, scores), problem, problems, np.ones_like(unscored), int(unscored.sum()))
    return _Samples(scores, problem, problems, ~unscored, int(unscored.sum()))


def _estimate(values: FloatArray, samples: _Samples, confidence: float) -> Estimate:
    """Mean and t interval, cut to [0, 1], of one value per problem that has scored samples."""
    per_problem = values[samples.counts() > 0]
    problems, scored = per_problem.size, int(samples.scored.sum())
    quantile = 0.5 + _checked_confidence(confidence) / 2.0
    if problems == 0:
        raise DataError("no sample has a score", where="correct", fix="Score the samples, or use missing='wrong'.")
    value = float(per_problem.mean())
    if problems == 1:
        return Estimate(value, 0.0, 1.0, math.nan, 1, scored, samples.missing)
    error = float(per_problem.std(ddof=1)) / math.sqrt(problems)
    reach = _t_quantile(quantile, problems - 1) * error
    return Estimate(value, max(value - reach, 0.0), min(value + reach, 1.0), error, problems, scored, samples.missing)


def _bootstrap_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    edges = [*range(0, resamples, _RESAMPLES_AT_ONCE), resamples]
    draws = (rng.integers(0, values.size, (stop - start, values.size)) for start, stop in itertools.pairwise(edges))
    return np.concatenate([values[rows].mean(axis=1) for rows in draws])


def _t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else Cornish-Fisher (Abramowitz-Stegun 26.7.5).

    At the 97.5 % point it is within 0.5 % for 3 degrees and within 0.01 % from 9 degrees on.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2.0 * probability - 1.0) * math.sqrt(0.5 / (probability * (1.0 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4.0,
        (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0,
        (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0,
        (79.0 * z**9 + 776.0 * z**7 + 1482.0 * z**5 - 1920.0 * z**3 - 945.0 * z) / 92160.0,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def _checked_confidence(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ParamsError(f"confidence is {confidence} and must lie between 0 and 1", where="confidence")
    return confidence
