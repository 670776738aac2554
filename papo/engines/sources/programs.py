"""A generated world of code: functions of one whole number, or of one list of them, that carry out a few operations in turn.

A problem is its signature and what to do, `solve(number): add 3, negate`; the gold answer is tests that call `solve`. A readable program
does one operation a line and gives each result a name:

    def solve(number):
        raised = number + 3
        return -raised

The traces that the warm start learns from are deliberately mixed in quality, so that a program that passes may be unreadable and a
readable one may fail: what a process reward has to tell apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from papo.engines.protocols import Problem
from papo.engines.sources.generated import GeneratedSource
from papo.params import ProgramsParams, ProgramTier
from papo.schemas import Grading

ENTRY_POINT = "solve"
GRADING = Grading(kind="code", entry_point=ENTRY_POINT)

POOL = 16
"""Inputs that tests are chosen from."""

LEAST_TESTS, LEAST_RESULTS = 5, 4
"""Tests of a problem, and different results that it has over the pool, at least."""

_SPARE = ("spare", "extra", "unused", "draft")


@dataclass(frozen=True)
class Kind:
    """What an operation does, as words, as Python and as a function; `{n}` is its number, `{x}` what it is applied to.

    Attributes:
        takes, gives: "number" or "numbers".
        name: of its result, in a readable program.
        inner: in an expression that goes through a list, the name of one of it is `{v}`.
        largest: of the number, which is 2 at least; 0 where there is none.
    """

    takes: str
    gives: str
    words: str
    python: str
    name: str
    apply: Callable[[Any, int], Any]
    largest: int = 9

    @property
    def infix(self) -> bool:
        """Whether its Python has to stand in parentheses within another."""
        return self.python[0] != "[" and not self.python.endswith((")", "]"))


KINDS = (
    Kind("number", "number", "add {n}", "{x} + {n}", "raised", lambda x, n: x + n),
    Kind("number", "number", "subtract {n}", "{x} - {n}", "lowered", lambda x, n: x - n),
    Kind("number", "number", "multiply by {n}", "{x} * {n}", "scaled", lambda x, n: x * n),
    Kind("number", "number", "divide by {n}", "{x} // {n}", "divided", lambda x, n: x // n),
    Kind("number", "number", "remainder by {n}", "{x} % {n}", "remainder", lambda x, n: x % n),
    Kind("number", "number", "at least {n}", "max({x}, {n})", "lifted", lambda x, n: max(x, n)),
    Kind("number", "number", "at most {n}", "min({x}, {n})", "capped", lambda x, n: min(x, n)),
    Kind("number", "number", "negate", "-{x}", "negated", lambda x, n: -x, 0),
    Kind("number", "number", "square", "{x} ** 2", "squared", lambda x, n: x**2, 0),
    Kind("number", "number", "size", "abs({x})", "size", lambda x, n: abs(x), 0),
    Kind("numbers", "numbers", "add {n} to each", "[{v} + {n} for {v} in {x}]", "shifted", lambda x, n: [v + n for v in x]),
    Kind("numbers", "numbers", "multiply each by {n}", "[{v} * {n} for {v} in {x}]", "stretched", lambda x, n: [v * n for v in x]),
    Kind("numbers", "numbers", "keep above {n}", "[{v} for {v} in {x} if {v} > {n}]", "large", lambda x, n: [v for v in x if v > n]),
    Kind("numbers", "numbers", "keep below {n}", "[{v} for {v} in {x} if {v} < {n}]", "small", lambda x, n: [v for v in x if v < n]),
    Kind("numbers", "numbers", "drop first {n}", "{x}[{n}:]", "rest", lambda x, n: x[n:], 3),
    Kind("numbers", "numbers", "keep first {n}", "{x}[:{n}]", "first", lambda x, n: x[:n], 3),
    Kind("numbers", "numbers", "sort", "sorted({x})", "ordered", lambda x, n: sorted(x), 0),
    Kind("numbers", "numbers", "reverse", "{x}[::-1]", "backwards", lambda x, n: x[::-1], 0),
    Kind("numbers", "number", "total", "sum({x})", "total", lambda x, n: sum(x), 0),
    Kind("numbers", "number", "count", "len({x})", "count", lambda x, n: len(x), 0),
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """A kind with its number."""

    kind: Kind
    number: int

    @property
    def words(self) -> str:
        return self.kind.words.format(n=self.number)

    def python(self, operand: str, one: str) -> str:
        return self.kind.python.format(x=operand, n=self.number, v=one)


Chain = tuple[Operation, ...]


class ProgramsSource(GeneratedSource[ProgramTier, Chain]):
    """See `GeneratedSource`; a draft is the chain of operations.

    The tests of a problem depend on the problem alone, so that it has the same id whatever the seed.
    """

    world, unit, patience = "programs", "operations", 10

    def __init__(self, params: ProgramsParams, *, seed: int, prompt_template: str = "{prompt}") -> None:
        self._params = params
        super().__init__(params.train, params.eval, params.traces, seed=seed, prompt_template=prompt_template)

    def _draw(self, stream: random.Random, tier: ProgramTier) -> Chain:
        return draw_chain(stream, tier)

    def _prompt(self, chain: Chain) -> str:
        return prompt_of(chain)

    def _problem(self, chain: Chain) -> Problem:
        tier = f"{len(chain)} operations"
        return Problem(prompt_of(chain), tests_of(chain), clean(chain), "programs", tier, grading=GRADING)

    def _range(self, tier: ProgramTier) -> tuple[int, int]:
        return tier.min_operations, tier.max_operations

    def _trace(self, stream: random.Random, chain: Chain) -> str:
        p = self._params
        written = _wrong(stream, chain) if stream.random() < p.wrong_share else chain
        style = stream.random()
        for share, write in ((p.cramped_share, cramped), (p.terse_share, terse)):
            if style < share:
                return write(written)
            style -= share
        lines = clean(written)
        return _padded(stream, lines) if style < p.padded_share else lines


def draw_chain(stream: random.Random, tier: ProgramTier) -> Chain:
    """Operations that fit each other, no kind twice, each of which counts: without any one of them some result is another."""
    while True:
        chain: Chain = ()
        gives = stream.choice(["number", "numbers"])
        for _ in range(stream.randint(tier.min_operations, tier.max_operations)):
            used = {operation.kind.words for operation in chain}
            kind = stream.choice([kind for kind in KINDS if kind.takes == gives and kind.words not in used])
            chain = (*chain, Operation(kind, stream.randint(2, kind.largest) if kind.largest else 0))
            gives = kind.gives
        if _counts(chain):
            return chain


def prompt_of(chain: Chain) -> str:
    """`solve(number): add 3, negate` and a line break."""
    return f"{ENTRY_POINT}({chain[0].kind.takes}): {', '.join(operation.words for operation in chain)}\n"


def result_of(chain: Chain, given: Any) -> Any:
    """What the chain makes of a number or a list of numbers, computed without any of the Python that programs are written in."""
    for operation in chain:
        given = operation.kind.apply(given, operation.number)
    return given


def clean(chain: Chain) -> str:
    """The readable program, and the reference solution: an operation a line, each result by its name."""
    lines, operand = [f"def {ENTRY_POINT}({chain[0].kind.takes}):"], chain[0].kind.takes
    for operation in chain[:-1]:
        lines.append(f"    {operation.kind.name} = {operation.python(operand, 'item')}")
        operand = operation.kind.name
    return "\n".join([*lines, f"    return {chain[-1].python(operand, 'item')}"])


def cramped(chain: Chain) -> str:
    """The program in one line, in names of one letter."""
    steps = [operation.python("x", "v") for operation in chain]
    line = "; ".join([*(f"x = {step}" for step in steps[:-1]), f"return {steps[-1]}"])
    return f"def {ENTRY_POINT}(x):\n    {line}"


def terse(chain: Chain) -> str:
    """The program as one expression, in names of one letter."""
    expression = "x"
    for place, operation in enumerate(chain):
        if place and chain[place - 1].kind.infix and operation.kind.infix:
            expression = f"({expression})"
        expression = operation.python(expression, "v")
    return f"def {ENTRY_POINT}(x):\n    return {expression}"


def tests_of(chain: Chain) -> str:
    """`check(candidate)` over inputs that tell the chain from chains that differ in one operation, wherever the pool does."""
    pool = _pool(random.Random(prompt_of(chain)), chain[0].kind.takes)
    right = [result_of(chain, given) for given in pool]
    chosen = {0}
    for other in _neighbours(chain):
        differs = [place for place, given in enumerate(pool) if result_of(other, given) != right[place]]
        if differs and not chosen & set(differs):
            chosen.add(differs[0])
    for place in range(POOL):
        if len(chosen) < LEAST_TESTS:
            chosen.add(place)
    calls = [f"    assert candidate({pool[place]!r}) == {right[place]!r}" for place in sorted(chosen)]
    return "\n".join(["def check(candidate):", *calls, ""])


def _pool(stream: random.Random, takes: str) -> list[Any]:
    if takes == "number":
        return stream.sample(range(-30, 31), POOL)
    return [[stream.randint(-9, 12) for _ in range(stream.randint(4, 8))] for _ in range(POOL)]


def _counts(chain: Chain) -> bool:
    """Whether the chain has different results, and every operation has a part in them."""
    pool = _pool(random.Random(prompt_of(chain)), chain[0].kind.takes)
    right = [result_of(chain, given) for given in pool]
    if len(set(map(repr, right))) < LEAST_RESULTS:
        return False
    shorter = (chain[:place] + chain[place + 1 :] for place in range(len(chain)))
    return all(
        not _fits(other, chain[0].kind.takes)
        or any(result_of(other, given) != result for given, result in zip(pool, right, strict=True))
        for other in shorter
    )


def _fits(chain: Chain, given: str) -> bool:
    """Whether each operation takes what the one before gives, and the first what is given."""
    kinds = [operation.kind for operation in chain]
    return [kind.takes for kind in kinds] == [given, *(kind.gives for kind in kinds)][: len(kinds)]


def _neighbours(chain: Chain) -> Iterator[Chain]:
    """Chains that fit the same input and differ in one operation: another number, another kind, one left out, two swapped."""
    takes = chain[0].kind.takes
    for place, operation in enumerate(chain):
        before, after = chain[:place], chain[place + 1 :]
        for number in range(2, operation.kind.largest + 1):
            if number != operation.number:
                yield (*before, Operation(operation.kind, number), *after)
        for kind in KINDS:
            if (kind.takes, kind.gives) == (operation.kind.takes, operation.kind.gives) and kind != operation.kind:
                yield (*before, Operation(kind, min(operation.number or 2, kind.largest)), *after)
        for other in ((*before, *after), (*before, *after[:1], operation, *after[1:])):
            if other != chain and _fits(other, takes):
                yield other


def _wrong(stream: random.Random, chain: Chain) -> Chain:
    """A neighbour with other results."""
    pool = _pool(random.Random(prompt_of(chain)), chain[0].kind.takes)
    others = list(_neighbours(chain))
    while True:
        other = stream.choice(others)
        if any(result_of(other, given) != result_of(chain, given) for given in pool):
            return other


def _padded(stream: random.Random, program: str) -> str:
    """The program after one or two lines that do nothing: a name that nobody reads."""
    head, rest = program.split("\n", 1)
    parameter = head[head.index("(") + 1 : head.index(")")]
    lines = [
        f"    {name} = {stream.choice([parameter, str(stream.randint(2, 9))])}"
        for name in stream.sample(_SPARE, stream.randint(1, 2))
    ]
    return "\n".join([head, *lines, rest])
