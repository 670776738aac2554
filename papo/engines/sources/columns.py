"""Any data set whose columns can be named in `prepare.columns`."""

from __future__ import annotations

from dataclasses import replace

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row
from papo.params import ColumnsParams


def problem(row: Row, columns: ColumnsParams) -> Problem | Drop:
    """What the mapping says; the text as it stands."""
    prompt, answer = (
        str(value) if (value := row.get(name)) is not None else "" for name in (columns.prompt, columns.answer)
    )
    read = row.problem(prompt, answer, row.optional(columns.reference_solution, str))
    if isinstance(read, Drop):
        return read
    return replace(read, tier=row.optional(columns.tier, str), pass_rate=row.pass_rate(columns.pass_rate))
