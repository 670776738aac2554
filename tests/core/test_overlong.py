"""The penalty for length, at its edges and in the advantages of groups small enough to compute by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.core.advantages import GUARDED_PENALTY, VARIANTS, Advantages, compute_advantages, count_inversions
from papo.core.overlong import overlong_penalties
from papo.errors import DataError, ParamsError

NAN = math.nan
WITH_OUTCOME = tuple(name for name in VARIANTS if name not in ("prm", "mult"))


def one_group(orm: Sequence[float], prm: Sequence[float], penalties: Any, **given: Any) -> Advantages:
    return compute_advantages(orm, prm, [0] * len(orm), penalties=penalties, **given)


# ---- the penalty ----


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (79, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (99, -0.475), (100, -0.5), (101, -0.5), (500, -0.5)],
)
def test_the_penalty_rises_over_the_buffer(length: int, penalty: float) -> None:
    (found,) = overlong_penalties([length], 100, 20, 0.5)
    assert found == pytest.approx(penalty, abs=1e-12)
    assert math.copysign(1.0, found) == (-1.0 if penalty else 1.0)  # never -0


def test_a_buffer_of_one_token_is_all_or_nothing() -> None:
    assert overlong_penalties([98, 99, 100, 101], 100, 1, 2.0).tolist() == [0.0, 0.0, -2.0, -2.0]


def test_the_largest_buffer_leaves_one_token_free() -> None:
    assert overlong_penalties([1, 2, 4], 4, 3, 3.0).tolist() == [0.0, -1.0, -3.0]


def test_each_response_may_have_a_limit_of_its_own() -> None:
    assert overlong_penalties([90, 90, 90], [100, 90, 200], 20, 1.0).tolist() == [-0.5, -1.0, 0.0]
    assert overlong_penalties([], [], 20, 1.0).tolist() == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"buffer": 0}, ParamsError, "buffer is 0 and must be from 1 to below the limit of 100"),
        ({"buffer": 100}, ParamsError, "buffer is 100"),
        ({"limit": [100, 20]}, ParamsError, "below the limit of 20"),
        ({"factor": 0.0}, ParamsError, "factor is 0.0 and must be a positive"),
        ({"factor": -1.0}, ParamsError, "factor is -1.0"),
        ({"factor": NAN}, ParamsError, "factor is nan"),
        ({"factor": math.inf}, ParamsError, "factor is inf"),
        ({"lengths": [5, -1]}, DataError, r"lengths\[1\] is -1"),
        ({"lengths": [5, 1.5]}, DataError, r"lengths\[1\] is 1.5: a number of tokens"),
        ({"lengths": [5, NAN]}, DataError, r"lengths\[1\] is nan"),
        ({"limit": [100, 100, 100]}, DataError, "limit has 3 values for 2 responses"),
        ({"limit": NAN}, DataError, "limit"),
    ],
)
def test_what_is_no_length_limit_buffer_or_factor_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        overlong_penalties(**{"lengths": [5, 90], "limit": 100, "buffer": 20, "factor": 0.5} | change)


# ---- in the advantages ----

# Right, right, wrong, wrong with 80, 90, 80 and 100 of 100 tokens: penalties 0, -1/4, 0 and -1/2.
# r_out + penalty is 1, 3/4, 0, -1/2 with mean 5/16; its deviations 11, 7, -5, -13 sixteenths have the squares 364/256.
ORM, PRM = [1, 1, 0, 0], [1, 0.5, NAN, NAN]
PENALTIES = overlong_penalties([80, 90, 80, 100], 100, 20, 0.5)
STD = math.sqrt(364 / 256 / 3)
OUT = [deviation / 16 / STD for deviation in (11, 7, -5, -13)]
WITHIN = [math.sqrt(0.5), -math.sqrt(0.5), 0.0, 0.0]
# Fullnorm: products 1, 1/2, 0, 0 with mean 3/8 and squares of deviations (25 + 1 + 9 + 9)/64.
PRODUCT = [deviation / 8 / math.sqrt(44 / 64 / 3) for deviation in (5, 1, -3, -3)]
# Mult: 1, 1/4, 0, -1/2 with mean 3/16: 13, 1, -3, -11 sixteenths. prm: 1 and 1/4 of the two that have a score.
MULT = [deviation / 16 / math.sqrt(300 / 256 / 3) for deviation in (13, 1, -3, -11)]


@pytest.mark.parametrize(
    ("variant", "process", "total"),
    [
        ("orm", [0.0] * 4, OUT),
        ("papo", WITHIN, [a + b for a, b in zip(OUT, WITHIN, strict=True)]),
        ("fullnorm", PRODUCT, [a + b for a, b in zip(OUT, PRODUCT, strict=True)]),
        ("convex", WITHIN, OUT),  # lam = 1
        ("mult", MULT, MULT),
        ("prm", WITHIN, WITHIN),
    ],
)
def test_each_variant_by_hand(variant: str, process: list[float], total: list[float]) -> None:
    found = one_group(ORM, PRM, PENALTIES, variant=variant)
    np.testing.assert_allclose(found.outcome, OUT, rtol=1e-5)
    np.testing.assert_allclose(found.process, process, rtol=1e-5)
    np.testing.assert_allclose(found.total, total, atol=1e-5)


def test_prm_has_the_penalty_on_its_score() -> None:
    """Scores 1 1/2 0 with penalties 0 1/4 1/2: 1, 1/4, -1/2 lie evenly."""
    found = one_group([1, 0, 0], [1, 0.5, 0], [0, -0.25, -0.5], variant="prm")
    np.testing.assert_allclose(found.total, [1, 0, -1], atol=1e-5)


def test_gdpo_has_the_penalty_in_its_outcome_part() -> None:
    found = one_group(ORM, PRM, PENALTIES, variant="gdpo")
    free = one_group(ORM, PRM, None, variant="gdpo")
    np.testing.assert_allclose(found.outcome, OUT, rtol=1e-5)
    assert found.process.tolist() == free.process.tolist()
    sums = found.outcome + found.process
    np.testing.assert_allclose(found.total, sums / math.sqrt(float(sums @ sums) / 3), rtol=1e-5)


def test_mean_only_adds_what_the_penalty_is() -> None:
    found = one_group(ORM, PRM, PENALTIES, variant="orm", scale="mean_only")
    assert found.total.tolist() == [11 / 16, 7 / 16, -5 / 16, -13 / 16]


def test_a_group_of_equal_outcomes_is_told_apart_by_length() -> None:
    found = one_group([1, 1, 1], [NAN] * 3, [0, -0.25, -0.5])
    np.testing.assert_allclose(found.total, [1, 0, -1], atol=1e-5)
    assert not one_group([1, 1, 1], [NAN] * 3, [-0.1] * 3).total.any()


def test_a_missing_outcome_stays_missing() -> None:
    found = one_group([1, NAN, 0], [1, 1, NAN], [0, -0.5, 0])
    without = one_group([1, 0], [1, NAN], [0, 0])
    assert [part[1] for part in found] == [0.0] * 3
    assert np.delete(found.total, 1).tolist() == without.total.tolist()


def test_a_correct_response_worth_nothing_is_still_correct() -> None:
    """With all of its reward gone it is compared with the other correct ones by its reasoning, and with them alone."""
    found = one_group([1, 1, 0], [0.5, 1, 1], [-1, 0, 0])
    np.testing.assert_allclose(found.process, [-math.sqrt(0.5), math.sqrt(0.5), 0], rtol=1e-5)
    assert found.outcome[0] == pytest.approx(found.outcome[2])


@pytest.mark.parametrize(
    ("penalties", "message"),
    [
        ([0, NAN], r"penalties\[1\] is nan"),
        ([0, None], r"penalties\[1\] is nan"),
        ([0.1, 0], r"penalties\[0\] is 0.1: a penalty is 0 or below"),
        ([0, -math.inf], r"penalties\[1\] is -inf"),
        ([0], "penalties has 1 values for 2 responses"),
        (["long", "short"], "penalties are not all numbers"),
    ],
)
def test_what_is_no_penalty_is_refused(penalties: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        one_group([1, 0], [1, NAN], penalties)


# ---- properties ----

levels = st.sampled_from([0.0, 0.5, 1.0, NAN])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], list[float], list[int], list[int]]:
    """Outcomes, process scores, groups, and lengths of up to 120 tokens."""
    size = draw(st.integers(1, 20))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=size, max_size=size))

    outcomes = column(st.sampled_from([0.0, 1.0, 1.0, NAN]))
    return outcomes, column(levels), column(st.integers(0, 2)), column(st.integers(0, 120))


Batch = tuple[list[float], list[float], list[int], list[int]]


@settings(deadline=None)
@given(batches(), st.sampled_from(VARIANTS), st.integers(0, 130))
def test_equal_lengths_change_nothing(batch: Batch, variant: str, length: int) -> None:
    *scores, lengths = batch
    penalties = overlong_penalties([length] * len(lengths), 100, 20, 0.5)
    found = compute_advantages(*scores, variant=variant, penalties=penalties)
    free = compute_advantages(*scores, variant=variant)
    for penalised, plain in zip(found, free, strict=True):
        np.testing.assert_allclose(penalised, plain, atol=1e-12)
    assert not found.outcome[free.outcome == 0.0].any()


@settings(deadline=None)
@given(batches(), st.sampled_from(WITH_OUTCOME), st.floats(0.01, 5.0))
def test_the_correct_subset_and_its_process_part_stay(batch: Batch, variant: str, factor: float) -> None:
    *scores, lengths = batch
    penalties = overlong_penalties(lengths, 100, 20, factor)
    found = compute_advantages(*scores, variant=variant, penalties=penalties)
    assert found.process.tolist() == compute_advantages(*scores, variant=variant).process.tolist()


@settings(deadline=None)
@given(batches())
def test_of_two_alike_the_longer_is_worth_no_more(batch: Batch) -> None:
    orm, _, groups, lengths = batch
    total = compute_advantages(orm, [NAN] * len(orm), groups, penalties=overlong_penalties(lengths, 100, 20, 0.5)).total
    for one in range(len(orm)):
        for other in range(len(orm)):
            if (orm[one], groups[one]) == (orm[other], groups[other]) and lengths[one] <= lengths[other]:
                assert total[one] >= total[other]


@settings(deadline=None, max_examples=200)
@given(batches(), st.sampled_from([0.3, 1.0, 40.0]), st.sampled_from(WITH_OUTCOME), st.floats(0.01, GUARDED_PENALTY))
def test_the_rank_guard_keeps_the_order_of_right_and_wrong(
    batch: Batch, lam: float, variant: str, factor: float
) -> None:
    orm, prm, groups, lengths = batch
    lam = min(lam, 1.0) if variant == "convex" else lam
    penalties = overlong_penalties(lengths, 100, 20, factor)
    total = compute_advantages(
        orm, prm, groups, variant=variant, lam=lam, guard="rank", penalties=penalties
    ).total.astype(np.float32)
    assert count_inversions(total, orm, groups) == 0


def test_without_the_guard_a_penalty_can_break_the_order_that_lam_max_keeps() -> None:
    orm, prm = [1] * 6 + [0] * 2, [1] * 5 + [0] + [NAN] * 2
    penalties = [0] * 5 + [-0.5] + [0] * 2
    assert count_inversions(one_group(orm, prm, None).total, orm, [0] * 8) == 0
    assert count_inversions(one_group(orm, prm, penalties).total, orm, [0] * 8) == 1
    assert count_inversions(one_group(orm, prm, penalties, guard="rank").total, orm, [0] * 8) == 0


def test_the_rank_guard_refuses_a_penalty_that_would_break_the_order_alone() -> None:
    assert one_group([1, 0], [1, NAN], [-GUARDED_PENALTY, 0], guard="rank").total[0] > 0
    with pytest.raises(ParamsError, match=r"penalties of at most 0\.9, and one is 1"):
        one_group([1, 0], [1, NAN], [-1, 0], guard="rank")
