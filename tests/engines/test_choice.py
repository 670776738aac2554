"""Multiple choice: letters, several letters, stated answers, bad gold answers."""

from __future__ import annotations

import pytest

from papo.engines.protocols import Verdict, VerifyItem
from papo.engines.verifiers.choice import ChoiceVerifier
from papo.schemas import Grading

BOXED = Grading(kind="choice")
STATED = Grading(kind="choice", extraction="answer_is")


@pytest.mark.parametrize(
    ("gold", "completion", "grading", "verdict"),
    [
        ("B", r"so \boxed{B}", BOXED, Verdict(1.0, "B", "ok")),
        ("B", r"\boxed{\text{(B)}}", BOXED, Verdict(1.0, "B", "ok")),
        ("(B)", r"\boxed{b}", BOXED, Verdict(1.0, "B", "ok")),
        (r"\text{(B)}", r"\boxed{B. 42\text{ m}}", BOXED, Verdict(1.0, "B", "ok")),
        ("J", r"\boxed{\mathrm{J}}", BOXED, Verdict(1.0, "J", "ok")),
        ("B", r"\boxed{C}", BOXED, Verdict(0.0, "C", "ok")),
        ("B", r"\boxed{B} or rather \boxed{C}", BOXED, Verdict(0.0, "C", "ok")),
        ("B", r"\boxed{B \text{ or } C}", BOXED, Verdict(0.0, "B, C", "ok")),
        ("B", r"\boxed{\text{(C) and (B)}}", BOXED, Verdict(0.0, "C, B", "ok")),
        ("B", r"\boxed{B}, that is \boxed{42}", BOXED, Verdict(0.0, None, "no_answer")),
        ("B", r"\boxed{B", BOXED, Verdict(0.0, None, "no_answer")),
        ("B", "The answer is B.", BOXED, Verdict(0.0, None, "no_answer")),
        ("B", "The answer is (B).", STATED, Verdict(1.0, "B", "ok")),
        ("B", "Answer: A\nNo.\n**Answer:** B", STATED, Verdict(1.0, "B", "ok")),
        ("B", "The answer is A or B.", STATED, Verdict(0.0, "A, B", "ok")),
        ("B", r"The answer is B. \boxed{C}", STATED, Verdict(0.0, "C", "ok")),
        ("B", r"The answer is B. \boxed{", STATED, Verdict(0.0, None, "no_answer")),
        ("B", "\u202eB\x00", STATED, Verdict(0.0, None, "no_answer")),
        ("42", r"\boxed{B}", BOXED, Verdict(None, "B", "unparsable_gold")),
        ("A or B", r"\boxed{B}", BOXED, Verdict(None, "B", "unparsable_gold")),
        ("", r"\boxed{B}", BOXED, Verdict(None, "B", "unparsable_gold")),
    ],
)
def test_verdicts(gold: str, completion: str, grading: Grading, verdict: Verdict) -> None:
    done = list[int]()
    assert ChoiceVerifier().verify([VerifyItem(gold, completion, grading)], done.append) == [verdict]
    assert done == [1]


def test_no_items_and_no_library() -> None:
    assert ChoiceVerifier().verify([], lambda _: None) == []
    assert ChoiceVerifier().versions() == {}
