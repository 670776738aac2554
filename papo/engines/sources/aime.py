"""AIME of any year: problem and answer, an integer from 0 to 999; or the schema of verl."""

from __future__ import annotations

from dataclasses import replace

from papo.engines.protocols import Drop, Problem
from papo.engines.sources import verl
from papo.engines.sources.rows import Row

ID = "id"


def problem(row: Row, seed: int) -> Problem | Drop:
    """Leading zeros of the answer sheet (`025`) are left out."""
    read = verl.problem(row, seed) if row.values.keys() >= verl.COLUMNS else _plain(row)
    if isinstance(read, Drop):
        return read
    if not (read.answer.isdecimal() and len(read.answer) <= 3):
        return row.drop("unparsable_gold", f"{read.answer!r} is no integer from 0 to 999", read.prompt)
    return replace(read, answer=str(int(read.answer)))


def _plain(row: Row) -> Problem | Drop:
    solution = row.maybe("solution") or row.maybe("Solution")
    return row.problem(row.text("problem", "Problem", "question"), row.text("answer", "Answer"), solution)
