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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from papo.engines.protocols import Problem
from papo.engines.sources.drawing import distinct
from papo.params import SumsParams, Tier


class SumsSource:
    """Generates problems, held-out tiers that share no problem with training, and warm-start traces.

    Everything is decided by `seed`; the three parts draw from streams of their own, so that asking for more traces changes no problem.
    """

    def __init__(self, params: SumsParams, *, seed: int, prompt_template: str = "{prompt}") -> None:
        self._params, self._template = params, prompt_template
        self._seed = seed
        self._benchmarks = self._draw_benchmarks()
        held_out = {problem.prompt for problems in self._benchmarks.values() for problem in problems}
        self._train = list(_draw(self._stream("train"), params.train, held_out, f"{_name(params.train)}"))

    def train(self) -> Iterator[Problem]:
        return map(self._worded, self._train)

    def benchmarks(self) -> Mapping[str, Iterator[Problem]]:
        return {name: map(self._worded, problems) for name, problems in self._benchmarks.items()}

    def traces(self) -> Iterator[tuple[str, str]]:
        """Mixed traces on fresh problems of the training tier, none of them held out."""
        stream = self._stream("traces")
        held_out = {problem.prompt for problems in self._benchmarks.values() for problem in problems}
        made = 0
        while made < self._params.traces:
            terms = draw_terms(stream, self._params.train)
            if prompt_of(terms) in held_out:
                continue
            yield self._wording(prompt_of(terms)), self._trace(stream, terms)
            made += 1

    def _worded(self, problem: Problem) -> Problem:
        return replace(problem, prompt=self._wording(problem.prompt))

    def _wording(self, prompt: str) -> str:
        return prompt if self._template == "{prompt}" else self._template.format(prompt=prompt.strip())

    def _stream(self, part: str) -> random.Random:
        return random.Random(f"{self._seed}/{part}")

    def _draw_benchmarks(self) -> dict[str, list[Problem]]:
        drawn: dict[str, list[Problem]] = {}
        taken: set[str] = set()
        for name, tier in self._params.eval.items():
            drawn[name] = list(_draw(self._stream(f"eval/{name}"), tier, taken, name))
            taken |= {problem.prompt for problem in drawn[name]}
        return drawn

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


def _name(tier: Tier) -> str:
    return f"{tier.min_terms}-{tier.max_terms} terms" if tier.min_terms < tier.max_terms else f"{tier.min_terms} terms"


def _draw(stream: random.Random, tier: Tier, taken: set[str], name: str) -> Iterator[Problem]:
    def draw() -> tuple[str, Callable[[], Problem]]:
        terms = draw_terms(stream, tier)
        return prompt_of(terms), partial(_problem, terms)

    return distinct(
        draw, tier.problems, taken,
        what=f"problems of {_name(tier)}", where=f"prepare.sums, {name}",
        fix="ask for fewer problems or for more terms", patience=100,
    )  # fmt: skip


def _problem(terms: list[int]) -> Problem:
    return Problem(
        prompt=prompt_of(terms),
        answer=str(sum(terms)),
        reference_solution=solution_of(terms),
        source="sums",
        tier=_name(Tier(min_terms=len(terms), max_terms=len(terms), problems=1)),
    )


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
