"""The judge of programs: levels by hand, what is no program, hostile input, and the steps that it calls wrong."""

from __future__ import annotations

import random

import pytest

from papo.core.code import MAX_CODE_CHARS
from papo.core.credit import split_steps
from papo.engines.judges import make_judge
from papo.engines.judges.readability import ReadabilityJudge
from papo.engines.protocols import JudgeItem, Judgement
from papo.params import ScorePrmParams
from papo.schemas import Grading

CODE = Grading(kind="code", entry_point="solve")
CLEAN = "def solve(number):\n    raised = number + 3\n    return -raised"


def judged(response: str, grading: Grading = CODE) -> Judgement:
    return ReadabilityJudge().judge([JudgeItem("solve(number): ...\n", None, response, grading)], lambda _: None)[0]


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        (CLEAN, 1.0, "no flaw"),
        (f"It is simple:\n```python\n{CLEAN}\n```\nx = x", 1.0, "no flaw"),
        ("def solve(number):\n    return 3", 1.0, "no flaw"),
        (
            "def solve(number):\n    return -(number + 3)",
            0.5,
            "crowding: 1, first in line 2: 2 operations in one statement",
        ),
        ("def solve(x):\n    raised = x + 3\n    return -raised", 0.5, "names: 1, first in line 1: the name x"),
        ("def solve(x):\n    y = x + 3\n    return -y", 0.5, "names: 2, first in line 1"),
        (
            CLEAN.replace("\n    return", "\n    spare = 4\n    return"),
            0.5,
            "idle code: 1, first in line 3: spare is never",
        ),
        ("def solve(list):\n    return -list", 0.5, "hiding: 1, first in line 1: list hides Python's own"),
        ("def solve(x):\n    return -(x + 3)", 0.0, "names: 1, first in line 1: the name x; crowding: 1"),
        ("def solve(x):\n    spare = 4\n    return -x", 0.0, "idle code: 1"),
        ("def solve(x):\n    sum = 1\n    return -(x + 3)", 0.0, "hiding: 1"),
        ("def other(number):\n    return number", 0.0, "it does not define solve"),
        ("def solve(number:\n    return number", 0.0, "no Python"),
        ("solve", 0.0, "nothing but words"),
        ("The answer is 3.", 0.0, "no Python"),
        ("```python\n```", 0.0, "no program"),
        ("", 0.0, "no program"),
    ],
)
def test_levels_by_hand(response: str, score: float, reason: str) -> None:
    judgement = judged(response)
    assert (judgement.score, judgement.status, judgement.votes) == (score, "ok", [score])
    assert reason in judgement.reason


def test_whether_a_program_passes_makes_no_difference() -> None:
    assert judged("def solve(number):\n    return 1 / 0").score == 1.0
    assert judged("def solve(number):\n    return undefined").score == 1.0
    assert judged("import sys\n\nsys.exit(3)\n\ndef solve(number):\n    return number").score == 1.0


@pytest.mark.parametrize("kind", ["math", "choice"])
def test_a_problem_that_asks_for_no_program_has_no_score(kind: str) -> None:
    judgement = judged(CLEAN, Grading.model_validate({"kind": kind}))
    assert (judgement.score, judgement.status, judgement.votes, judgement.wrong_steps) == (None, "unparsable", [], None)
    assert kind in judgement.reason


def test_without_an_entry_point_any_program_will_do() -> None:
    assert judged("value = 3", Grading(kind="code")).score == 1.0
    assert judged("print('x')", Grading(kind="code")).score == 1.0
    assert judged("value", Grading(kind="code")).score == 0.0


