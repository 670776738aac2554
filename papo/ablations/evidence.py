"""What the runs of a plan show: comparisons with verdicts, claims, and what each arm came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from papo.ablations.measures import Measured
from papo.ablations.plan import Arm, Claim, Need, Plan, pairs
from papo.ablations.words import unit
from papo.core.comparison import Difference, Verdict, by_seed, by_seed_and_problem, resampled, verdicts
from papo.errors import DataError

Answer = Literal["holds", "does not hold", "undecided"]

BETTER_UP = {"accuracy": True, "gain": True, "fall": False}
"""Whether more of a measure is better; of the others that is nobody's to say."""

AGAINST = {
    "higher": ("lower", "same"),
    "lower": ("higher", "same"),
    "same": ("higher", "lower"),
    "not lower": ("lower",),
    "not higher": ("higher",),
}
"""Verdicts that speak against what a claim needs."""


@dataclass(frozen=True)
class Compared:
    """An arm's measure against another's, or against nothing: by seed and problem where the measure has a value a problem."""

    measure: str
    arm: str
    against: str | None
    margin: float | None
    difference: Difference | None
    resampled: tuple[float, float] | None
    verdict: Verdict | None
    missing: str = ""
    """Why there is no difference."""

    @property
    def words(self) -> str:
        """The verdict as a person reads it."""
        return (
            words(self.measure, self.verdict, self.margin)
            if self.verdict is not None
            else f"no verdict: {self.missing}"
        )


@dataclass(frozen=True)
class Answered:
    """A claim, what was measured for it, and whether it holds."""

    claim: Claim
    compared: list[Compared]
    answer: Answer


def words(measure: str, verdict: Verdict, margin: float | None) -> str:
    """`better`, `worse` (of other measures `higher`, `lower`), `no difference larger than d`, `undecided: about n more seeds`."""
    if verdict.word in ("higher", "lower"):
        up = BETTER_UP.get(measure.partition("/")[0])
        told = verdict.word if up is None else "better" if (verdict.word == "higher") == up else "worse"
        return f"{told}, by less than {shown(measure, margin)}" if verdict.within and margin else told
    if verdict.word == "same":
        return f"no difference larger than {shown(measure, margin or 0.0)}"
    if verdict.seeds is None:
        return "undecided: more seeds alone would not decide it"
    return f"undecided: about {verdict.seeds} more seed{'s' if verdict.seeds != 1 else ''}"


def shown(measure: str, value: float) -> str:
    """A size of the measure, in points for shares and tokens for lengths."""
    return f"{100 * value if unit(measure) == ' points' else value:g}{unit(measure)}"


def compare(plan: Plan, runs: Mapping[str, Mapping[int, Measured]]) -> list[Compared]:
    """Every comparison of the plan, with verdicts that are corrected for all of them.

    Args:
        runs: those that are done, by arm's name and seed.

    Raises:
        ParamsError: a measure that the runs do not have.
    """
    asked = [(measure, arm.name, other.name, plan.margin(measure)) for measure, arm, other in pairs(plan)]
    return _judged(plan, asked, runs)


def answer(plan: Plan, runs: Mapping[str, Mapping[int, Measured]]) -> list[Answered]:
    """Every claim of the plan; what is measured for all of them together is one family of tests.

    A claim holds if all that it needs is so, does not if one of them is decided otherwise, and is undecided else.

    Raises:
        ParamsError: as `compare`.
    """
    asked, needs = [], []
    for claim in plan.claims:
        for need in claim.needs:
            arm = plan.find(need.arm, f"claims.{claim.name}")
            other = plan.find(need.against, f"claims.{claim.name}").name if need.against is not None else None
            asked.append((need.measure, arm.name, other, plan.margin(need.measure, need.margin)))
            needs.append(need)
    compared = _judged(plan, asked, runs)
    found, at = [], 0
    for claim in plan.claims:
        mine = compared[at : at + len(claim.needs)]
        at += len(claim.needs)
        states = [_state(need, one) for need, one in zip(claim.needs, mine, strict=True)]
        told: Answer = "undecided"
        if "does not hold" in states:
            told = "does not hold"
        elif set(states) == {"holds"}:
            told = "holds"
        found.append(Answered(claim, mine, told))
    return found


def _state(need: Need, one: Compared) -> Answer:
    if one.verdict is None:
        return "undecided"
    word = one.verdict.word
    if need.is_ in ("not lower", "not higher"):
        # Not worse by more than the margin: the same, or beyond it on the other side.
        other = need.is_.removeprefix("not ")
        if word == other:
            return "holds" if one.verdict.within else "does not hold"
        return "holds" if word in ("same", "higher", "lower") else "undecided"
    if need.is_ == "same" and word in ("higher", "lower") and one.verdict.within:
        return "holds"
    if word == need.is_:
        return "holds"
    return "does not hold" if word in AGAINST[need.is_] else "undecided"


