"""Checks on rows that stages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.errors import DataError, FailedRowsError
from papo.schemas import FAILED_STATUSES, PROBLEMS, Grading
from papo.store.tables import read_columns


def check_failures(stage: str, statuses: Mapping[str, int], limit: float) -> None:
    """Stops the stage when the share of failed rows is above `limit`.

    Raises:
        FailedRowsError: naming the causes and how many rows each has.
    """
    failed = {status: count for status, count in statuses.items() if status in FAILED_STATUSES}
    total = sum(statuses.values())
    if sum(failed.values()) > limit * total:
        causes = ", ".join(f"{count} {status}" for status, count in sorted(failed.items()))
        raise FailedRowsError(
            f"{sum(failed.values())} of {total} rows failed: {causes}",
            where=f"stage {stage}, limit {limit:.0%}",
            fix=f"remove the cause, or raise {stage}.max_failed_share",
        )


def check_aligned(rollouts: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuses a table whose rows are not those of the rollouts, in their order."""
    keys = [(row["problem_id"], row["sample_index"]) for row in rollouts]
    others = [(row["problem_id"], row["sample_index"]) for row in other]
    if keys != others:
        raise DataError(
            f"its {len(others)} rows are not the {len(keys)} rows of the rollouts",
            where=str(path),
            fix="run the stage that makes it again",
        )


def of_problems(problems: Path, column: str, wanted: set[str]) -> dict[str, Any]:
    """problem_id -> `column` of the problem set.

    Raises:
        DataError: a response belongs to a problem that the problem set does not hold.
    """
    values = {row["problem_id"]: row[column] for row in read_columns(problems, PROBLEMS, "problem_id", column)}
    unknown = sorted(wanted - values.keys())
    if unknown:
        raise DataError(
            f"{len(unknown)} problems of the rollouts are not in the problem set, the first is {unknown[0]}",
            where=str(problems),
            fix="run rollout again: the problem set has changed since",
        )
    return values


def gradings_of(problems: Path, wanted: set[str]) -> dict[str, Grading]:
    """problem_id -> how it is graded.

    Raises:
        DataError: as `of_problems`.
    """
    texts = of_problems(problems, "grading", wanted)
    return {key: Grading.model_validate_json(text) for key, text in texts.items()}
