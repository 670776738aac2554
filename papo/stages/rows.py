"""Checks on rows that stages share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from papo.errors import DataError, FailedRowsError
from papo.schemas import FAILED_STATUSES, PROBLEMS, Grading
from papo.store.tables import read_table, values

_NAMES = ["problem_id", "sample_index"]


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
        raise _not_aligned(len(keys), len(others), path)


def _not_aligned(rows: int, others: int, path: Path) -> DataError:
    return DataError(
        f"its {others} rows are not the {rows} rows of the rollouts",
        where=str(path),
        fix="run the stage that makes it again",
    )


def check_same_rows(rollouts: pa.Table, other: pa.Table, path: Path) -> None:
    """As `check_aligned`, of tables."""
    if not rollouts.select(_NAMES).equals(other.select(_NAMES)):
        raise _not_aligned(len(rollouts), len(other), path)


def of_problems(problems: Path, column: str, wanted: Collection[str]) -> dict[str, Any]:
    """problem_id -> `column` of the problem set.

    Raises:
        DataError: a response belongs to a problem that the problem set does not hold.
    """
    frame = read_table(problems, PROBLEMS, "problem_id", column)
    found = dict(zip(values(frame, "problem_id"), values(frame, column), strict=True))
    unknown = sorted(set(wanted) - found.keys())
    if unknown:
        raise DataError(
            f"{len(unknown)} problems of the rollouts are not in the problem set, the first is {unknown[0]}",
            where=str(problems),
            fix="run rollout again: the problem set has changed since",
        )
    return found


def gradings_of(problems: Path, wanted: Collection[str]) -> dict[str, Grading]:
    """problem_id -> how it is graded.

    Raises:
        DataError: as `of_problems`.
    """
    texts = of_problems(problems, "grading", wanted)
    read = {text: Grading.model_validate_json(text) for text in dict.fromkeys(texts.values())}  # most are the same
    return {key: read[text] for key, text in texts.items()}
