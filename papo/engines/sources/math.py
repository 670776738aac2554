r"""MATH and MATH-500: problem, solution, answer; where there is no answer, it is the last `\boxed` of the solution."""

from __future__ import annotations

from papo.core.answers import extract_boxed
from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row

COLUMNS = {"problem"}
ID = "unique_id"


def problem(row: Row, seed: int) -> Problem | Drop:
    """The tier is the level, 1 to 5."""
    answer = row.text("answer") if "answer" in row.values else extract_boxed(row.text("solution")) or ""
    level = row.maybe("level").removeprefix("Level ")
    return row.problem(row.text("problem"), answer, row.maybe("solution"), tier=f"level {level}" if level else None)
