"""Groups of responses: who belongs together, checked scores, and what is computed within each group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from papo.errors import DataError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.intp]

LARGEST = 1e100
"""Bound on the size of a score: beyond it a sum of squares could overflow float64."""


def group_normalise(
    scores: FloatArray, population: BoolArray, index: IndexArray, groups: int, *, scale: str, eps: float
) -> FloatArray:
    """(x - mean) / (std + eps) over the masked part of each group (Eq. 3); 0 outside it and where its std <= eps.

    Args:
        scores: (N,) values, finite where masked.
        population: (N,) mask of the responses that are compared with each other.
        index, groups: as `group_index` gives them.
        scale, eps: as in `compute_advantages`.
    """
    rows, present = index[population], scores[population]
    # Measured from the group's lowest score, equal scores are exact zeros, and for scores such as 0, 0.5 and 1 every
    # sum below is exact, so that the order of the rows changes no bit. As one term is 0, the one-pass variance loses at
    # most a factor of the group size in precision.
    above = present - extreme(np.minimum, np.inf, scores, population, index, groups)[rows]
    count = np.bincount(rows, minlength=groups)
    sums = np.bincount(rows, above, minlength=groups)
    squares = np.bincount(rows, above * above, minlength=groups)
    std = np.sqrt(np.maximum(count * squares - sums * sums, 0.0) / np.maximum(count * (count - 1.0), 1.0))
    factor = np.where(std > eps, 1.0 / (std + eps) if scale == "std" else 1.0, 0.0)
    normalised = np.zeros(scores.size)
    normalised[population] = (above - (sums / np.maximum(count, 1))[rows]) * factor[rows]
    return normalised


def group_index(ids: Iterable[Any], *, length: int, name: str = "group_ids") -> tuple[IndexArray, int]:
    """Number the groups 0..P-1: (index of its group for each of the N rows, P). Equal ids are one group.

    Raises:
        DataError: not `length` ids, or an id is None or NaN.
    """
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise DataError(f"{name} has {ids.ndim} dimensions and needs one", where=name)
    numeric = isinstance(ids, np.ndarray) and ids.dtype.kind in "biuf"
    values: Any = ids if numeric else ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    _check_length(name, len(values), length)
    if numeric:
        _refuse_rows(np.isnan(values), values, name, "a group id must not be missing")
        unique, index = np.unique(values, return_inverse=True)
        return index.astype(np.intp, copy=False), unique.size
    # A dictionary keeps ids of mixed types apart (np.asarray would make the int 1 and the string "1" one group) and is
    # several times quicker than sorting strings.
    numbers: defaultdict[Any, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    index = np.fromiter(map(numbers.__getitem__, values), dtype=np.intp, count=length)
    if any(is_missing(key) for key in numbers):
        _refuse_rows(np.array([is_missing(v) for v in values]), values, name, "a group id must not be missing")
    return index, len(numbers)


def is_missing(value: object) -> bool:
    """Whether a single value is None or NaN."""
    return value is None or bool(value != value)


def as_scores(values: npt.ArrayLike, name: str, *, length: int | None = None, missing_ok: bool = True) -> FloatArray:
    """A checked (N,) float64 copy or view of scores, None as NaN.

    Raises:
        DataError: not numbers, not one-dimensional, not `length` of them, infinite, or missing against `missing_ok`.
    """
    try:
        scores: FloatArray = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} are not all numbers: {error}", where=name, fix="Use NaN for missing.") from error
    if scores.ndim != 1:
        raise DataError(f"{name} has {scores.ndim} dimensions and needs one", where=name)
    if length is not None:
        _check_length(name, scores.size, length)
    _refuse_rows(np.abs(scores) > LARGEST, scores, name, f"a score must be within {LARGEST:g} in size")
    if not missing_ok:
        _refuse_rows(np.isnan(scores), scores, name, "no value may be missing here")
    return scores


def as_outcomes(values: npt.ArrayLike, name: str, *, length: int | None = None) -> FloatArray:
    """Like `as_scores`, and every score that is present must be 0 or 1.

    Raises:
        DataError: as in `as_scores`, or a score is not binary.
    """
    scores = as_scores(values, name, length=length)
    shaped = ~((scores == 0.0) | (scores == 1.0) | np.isnan(scores))
    _refuse_rows(shaped, scores, name, "the outcome is a binary accuracy: 0, 1 or missing (NaN), never a shaped reward")
    return scores


def as_penalties(values: npt.ArrayLike | None, *, length: int) -> FloatArray:
    """A checked (N,) array of penalties; zeros for None.

    Raises:
        DataError: as in `as_scores`, or a penalty is missing or above 0.
    """
    if values is None:
        return np.zeros(length)
    penalties = as_scores(values, "penalties", length=length, missing_ok=False)
    _refuse_rows(penalties > 0.0, penalties, "penalties", "a penalty is 0 or below")
    return penalties


def extreme(
    ufunc: np.ufunc, start: float, values: FloatArray, mask: BoolArray, index: IndexArray, groups: int
) -> FloatArray:
    """(P,) minimum or maximum over the masked part of each group; `start` where that part is empty."""
    result = np.full(groups, start)
    ufunc.at(result, index[mask], values[mask])
    return result


def _check_length(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise DataError(
            f"{name} has {found} values for {expected} responses", where=name, fix="Give one value per response."
        )


def _refuse_rows(bad: npt.NDArray[Any], values: Any, name: str, rule: str) -> None:
    """Name the first row that breaks the rule."""
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{name}[{row}] is {values[row]}: {rule}", where=f"{name}, {int(bad.sum())} such rows")
