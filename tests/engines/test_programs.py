"""The generated programming problems and traces: valid, held out, seeded, mixed as the params say, and told apart by their tests."""

from __future__ import annotations

import ast
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from sandboxes import sandboxed

from papo.engines.protocols import JudgeItem, Problem, VerifyItem
from papo.engines.sandbox import Sandbox
from papo.engines.sources import make_source
from papo.engines.sources.programs import (
    ENTRY_POINT,
    KINDS,
    LEAST_TESTS,
    Operation,
    ProgramsSource,
    _neighbours,
    clean,
    cramped,
    draw_chain,
    prompt_of,
    result_of,
    terse,
)
from papo.engines.sources.programs import tests_of as checks_of  # a name that pytest does not take for a test
from papo.engines.verifiers.code import CodeVerifier
from papo.errors import DataError
from papo.params import PrepareParams, ProgramsParams, ProgramTier
from papo.schemas import Grading

IN_RANGE = ProgramTier(min_operations=2, max_operations=4, problems=120)
SMALL = ProgramsParams(
    train=IN_RANGE,
    eval={
        "same": ProgramTier(min_operations=2, max_operations=4, problems=40),
        "harder": ProgramTier(min_operations=5, max_operations=5, problems=20),
    },
    traces=300,
)


def kind(words: str) -> Any:
    return next(kind for kind in KINDS if kind.words == words)


def called(program: str, given: Any) -> Any:
    """What a program that this repository wrote makes of an input."""
    names: dict[str, Any] = {}
    exec(compile(program, "program", "exec"), names)
    return names[ENTRY_POINT](given)


def passes(program: str, tests: str) -> bool:
    names: dict[str, Any] = {}
    exec(compile(f"{program}\n{tests}", "program", "exec"), names)
    try:
        names["check"](names[ENTRY_POINT])
    except Exception:  # what a wrong program does is anything
        return False
    return True


def problems_of(source: ProgramsSource) -> list[Problem]:
    return [*source.train(), *(problem for items in source.benchmarks().values() for problem in items)]


def test_the_readable_program_as_its_problem_says() -> None:
    chain = (Operation(kind("keep above {n}"), 3), Operation(kind("total"), 0), Operation(kind("subtract {n}"), 2))
    assert prompt_of(chain) == "solve(numbers): keep above 3, total, subtract 2\n"
    assert clean(chain) == (
        "def solve(numbers):\n    large = [item for item in numbers if item > 3]\n    total = sum(large)\n    return total - 2"
    )
    assert terse(chain) == "def solve(x):\n    return sum([v for v in x if v > 3]) - 2"
    assert cramped(chain) == "def solve(x):\n    x = [v for v in x if v > 3]; x = sum(x); return x - 2"
    assert result_of(chain, [1, 5, 9]) == 12


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("add {n}", "negate", "-(x + 4)"),
        ("negate", "square", "(-x) ** 2"),
        ("add {n}", "size", "abs(x + 4)"),
        ("size", "add {n}", "abs(x) + 4"),
        ("subtract {n}", "multiply by {n}", "(x - 4) * 4"),
        ("sort", "drop first {n}", "sorted(x)[4:]"),
        ("keep first {n}", "reverse", "x[:4][::-1]"),
        ("add {n} to each", "keep below {n}", "[v for v in [v + 4 for v in x] if v < 4]"),
    ],
)
def test_a_terse_program_has_the_parentheses_that_it_needs(first: str, second: str, expected: str) -> None:
    chain = (Operation(kind(first), 4), Operation(kind(second), 4))
    assert terse(chain) == f"def solve(x):\n    return {expected}"


def test_what_operations_do_and_what_their_python_does_is_the_same() -> None:
    stream = random.Random(0)
    for _ in range(300):
        chain = draw_chain(stream, IN_RANGE)
        inputs: list[Any] = [7, 0, -12] if chain[0].kind.takes == "number" else [[], [3], [9, -4, 0, 9, 2]]
        for given in inputs:
            right = result_of(chain, given)
            assert [called(write(chain), given) for write in (clean, terse, cramped)] == [right] * 3


def test_every_kind_of_operation_is_drawn_and_none_twice_in_a_chain() -> None:
    stream = random.Random(0)
    chains = [draw_chain(stream, IN_RANGE) for _ in range(500)]
    assert {operation.kind.words for chain in chains for operation in chain} == {kind.words for kind in KINDS}
    for chain in chains:
        assert len({operation.kind.words for operation in chain}) == len(chain)
        assert all(one.kind.gives == other.kind.takes for one, other in pairwise(chain))


