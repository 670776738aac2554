"""Several votes on one response, combined into one score, and how far they agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import mean, median

from papo.errors import DataError, ParamsError

VOTES = {"median": "majority", "majority": "majority", "mean": "average"}
"""Ways to combine scores -> how `papo.core.credit.combine_votes` combines the wrong steps of the same votes."""


def combine_scores(scores: Sequence[float], vote: str = "median") -> float:
    """One score of k >= 1 votes; their order does not count, so that responses with the same votes have the very same score.

        median     the middle one; of an even number, the mean of the two in the middle
        majority   the most frequent one; of several as frequent, the lowest
        mean       their mean, rounded once

    Raises:
        DataError: no vote, or one that is no finite number.
        ParamsError: an unknown vote.
    """
    if vote not in VOTES:
        raise ParamsError(f"unknown vote {vote!r}", where="vote", fix=f"Choose one of {', '.join(VOTES)}.")
    if not scores or not all(map(math.isfinite, scores)):
        raise DataError(f"not the votes on a response: {list(scores)}", where="scores", fix="Give at least one number.")
    if vote == "median":
        return float(median(scores))
    if vote == "mean":
        return float(mean(scores))  # in fractions: equal votes give themselves, in any number
    counts = Counter(scores)
    most = max(counts.values())
    return float(min(score for score, count in counts.items() if count == most))


def vote_agreement(votes: Iterable[Sequence[float]]) -> float | None:
    """Mean, over the responses with two votes or more, of the share of pairs of their votes that are equal; None without any.

    P = mean_i #{j < k: v_ij = v_ik} / (n_i (n_i - 1) / 2)
    """
    shares = []
    for ballot in votes:
        if len(ballot) > 1:
            pairs = list(combinations(ballot, 2))
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    return math.fsum(shares) / len(shares) if shares else None
