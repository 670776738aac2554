"""Several votes are one score, whatever their order."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.core.advantages import compute_advantages
from papo.core.credit import VOTES as CRITIQUES
from papo.core.votes import VOTES, combine_scores, vote_agreement
from papo.errors import DataError, ParamsError

LEVELS = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("scores", "median", "majority", "mean"),
    [
        ([1.0], 1.0, 1.0, 1.0),
        ([0.0, 0.5, 0.5], 0.5, 0.5, 1 / 3),
        ([1.0, 0.0], 0.5, 0.0, 0.5),  # of two as frequent, the lower
        ([1.0, 1.0, 0.0, 0.0, 0.5], 0.5, 0.0, 0.5),
        ([1.0, 1.0, 0.0], 1.0, 1.0, 2 / 3),
        ([0.0, 0.5, 1.0, 1.0], 0.75, 1.0, 0.625),
    ],
)
def test_votes_by_hand(scores: list[float], median: float, majority: float, mean: float) -> None:
    assert combine_scores(scores) == median
    assert combine_scores(scores, "majority") == majority
    assert combine_scores(scores, "mean") == mean


@given(LEVELS, st.sampled_from(list(VOTES)))
def test_the_order_of_the_votes_changes_no_bit(scores: list[float], vote: str) -> None:
    assert len({combine_scores(order, vote) for order in permutations(scores)}) == 1
    assert min(scores) <= combine_scores(scores, vote) <= max(scores)


def test_equal_means_that_are_no_dyadic_numbers_give_no_process_advantage() -> None:
    ballots = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    scores = [combine_scores(ballot, "mean") for ballot in ballots]
    found = compute_advantages(np.ones(4), np.array(scores), ["p"] * 4)
    assert found.process.tolist() == [0.0] * 4


def test_each_way_to_combine_scores_has_one_to_combine_critiques() -> None:
    assert set(VOTES.values()) <= set(CRITIQUES)


@pytest.mark.parametrize("scores", [[], [float("nan")], [0.5, float("inf")]])
def test_what_is_no_vote_is_refused(scores: list[float]) -> None:
    with pytest.raises(DataError, match="not the votes"):
        combine_scores(scores)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ParamsError, match="median, majority, mean"):
        combine_scores([1.0], "mode")


def test_agreement_of_votes_is_the_share_of_equal_pairs() -> None:
    assert vote_agreement([[1.0, 1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0], []]) == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert vote_agreement([[1.0], []]) is None