def test_problems_are_of_the_kind_code_with_tests_that_their_solution_passes() -> None:
    problems = problems_of(ProgramsSource(SMALL, seed=0))
    assert len(problems) == 180
    for problem in problems:
        assert problem.grading == Grading(kind="code", entry_point="solve")
        assert problem.source == "programs"
        assert problem.answer.count("assert candidate(") >= LEAST_TESTS
        assert passes(problem.reference_solution or "", problem.answer)
        assert problem.tier == f"{problem.prompt.count(',') + 1} operations"


def test_tests_tell_a_program_from_those_that_differ_in_one_operation() -> None:
    stream = random.Random(1)
    fooled = same = tried = 0
    for _ in range(60):
        chain = draw_chain(stream, IN_RANGE)
        tests = checks_of(chain)
        # Inputs that the tests were not chosen from.
        number = chain[0].kind.takes == "number"
        others: list[Any] = (
            [*range(-60, 61)] if number else [[stream.randint(-9, 12) for _ in range(7)] for _ in range(60)]
        )
        for other in _neighbours(chain):
            differs = any(result_of(other, given) != result_of(chain, given) for given in others)
            tried, same = tried + 1, same + (not differs)
            fooled += differs and passes(clean(other), tests)
    assert tried > 1000
    assert same < 0.15 * tried
    assert fooled < 0.03 * tried


def test_the_tests_of_a_problem_do_not_depend_on_the_seed() -> None:
    first, second = (
        {problem.prompt: problem.answer for problem in problems_of(ProgramsSource(params, seed=seed))}
        for seed, params in enumerate(
            [SMALL.model_copy(update={"train": IN_RANGE.model_copy(update={"problems": 1500})})] * 2
        )
    )
    both = first.keys() & second.keys()
    assert len(both) > 20
    assert all(first[prompt] == second[prompt] for prompt in both)


def test_nothing_is_in_two_parts_and_nothing_twice() -> None:
    tier = ProgramTier(min_operations=2, max_operations=2, problems=400)
    params = ProgramsParams(train=tier, eval={"a": tier, "b": IN_RANGE}, traces=1500)
    source = ProgramsSource(params, seed=0)
    prompts = [problem.prompt for problem in problems_of(source)]
    assert len(prompts) == len(set(prompts)) == 920
    held_out = {problem.prompt for items in source.benchmarks().values() for problem in items}
    traced = {prompt for prompt, _ in source.traces()}
    assert not held_out & traced
    assert traced & {
        problem.prompt for problem in source.train()
    }  # the space is small: without care they would overlap


def test_a_seed_decides_everything_and_a_source_can_be_read_twice() -> None:
    def everything(source: ProgramsSource) -> list[object]:
        return [list(source.train()), {k: list(v) for k, v in source.benchmarks().items()}, list(source.traces())]

    source = ProgramsSource(SMALL, seed=0)
    assert everything(source) == everything(source) == everything(ProgramsSource(SMALL, seed=0))
    other = everything(ProgramsSource(SMALL, seed=1))
    assert all(one != two for one, two in zip(everything(source), other, strict=True))


def test_the_parts_draw_from_streams_of_their_own() -> None:
    source = ProgramsSource(SMALL, seed=0)
    more = ProgramsSource(SMALL.model_copy(update={"traces": 500}), seed=0)
    assert list(more.train()) == list(source.train())
    assert list(more.traces())[:300] == list(source.traces())


