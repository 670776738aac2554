"""OlympiadBench, open questions: question, context, final_answer [text], is_multiple_answer, unit, answer_type, error.

The row that is graded within an `error` is dropped, as in the usual 674 text-only problems of mathematics in English.
"""

from __future__ import annotations

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row
from papo.schemas import Grading

COLUMNS = {"question", "final_answer"}
ID = "id"


def problem(row: Row, seed: int) -> Problem | Drop:
    """The context stands before the question; the tier is the subfield."""
    prompt = "\n\n".join(part for part in (row.maybe("context"), row.text("question")) if part)
    if error := row.maybe("error"):
        return row.drop("marked_error", f"error is {error}", prompt)
    answers = row.get("final_answer")
    if not answers:
        return row.drop("proof_only", prompt=prompt)
    solutions = row.values.get("solution") or [""]
    gold, tier = ", ".join(map(str, answers)), row.maybe("subfield") or None
    return row.problem(prompt, gold, str(solutions[0]), grading=_grading(row), tier=tier)


def _grading(row: Row) -> Grading:
    several = bool(row.get("is_multiple_answer"))
    # Several tuples are a set of tuples; what order there is within each, their parentheses say.
    ordered = row.maybe("answer_type") == "Tuple" and not several
    return Grading(several=several, ordered=ordered, unit=row.maybe("unit").strip("$") or None)
