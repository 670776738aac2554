"""Contamination: equal but for the writing, reworded lightly; what is clean stays."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.engines.decontamination import Match, matches, tokens_of

DATA = Path(__file__).parents[3] / "shared/data"
GOLD = (
    r"Let $x$ and $y$ be positive real numbers such that $x + y = 10$. "
    r"Find the largest value that $\frac{1}{2} x^2 y$ can take, and round it to the nearest integer."
)
OTHERS = [
    "How many ways are there to seat five people in a row of eight chairs?",
    "A train leaves the station at noon and drives 60 miles an hour; when has it gone 210 miles?",
    "Compute $3+5$.",
]


def near(train: list[str], benchmark: list[str], threshold: float | None = 0.7) -> dict[int, Match]:
    return matches(train, {"bench": benchmark}, threshold=threshold)


@pytest.mark.parametrize(
    "planted",
    [
        GOLD,
        GOLD.upper().replace("\\FRAC", "\\frac"),
        GOLD.replace(" ", "  ").replace(". ", ".\n\n"),
        GOLD.replace("$x + y = 10$", r"\( x\,+\,y \;=\; 10 \)").replace(r"\frac", r"\displaystyle \dfrac"),
        GOLD.replace("$", "$$").replace(",", "").removesuffix("."),
        GOLD.replace("x + y", "x+y").replace("x^2 y", r"x^{2}\quad y"),
    ],
    ids=["same", "case", "spaces", "LaTeX's spacing", "punctuation", "braces"],
)
def test_the_same_problem_written_otherwise_is_equal(planted: str) -> None:
    assert near([*OTHERS, planted], [OTHERS[0] + " Or six?", GOLD], None) == {3: Match("bench", 1, 1.0, True)}


@pytest.mark.parametrize(
    "planted",
    [
        GOLD.replace("Find the largest value", "Determine the greatest value"),
        GOLD.replace("positive real numbers such that", "positive reals with"),
        "Problem 7. " + GOLD.replace(", and round it to the nearest integer", ""),
        GOLD + " Show your work.",
        GOLD.replace("10", "12"),
    ],
)
def test_a_light_rewording_is_near(planted: str) -> None:
    (match,) = near([*OTHERS, planted], [GOLD, "How far is it?"]).values()
    assert (match.benchmark, match.place, match.equal) == ("bench", 0, False)
    assert 0.7 <= match.score < 1
    assert near([planted], [GOLD], None) == {}


def test_the_score_is_the_share_of_tokens_in_common() -> None:
    one = "Tom has seven red apples and gives his sister Ann three of the apples"  # 14 words
    two = "Tim has seven red apples and gives his sister Ann two of the apples"
    assert near([one], [two]) == {0: Match("bench", 0, pytest.approx(12 / 14), False)}
    assert near([one], [two], 0.86) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3+5", "3-5"),
        ("2*(3+4)", "2*3+4"),
        ("5!", "5"),
        ("1.5", "15"),
        ("(1,2)", "12"),
        (r"\sin x", "sin x"),
        ("x^2", "x2"),
    ],
)
def test_what_makes_another_problem_counts(one: str, other: str) -> None:
    assert near([f"Compute ${one}$."], [f"Compute ${other}$."]) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [("1,000", "1000"), ("1{,}000", "1000"), ("(1, 2)", "(1,2)"), ("six-digit", "six digit"), ("3 + 5", "3+5"), ("计算", "计 算")],
)  # fmt: skip
def test_what_makes_none_does_not(one: str, other: str) -> None:
    assert tokens_of(one) == tokens_of(other)


def test_formulas_that_differ_in_a_digit_are_other_problems() -> None:
    assert near(["3+5-2+4+1+1+9-3=?\n"], ["3+5-2+4+1+1+9-4=?\n"], 0.5) == {}


def test_the_template_of_a_set_is_no_likeness_and_hides_none() -> None:
    template = "You are a knowledgeable assistant. Think step by step. {} Please put the final answer within a box."
    questions = [
        "Compute $3+5$.",
        "How many dogs are there?",
        "Is it late?",
        "What is a ring?",
        "Name a prime above 90.",
    ]
    train = [template.format(question) for question in questions]
    assert near(train, ["What is a field?", "Compute $3-5$."]) == {}
    assert (
        near(train, [template.format(text) for text in ("What is a field?", "How far?", "Who?", "When?", "Why?")]) == {}
    )
    assert near(train, ["Name a prime above 90", "Who?"]) == {4: Match("bench", 0, 1.0, True)}
    assert near(questions, [*train[:4], template.format("Who?")], None).keys() == {0, 1, 2, 3}


def test_the_most_like_of_several_benchmarks_is_named() -> None:
    far, close = GOLD.replace("10", "12").replace("largest", "least"), GOLD.replace("10", "12")
    assert matches([GOLD], {"a": ["Who?", far], "b": [close]}, threshold=0.7)[0].benchmark == "b"
    assert matches([GOLD], {"a": [close], "b": ["Who?", GOLD]}, threshold=0.7) == {0: Match("b", 1, 1.0, True)}


def test_nothing_is_found_in_nothing() -> None:
    assert matches([], {"a": ["x"]}, threshold=0.5) == {}
    assert matches(["x"], {}, threshold=0.5) == {}
    assert near(["???"], ["!!!"]) == {}


@given(st.lists(st.text(max_size=60), max_size=6), st.lists(st.text(max_size=60), max_size=6))
def test_any_text_is_compared_and_equal_text_found(train: list[str], benchmark: list[str]) -> None:
    found = near(train, benchmark)
    assert {index for index, text in enumerate(train) if text in benchmark} <= found.keys()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside this checkout")
def test_real_problems() -> None:
    def read(name: str, column: str) -> list[str]:
        return [json.loads(line)[column] for line in (DATA / name).read_text().splitlines()]

    gsm8k, olympiad = read("gsm8k_test.jsonl", "question"), read("olympiadbench_675.jsonl", "question")
    math500 = read("math500.jsonl", "problem")
    assert matches(gsm8k, {"math-500": math500, "olympiadbench": olympiad}, threshold=0.7) == {}
    planted = [text.replace("$", " $").replace("Find", "Determine").replace("Compute", "Calculate") for text in math500]
    found = matches([*gsm8k, *planted], {"math-500": math500}, threshold=0.7)
    # What is short has too few words to be like another.
    assert len(found) > 485
    assert all(index - len(gsm8k) == match.place for index, match in found.items())


def test_twenty_thousand_against_two_thousand_take_less_than_a_minute() -> None:
    stream = random.Random(0)
    words = [f"w{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(3000)]
    weights = [1 / (n + 1) for n in range(3000)]
    texts = [" ".join(stream.choices(words, weights, k=50)) for _ in range(22_000)]
    began = time.monotonic()
    found = near([*texts[:19_999], texts[20_000] + " or"], texts[20_000:])
    assert time.monotonic() - began < 60
    assert found.keys() == {19_999}
