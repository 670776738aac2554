"""GPQA: a question, its correct answer and three incorrect ones; the four become lettered choices."""

from __future__ import annotations

import random

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row
from papo.schemas import Grading

COLUMNS = {"Question", "Correct Answer", "Incorrect Answer 1"}
ID = "Record ID"
LETTERS = "ABCD"


def problem(row: Row, seed: int) -> Problem | Drop:
    """Choices in an order that `seed` and the question alone decide; the gold answer is the letter."""
    question, right = row.text("Question"), row.text("Correct Answer")
    choices = [right, *(row.text(f"Incorrect Answer {number}") for number in (1, 2, 3))]
    if not all(choices):
        return row.drop("no_answer", "a choice is empty", question)
    if choices.count(right) > 1:
        return row.drop("unparsable_gold", "an incorrect choice is the correct one", question)
    random.Random(f"{seed}\0{question}").shuffle(choices)
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return row.problem(
        f"{question}\n\n{listed}" if question else "",
        LETTERS[choices.index(right)],
        row.maybe("Explanation"),
        grading=Grading(kind="choice", extraction="answer_is"),
        tier=row.maybe("High-level domain") or None,
    )
