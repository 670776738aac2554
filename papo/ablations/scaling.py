"""Fits of log L = -k(N) log X + E(N): how the error falls with the responses that training has seen (arXiv 2509.25300, Eq. 1).

L is 1 - avg@k on a benchmark, X the responses sampled up to a policy, N the size of the policy, an axis of the plan. Each seed is fitted
by itself, by least squares, so that an interval over seeds says how sure the slope is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from papo.ablations.measures import Measured
from papo.ablations.plan import Plan
from papo.core.comparison import Difference, by_seed


@dataclass(frozen=True)
class Fit:
    """Slope k and offset E of an arm; `r2`: the share of the variance of log L that the line explains, the mean over seeds."""

    arm: str
    benchmark: str
    slope: float
    offset: float
    r2: float
    interval: Difference | None

    def as_json(self) -> dict[str, Any]:
        low, high = (None, None) if self.interval is None else (self.interval.low, self.interval.high)
        return {"arm": self.arm, "benchmark": self.benchmark, "k": self.slope, "low": low, "high": high, "E": self.offset,
                "r2": self.r2}  # fmt: skip


def fits(plan: Plan, runs: Mapping[str, Mapping[int, Measured]]) -> list[Fit]:
    """One fit an arm that has at least three policies after the warm start; none where the plan asks for none."""
    if plan.scaling is None:
        return []
    found = []
    for arm in plan.arms:
        lines = [line for run in runs.get(arm.name, {}).values() if (line := fit(*points(run, plan.scaling.benchmark)))]
        if lines:
            slopes = [line[0] for line in lines]
            interval = by_seed(slopes, confidence=plan.confidence) if len(slopes) > 1 else None
            slope, offset, r2 = (float(np.mean(column)) for column in zip(*lines, strict=True))
            found.append(Fit(arm.name, plan.scaling.benchmark, slope, offset, r2, interval))
    return found


def points(run: Measured, benchmark: str) -> tuple[list[float], list[float]]:
    """(X, L) of the policies after the warm start."""
    rollout = run.found.run.params.rollout
    seen = rollout.prompts_per_round * rollout.group_size
    pairs = [(rounds * seen, 1.0 - value) for rounds, value in run.accuracies(benchmark) if rounds and value < 1.0]
    return [x for x, _ in pairs], [y for _, y in pairs]


def fit(x: list[float], errors: list[float]) -> tuple[float, float, float] | None:
    """(k, E, r2) of log errors = -k log x + E; None of fewer than three points."""
    if len(x) < 3:
        return None
    log_x, log_l = np.log(x), np.log(errors)
    slope, offset = np.polyfit(log_x, log_l, 1).tolist()
    total = float(np.sum((log_l - log_l.mean()) ** 2))
    left = float(np.sum((log_l - slope * log_x - offset) ** 2))
    return -slope, offset, 1.0 - left / total if total > 0.0 else math.nan
