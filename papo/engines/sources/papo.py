"""A table of problems that `papo prepare` or `papo pass-rates` wrote: taken as it is, with its prompts worded already."""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row
from papo.errors import DataError
from papo.schemas import Grading

COLUMNS = {"problem_id", "prompt", "answer", "grading"}
ID = "problem_id"


def problem(row: Row, seed: int) -> Problem | Drop:
    """Every column as it stands, the pass rate included.

    Raises:
        DataError: `grading` is not that of a problem.
    """
    try:
        grading = Grading.model_validate_json(row.text("grading"))
    except ValidationError as error:
        raise DataError(
            f"grading is not what problems carry: {error.errors(include_url=False)[0]['msg']}",
            where=row.where,
            fix="make the table anew, or name its columns in prepare.columns",
        ) from None
    prompt, answer = (str(row.get(name) or "") for name in ("prompt", "answer"))
    source, tier = row.maybe("source"), row.maybe("tier") or None
    read = row.problem(prompt, answer, row.maybe("reference_solution"), grading=grading, source=source, tier=tier)
    return read if isinstance(read, Drop) else replace(read, pass_rate=row.pass_rate("pass_rate"))
