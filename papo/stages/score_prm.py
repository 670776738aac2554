"""score_prm: the process score of each response that the variant needs one for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.core.advantages import process_needed
from papo.core.groups import BoolArray
from papo.engines.protocols import Judge, JudgeItem, Judgement
from papo.params import ScorePrmParams, Variant
from papo.schemas import ORM, PRM, ROLLOUTS, Grading
from papo.stages.rows import check_failures, check_same_rows, gradings_of, of_problems
from papo.store.faults import reached
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import codes, numbers, read_parts, read_table, write_parts

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
    keys = read_table(inputs.rollouts, ROLLOUTS, "problem_id", "sample_index")
    orm = read_table(inputs.orm, ORM, "problem_id", "sample_index", "orm_score")
    check_same_rows(keys, orm, inputs.orm)
    groups, ids = codes(keys, "problem_id")
    asked = process_needed(inputs.variant, numbers(orm, "orm_score"), groups)
    statuses: Counter[str] = Counter()
    parts = _judged(params, inputs, engine, asked, ids, statuses, context)
    rows = write_parts(out, PRM, parts)
    metrics = {"asked_share": int(asked.sum()) / rows, **engine.metrics(rows - int(asked.sum()))}
    return task.finish(rows=rows, counts=statuses, metrics=metrics, versions=engine.versions())


def _judged(
    params: ScorePrmParams,
    inputs: Inputs,
    engine: Judge,
    asked: BoolArray,
    ids: Collection[str],
    statuses: Counter[str],
    context: Context,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of the table in parts; `statuses` counts them.

    Raises:
        FailedRowsError: after the last.
    """
    references = of_problems(inputs.problems, "reference_solution", ids)
    gradings = gradings_of(inputs.problems, ids)
    # A judge that is paid is asked about the round as a whole: what it is asked twice is paid once, and counted so.
    size = None if engine.apart else len(asked)
    done = 0
    with context.progress(f"score_prm {inputs.round}", int(asked.sum())) as progress:
        columns = ("problem_id", "sample_index", "prompt", "completion")
        for part in read_parts(inputs.rollouts, ROLLOUTS, *columns, rows=size):
            rows = part.to_pylist()
            needed = asked[done : done + len(rows)].tolist()
            reached("judge")
            answers = iter(engine.judge(_items(rows, needed, references, gradings), progress))
            reached("judged")
            judgements = [next(answers) if ask else NOT_ASKED for ask in needed]
            statuses.update(judgement.status for judgement in judgements)
            done += len(rows)
            yield [
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
                for row, judgement in zip(rows, judgements, strict=True)
            ]
    counted = {status: count for status, count in statuses.items() if status != "not_asked"}
    check_failures("score_prm", counted, params.max_failed_share)


def items_of(
    rollouts: Sequence[Mapping[str, Any]], outcomes: list[Any], variant: Variant, problems: Path
) -> tuple[list[bool], list[JudgeItem]]:
    """Which responses the judge is asked about, in whole groups, and what it is asked about those."""
    ids = {row["problem_id"] for row in rollouts}
    references, gradings = of_problems(problems, "reference_solution", ids), gradings_of(problems, ids)
    asked: list[bool] = process_needed(variant, outcomes, [row["problem_id"] for row in rollouts]).tolist()
    return asked, _items(rollouts, asked, references, gradings)


def _items(
    rollouts: Sequence[Mapping[str, Any]],
    asked: Sequence[bool],
    references: Mapping[str, str | None],
    gradings: Mapping[str, Grading],
) -> list[JudgeItem]:
    return [
        JudgeItem(row["prompt"], references[row["problem_id"]], row["completion"], gradings[row["problem_id"]])
        for row, ask in zip(rollouts, asked, strict=True)
        if ask
    ]
