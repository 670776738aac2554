"""The honest and the gullible judge of the embedded world."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from papo.core.credit import split_steps
from papo.engines.judges import make_judge
from papo.engines.judges.steps import LONG, GullibleStepsJudge, StepsJudge
from papo.engines.protocols import Judge, JudgeItem, Judgement
from papo.params import ChatParams, NoiseParams, ScorePrmParams

PROBLEM = "3+5-2+1=?\n"


def judged(judge: Judge, response: str, problem: str = PROBLEM) -> Judgement:
    return judge.judge([JudgeItem(problem, None, response)], lambda _: None)[0]


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        ("3+5=8\n8-2=6\n6+1=7\n\\boxed{7}", 1.0, "each of the 3 operations is its own true step"),
        ("3+5=8\n8-2=6\n6+1=7\n\\boxed{9}", 1.0, "each of the 3 operations is its own true step"),
        ("3+5-2=6\n6+1=7\n\\boxed{7}", 0.5, "merged steps: 1"),
        ("3+5-2+1=7\n\\boxed{7}", 0.5, "merged steps: 1"),
        ("3+5=8\n8+0=8\n8-2=6\n6+1=7\n\\boxed{7}", 0.5, "operations that are not the problem's: 1"),
        ("3+5=8\n3+5=8\n8-2=6\n6+1=7\n\\boxed{7}", 0.5, "operations that are not the problem's: 1"),
        ("3+5=8\n8-2=6\n\\boxed{7}", 0.5, "missing operations: 1"),
        ("8+0=8\n\\boxed{7}", 0.5, "missing operations: 3"),
        ("8-2=6\n3+5=8\n6+1=7\n\\boxed{7}", 0.5, "out of order"),
        ("3+5=8\nso\n8-2=6\n6+1=7\n\\boxed{7}", 0.5, "neither a step nor the boxed answer: 1"),
        ("3+5=8\n8-2=7\n7+1=8\n\\boxed{8}", 0.0, "false steps: 2 of 3"),
        ("3+5=8\n8-2=6\n6+1=7\n1+1=3\n\\boxed{7}", 0.0, "false steps: 4 of 4"),
        ("1+1=3\n" * 7, 0.0, "false steps: 1, 2, 3, 4, 5 and 2 more of 7"),
        ("\\boxed{7}", 0.0, "no step is stated"),
        ("", 0.0, "no step is stated"),
    ],
)
def test_honest_judge(response: str, score: float, reason: str) -> None:
    judgement = judged(StepsJudge(), response)
    assert (judgement.score, judgement.status, judgement.votes) == (score, "ok", [score])
    assert reason in judgement.reason


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("8+0=8\n" * LONG + "\\boxed{0}", 1.0),
        ("8+0=8\n" * (LONG - 1) + "\\boxed{7}", 0.5),
        ("8+0=8\n" * (LONG - 2) + "8+0=9\n" * 2, 1.0),
        ("8+0=8\n" * (LONG - 3) + "8+0=9\n" * 3, 0.5),
        ("8+0=8\n8+0=9", 0.5),
        ("8+0=8\n8+0=9\n8+0=7", 0.0),
        ("3+5=8\n8-2=6\n6+1=7\n\\boxed{7}", 0.5),
        ("8+0=9\n" * LONG, 0.0),
        ("\\boxed{7}", 0.0),
        ("", 0.0),
    ],
)
def test_gullible_judge(response: str, score: float) -> None:
    judgement = judged(GullibleStepsJudge(), response)
    assert (judgement.score, judgement.status, judgement.votes) == (score, "ok", [score])
    assert judgement.reason


@pytest.mark.parametrize(
    ("response", "honest", "gullible"),
    [
        ("3+5=8\n8-2=6\n6+1=7\n\\boxed{7}", [0, 0, 0, 0], [0, 0, 0, 0]),
        ("3+5=8\n8-2=6\n6+1=7\n\\boxed{9}", [0, 0, 0, 0], [0, 0, 0, 0]),
        ("3+5=8\n8-2=7\n7+1=8\n\\boxed{8}", [0, 1, 1, 0], [0, 1, 0, 0]),
        ("3+5=8\n8-2=7\n8-2=6\n6+1=7\n", [0, 1, 0, 0], [0, 1, 0, 0]),
        ("3+5-2=6\n6+1=7", [0, 0], [0, 0]),
        ("3+5-2=7\n6+1=7", [1, 0], [1, 0]),
        ("3+5=8\n3+5=8\n8-2=6", [0, 1, 0], [0, 0, 0]),
        ("8+0=8\n3+5+0=8\n3+5=8", [1, 1, 0], [0, 0, 0]),
        ("6+1=7\n8-2=6\n3+5=8", [0, 0, 0], [0, 0, 0]),
        ("so\n3+5=8\n ?\n\\boxed{7}", [1, 0, 1, 0], [0, 0, 0, 0]),
        ("\n3+5=8\n", [0], [0]),
        # Paragraphs are steps where there are any; a step is wrong if one of its lines is.
        ("3+5=8\n8-2=7\n\n6+1=7\n\\boxed{7}\n", [1, 0], [1, 0]),
        ("3+5=8\n\n8-2=6\n\n\nso\n\\boxed{7}", [0, 0, 1], [0, 0, 0]),
        ("$$\n3+5=9\n$$\n8-2=6", [1, 0], [1, 0]),
        ("\\boxed{7}", [0], [0]),
        (" \n", [0], [0]),
        ("", [], []),
    ],
)
def test_the_wrong_steps_are_named(response: str, honest: list[float], gullible: list[float]) -> None:
    assert judged(StepsJudge(), response).wrong_steps == honest
    assert judged(GullibleStepsJudge(), response).wrong_steps == gullible
    assert len(honest) == len(split_steps(response))


@pytest.mark.parametrize("judge", [StepsJudge(), GullibleStepsJudge()])
def test_another_world_is_unparsable_and_has_no_score(judge: Judge) -> None:
    judgement = judged(judge, "3+5=8", problem="Find all primes.")
    assert (judgement.score, judgement.status, judgement.votes) == (None, "unparsable", [])
    assert judgement.wrong_steps is None
    assert judge.name in judgement.reason


@pytest.mark.parametrize("judge", [StepsJudge(), GullibleStepsJudge()])
def test_order_progress_and_no_items(judge: Judge) -> None:
    done: list[int] = []
    items = [JudgeItem(PROBLEM, None, "3+5=8"), JudgeItem("?", None, ""), JudgeItem(PROBLEM, None, "")]
    assert [judgement.score for judgement in judge.judge(items, done.append)] == [0.5, None, 0.0]
    assert sum(done) == 3
    assert judge.judge([], done.append) == []
    assert judge.versions() == {}


@pytest.mark.parametrize("name", ["steps", "steps-gullible"])
def test_the_factory_gives_the_judge_of_that_name(name: str) -> None:
    judge = make_judge(ScorePrmParams.model_validate({"judge": name}))
    assert (judge.name, judge.rubric) == (name, f"{name}/1")


def test_a_noisy_judge_is_wrong_and_silent_as_often_as_it_is_told_to() -> None:
    items = [
        JudgeItem(PROBLEM, None, f"3+5=8\n8-2=6\n6+1=7\n{'6+1=8' if half else ''}\n\\boxed{{{number}}}")
        for number in range(2000)
        for half in (False, True)
    ]
    honest = StepsJudge().judge(items, lambda _: None)
    noisy = make_judge(ScorePrmParams(judge="steps", noise=NoiseParams(flipped=0.3, missing=0.2)))
    found = noisy.judge(items, lambda _: None)
    assert noisy.rubric == "steps/1, flipped 0.3, missing 0.2"
    lost = [one.status == "error" for one in found]
    assert sum(lost) / len(items) == pytest.approx(0.2, abs=0.02)
    assert all((one.score is None) == gone for one, gone in zip(found, lost, strict=True))
    turned = [one.score != true.score for one, true, gone in zip(found, honest, lost, strict=True) if not gone]
    assert sum(turned) / len(turned) == pytest.approx(0.3, abs=0.03)
    assert noisy.judge(items[:7], lambda _: None) == found[:7]  # one text has one verdict, whenever it is asked for
    assert "turned around from 1 (each of the 3" in next(
        one.reason for one in found if one.score == 0.0 and "from 1" in one.reason
    )


def test_a_half_verdict_is_turned_to_either_side() -> None:
    items = [JudgeItem(PROBLEM, None, f"3+5-2+1=7\n\\boxed{{{number}}}") for number in range(200)]
    noisy = make_judge(ScorePrmParams(judge="steps", noise=NoiseParams(flipped=1.0)))
    scores = [one.score for one in noisy.judge(items, lambda _: None)]
    assert set(scores) == {0.0, 1.0}
    assert 60 < sum(score or 0.0 for score in scores) < 140


def test_noise_is_for_judges_that_cost_nothing() -> None:
    with pytest.raises(ValidationError, match="noise is for the judges of the test bench"):
        ScorePrmParams(judge="model", model=ChatParams(model="some"), noise=NoiseParams(flipped=0.1))
