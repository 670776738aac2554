"""How two sets of advantages of the same responses differ where it matters to training: in sign, and in the order within a group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.groups import FloatArray, IndexArray, as_scores, extreme, group_index


class Comparison(NamedTuple):
    """Counts of responses. `sign_changed` = `flipped` + `silenced` + `woken`."""

    responses: int
    flipped: int
    """From above 0 to below it, or back."""
    silenced: int
    """From a push to exactly 0."""
    woken: int
    """From exactly 0 to a push."""
    sign_changed: int
    rank_changed: int
    """Their dense rank within the group is another."""


def compare(old: npt.ArrayLike, new: npt.ArrayLike, group_ids: Iterable[Any], *, tolerance: float = 1e-9) -> Comparison:
    """What became of N responses between the advantages `old` and `new`.

    The dense rank of a response is 1 + how many distinct values of its group are above its own. Neighbours in the order of a group are
    one value where they differ by at most `tolerance` times the largest size of a value in it, so that rounding makes no rank.

    Args:
        old, new: (N,) advantages.
        group_ids: (N,) ids of the prompts, in any order.
        tolerance: 1e-9 for float64; use 1e-6 for what was stored as float32.

    Raises:
        DataError: lengths differ, a value is missing or infinite, an id is missing.
    """
    before = as_scores(old, "old", missing_ok=False)
    after = as_scores(new, "new", length=before.size, missing_ok=False)
    index, groups = group_index(group_ids, length=before.size)
    was, is_ = np.sign(before), np.sign(after)
    flipped = int(np.count_nonzero(was * is_ < 0.0))
    silenced = int(np.count_nonzero((was != 0.0) & (is_ == 0.0)))
    woken = int(np.count_nonzero((was == 0.0) & (is_ != 0.0)))
    moved = _dense_ranks(before, index, groups, tolerance) != _dense_ranks(after, index, groups, tolerance)
    return Comparison(before.size, flipped, silenced, woken, flipped + silenced + woken, int(np.count_nonzero(moved)))


def _dense_ranks(values: FloatArray, index: IndexArray, groups: int, tolerance: float) -> IndexArray:
    """(N,) ranks within the group, 1 for its highest value."""
    everyone = np.ones(values.size, dtype=np.bool_)
    noise = tolerance * extreme(np.maximum, 0.0, np.abs(values), everyone, index, groups)
    order = np.lexsort((-values, index))
    group, ordered = index[order], values[order]
    first = np.diff(group, prepend=-1) != 0
    below = -np.diff(ordered, prepend=np.inf) > noise[group]
    steps = np.cumsum(first | below)
    ranks = np.empty(values.size, dtype=np.intp)
    ranks[order] = steps - steps[first][group] + 1
    return ranks
