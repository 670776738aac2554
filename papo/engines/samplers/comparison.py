"""Which of two known policies some log-probs are of, where what gave them rounds coarsely.

Log-probs y of a server are those of the policy it serves, and noise. With w those of the policy that is wanted and d the way from there to
another one, y = w + t d + noise has t = 0 where the server serves the wanted policy and t = 1 where it serves the other. Its least-squares
estimate is (y - w)·d / d·d, and y is nearer to the other in mean squared difference just where that is above 1/2. Of noise alike on all
tokens, of variance v, the log of the likelihood ratio of the two is (1 - 2t) d·d / 2v; but noise differs from token to token, and within a
sequence one rounding meets all that come after, so the standard error is that of sums over whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SURE = 5.0
"""Standard errors from a policy beyond which log-probs are none of it: one in three million by chance, of normal noise."""


@dataclass(frozen=True)
class Place:
    """Where log-probs lie on the way from the wanted policy, at 0, to another, at 1, and the standard error of that."""

    at: float
    error: float

    @property
    def margin(self) -> float:
        """Standard errors from the other policy; 0 where the two are one."""
        return (1.0 - self.at) / self.error

    @property
    def is_other(self) -> bool:
        """They are nearer to the other policy, and none of the wanted one."""
        return self.at > 0.5 and self.at > SURE * self.error

    @property
    def is_told(self) -> bool:
        """They are none of the other policy."""
        return self.margin > SURE


def place(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Place:
    """Of log-probs by sequence."""
    ways = [theirs - ours for theirs, ours in zip(other, wanted, strict=True)]
    length = _sum(ways, ways)
    if length == 0.0 or len(ways) < 2:
        return Place(0.0, math.inf)
    gone = [values - ours for values, ours in zip(found, wanted, strict=True)]
    at = _sum(gone, ways) / length
    rest = [step - at * way for step, way in zip(gone, ways, strict=True)]
    sequences, tokens = len(ways), sum(map(len, ways))
    within = sum(float(one @ way) ** 2 for one, way in zip(rest, ways, strict=True)) * sequences / (sequences - 1)
    alike = _sum(rest, rest) / max(tokens - 1, 1) * length
    # The larger of the two: few sequences may agree by chance.
    return Place(at, max(math.sqrt(max(within, alike)) / length, 1e-9))


def _sum(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> float:
    return float(sum(left @ right for left, right in zip(one, two, strict=True)))
