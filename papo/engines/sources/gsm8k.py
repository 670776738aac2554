"""GSM8K: question, and an answer that is the solution with the result after `####`."""

from __future__ import annotations

import re

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row

COLUMNS = {"question", "answer"}
ID = ""
MARK = "####"

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def problem(row: Row, seed: int) -> Problem | Drop:
    """The number after `####` without separators; the solution without the notes of the calculator."""
    prompt = row.text("question")
    solution, mark, result = row.text("answer").rpartition(MARK)
    if not mark:
        return row.drop("no_answer", f"no {MARK} in it", prompt)
    return row.problem(prompt, result.strip().replace(",", ""), _CALCULATOR.sub("", solution).strip())
