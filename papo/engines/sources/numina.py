"""NuminaMath-1.5 and its verifiable part: problem, solution, answer, question_type, problem_is_valid, solution_is_valid, source."""

from __future__ import annotations

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row
from papo.schemas import Grading

COLUMNS = {"problem", "answer", "question_type"}
ID = ""


def problem(row: Row, seed: int) -> Problem | Drop:
    """Proofs, unknown answers, and rows that the data set itself calls not valid are dropped."""
    prompt, answer = row.text("problem"), row.text("answer")
    kind = row.maybe("question_type")
    if kind.lower() == "proof" or answer.lower() == "proof":
        return row.drop("proof_only", prompt=prompt)
    if answer.lower() == "notfound":
        return row.drop("no_answer", "notfound", prompt)
    for column in ("problem_is_valid", "solution_is_valid"):
        if row.maybe(column).lower() not in ("", "yes"):
            return row.drop("marked_error", f"{column} is {row.text(column)}", prompt)
    letter = kind.lower() == "mcq" and len(answer) == 1 and answer.isalpha()
    grading = Grading(kind="choice") if letter else Grading()
    return row.problem(prompt, answer, row.maybe("solution"), grading=grading, source=row.maybe("source"))
