"""score_prm: the process score of each response that the variant needs one for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.core.advantages import process_needed
from papo.engines.protocols import Judge, JudgeItem, Judgement
from papo.params import ScorePrmParams, Variant
from papo.schemas import ORM, PRM, ROLLOUTS
from papo.stages.rows import check_aligned, check_failures, gradings_of, of_problems
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_columns, write_rows

CODE = (
    "stages/score_prm.py",
    "stages/rows.py",
    "engines/judges",
    "engines/chat.py",
    "rubrics",
    "core/advantages.py",
    "core/code.py",
    "core/credit.py",
    "core/fence.py",
    "core/groups.py",
    "core/readability.py",
    "core/replies.py",
    "core/steps.py",
    "core/votes.py",
)

NOT_ASKED = Judgement(None, "not_asked", "the variant does not use this score")


@dataclass(frozen=True)
class Inputs:
    """`variant` decides which responses the judge is asked about; `rubric`: digest of what the judge goes by, beside the code."""

    round: int
    variant: Variant
    rollouts: Path
    orm: Path
    problems: Path
    rubric: str = ""


def run(params: ScorePrmParams, inputs: Inputs, out: Path, *, engine: Judge, context: Context = Context()) -> Manifest:
    """Writes one process score a response to `out`, null where it was not asked for or the judge failed.

    Raises:
        FailedRowsError: more than `max_failed_share` of the rows that were asked about have no score.
        SetupError, ServerDownError, BudgetError: of a judge that is paid; what it was paid for is kept, and found by the next try.
    """
    task = Task("score_prm", params.deciding, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    rollouts = read_columns(inputs.rollouts, ROLLOUTS, "problem_id", "sample_index", "prompt", "completion")
    orm = read_columns(inputs.orm, ORM, "problem_id", "sample_index", "orm_score")
    check_aligned(rollouts, orm, inputs.orm)
    asked, items = items_of(rollouts, [row["orm_score"] for row in orm], inputs.variant, inputs.problems)
    with context.progress(f"score_prm {inputs.round}", len(items)) as progress:
        answers = iter(engine.judge(items, progress))
    judgements = [next(answers) if ask else NOT_ASKED for ask in asked]
    statuses = Counter(judgement.status for judgement in judgements)
    check_failures("score_prm", {key: n for key, n in statuses.items() if key != "not_asked"}, params.max_failed_share)
    rows = [
        {
            "round": inputs.round,
            "problem_id": row["problem_id"],
            "sample_index": row["sample_index"],
            "prm_score": judgement.score,
            "status": judgement.status,
            "reason": judgement.reason,
            "votes": judgement.votes,
            "wrong_steps": judgement.wrong_steps,
            "judge": engine.name,
            "rubric": engine.rubric,
            "prompt_tokens": judgement.prompt_tokens,
            "completion_tokens": judgement.completion_tokens,
            "cached": judgement.cached,
        }
        for row, judgement in zip(rollouts, judgements, strict=True)
    ]
    write_rows(out, PRM, rows)
    metrics = {"asked_share": len(items) / len(rollouts), **engine.metrics(len(rollouts) - len(items))}
    return task.finish(rows=len(rows), counts=statuses, metrics=metrics, versions=engine.versions())


def items_of(
    rollouts: Sequence[Mapping[str, Any]], outcomes: list[Any], variant: Variant, problems: Path
) -> tuple[list[bool], list[JudgeItem]]:
    """Which responses the judge is asked about, in whole groups, and what it is asked about those."""
    ids = {row["problem_id"] for row in rollouts}
    references, gradings = of_problems(problems, "reference_solution", ids), gradings_of(problems, ids)
    asked: list[bool] = process_needed(variant, outcomes, [row["problem_id"] for row in rollouts]).tolist()
    items = [
        JudgeItem(row["prompt"], references[row["problem_id"]], row["completion"], gradings[row["problem_id"]])
        for row, ask in zip(rollouts, asked, strict=True)
        if ask
    ]
    return asked, items
