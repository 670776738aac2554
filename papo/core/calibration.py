"""How far the scores of a judge agree with labels, and what they follow besides.

A label is one of a few levels in [0, 1], such as 0, 0.5 and 1, that says how good the reasoning of a response is; a score is any number.
Where scores are compared with labels as levels, a score counts as the nearest level, the higher of two that are equally near. A
measure that its data cannot give (one level only, scores that are all alike, a single vote) is None, never a number that looks like one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.groups import FloatArray, IndexArray, as_scores, group_index
from papo.errors import DataError, ParamsError

WEIGHTS = ("none", "linear")

_ROUNDING = 1e-12
"""Share of the whole variation up to which what is left within the levels is a rounding error."""

_ENOUGH = 0.5
"""Share of the resamples that must have a value for an interval."""


class Measured(NamedTuple):
    """A measure with its interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def beyond(self, limit: float) -> bool:
        """Whether it is above `limit` in size, and its interval, if it has one, on one side of 0."""
        if self.value is None or abs(self.value) <= limit:
            return False
        return self.low is None or self.high is None or not self.low <= 0.0 <= self.high


class FirstErrors(NamedTuple):
    """How often a judge finds the first wrong step: shares of the responses that have one, of those that have none, and of all."""

    compared: int
    found: float | None
    none_right: float | None
    exact: float | None


def nearest_level(scores: npt.ArrayLike, levels: Sequence[float]) -> IndexArray:
    """(N,) the number of the level nearest to each score; of two equally near the higher.

    Raises:
        DataError: a score is missing or no number.
        ParamsError: levels are not at least one number, ascending.
    """
    if not levels or any(b <= a for a, b in pairwise(levels)):
        raise ParamsError(f"levels are {list(levels)}: ascending numbers are needed", where="levels")
    values = as_scores(scores, "scores", missing_ok=False)
    middles = (np.asarray(levels[:-1]) + np.asarray(levels[1:])) / 2.0
    return np.searchsorted(middles, values, side="right").astype(np.intp)


def confusion(labels: IndexArray, verdicts: IndexArray, levels: int) -> IndexArray:
    """(L, L) counts: C[i, j] responses have label i and verdict j, both numbers of levels."""
    counts: IndexArray = np.bincount(labels * levels + verdicts, minlength=levels * levels).reshape(levels, levels)
    return counts


def agreement(counts: IndexArray) -> float | None:
    """Share of the responses whose verdict is their label: sum_i C[i, i] / N; None of no response."""
    total = int(counts.sum())
    return float(np.trace(counts)) / total if total else None


def cohen_kappa(counts: IndexArray, weights: str = "none") -> float | None:
    """Cohen's kappa: 1 for full agreement, 0 for that of chance.

        kappa = 1 - sum_ij w_ij C_ij / sum_ij w_ij E_ij,    E_ij = (sum_j C_ij) (sum_i C_ij) / N

    with w_ij = 1 where i != j (`none`), or |i - j| (`linear`: the further from the label, the worse).

    Returns:
        None where all labels are of one level, as kappa then says nothing: whatever the verdicts, it is 0 or undefined.

    Raises:
        ParamsError: unknown weights.
    """
    if weights not in WEIGHTS:
        raise ParamsError(f"unknown weights {weights!r}", where="weights", fix=f"Choose one of {', '.join(WEIGHTS)}.")
    by_label, by_verdict = counts.sum(axis=1), counts.sum(axis=0)
    if np.count_nonzero(by_label) < 2:
        return None
    apart = np.abs(np.subtract.outer(np.arange(len(counts)), np.arange(len(counts)))).astype(np.float64)
    cost = np.minimum(apart, 1.0) if weights == "none" else apart
    expected = np.outer(by_label, by_verdict) / counts.sum()
    return 1.0 - float((cost * counts).sum()) / float((cost * expected).sum())


def auc(labels: IndexArray, scores: npt.ArrayLike) -> float | None:
    """The chance that of two responses with different labels the better one has the higher score; equal scores count half.

        AUC = sum_{a < b} (#{s_b > s_a} + #{s_b = s_a} / 2) / sum_{a < b} n_a n_b       over levels a, b and their responses

    With two levels it is the area under the ROC curve, with more it is (Somers' D + 1) / 2.

    Returns:
        None where all labels are of one level.
    """
    values = as_scores(scores, "scores", length=labels.size, missing_ok=False)
    _, at = np.unique(values, return_inverse=True)
    levels = int(labels.max(initial=-1)) + 1
    table = np.zeros((levels, int(at.max(initial=-1)) + 1))
    np.add.at(table, (labels, at), 1.0)
    ahead = pairs = 0.0
    for low, high in combinations(range(levels), 2):
        below = np.cumsum(table[low]) - table[low]
        ahead += float(table[high] @ (below + table[low] / 2.0))
        pairs += float(table[low].sum() * table[high].sum())
    return ahead / pairs if pairs else None


def partial_correlation(scores: npt.ArrayLike, other: npt.ArrayLike, labels: IndexArray) -> float | None:
    """Correlation of the score with something else, given the label: what the score follows that the label does not explain.

        r = sum_i ds_i dx_i / sqrt(sum_i ds_i^2 sum_i dx_i^2),     ds_i = s_i - mean(s | label_i),  dx_i = x_i - mean(x | label_i)

    which is Pearson's correlation of the residuals of both on the labels as categories.

    Returns:
        None where score or the other is the same for all responses of each label.
    """
    ds, dx = _within(scores, labels, "scores"), _within(other, labels, "other")
    if ds is None or dx is None:
        return None
    size = math.sqrt(float(ds @ ds)) * math.sqrt(float(dx @ dx))
    return float(np.clip(float(ds @ dx) / size, -1.0, 1.0))


