"""The words of `papo explain` on groups made by hand, and that they say what the numbers say on any group."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.core.advantages import VARIANTS, compute_advantages
from papo.core.credit import token_advantages
from papo.core.explain import Group, Settings, Why, explain

NAN = math.nan
DEFAULT = Settings("papo", 1.0, "std", 1e-6, "none")


def group(
    orm: Sequence[float],
    prm: Sequence[float],
    given: Settings,
    penalties: Sequence[float] | None = None,
    **statuses: Sequence[str],
) -> Group:
    parts = compute_advantages(
        orm, prm, [0] * len(orm),
        variant=given.variant, lam=given.lam, scale=given.scale, eps=given.eps, guard=given.guard, penalties=penalties,
    )  # fmt: skip
    return Group(
        np.array(orm, dtype=np.float64),
        np.array(prm, dtype=np.float64),
        *parts,
        statuses.get("orm_statuses", ["timeout" if math.isnan(x) else "ok" for x in orm]),
        statuses.get("prm_statuses", ["not_asked" if math.isnan(x) else "ok" for x in prm]),
        None if penalties is None else np.array(penalties, dtype=np.float64),
    )


def why(orm: Sequence[float], prm: Sequence[float], statuses: Any = None, **change: Any) -> Why:
    given = DEFAULT._replace(**change)
    return explain(group(orm, prm, given, **(statuses or {})), given)


def test_a_correct_response_that_is_pushed_down() -> None:
    found = why([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0.5, NAN, NAN])
    assert found.responses[5] == (
        "correct; its process score 0.5 is below the mean 0.917 of the 6 correct responses, so A_proc = -2.04; "
        "A = 0.54 + 1 x -2.04 = -1.50 < 0: a correct response is pushed down"
    )
    assert found.responses[0] == (
        "correct; its process score 1 is above the mean 0.917 of the 6 correct responses, so A_proc = 0.41; "
        "A = 0.54 + 1 x 0.41 = 0.95 > 0: pushed up"
    )
    assert found.responses[6] == "wrong; A = A_out = -1.62 < 0: pushed down"
    assert found.group == [
        "8 responses: 6 correct, 2 wrong",
        "A_proc is active: the 6 correct responses have scores from 0.5 to 1",
        "lam 1 is below lam_max 1.058: no score puts a correct one of 8 responses below a wrong one",
        "inversions: none",
    ]


def test_all_right_and_alike() -> None:
    found = why([1, 1], [1, 1])
    assert (
        found.responses
        == ["correct; A_proc = 0, as all correct scores are equal; A = A_out = 0: it teaches nothing"] * 2
    )
    assert found.group == [
        "2 responses: 2 correct, 0 wrong",
        "A_out is 0 throughout: the known verdicts are all equal",
        "A_proc is 0 throughout: all correct scores are equal",
        "of 2 responses a correct one stays above a wrong one with any lam",
    ]


def test_all_right_and_not_alike() -> None:
    found = why([1, 1, 1], [1, 0.5, 0])
    assert found.responses[1] == (
        "correct; its process score 0.5 is the mean 0.5 of the 3 correct responses, so A_proc = 0; A = A_out = 0: it teaches nothing"
    )
    assert "A_out is 0 throughout: the known verdicts are all equal" in found.group
    assert "A_proc is active: the 3 correct responses have scores from 0 to 1" in found.group
    assert not any("inversions" in sentence for sentence in found.group)


def test_all_wrong() -> None:
    found = why([0, 0, 0], [NAN] * 3, {"orm_statuses": ["ok", "no_answer", "ok"]})
    assert found.responses == [
        "wrong; A = A_out = 0: it teaches nothing",
        "wrong (no answer); A = A_out = 0: it teaches nothing",
        "wrong; A = A_out = 0: it teaches nothing",
    ]
    assert "A_proc is 0 throughout: fewer than two responses are correct" in found.group


def test_one_right() -> None:
    found = why([1, 0, 0, 0], [1, NAN, NAN, NAN])
    assert found.responses[0] == (
        "correct; A_proc = 0, as fewer than two responses are correct; A = A_out = 1.50 > 0: pushed up"
    )
    assert found.group[1:] == [
        "A_proc is 0 throughout: fewer than two responses are correct",
        "lam 1 is below lam_max 1.732: no score puts a correct one of 4 responses below a wrong one",
        "inversions: none",
    ]


def test_a_judge_that_failed() -> None:
    statuses = {"prm_statuses": ["ok", "ok", "timeout", "not_asked"]}
    found = why([1, 1, 1, 0], [1, 0, NAN, NAN], statuses)
    assert found.responses[2] == (
        "correct; its process score is missing (timeout), so A_proc = 0; A = A_out = 0.50 > 0: pushed up"
    )
    assert "above the mean 0.5 of the 2 correct responses that have one" in found.responses[0]
    once = why([1, 1, 1, 0], [1, NAN, NAN, NAN])
    assert "A_proc = 0, as only one process score is there" in once.responses[0]
    never = why([1, 1, 1, 0], [NAN] * 4)
    assert "A_proc is 0 throughout: no process score is there" in never.group


def test_a_verifier_that_failed() -> None:
    found = why([1, 1, 0, NAN], [1, 0, NAN, 1])
    assert found.responses[3] == "no verdict (timeout): it leaves the statistics of its group, A = 0"
    assert found.group[0] == "4 responses: 2 correct, 1 wrong, 1 without a verdict"
    assert "of 3 responses" in found.group[2]  # the bound is that of the verdicts that are there
    nothing = why([NAN, NAN], [1, 0])
    assert "A_out is 0 throughout: no verdict is known" in nothing.group


def test_lam_beyond_the_bound_and_the_guard() -> None:
    scores = ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, NAN, NAN])
    free = why(*scores, lam=2.0)
    assert (
        "lam 2 is not below lam_max 1.058: a score can put a correct one of 8 responses below a wrong one" in free.group
    )
    assert free.group[-1] == "inversions: 1 of the correct responses do not outrank every wrong one"
    held = why(*scores, lam=2.0, guard="rank")
    # The gap 2.16 of A_out less a thousandth, over 2 x 2.04.
    assert any(sentence.startswith("guard rank multiplied A_proc by 0.529, ") for sentence in held.group)
    assert any(sentence.endswith("; guard rank keeps the order") for sentence in held.group)
    assert held.group[-1] == "inversions: none"
    assert not any("multiplied" in sentence for sentence in why(*scores, lam=0.5, guard="rank").group)


def test_a_penalty_for_length() -> None:
    """Rewards 1, 1/2 and 0 lie evenly, so that the second right one is at the mean of the group."""
    found = why([1, 1, 0], [1, 0.5, NAN], {"penalties": [0, -0.5, 0]})
    assert found.responses == [
        "correct; its process score 1 is above the mean 0.75 of the 2 correct responses, so A_proc = 0.71; "
        "A = 1.00 + 1 x 0.71 = 1.71 > 0: pushed up",
        "correct; its length costs 0.5 of its reward; its process score 0.5 is below the mean 0.75 of the 2 correct responses, so "
        "A_proc = -0.71; A = 0 + 1 x -0.71 = -0.71 < 0: a correct response is pushed down",
        "wrong; A = A_out = -1.00 < 0: pushed down",
    ]
    assert found.group == [
        "3 responses: 2 correct, 1 wrong",
        "1 of 3 lose some of their reward for their length; their verdicts stay",
        "A_proc is active: the 2 correct responses have scores from 0.5 to 1",
        "lam_max is no bound where a penalty narrows the gap between right and wrong",
        "inversions: none",
    ]


def test_a_penalty_and_the_guard() -> None:
    found = why([1, 1, 0], [1, 0.5, NAN], {"penalties": [0, -0.5, 0]}, lam=3.0, guard="rank")
    assert (
        "lam_max is no bound where a penalty narrows the gap between right and wrong; guard rank keeps the order"
        in found.group
    )
    assert any(sentence.startswith("guard rank multiplied A_proc by 0.471") for sentence in found.group)
    assert found.group[-1] == "inversions: none"


def test_equal_verdicts_told_apart_by_length() -> None:
    found = why([0, 0, 0], [NAN] * 3, {"penalties": [0, -0.25, -0.5]})
    assert found.responses[2] == "wrong; its length costs 0.5 of its reward; A = A_out = -1.00 < 0: pushed down"
    assert found.responses[0] == "wrong; A = A_out = 1.00 > 0: a wrong response is pushed up"
    assert "A_out is of the penalties alone: the known verdicts are all equal" in found.group


def test_a_penalty_that_leaves_nothing_of_being_right() -> None:
    found = why([1, 0], [NAN] * 2, {"penalties": [-1, 0]}, variant="orm")
    assert found.responses[0] == "correct; its length costs 1 of its reward; A = A_out = 0: it teaches nothing"
    assert "A_out is 0 throughout: the penalties leave no difference between right and wrong" in found.group
    assert found.group[-1] == "inversions: 1 of the correct responses do not outrank every wrong one"


def test_a_penalty_that_is_the_same_for_all() -> None:
    found = why([0, 0], [NAN] * 2, {"penalties": [-0.5, -0.5]})
    assert "A_out is 0 throughout: the known verdicts are all equal" in found.group
    assert "2 of 2 lose some of their reward for their length; their verdicts stay" in found.group


def test_a_penalty_of_a_response_without_a_verdict_is_not_spoken_of() -> None:
    found = why([1, 0, NAN], [NAN] * 3, {"penalties": [0, 0, -0.5]})
    assert found.responses[2] == "no verdict (timeout): it leaves the statistics of its group, A = 0"
    assert not any("length" in sentence for sentence in found.group)


@pytest.mark.parametrize(
    ("variant", "score"), [("prm", "process score"), ("mult", "product of verdict and process score")]
)
def test_the_one_reward_has_the_penalty(variant: str, score: str) -> None:
    found = why([1, 0], [0.9, 0.0], {"penalties": [-0.5, 0]}, variant=variant)
    assert (
        f"its length costs 0.5 of its reward; its {score} with its penalty 0.4 is above the mean 0.2 of"
        in found.responses[0]
    )


def test_the_settings_in_words() -> None:
    assert DEFAULT.words() == "variant=papo lam=1 scale=std eps=1e-06 guard=none"
    given = DEFAULT._replace(overlong=(32, 0.5))
    assert given.words() == f"{DEFAULT.words()} overlong.buffer=32 overlong.factor=0.5"
    assert given.words("lam", "overlong") == "lam=1 overlong.buffer=32 overlong.factor=0.5"
    assert DEFAULT.words("overlong") == "overlong=null"


def test_orm_uses_no_process_score() -> None:
    found = why([1, 0], [1, 0], variant="orm")
    assert found.responses == ["correct; A = A_out = 0.71 > 0: pushed up", "wrong; A = A_out = -0.71 < 0: pushed down"]
    assert found.group[1] == "A_proc is not used by the variant orm"


def test_prm_pushes_a_wrong_response_up() -> None:
    found = why([1, 1, 0, 0], [0, 0.5, 1, NAN], variant="prm")
    assert found.responses[2] == (
        "wrong; its process score 1 is above the mean 0.5 of the 3 responses that have one, so A_proc = 1.00; "
        "A = A_proc = 1.00 > 0: a wrong response is pushed up"
    )
    assert found.responses[3] == (
        "wrong; its process score is missing (not_asked), so A_proc = 0; A = A_proc = 0: it teaches nothing"
    )
    assert found.group[-1] == "inversions: 2 of the correct responses do not outrank every wrong one"


@pytest.mark.parametrize(
    ("variant", "lam", "sum_"),
    [
        ("mult", 1.0, "A = A_proc = 1.50 > 0"),
        ("fullnorm", 0.5, "A = 0.87 + 0.5 x 1.50 = 1.62 > 0"),
        ("convex", 0.25, "A = 0.25 x 0.87 + 0.75 x 0.71 = 0.75 > 0"),
    ],
)
def test_the_sum_of_each_variant(variant: str, lam: float, sum_: str) -> None:
    assert sum_ in why([1, 1, 0, 0], [1, 0, 1, 0.5], variant=variant, lam=lam).responses[0]


def test_mult_compares_products() -> None:
    found = why([1, 1, 0, 0], [1, 0, 1, 0.5], variant="mult")
    assert found.responses[2].startswith(
        "wrong; its product of verdict and process score 0 is below the mean 0.25 of the 4 responses, so A_proc = -0.50; "
    )
    assert "A_proc is 0 throughout: all scores are equal" in why([0, 0], [1, 0], variant="mult").group


def test_gdpo_names_what_it_divides_by() -> None:
    found = why([1, 0], [1, NAN], variant="gdpo")
    assert "A = (0.71 + 1 x 0) / 1 = 0.71 > 0: pushed up" in found.responses[0]
    assert "1 is the standard deviation over the round" in found.group


def capo(orm: Sequence[float], debits: Sequence[Sequence[float] | None]) -> Why:
    sizes = [4] * len(orm)
    parts = token_advantages(orm, debits, sizes, [0] * len(orm))
    missing = [NAN] * len(orm)
    given = DEFAULT._replace(variant="capo")
    whole = Group(np.array(orm), np.array(missing), *parts[:3], ["ok"] * len(orm), ["ok"] * len(orm))
    return explain(whole, given)


def test_capo_speaks_of_means_over_tokens() -> None:
    found = capo([1.0, 1.0, 0.0], [[0, 0, 1, 1], [0, 0, 0, 0], None])
    assert re.fullmatch(
        r"correct; the wrong steps in the group give A_proc = -0\.\d\d; "
        r"in the mean over its tokens A = 0\.\d\d \+ -0\.\d\d = 0\.\d\d > 0: pushed up",
        found.responses[0],
    )
    assert found.group[1] == "A_proc is active: the tokens of steps that the judge calls wrong are debited"


def test_capo_without_a_wrong_step() -> None:
    found = capo([1.0, 1.0, 0.0], [[0] * 4, None, None])
    assert (
        found.responses[0] == "correct; in the mean over its tokens A = 0.68 + 0 = 0.68 > 0: pushed up"
    )  # (2 - 4/3) / sqrt(128/12 / 11)
    assert found.group[1].startswith("A_proc is 0 throughout: ")


def test_what_only_rounding_leaves_is_nothing() -> None:
    parts = (np.array([0.0, 0.0]), np.array([1e-17, -1e-17]), np.array([1e-17, -1e-17]))
    scores = (np.array([1.0, 1.0]), np.array([NAN, NAN]))
    found = explain(Group(*scores, *parts, ["ok"] * 2, ["ok"] * 2), DEFAULT._replace(variant="capo"))
    assert found.responses == ["correct; in the mean over its tokens A = 0 + 0 = 0: it teaches nothing"] * 2


score = st.sampled_from([0.0, 0.5, 1.0, NAN])


Case = tuple[list[float], list[float], Settings, list[float] | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.lists(st.tuples(st.sampled_from([0.0, 1.0, NAN]), score), min_size=1, max_size=9))
    variant = draw(st.sampled_from(VARIANTS))
    lam = draw(st.sampled_from([0.25, 1.0] if variant == "convex" else [0.0, 0.25, 1.0, 3.0]))
    ranked = variant not in ("prm", "mult")
    guard = draw(st.sampled_from(["none", "rank"] if ranked else ["none"]))
    given = Settings(variant, lam, draw(st.sampled_from(["std", "mean_only"])), 1e-6, guard)
    penalties = draw(st.lists(st.sampled_from([0.0, -0.25, -0.9]), min_size=len(rows), max_size=len(rows)))
    return [row[0] for row in rows], [row[1] for row in rows], given, draw(st.sampled_from([None, penalties]))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_the_words_say_what_the_numbers_say(case: Case) -> None:
    orm, prm, given, penalties = case
    numbers = group(orm, prm, given, penalties)
    found = explain(numbers, given)
    assert len(found.responses) == len(orm)
    for row, sentence in enumerate(found.responses):
        total, process = numbers.total[row], numbers.process[row]
        assert ("pushed up" in sentence) == (total > 0)
        assert ("pushed down" in sentence) == (total < 0)
        if math.isnan(orm[row]):
            assert sentence.startswith("no verdict")
            continue
        assert sentence.startswith("correct" if orm[row] else "wrong")
        assert ("its length costs" in sentence) == bool(penalties and penalties[row])
        assert sentence.split(" = ")[-1].split(" ")[0].rstrip(":") == (f"{total:.2f}" if total else "0")
        assert ("is below the mean" in sentence) == (process < 0)
        assert ("is above the mean" in sentence) == (process > 0)
        assert (f"so A_proc = {process:.2f}" in sentence) == (process != 0)
    active = bool(numbers.process.any())
    assert any(sentence.startswith("A_proc is active") for sentence in found.group) == active
    assert any(sentence.startswith(("A_proc is 0", "A_proc is not used")) for sentence in found.group) == (not active)
