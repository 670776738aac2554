"""HumanEval: the head of a function to go on with, and the tests that its body has to pass."""

from __future__ import annotations

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row
from papo.schemas import Grading

COLUMNS = {"prompt", "test", "entry_point"}
ID = "task_id"


def problem(row: Row, seed: int) -> Problem | Drop:
    """The gold answer is the tests, and the reference solution the body; both, as the prompt, to the last space."""
    prompt, test = (str(row.get(name) or "") for name in ("prompt", "test"))
    body = str(row.values.get("canonical_solution") or "")
    entry_point = row.text("entry_point")
    if not entry_point:
        return row.drop("no_answer", "no entry point", prompt)
    return row.problem(prompt, test, body, grading=Grading(kind="code", prefix=prompt, entry_point=entry_point))
