"""What the page tells: signals by round, updates by step, benchmarks with their intervals, how far the judge can be trusted."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, model_validator

from papo.core.alarms import Alarm
from papo.params import Metric

Rows = list[dict[str, float]]
FloatArray = npt.NDArray[np.float64]


class Estimate(BaseModel):
    """A mean with its interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    problems: int
    missing: int = 0


class Gain(Estimate):
    """The paired difference of `metric` between the final policy and the warm start; `of`: `final`, or the round that was the best."""

    metric: Metric = "avg_at_k"
    of: str = "final"


class PolicyResult(BaseModel):
    """One policy on one benchmark."""

    avg_at_k: Estimate
    pass_at_k: Estimate
    maj_at_k: Estimate | None = None
    k: int
    length_mean: FiniteFloat
    truncated_share: FiniteFloat
    no_answer_share: FiniteFloat
    timeout_share: FiniteFloat = 0.0
    tiers: dict[str, Estimate] = {}


class Benchmark(BaseModel):
    """The policies by name, and the paired gain of `final` over `warmstart`."""

    policies: dict[str, PolicyResult]
    gain: Gain

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not {"warmstart", "final", "gain"} <= values.keys():
            raise ValueError("needs warmstart, final and gain")
        return {"gain": values["gain"], "policies": {name: v for name, v in values.items() if name != "gain"}}

    @property
    def ends(self) -> tuple[Estimate, Estimate]:
        """Warm start and final policy by the metric of the gain."""
        first, last = (getattr(policy, self.gain.metric) for policy in (self.warmstart, self.final))
        return first, last

    @property
    def metric(self) -> str:
        """`avg@4`."""
        return self.gain.metric.replace("_at_k", f"@{self.final.k}")

    @property
    def warmstart(self) -> PolicyResult:
        return self.policies["warmstart"]

    @property
    def final(self) -> PolicyResult:
        return self.policies["final"]

    def ordered(self) -> list[tuple[str, PolicyResult]]:
        """The policies in the order of training, by the name a person reads."""
        between = sorted((_round_of(name), policy) for name, policy in self._between())
        named = [(f"After round {round_}", policy) for round_, policy in between]
        chosen = f"Final (after round {_round_of(self.gain.of)})" if self.gain.of.startswith("round-") else "Final"
        return [("Warm start", self.warmstart), *named, (chosen, self.final)]

    def tiers(self) -> list[str]:
        """The tiers, none if there is only one."""
        names = sorted({tier for policy in self.policies.values() for tier in policy.tiers}, key=_natural)
        return names if len(names) > 1 else []

    def trained(self, rounds: int) -> list[tuple[int, Estimate]]:
        """(rounds that the policy was trained for, avg@k), in order; the final one for `rounds`, unless the best was chosen."""
        rounds = _round_of(self.gain.of) + 1 if self.gain.of.startswith("round-") else rounds
        between = [(_round_of(name) + 1, policy.avg_at_k) for name, policy in self._between()]
        ends = [(0, self.warmstart.avg_at_k), (rounds, self.final.avg_at_k)]
        return sorted(ends + between, key=lambda point: point[0])

    def _between(self) -> list[tuple[str, PolicyResult]]:
        return [(name, policy) for name, policy in self.policies.items() if re.fullmatch(r"round-\d+", name)]


def _round_of(name: str) -> int:
    return int(name.removeprefix("round-"))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts `9 terms` before `10 terms`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


class Interval(BaseModel):
    """A measure of a judge with its interval; None where the data could not give it."""

    value: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None

    def __str__(self) -> str:
        """`0.87 [0.84, 0.90]`, `-` where there is no value."""
        if self.value is None:
            return "-"
        ends = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{ends}"


class Calibration(BaseModel):
    """What the page tells of calibration.json: one judge on one labelled data set."""

    judge: str
    rubric: str
    data: str
    responses: int
    scored: int
    agreement: Interval
    kappa_linear: Interval
    auc: Interval
    length_bias: Interval
    answer_bias: Interval
    notes: list[str] = []


EVALUATION = TypeAdapter(Annotated[dict[str, Benchmark], Field(min_length=1)])


@dataclass(frozen=True)
class Run:
    """What the page tells: a row of signals a round, a row of metrics an optimizer step, benchmarks by name, alarms as they began.

    `accepted`: by alarm, that the run went on in spite of it. `judging`: a row of the metrics of score_prm a round; `judging_total`: the
    same over the run.
    """

    params: dict[str, Any]
    rounds: Rows
    steps: Rows
    evaluation: dict[str, Benchmark]
    alarms: list[Alarm] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)
    calibrations: list[Calibration] = field(default_factory=list)
    judging: Rows = field(default_factory=list)
    judging_total: dict[str, float] = field(default_factory=dict)
    lineage: str = ""

    def signal(self, name: str) -> FloatArray:
        """One value a round, from 0 to the last; NaN where the signal is absent."""
        values = np.full(1 + max((int(row["round"]) for row in self.rounds), default=-1), math.nan)
        for row in self.rounds:
            values[int(row["round"])] = row.get(name, math.nan)
        return values
