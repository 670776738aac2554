"""A penalty on the reward of responses that come near the limit on their length: the soft overlong punishment of DAPO (arXiv 2503.14476).

With a limit of L tokens, of which the last b are a buffer, and a factor f, a response of n tokens has the penalty

    0                       for      n <= L - b
    f * (L - b - n) / b     for  L - b < n <= L
    -f                      for      n > L

DAPO has rewards of -1 and 1 and f = 1. The outcome here is 0 or 1, so that f = 0.5 is as much of the way from right to wrong.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from papo.core.groups import LARGEST, FloatArray, as_scores
from papo.errors import DataError, ParamsError


def overlong_penalties(lengths: npt.ArrayLike, limit: npt.ArrayLike, buffer: int, factor: float) -> FloatArray:
    """(N,) penalties, 0 or below.

    Args:
        lengths: (N,) tokens of each response.
        limit: on the tokens of a response; one for all, or (N,) of them.
        buffer: tokens before the limit over which the penalty rises, at least 1 and below every limit.
        factor: size of the penalty at the limit and beyond, above 0.

    Raises:
        DataError: not one length, or limit, a response; a length that is no number of tokens.
        ParamsError: a buffer or factor out of bounds.
    """
    tokens = as_scores(lengths, "lengths", missing_ok=False)
    bad = (tokens < 0.0) | (tokens != np.floor(tokens))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"lengths[{row}] is {tokens[row]:g}: a number of tokens is needed", where="lengths")
    size = tokens.size if np.ndim(limit) else 1
    limits = as_scores(np.atleast_1d(np.asarray(limit)), "limit", length=size, missing_ok=False)
    lowest = float(limits.min(initial=np.inf))
    if not 1 <= buffer < lowest:
        raise ParamsError(
            f"the overlong buffer is {buffer} and must be from 1 to below the limit of {lowest:g} tokens",
            where="overlong buffer",
            fix="Take a part of the limit, such as a quarter.",
        )
    if not 0.0 < factor <= LARGEST:
        raise ParamsError(f"the overlong factor is {factor} and must be a positive number", where="overlong factor")
    # 0 and not -0 where nothing is exceeded.
    return 0.0 - factor * np.clip((tokens - (limits - buffer)) / buffer, 0.0, 1.0)
