"""How readable the programs that pass are, by round and on the benchmarks: of each run, also of those whose variant asks no judge.

    python tests/benchmarks/readability_by_round.py runs/programs runs/programs-orm

The mean of the scores of the passing programs of each problem, averaged over problems, with a 95 % interval by Student's t over them. A
problem without a passing program is left out. Columns: passing share, problems with a passing program, readability, its interval.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from papo.engines.judges.readability import ReadabilityJudge
from papo.engines.protocols import JudgeItem
from papo.schemas import EVALUATION, ORM, PROBLEMS, ROLLOUTS, Grading
from papo.store.layout import Workspace
from papo.store.tables import read_rows


def by_round(run: Path) -> list[str]:
    """One line a round."""
    workspace = Workspace(run)
    problems = _problems([workspace.train_problems])
    rounds = sorted(int(path.name) for path in (run / "artifacts/rounds").iterdir() if path.name.isdigit())
    lines = []
    for number in rounds:
        orm = workspace.table(number, "orm")
        if orm.exists():
            outcomes = [row["orm_score"] for row in read_rows(orm, ORM)]
            rows = [
                row | {"orm_score": outcome}
                for row, outcome in zip(read_rows(workspace.table(number, "rollouts"), ROLLOUTS), outcomes, strict=True)
            ]
            lines.append(f"round {number:<24}{_line(rows, problems)}")
    return lines


def by_benchmark(run: Path) -> list[str]:
    """Two lines a benchmark: the warm start and the final policy."""
    lines = []
    for table in sorted((run / "artifacts/evaluation").glob("*.parquet")):
        problems = _problems([run / "data/problems/eval" / table.name])
        rows = read_rows(table, EVALUATION)
        for policy in dict.fromkeys(row["policy"] for row in rows):
            of_policy = [row for row in rows if row["policy"] == policy]
            lines.append(f"{table.stem + ' ' + policy:<30}{_line(of_policy, problems)}")
    return lines


def _problems(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    return {row["problem_id"]: row for path in paths for row in read_rows(path, PROBLEMS)}


def _line(rows: Sequence[Mapping[str, Any]], problems: Mapping[str, Mapping[str, Any]]) -> str:
    passing = [row for row in rows if row["orm_score"] == 1.0]
    items = []
    for row in passing:
        problem = problems[row["problem_id"]]
        grading = Grading.model_validate(json.loads(problem["grading"]))
        items.append(JudgeItem(problem["prompt"], problem["reference_solution"], row["completion"], grading))
    scores = defaultdict(list)
    for row, judgement in zip(passing, ReadabilityJudge().judge(items, lambda _: None), strict=True):
        scores[row["problem_id"]].append(judgement.score)
    means = np.array([np.mean(values) for values in scores.values()])
    half = float(stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)) if len(means) > 1 else float("nan")
    mean = float(means.mean()) if len(means) else float("nan")
    return f"{len(passing) / len(rows):6.1%} {len(means):4d} {mean:6.3f} [{mean - half:.3f}, {mean + half:.3f}]"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name)
        print("\n".join([*by_round(Path(name)), *by_benchmark(Path(name))]))