def style_of(program: str) -> str:
    if program.startswith("def solve(x)"):
        return "cramped" if ";" in program else "terse"
    read = {
        node.id
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    given = {
        node.id
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return "padded" if given - read else "clean"


def chain_of(prompt: str) -> str:
    """The tests of a problem, made from its words."""
    words = prompt.split(": ")[1].strip().split(", ")
    takes, chain = prompt[len("solve(") : prompt.index(")")], []
    for word in words:
        number = next((int(part) for part in word.split() if part.isdigit()), 0)
        form = word.replace(str(number), "{n}") if number else word
        found = next(one for one in KINDS if one.words == form and one.takes == takes)
        chain.append(Operation(found, number))
        takes = found.gives
    return checks_of(tuple(chain))


def test_traces_mix_the_styles_in_the_shares_asked_for_and_each_has_wrong_ones() -> None:
    params = SMALL.model_copy(
        update={"traces": 3000, "cramped_share": 0.2, "terse_share": 0.3, "padded_share": 0.2, "wrong_share": 0.25}
    )
    traces = list(ProgramsSource(params, seed=0).traces())
    styles = [style_of(program) for _, program in traces]
    shares = {style: count / 3000 for style, count in Counter(styles).items()}
    # Four standard deviations of a share of 3,000 draws are 0.037 at most.
    assert shares == pytest.approx({"cramped": 0.2, "terse": 0.3, "padded": 0.2, "clean": 0.3}, abs=0.037)
    failed: Counter[str] = Counter()
    for (prompt, program), style in zip(traces[:1200], styles, strict=False):
        failed[style] += not passes(program, chain_of(prompt))
    for style, count in failed.items():
        # Nearly every wrong program is found out by the tests; see above.
        assert 0.15 < count / styles[:1200].count(style) < 0.35


def test_nothing_wrong_is_shown_where_nothing_wrong_is_asked_for() -> None:
    params = SMALL.model_copy(update={"wrong_share": 0.0})
    assert all(passes(program, chain_of(prompt)) for prompt, program in ProgramsSource(params, seed=0).traces())
    params = SMALL.model_copy(update={"wrong_share": 1.0})
    failed = [not passes(program, chain_of(prompt)) for prompt, program in ProgramsSource(params, seed=0).traces()]
    assert sum(failed) > 0.95 * len(failed)


@sandboxed
def test_in_the_sandbox_references_pass_and_wrong_programs_fail() -> None:
    problems = problems_of(ProgramsSource(SMALL, seed=2))[:12]
    right = [VerifyItem(problem.answer, problem.reference_solution or "", problem.grading) for problem in problems]
    wrong = [VerifyItem(one.gold, other.completion, one.grading) for one, other in pairwise(right)]
    words = [
        VerifyItem(right[0].gold, text, right[0].grading) for text in ("no program", "def solve(number):\n    return")
    ]
    verdicts = CodeVerifier(Sandbox(), workers=2).verify([*right, *wrong, *words], lambda _: None)
    assert [verdict.score for verdict in verdicts] == [1.0] * 12 + [0.0] * 13
    assert {verdict.status for verdict in verdicts} == {"ok"}


@pytest.mark.parametrize(("name", "where"), [("train", "train"), ("tiny", "tiny")])
def test_more_problems_than_there_are_is_an_error(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A world of four kinds without numbers has few chains of two.
    few = tuple(
        kind for kind in KINDS if kind.words in ("negate", "square", "size", "sort", "reverse", "total", "count")
    )
    monkeypatch.setattr("papo.engines.sources.programs.KINDS", few)
    many = ProgramTier(min_operations=2, max_operations=2, problems=50)
    one = ProgramTier(min_operations=2, max_operations=2, problems=1)
    params = ProgramsParams(train=many if name == "train" else one, eval={"tiny": one if name == "train" else many})
    with pytest.raises(DataError, match=r"only \d+ different problems of 2 operations found, 50 asked for") as caught:
        ProgramsSource(params, seed=0)
    assert caught.value.where == f"prepare.programs, {where}"


def test_the_prompt_template_words_the_problem_and_nothing_else() -> None:
    plain, worded = ProgramsSource(SMALL, seed=0), ProgramsSource(SMALL, seed=0, prompt_template="Write {prompt}!")
    first = next(plain.train())
    assert next(worded.train()).prompt == f"Write {first.prompt.strip()}!"
    assert [problem.answer for problem in worded.train()] == [problem.answer for problem in plain.train()]
    prompt, completion = next(plain.traces())
    assert next(worded.traces()) == (f"Write {prompt.strip()}!", completion)


def test_make_source_passes_seed_and_template_on() -> None:
    source = make_source(PrepareParams(source="programs", programs=SMALL, seed=7, prompt_template="> {prompt}"))
    expected = ProgramsSource(SMALL, seed=7, prompt_template="> {prompt}")
    assert list(source.train()) == list(expected.train())


def test_references_are_what_the_judge_calls_readable_and_terse_programs_are_not() -> None:
    from papo.engines.judges.readability import ReadabilityJudge

    stream = random.Random(3)
    chains = [draw_chain(stream, IN_RANGE) for _ in range(100)]
    for write, scores in ((clean, {1.0}), (terse, {0.0}), (cramped, {0.0})):
        items = [JudgeItem("", None, write(chain), Grading(kind="code", entry_point="solve")) for chain in chains]
        assert {judgement.score for judgement in ReadabilityJudge().judge(items, lambda _: None)} == scores
