"""score_orm: the outcome of each response, 1 or 0, or missing with a status that says why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from papo.engines.protocols import Verifier, VerifyItem
from papo.params import ScoreOrmParams
from papo.schemas import ORM, ROLLOUTS, Grading
from papo.stages.rows import check_failures, of_problems
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_columns, write_rows

CODE = (
    "stages/score_orm.py",
    "stages/rows.py",
    "engines/verifiers",
    "engines/sandbox.py",
    "engines/in_sandbox.py",
    "core/answers.py",
    "core/code.py",
)


@dataclass(frozen=True)
class Inputs:
    round: int
    rollouts: Path
    problems: Path


def run(
    params: ScoreOrmParams, inputs: Inputs, out: Path, *, engine: Verifier, context: Context = Context()
) -> Manifest:
    """Writes one outcome a response to `out`.

    Raises:
        FailedRowsError: more than `max_failed_share` of the rows have no score.
    """
    task = Task("score_orm", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    rollouts = read_columns(inputs.rollouts, ROLLOUTS, "problem_id", "sample_index", "completion")
    ids = {row["problem_id"] for row in rollouts}
    answers = of_problems(inputs.problems, "answer", ids)
    gradings = {
        key: Grading.model_validate_json(text) for key, text in of_problems(inputs.problems, "grading", ids).items()
    }
    items = [VerifyItem(answers[row["problem_id"]], row["completion"], gradings[row["problem_id"]]) for row in rollouts]
    with context.progress(f"score_orm {inputs.round}", len(rollouts)) as progress:
        verdicts = engine.verify(items, progress)
    statuses = Counter(verdict.status for verdict in verdicts)
    check_failures("score_orm", statuses, params.max_failed_share)
    rows = [
        {
            "round": inputs.round,
            "problem_id": row["problem_id"],
            "sample_index": row["sample_index"],
            "orm_score": verdict.score,
            "extracted": verdict.extracted,
            "status": verdict.status,
        }
        for row, verdict in zip(rollouts, verdicts, strict=True)
    ]
    write_rows(out, ORM, rows)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    metrics = {"accuracy": sum(scores) / len(scores)} if scores else {}
    return task.finish(rows=len(rows), counts=statuses, metrics=metrics, versions=engine.versions())