def partial_slope(scores: npt.ArrayLike, other: npt.ArrayLike, labels: IndexArray) -> float | None:
    """How much the score changes, given the label, for one standard deviation of something else within a label.

        b = sum_i ds_i dx_i / sum_i dx_i^2 * sqrt(sum_i dx_i^2 / N)         ds, dx as in `partial_correlation`

    Returns:
        0 where the score is the same for all responses of each label; None where the other is.
    """
    ds, dx = _within(scores, labels, "scores"), _within(other, labels, "other")
    if dx is None:
        return None
    return 0.0 if ds is None else float(ds @ dx) / math.sqrt(float(dx @ dx) * dx.size)


def krippendorff_alpha(votes: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha of the votes as numbers: 1 for equal votes on every response, 0 for no more alike than votes on different ones.

        alpha = 1 - D_o / D_e
        D_o = sum_i (sum_{j != k} (v_ij - v_ik)^2) / (n_i - 1) / n,     D_e = sum_{a != b} (v_a - v_b)^2 / (n (n - 1))

    over the responses i with n_i >= 2 votes, a and b running over all their n votes. Responses may have different numbers of votes.

    Returns:
        None where no response has two votes, or all votes are the same number.
    """
    ballots = [as_scores(ballot, "votes", missing_ok=False) for ballot in votes if len(ballot) > 1]
    if not ballots:
        return None
    pooled = np.concatenate(ballots)
    # sum over pairs of (a - b)^2 is 2 n sum (a - mean)^2
    expected = 2.0 * pooled.size * _squares(pooled) / (pooled.size * (pooled.size - 1))
    if expected <= _ROUNDING:
        return None
    observed = math.fsum(2.0 * one.size * _squares(one) / (one.size - 1) for one in ballots) / pooled.size
    return 1.0 - observed / expected


def first_errors(named: Sequence[int | None], labelled: Sequence[int | None]) -> FirstErrors:
    """Compares first wrong steps, numbered from 1, 0 where no step is wrong; a None on either side is not compared.

    `found`: of the responses with a wrong step, those whose first one the judge names; `none_right`: of the others, those in which it
    names none; `exact`: both together.

    Raises:
        DataError: not as many of the one as of the other.
    """
    if len(named) != len(labelled):
        raise DataError(f"{len(named)} named first errors for {len(labelled)} labels", where="first_errors")
    pairs = [(a, b) for a, b in zip(named, labelled, strict=True) if a is not None and b is not None]
    wrong, right = [a == b for a, b in pairs if b], [a == b for a, b in pairs if not b]
    return FirstErrors(len(pairs), _share(wrong), _share(right), _share(wrong + right))


def intervals(
    measures: Mapping[str, Callable[[IndexArray], float | None]],
    clusters: Sequence[Any],
    *,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Measured]:
    """Each measure of all rows, with the percentile interval of a bootstrap over clusters.

    Clusters (the responses to one problem are not independent) are drawn with replacement, as many as there are; a measure is called with
    the rows of a draw, and all measures see the same draws. A draw in which a measure is not defined says nothing about it; if that
    is half of the draws or more, or there is one cluster only, there is no interval.

    Args:
        measures: name -> function of (M,) row numbers.
        clusters: (N,) ids.
        seed, resamples: of the bootstrap.
        confidence: coverage of the interval.

    Raises:
        ParamsError: confidence outside (0, 1), or resamples < 2.
    """
    if resamples < 2 or not 0.0 < confidence < 1.0:
        raise ParamsError(
            f"resamples is {resamples} and confidence {confidence}", where="intervals", fix="2 or more; 0 to 1"
        )
    index, number = group_index(clusters, length=len(clusters), name="clusters")
    whole = {name: measure(np.arange(len(clusters))) for name, measure in measures.items()}
    if number < 2:
        return {name: Measured(value) for name, value in whole.items()}
    rows = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    drawn: dict[str, list[float]] = {name: [] for name, value in whole.items() if value is not None}
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        chosen = np.concatenate([rows[cluster] for cluster in rng.integers(0, number, number).tolist()])
        for name, values in drawn.items():
            if (value := measures[name](chosen)) is not None:
                values.append(value)
    tail = (1.0 - confidence) / 2.0
    found = {}
    for name, value in whole.items():
        values = drawn.get(name, [])
        ends = np.quantile(values, [tail, 1.0 - tail]).tolist() if len(values) > _ENOUGH * resamples else (None, None)
        found[name] = Measured(value, *ends)
    return found


def _within(values: npt.ArrayLike, labels: IndexArray, name: str) -> FloatArray | None:
    """What is left of the values when the mean of their label is taken off; None where that is nothing."""
    data = as_scores(values, name, length=labels.size, missing_ok=False)
    if not data.size:
        return None
    means = np.bincount(labels, data) / np.maximum(np.bincount(labels), 1)
    left: FloatArray = data - means[labels]
    return left if float(left @ left) > _ROUNDING * max(float(data @ data), _ROUNDING) else None


def _squares(values: FloatArray) -> float:
    return float(((values - values.mean()) ** 2).sum())


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None
