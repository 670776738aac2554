"""The embedded world: left-to-right sums and differences of one-digit terms whose running value is never negative.

A problem is `3+5-2=?`; a full solution states each operation on a line of its own and boxes the result:

    3+5=8
    8-2=6
    \\boxed{6}

The traces that the warm start learns from are deliberately mixed in quality, so that a right answer may come without reasoning and
reasoning may be wrong: what a process reward has to tell apart.
"""

from __future__ import annotations

import random

from papo.engines.protocols import Problem
from papo.engines.sources.generated import GeneratedSource
from papo.params import SumsParams, Tier


class SumsSource(GeneratedSource[Tier, list[int]]):
    """See `GeneratedSource`; a draft is the signed terms."""

    world, unit, patience = "sums", "terms", 100

    def __init__(self, params: SumsParams, *, seed: int, prompt_template: str = "{prompt}") -> None:
        self._params = params
        super().__init__(params.train, params.eval, params.traces, seed=seed, prompt_template=prompt_template)

    def _draw(self, stream: random.Random, tier: Tier) -> list[int]:
        return draw_terms(stream, tier)

    def _prompt(self, terms: list[int]) -> str:
        return prompt_of(terms)

    def _problem(self, terms: list[int]) -> Problem:
        return Problem(prompt_of(terms), str(sum(terms)), solution_of(terms), "sums", f"{len(terms)} terms")

    def _range(self, tier: Tier) -> tuple[int, int]:
        return tier.min_terms, tier.max_terms

    def _trace(self, stream: random.Random, terms: list[int]) -> str:
        p = self._params
        style = stream.random()
        if style < p.bare_share:
            answer = sum(terms)
            if stream.random() < p.bare_wrong_share:
                answer += stream.choice([-2, -1, 1, 2])
            return boxed(max(answer, 0))
        style -= p.bare_share
        if style < p.merged_share:
            return _write(stream, _chunks(terms, stream, largest=2), p.wrong_step_share)
        style -= p.merged_share
        lines = _write(stream, _chunks(terms, stream, largest=1), p.wrong_step_share)
        return _padded(stream, lines) if style < p.verbose_share else lines


def draw_terms(stream: random.Random, tier: Tier) -> list[int]:
    """Signed one-digit terms, 1 to 9, the first positive, with a running value that never falls below zero."""
    terms = [stream.randint(1, 9)]
    value = terms[0]
    for _ in range(stream.randint(tier.min_terms, tier.max_terms) - 1):
        term = stream.randint(1, 9)
        if term <= value and stream.random() < 0.5:
            term = -term
        value += term
        terms.append(term)
    return terms


def prompt_of(terms: list[int]) -> str:
    """`3+5-2=?` and a line break, of [3, 5, -2]."""
    return f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:]) + "=?\n"


def boxed(answer: int) -> str:
    return f"\\boxed{{{answer}}}"


def solution_of(terms: list[int]) -> str:
    """The reference solution: each operation as a line of its own, then the boxed result."""
    lines, value = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{value}{term:+d}={value + term}")
        value += term
    return "\n".join([*lines, boxed(value)])


def _chunks(terms: list[int], stream: random.Random, largest: int) -> list[list[int]]:
    """The terms after the first, in runs of 1 to `largest`; at least one run of `largest` where there is room."""
    rest = terms[1:]
    runs: list[list[int]] = []
    while rest:
        size = min(len(rest), largest if not runs else stream.randint(1, largest))
        runs.append(rest[:size])
        rest = rest[size:]
    return [terms[:1], *runs]


def _write(stream: random.Random, runs: list[list[int]], wrong_share: float) -> str:
    value = runs[0][0]
    lines = []
    for run in runs[1:]:
        result = value + sum(run)
        if stream.random() < wrong_share:
            result = max(0, result + stream.choice([-2, -1, 1, 2]))
        lines.append(f"{value}" + "".join(f"{term:+d}" for term in run) + f"={result}")
        value = result
    return "\n".join([*lines, boxed(value)])


def _padded(stream: random.Random, trace: str) -> str:
    """The trace with true but irrelevant identities strewn in before the answer."""
    *lines, answer = trace.split("\n")
    for _ in range(stream.randint(2, 6)):
        left, right = stream.randint(1, 9), stream.choice([0, 0, 1])
        lines.insert(stream.randint(0, len(lines)), f"{left}+{right}={left + right}")
    return "\n".join([*lines, answer])