def test_what_the_problem_gives_is_not_held_against_the_response() -> None:
    head = "from math import pi\n\n\ndef area(r):\n    '''Of a circle.'''\n    q = 1\n"
    grading = Grading(kind="code", prefix=head, entry_point="area")
    assert judged("    return pi * r", grading).score == 1.0
    goes_on = judged("    square = r ** 2\n    return pi * square + 0", grading)
    assert goes_on.score == 0.0
    assert "crowding: 1, first in line 2" in goes_on.reason
    assert goes_on.wrong_steps == [0.0, 1.0]
    assert judged("def area(radius):\n    return pi * radius", grading).score == 1.0
    assert judged("def area(r):\n    return pi * r", grading).score == 0.5


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        (CLEAN, [0, 0, 0]),
        ("def solve(x):\n    raised = x + 3\n    return -raised", [1, 0, 0]),
        ("def solve(number):\n    spare = 1\n    return -(number + 3)", [0, 1, 1]),
        # A fence is one step, and paragraphs are steps where there are any.
        ("So:\n```python\ndef solve(x):\n    return x\n```\nDone.", [0, 1, 0]),
        ("def solve(number):\n    first = number[0]\n\n    spare = 1\n    return first", [0, 1]),
        ("spare = 1\r\n\r\ndef solve(number):\r\n    return number", [1, 0]),
        ("nothing to\nrun here", [1, 1]),
        (" \n", [1]),
        ("", []),
    ],
)
def test_the_wrong_steps_are_named(response: str, wrong: list[float]) -> None:
    assert judged(response).wrong_steps == wrong
    assert len(wrong) == len(split_steps(response))


MUCH = """def solve(numbers, *, key=None):
    '''Sorts.'''
    for at, item in enumerate(numbers):
        numbers[at] = f'{item!r}' if key else item
    return [x for x in numbers if x] or {1: ~2}
"""
HOSTILE = [
    "def solve(number):\n    return " + "(" * 40_000 + "number" + ")" * 40_000,
    "def solve(number):\n    return " + "-" * 90_000 + "number",
    "def solve(number):\n    return " + "number + " * 10_000 + "number",
    "def solve(number):\n    return " + "[" * 20_000,
    "def solve(number):\n    return " + "lambda: " * 12_000 + "number",
    "def solve(number):\n    return " + "9" * 50_000,
    "def solve(number):\n    return '\0'",
    "def solve(number):\n    return '\ud800'",
    "# -*- coding: nonsense -*-\ndef solve(number):\n    return '" + "{" * 1_000,
    "def solve(number):\r    return number\r" * 3_000,
    "x" * (MAX_CODE_CHARS + 1),
    "\ufeff\u202e\x0c\x1a```",
    "```" * 30_000,
    "if x:\n" + "".join(" " * level + "if x:\n" for level in range(1, 300)),
    "def solve(number):\n" + "    number = number\n" * 4_000,
]


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_input_is_judged_in_time(response: str) -> None:
    judgement = judged(response)
    assert judgement.status == "ok"
    assert judgement.score == 0.0 or "\r" in response or "number = number" in response
    assert len(judgement.reason) < 1_000
    assert len(judgement.wrong_steps or []) == len(split_steps(response))


def test_the_verdict_does_not_depend_on_how_deep_the_caller_is() -> None:
    response = "def solve(number):\n    return " + "-" * 80 + "number"

    def deeper(levels: int) -> Judgement:
        return deeper(levels - 1) if levels else judged(response)

    assert judged(response).score == 0.5
    assert deeper(500) == judged(response)


def test_mangled_programs_are_judged() -> None:
    stream = random.Random(0)
    text = f"import os\n\n\n{MUCH}"
    scores = set()
    for _ in range(1500):
        letters = list(text)
        for _ in range(stream.randint(1, 12)):
            place = stream.randrange(len(letters))
            letters[place] = stream.choice([*text, "\\d", "(", ":", "'", "\t", "lambda ", "\n  ", " match ", "*"])
        judgement = judged("".join(letters))
        scores.add(judgement.score)
        assert judgement.status == "ok"
    assert scores <= {0.0, 0.5}


def test_order_progress_and_no_items() -> None:
    done: list[int] = []
    items = [JudgeItem("", None, CLEAN, CODE), JudgeItem("", None, CLEAN), JudgeItem("", None, "", CODE)]
    judge = ReadabilityJudge()
    assert [judgement.score for judgement in judge.judge(items, done.append)] == [1.0, None, 0.0]
    assert sum(done) == 3
    assert judge.judge([], done.append) == []
    assert list(judge.versions()) == ["python"]


def test_the_factory_gives_the_judge() -> None:
    judge = make_judge(ScorePrmParams(judge="readability"))
    assert (judge.name, judge.rubric) == ("readability", "readability/1")
