r"""The texts of the embedded world: problems such as `3+5-2=?`, and responses that state their steps line by line.

    3+5=8
    8-2=6
    \boxed{6}

A step is a line that is an identity of sums and differences, read from left to right. It is true or false as such;
whether it belongs to the problem is for a judge to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Operation = tuple[int, str, int, int]
"""Left operand, sign, right operand, result: (3, "+", 5, 8) of `3+5=8`."""

# Numbers are bounded: a longer run of digits is no running value of a sum of one-digit terms.
_PROBLEM = re.compile(r"(?<![\w.+\-])[0-9](?:[+-][0-9])+=\?")
_STEP = re.compile(r"(-?[0-9]{1,15}(?:[+-][0-9]{1,15})+)=(-?[0-9]{1,15})")
_TERM = re.compile(r"[+-]?[0-9]+")
_BLANKS = re.compile(r"[ \t\r]+")
_BOX = "\\boxed{"


@dataclass(frozen=True)
class Step:
    """`terms` are signed, as in [3, 5, -2] of `3+5-2`, and at least two; `result` is what the line claims."""

    terms: tuple[int, ...]
    result: int

    @property
    def true(self) -> bool:
        return sum(self.terms) == self.result

    @property
    def operations(self) -> list[Operation]:
        """What the line does, with the values it should have; more than one operation if it is merged."""
        return operations(list(self.terms))


def parse_problem(prompt: str) -> list[int] | None:
    """The signed terms of the one problem in the prompt: [3, 5, -2] of `3+5-2=?`; None unless there is exactly one.

    Text around it (a prompt template) is allowed. Terms have one digit, and there are at least two.
    """
    found = _PROBLEM.findall(prompt)
    return _terms(found[0].removesuffix("=?")) if len(found) == 1 else None


def operations(terms: list[int]) -> list[Operation]:
    """The chain that carries out the terms: (left, sign, right, result), each result being the next left."""
    chain, value = [], terms[0]
    for term in terms[1:]:
        chain.append((value, "-" if term < 0 else "+", abs(term), value + term))
        value += term
    return chain


def parse_steps(response: str) -> list[Step]:
    """The steps of a response in order. Lines that are none are passed over; see `stray_lines`."""
    matches = (_STEP.fullmatch(line) for line in _lines(response))
    return [Step(tuple(_terms(match[1])), int(match[2])) for match in matches if match]


def stray_lines(response: str) -> int:
    """How many lines are neither a step, nor blank, nor the boxed answer."""
    return sum(not line.startswith(_BOX) and not _STEP.fullmatch(line) for line in _lines(response))


def _lines(response: str) -> list[str]:
    lines = (_BLANKS.sub("", line) for line in response.split("\n"))
    return [line for line in lines if line]


def _terms(text: str) -> list[int]:
    return [int(term) for term in _TERM.findall(text)]
