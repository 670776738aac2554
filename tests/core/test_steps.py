"""Problems and steps of the embedded world."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.core.steps import Step, operations, parse_problem, parse_steps, stray_lines
from papo.engines.sources.sums import draw_terms, prompt_of, solution_of
from papo.params import Tier


@pytest.mark.parametrize(
    ("prompt", "terms"),
    [
        ("3+5-2=?", [3, 5, -2]),
        ("3+5-2=?\n", [3, 5, -2]),
        ("Carry out:\n3+5=?\nBox the result.", [3, 5]),
        ("0-0=?", [0, 0]),
        ("3+5", None),
        ("3=?", None),
        ("3+5=8", None),
        ("13+5=?", None),
        ("3+15=?", None),
        ("3++5=?", None),
        ("1-3+5=? 2+2=?", None),
        ("Find all primes p with p+2 prime.", None),
        ("\u0663+5=?", None),
        ("", None),
    ],
)
def test_parse_problem(prompt: str, terms: list[int] | None) -> None:
    assert parse_problem(prompt) == terms


def test_operations_chain_from_left_to_right() -> None:
    assert operations([7, 9, -4]) == [(7, "+", 9, 16), (16, "-", 4, 12)]
    assert operations([7]) == []


def test_steps_are_read_in_order_and_judged_as_such() -> None:
    assert parse_steps("7+9=16\n16-4=13\n\\boxed{13}") == [Step((7, 9), 16), Step((16, -4), 13)]
    assert [step.true for step in parse_steps("7+9=16\n16-4=13")] == [True, False]


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (" 3 + 5 = 8 \r", Step((3, 5), 8)),
        ("3+5-2=6", Step((3, 5, -2), 6)),
        ("-3+5=2", Step((-3, 5), 2)),
        ("3-5=-2", Step((3, -5), -2)),
        ("16-4=12", Step((16, -4), 12)),
    ],
)
def test_lines_that_are_steps(line: str, step: Step) -> None:
    assert parse_steps(line) == [step]
    assert step.true
    assert stray_lines(line) == 0


@pytest.mark.parametrize(
    "line",
    [
        *("3+5=", "3+5", "8=8", "=8", "3+5=8=8", "3+5=8-2=6", "3*5=15", "3+5=8 so"),
        *("3+5=8\\boxed{8}", "9" * 5000 + "+1=0", "\u0663+5=8"),
    ],
)
def test_lines_that_are_none(line: str) -> None:
    assert parse_steps(line) == []
    assert stray_lines(line) == 1


def test_blank_lines_and_the_box_are_not_stray() -> None:
    assert stray_lines("\n 3+5=8\n\n\\boxed{8}\n") == 0


def test_a_merged_step_has_several_operations() -> None:
    assert Step((3, 5, -2), 6).operations == [(3, "+", 5, 8), (8, "-", 2, 6)]


@given(st.integers(0, 10**6), st.integers(2, 30))
def test_the_generated_solution_states_exactly_the_operations(seed: int, length: int) -> None:
    terms = draw_terms(random.Random(seed), Tier(min_terms=length, max_terms=length, problems=1))
    assert parse_problem(prompt_of(terms)) == terms
    steps = parse_steps(solution_of(terms))
    assert [step.operations for step in steps] == [[operation] for operation in operations(terms)]
    assert all(step.true for step in steps)


@given(st.text(max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    parse_problem(text)
    assert len(parse_steps(text)) + stray_lines(text) <= text.count("\n") + 1


@pytest.mark.parametrize("text", ["1+" * 500_000, "1+1=2\n" * 150_000, " " * 10**6, "1" * 10**6])
def test_a_megabyte_is_read_quickly(text: str) -> None:
    start = time.process_time()
    parse_problem(text)
    parse_steps(text)
    assert time.process_time() - start < 5.0
