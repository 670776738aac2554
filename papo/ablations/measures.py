"""What a run came to, by the names that plans use.

accuracy/<benchmark>   avg@k of the final policy, a value a problem
gain/<benchmark>       that less the warm start's, a value a problem
length/<benchmark>     mean tokens of the final policy's answers, a value a problem
fall/<benchmark>       how far the final policy lies below the best of the evaluated rounds, a value a problem. The best round is chosen
                       on one half of the problems and counted on the other, and the other way round: the best of several noisy values
                       is too high on the problems that it was chosen on.
first/, last/, mean/<signal>   mean over the first or last quarter of the rounds, or all, of a signal such as zero_advantage_share
change/<signal>        last less first
verdicts               responses that the judge was asked about
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from papo.ablations.work import Found
from papo.core.groups import FloatArray
from papo.errors import DataError, ParamsError
from papo.lineage.record import RunRecord
from papo.schemas import EVALUATION
from papo.stages.evaluate import FINAL
from papo.store.layout import Workspace
from papo.store.tables import read_columns

WARMSTART = "warmstart"
QUARTER = 4

ByProblem = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """A run that is done, and its measures."""

    found: Found
    workspace: Workspace

    @property
    def record(self) -> RunRecord:
        assert self.found.record is not None
        return self.found.record

    def measure(self, name: str) -> float | ByProblem:
        """One number, or one by problem; NaN where there is none, such as the judge's score of a run without a judge.

        Raises:
            ParamsError: the run has no such benchmark.
            DataError, DamagedError: a table is not what was written.
        """
        kind, _, rest = name.partition("/")
        if kind == "verdicts":
            return float(
                sum(self._asked(step.metrics, step.rows) for step in self.record.steps if step.stage == "score_prm")
            )
        if kind in ("first", "last", "mean", "change"):
            return self._of_rounds(kind, self.signal(rest))
        if kind == "fall":
            return self._fall(rest)
        column = "completion_tokens" if kind == "length" else "orm_score"
        final = self.by_problem(rest, FINAL, column)
        if kind != "gain":
            return final
        first = self.by_problem(rest, WARMSTART, column)
        return {problem: value - first.get(problem, math.nan) for problem, value in final.items()}

    @staticmethod
    def _asked(metrics: Mapping[str, float], rows: int) -> float:
        return round(metrics.get("asked_share", 0.0) * rows)

    def signal(self, name: str) -> FloatArray:
        """A value a round; NaN where the round has none."""
        found = {
            step.round: step.metrics.get(name, math.nan) for step in self.record.steps if step.stage == "advantage"
        }
        return np.array([found.get(number, math.nan) for number in range(len(found))])

    def _of_rounds(self, kind: str, values: FloatArray) -> float:
        size = max(values.size // QUARTER, 1)
        first, last = (_mean(part) for part in (values[:size], values[-size:]))
        return {"first": first, "last": last, "mean": _mean(values), "change": last - first}[kind]

    @cached_property
    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _rows(self, benchmark: str) -> list[dict[str, Any]]:
        if benchmark not in self._tables:
            path = self.workspace.evaluation / f"{benchmark}.parquet"
            if not path.is_file():
                known = ", ".join(sorted(found.stem for found in self.workspace.evaluation.glob("*.parquet")))
                raise ParamsError(
                    f"the run {self.found.run.name} was not evaluated on {benchmark!r}",
                    where="a measure of the plan",
                    fix=f"name one of its benchmarks ({known}), or add it to evaluate.benchmarks",
                )
            columns = ("policy", "problem_id", "orm_score", "completion_tokens")
            self._tables[benchmark] = list(read_columns(path, EVALUATION, *columns))
        return self._tables[benchmark]

    def policies(self, benchmark: str) -> list[str]:
        """Those that were evaluated, in order of training."""
        return list(dict.fromkeys(row["policy"] for row in self._rows(benchmark)))

    def by_problem(self, benchmark: str, policy: str, column: str = "orm_score") -> ByProblem:
        """Means over the samples of a problem that have a value; NaN where none has."""
        found: dict[str, list[float]] = defaultdict(list)
        for row in self._rows(benchmark):
            if row["policy"] == policy:
                value = row[column]
                found[row["problem_id"]] += [] if value is None else [float(value)]
        if not found:
            raise DataError(
                f"no rows of the policy {policy}", where=f"{self.workspace.evaluation}/{benchmark}.parquet",
                fix="delete it and start the ablation again",
            )  # fmt: skip
        return {problem: _mean(np.array(values)) for problem, values in found.items()}

    def accuracies(self, benchmark: str) -> list[tuple[int, float]]:
        """(rounds of training, avg@k) of the policies evaluated, in order."""
        return [
            (self._rounds(policy), _mean(np.array(list(self.by_problem(benchmark, policy).values()))))
            for policy in self.policies(benchmark)
        ]

    def _rounds(self, policy: str) -> int:
        if policy == WARMSTART:
            return 0
        return self.found.run.params.run.rounds if policy == FINAL else int(policy.removeprefix("round-")) + 1

    def _fall(self, benchmark: str) -> ByProblem:
        trained = [policy for policy in self.policies(benchmark) if policy != WARMSTART]
        if len(trained) < 2:
            raise ParamsError(
                f"fall/{benchmark} needs policies between the first and the last", where="a measure of the plan",
                fix="set evaluate.every in the plan's base, such as 8",
            )  # fmt: skip
        values = [self.by_problem(benchmark, policy) for policy in trained]
        problems = sorted(values[0])
        table = np.array([[each[problem] for problem in problems] for each in values])
        fallen = np.full(len(problems), math.nan)
        for half in (0, 1):
            chosen = np.nanmean(table[:, half::2], axis=1)
            counted = slice(1 - half, None, 2)
            fallen[counted] = table[int(np.argmax(chosen)), counted] - table[trained.index(FINAL), counted]
        return dict(zip(problems, fallen.tolist(), strict=True))


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
