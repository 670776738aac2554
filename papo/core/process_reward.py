"""The process reward of Eq. 4 from the judge's score: what a missing one counts as, and what length is worth among correct responses.

    r_proc[i] = s[i] - b (n[i] - mean_C(n)) - c n[i] / L[i]

with the judge's score s, n tokens of a limit of L, and C the correct responses of the group that have a score. By default b = c = 0 and
r_proc = s. Neither term reaches a wrong response, or Eq. 3: what is right stays worth more than what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.groups import FloatArray, as_outcomes, as_scores, group_index
from papo.errors import ParamsError

MISSING = ("missing", "zero")


class Rule(NamedTuple):
    """What makes a process reward of a score, where it is not the score itself; as `process_rewards` takes it."""

    missing: str = "missing"
    length_neutral: bool = False
    length_cost: float = 0.0

    def __str__(self) -> str:
        return (
            f"missing={self.missing} length_neutral={str(self.length_neutral).lower()} length_cost={self.length_cost:g}"
        )


def process_rewards(
    prm_scores: npt.ArrayLike,
    orm_scores: npt.ArrayLike,
    group_ids: Iterable[Any],
    lengths: npt.ArrayLike,
    limits: npt.ArrayLike,
    *,
    needed: npt.ArrayLike,
    missing: str = "missing",
    length_neutral: bool = False,
    length_cost: float = 0.0,
) -> FloatArray:
    """(N,) process rewards, NaN where one is missing.

    Args:
        prm_scores, orm_scores, group_ids: as `compute_advantages` takes them.
        lengths, limits: (N,) tokens of each response, and the most that it might have had.
        needed: (N,) whom the variant asks a process score of, as `process_needed` says.
        missing: `zero` gives those of them that have none a score of 0, as most trainers do: a judge that could not be asked then counts
            as one that found nothing good. Here to measure what that costs.
        length_neutral: b is the slope of s over n within the groups, sum (n - mean_C(n)) (s - mean_C(s)) / sum (n - mean_C(n))^2 over all
            correct responses of the round, so that the rewards do not follow length; 0 where no lengths differ.
        length_cost: c, what a response of the longest length allowed pays.

    Raises:
        DataError: lengths differ, or malformed scores.
        ParamsError: an unknown `missing`, or a cost that is negative.
    """
    if missing not in MISSING:
        raise ParamsError(f"unknown missing {missing!r}", where="missing", fix=f"Choose one of {', '.join(MISSING)}.")
    if not 0.0 <= length_cost < np.inf:
        raise ParamsError(f"length_cost is {length_cost} and must be at least 0", where="length_cost")
    orm = as_outcomes(orm_scores, "orm_scores")
    score = as_scores(prm_scores, "prm_scores", length=orm.size)
    tokens = as_scores(lengths, "lengths", length=orm.size, missing_ok=False)
    limit = as_scores(limits, "limits", length=orm.size, missing_ok=False)
    index, groups = group_index(group_ids, length=orm.size)
    reward = score.copy()
    correct = orm == 1.0
    if length_neutral:
        judged = correct & ~np.isnan(score)
        rows, count = index[judged], np.maximum(np.bincount(index[judged], minlength=groups), 1)
        apart = tokens[judged] - (np.bincount(rows, tokens[judged], minlength=groups) / count)[rows]
        above = score[judged] - (np.bincount(rows, score[judged], minlength=groups) / count)[rows]
        spread = float(np.sum(apart * apart))
        slope = float(np.sum(apart * above)) / spread if spread > 0.0 else 0.0
        reward[judged] -= slope * apart
    if length_cost:
        reward[correct] -= length_cost * (tokens / limit)[correct]
    if missing == "zero":
        reward[np.asarray(needed, dtype=np.bool_) & np.isnan(score)] = 0.0
    return reward
