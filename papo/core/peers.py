"""What two libraries would have made of the same scores: group reward-decoupled normalisation (GDPO, arXiv 2601.05242) as TRL and
as verl compute it.

For comparison only; nothing is trained on these. With Z(x) = (x - mean) / (std + eps) over the group, ddof = 1, both take

    a = Z(r_out) + lam * Z(r_proc)

and standardise `a` over the batch. They differ from each other, and from `papo`, in what a missing score is and in this last step:

                   missing score                        the batch
    trl_gdpo       leaves mean and std, counts as 0     over responses
    verl_gdpo      is a score of 0.0                    over tokens: a long response weighs more, and its mean is subtracted
    papo           leaves mean and std, counts as 0     not standardised

Where wrong responses have no process score, `trl_gdpo` is therefore `papo` up to one factor for the whole batch, while `verl_gdpo`
normalises the process score over wrong responses, too, as `fullnorm` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from papo.core.groups import (
    LARGEST,
    BoolArray,
    FloatArray,
    IndexArray,
    as_outcomes,
    as_scores,
    extreme,
    group_index,
)
from papo.errors import DataError, ParamsError

_TRL_EPS = 1e-4
_VERL_EPS = 1e-6
_VERL_WHITENING = 1e-8


def trl_gdpo(
    orm_scores: npt.ArrayLike, prm_scores: npt.ArrayLike, group_ids: Iterable[Any], *, lam: float = 1.0
) -> FloatArray:
    """The (N,) advantages of TRL's `multi_objective_aggregation="normalize_then_sum"` with reward weights 1 and lam (TRL 1.16).

        a[i] = Z(r_out)[i] + lam * Z(r_proc)[i]         eps = 1e-4; a missing reward leaves Z and adds 0
        A[i] = (a[i] - mean(a)) / (std(a) + 1e-4)       over the responses of the batch that have a reward at all

    A response with neither reward leaves the batch and gets 0; so does the only response that has one. TRL computes in float32, this in
    float64.

    Args:
        orm_scores, prm_scores, group_ids: as in `compute_advantages`.
        lam: weight of the process reward, >= 0.

    Raises:
        DataError, ParamsError: as `compute_advantages`.
    """
    orm, prm, index, groups = _checked(orm_scores, prm_scores, group_ids, lam)
    has_orm, has_prm = ~np.isnan(orm), ~np.isnan(prm)
    total = _standardise(orm, has_orm, index, groups, _TRL_EPS)
    total += lam * _standardise(prm, has_prm, index, groups, _TRL_EPS)
    # The batch is one more group.
    return _standardise(total, has_orm | has_prm, np.zeros_like(index), 1, _TRL_EPS)


def verl_gdpo(
    orm_scores: npt.ArrayLike,
    prm_scores: npt.ArrayLike,
    group_ids: Iterable[Any],
    lengths: npt.ArrayLike,
    *,
    lam: float = 1.0,
) -> FloatArray:
    """The (N,) advantages of verl's `gdpo` estimator, one number for all tokens of a response.

        a[i] = Z(r_out)[i] + lam * Z(r_proc)[i]         eps = 1e-6; a missing reward is 0.0; alone in its group, Z(x) = x / (1 + eps)
        m    = sum(len * a) / n                         n = sum(len), the tokens of the batch
        v    = sum(len * (a - m)^2) / n * n / (n - 1)
        A[i] = (a[i] - m) / sqrt(v + 1e-8)

    In a batch of fewer than two tokens every A is 0.

    Args:
        orm_scores, prm_scores, group_ids: as in `compute_advantages`.
        lengths: (N,) tokens of each response.
        lam: weight of the process reward, >= 0.

    Raises:
        DataError, ParamsError: as `compute_advantages`; or a length is below 0.
    """
    orm, prm, index, groups = _checked(orm_scores, prm_scores, group_ids, lam)
    tokens = as_scores(lengths, "lengths", length=orm.size, missing_ok=False)
    if (tokens < 0.0).any():
        raise DataError(f"lengths[{int(np.argmax(tokens < 0.0))}] is below 0", where="lengths", fix="Count tokens.")
    total = _verl_normalise(orm, index, groups) + lam * _verl_normalise(prm, index, groups)
    count = float(tokens.sum())
    if count < 2.0:
        return np.zeros_like(total)
    centred = total - float(np.sum(tokens * total)) / count
    variance = float(np.sum(tokens * centred * centred)) / (count - 1.0)
    return centred / math.sqrt(variance + _VERL_WHITENING)


def _verl_normalise(scores: FloatArray, index: IndexArray, groups: int) -> FloatArray:
    filled = np.nan_to_num(scores, nan=0.0)
    alone = np.bincount(index, minlength=groups)[index] == 1
    normalised = _standardise(filled, np.ones_like(alone), index, groups, _VERL_EPS)
    return np.where(alone, filled / (1.0 + _VERL_EPS), normalised)


def _standardise(scores: FloatArray, population: BoolArray, index: IndexArray, groups: int, eps: float) -> FloatArray:
    """(x - mean) / (std + eps) over the masked part of each group, 0 outside it and where it is one response.

    Unlike `group_normalise` a std below eps is divided by, as both libraries do.
    """
    rows, present = index[population], scores[population]
    # Measured from the lowest, equal scores are exact zeros.
    above = present - extreme(np.minimum, np.inf, scores, population, index, groups)[rows]
    count = np.bincount(rows, minlength=groups)
    centred = above - (np.bincount(rows, above, minlength=groups) / np.maximum(count, 1))[rows]
    squares = np.bincount(rows, centred * centred, minlength=groups)
    std = np.sqrt(squares / np.maximum(count - 1, 1))
    normalised = np.zeros(scores.size)
    normalised[population] = centred / (std + eps)[rows]
    return normalised


def _checked(
    orm_scores: npt.ArrayLike, prm_scores: npt.ArrayLike, group_ids: Iterable[Any], lam: float
) -> tuple[FloatArray, FloatArray, IndexArray, int]:
    orm = as_outcomes(orm_scores, "orm_scores")
    prm = as_scores(prm_scores, "prm_scores", length=orm.size)
    if not 0.0 <= lam <= LARGEST:
        raise ParamsError(f"lam is {lam}; it must be 0 or above", where="lam")
    index, groups = group_index(group_ids, length=orm.size)
    return orm, prm, index, groups