def _judged(
    plan: Plan, asked: Sequence[tuple[str, str, str | None, float | None]], runs: Mapping[str, Mapping[int, Measured]]
) -> list[Compared]:
    found: list[Difference | str] = []
    tables = []
    for measure, arm, other, _ in asked:
        try:
            table = differences(measure, runs.get(arm, {}), runs.get(other, {}) if other is not None else None)
            tables.append(table)
            found.append(_difference(table, plan.confidence))
        except DataError as error:
            found.append(error.what)
            tables.extend([np.empty(0)] * (len(found) - len(tables)))
    there = [(index, one) for index, one in enumerate(found) if isinstance(one, Difference)]
    told = verdicts(
        [one for _, one in there], [asked[index][3] or 0.0 for index, _ in there], level=1.0 - plan.confidence
    )
    by_index = dict(zip([index for index, _ in there], told, strict=True))
    compared = []
    for index, ((measure, arm, other, margin), one) in enumerate(zip(asked, found, strict=True)):
        if isinstance(one, str):
            compared.append(Compared(measure, arm, other, margin, None, None, None, one))
        else:
            drawn = resampled(tables[index], seed=0, confidence=plan.confidence)
            compared.append(Compared(measure, arm, other, margin, one, drawn, by_index[index]))
    return compared


def _difference(table: Any, confidence: float) -> Difference:
    return (by_seed if table.ndim == 1 else by_seed_and_problem)(table, confidence=confidence)


def differences(measure: str, arm: Mapping[int, Measured], other: Mapping[int, Measured] | None) -> Any:
    """(S, P) or (S,) differences of the seeds that both have; of an arm alone its values.

    Raises:
        DataError: fewer than two seeds, or the seeds were evaluated on different problems.
    """
    seeds = sorted(arm if other is None else arm.keys() & other.keys())
    if len(seeds) < 2:
        both = "" if other is None else " of both"
        raise DataError(f"{'1 seed' if seeds else 'no seed'}{both} is done, and it takes two", where=measure)
    values = [arm[seed].measure(measure) for seed in seeds]
    others = [other[seed].measure(measure) for seed in seeds] if other is not None else None
    if not isinstance(values[0], dict):
        single = np.array(values, dtype=np.float64)
        single = single if others is None else single - np.array(others, dtype=np.float64)
        if np.count_nonzero(~np.isnan(single)) < 2:
            raise DataError("the arm has no such value, or the one that it is compared with", where=measure)
        return single
    problems = sorted(values[0])
    every = [*values, *(others or [])]
    if any(sorted(each) != problems for each in every if isinstance(each, dict)):
        raise DataError("the runs were evaluated on different problems", where=measure)
    table = _table(values, problems)
    return table if others is None else table - _table(others, problems)


def _table(values: Sequence[Any], problems: Sequence[str]) -> Any:
    return np.array([[each[problem] for problem in problems] for each in values], dtype=np.float64)


@dataclass(frozen=True)
class Level:
    """What an arm came to: a measure with its interval over its seeds (and problems); of one seed without."""

    arm: str
    measure: str
    value: float
    low: float
    high: float
    by_seed: dict[int, float]


def levels(
    plan: Plan, arms: Sequence[Arm], measures: Sequence[str], runs: Mapping[str, Mapping[int, Measured]]
) -> list[Level]:
    """Every measure of every arm that has a run which is done."""
    found = []
    for arm in arms:
        mine = runs.get(arm.name, {})
        for measure in measures:
            values = {seed: _single(mine[seed].measure(measure)) for seed in sorted(mine)}
            known = [value for value in values.values() if not math.isnan(value)]
            if not known:
                continue
            low = high = math.nan
            if len(known) > 1:
                table = differences(measure, mine, None)
                one = _difference(table, plan.confidence)
                # Student's interval knows nothing of the ends of a share.
                low, high = (
                    (max(one.low, 0.0), min(one.high, 1.0)) if measure.startswith("accuracy/") else (one.low, one.high)
                )
            found.append(Level(arm.name, measure, float(np.mean(known)), low, high, values))
    return found


def _single(value: Any) -> float:
    if not isinstance(value, dict):
        return float(value)
    known = [each for each in value.values() if not math.isnan(each)]
    return float(np.mean(known)) if known else math.nan
