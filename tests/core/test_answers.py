"""Answers as text: extraction, looks, numbers, and what is decided without algebra."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.core.answers import (
    MAX_ANSWER_CHARS,
    MAX_DIGITS,
    extract_boxed,
    longest_digits,
    normalise,
    plain_number,
    same_answer,
    visible,
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{6}", "6"),
        ("3+5=8\n8-2=6\n\\boxed{6}", "6"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{[0,\infty\}}", r"[0,\infty\}"),
        (r"\boxed{1\\} tail", r"1\\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        ("\\boxed{\u0660\x00}", "\u0660\x00"),
        ("\\boxed{5\ud800}", "5\ufffd"),
        ("\\boxed{" + "7" * MAX_ANSWER_CHARS + "}", "7" * MAX_ANSWER_CHARS),
    ],
)
def test_last_box(text: str, content: str) -> None:
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 6.",
        "boxed{6}",
        r"\boxed 6",
        r"\boxed{6",
        r"\boxed{1} and then \boxed{2",
        "\\boxed{6\\",
        r"\boxed{{6}",
        "\\boxed{" + "7" * (MAX_ANSWER_CHARS + 1) + "}",
    ],
)
def test_no_box(text: str) -> None:
    assert extract_boxed(text) is None


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 150_000, r"\boxed{" + "1" * 10**6, "\\boxed" + " " * 10**6, "{" * 10**6 + r"\boxed{1}"],
)
def test_extraction_of_a_megabyte_is_quick(text: str) -> None:
    start = time.perf_counter()
    extract_boxed(text)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (" 6 ", "6"),
        ("6.", "6"),
        ("$6$", "6"),
        ("$$6$$.", "6"),
        (r"\(6\)", "6"),
        (r"\[ 6 \]", "6"),
        ("$a$ and $b$", "$a$and$b$"),
        (r"\left( 1 , 2 \right)", "(1,2)"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        ("1,234,567", "1234567"),
        ("-1,234.50", "-1234.50"),
        (r"1{,}000", "1000"),
        (r"1\,000", "1000"),
        ("1 000", "1000"),
        ("1,2", "1,2"),
        ("32,349", "32349"),
        ("32, 349", "32, 349"),
        ("(1,234)", "(1,234)"),
        ("(1, 2)", "(1,2)"),
        (r"28\%", "28%"),
        ("28 %", "28%"),
        (r"\text{A}", "A"),
        (r"5 \text{ cm}", r"5 \text{cm}"),
        ("\u22125", "-5"),
        ("\u200e5\u200f", "5"),
        ("5\x00", "5"),
        ("\u00a05", "5"),
        (r"1 \\ 2", r"1 \\2"),
        (r"\pi r", r"\pi r"),
        ("5 4", "5 4"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_normalise(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_visible_keeps_everything_that_shows() -> None:
    assert visible("\u202e\ufeff(x)\u2069 \u0663\u00b2") == "(x) \u0663\u00b2"


@given(st.text(alphabet=st.sampled_from(list("\\$(){}[].,~!; 0129-+/=%afrctex\u200e\u2212\n")), max_size=40))
def test_normalising_twice_changes_nothing_further(answer: str) -> None:
    assert normalise(normalise(answer)) == normalise(answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("+12", Fraction(12)),
        ("-0012", Fraction(-12)),
        ("$1{,}000$", Fraction(1000)),
        ("0.125", Fraction(1, 8)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("-3/6", Fraction(-1, 2)),
        (r"-\dfrac{3}{6}", Fraction(-1, 2)),
        (r"\frac{-3}{6}", Fraction(-1, 2)),
        ("9" * MAX_DIGITS, Fraction(10**MAX_DIGITS - 1)),
        ("9" * (MAX_DIGITS + 1), None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("1e5", None),
        ("1_000", None),
        ("\u0661\u0662", None),
        ("\u00b2", None),
        ("3+5", None),
        ("28%", None),
        ("1.2.3", None),
        ("1 2", None),
        ("inf", None),
        ("", None),
        ("x", None),
    ],
)
def test_plain_number(text: str, value: Fraction | None) -> None:
    assert plain_number(text) == value


@given(st.integers(-(10**30), 10**30))
def test_every_integer_is_read_back(number: int) -> None:
    assert plain_number(str(number)) == plain_number(f"${number:,}$") == number


def test_longest_digits() -> None:
    assert longest_digits("12 and 3456, 7") == 4
    assert longest_digits("") == 0


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("6", "6", True),
        ("6", " $6.0$ ", True),
        ("6", "7", False),
        ("1000", "1,000", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "2/4", True),
        ("0.5", "0.6", None),
        (r"\frac{1}{3}", "0.333333", None),
        ("x+1", "x + 1", True),
        ("x+1", "1+x", None),
        ("3+5", "8", None),
        ("6", "3+5-2", False),
        ("6", "(3+5-2)", False),
        ("6", "3+5-2=?", False),
        ("6", "3+5-2=6", True),
        ("6", "(6)", True),
        ("6", "", False),
        ("6", "-", False),
        ("6", "6 6", False),
        ("12", "1\n2", False),
        ("6", "x=6", None),
        ("6", r"2\cdot3", None),
    ],
)
def test_same_answer(gold: str, answer: str, same: bool | None) -> None:
    assert same_answer(gold, answer) is same


@given(st.text(alphabet="0123456789+-=?\n", max_size=20), st.integers(0, 99))
def test_answers_in_the_alphabet_of_the_embedded_world_are_always_settled(answer: str, gold: int) -> None:
    assert same_answer(str(gold), answer) is not None
