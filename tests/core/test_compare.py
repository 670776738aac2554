"""Counts of changes in sign and in rank, by hand and against a slow loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.core.compare import Comparison, compare
from papo.errors import DataError


def test_every_count_by_hand() -> None:
    ids = ["a", "a", "a", "b", "b", "c", "c", "c"]
    old = [1.0, -0.5, -0.5, 0.0, 0.0, 2.0, 1.0, -3.0]
    new = [1.0, 0.5, -0.5, 0.0, 0.7, 0.0, 1.0, 3.0]
    # a: ranks 1 2 2 -> 1 2 3; b: 1 1 -> 2 1; c: 1 2 3 -> 3 2 1.
    assert compare(old, new, ids) == Comparison(
        responses=8, flipped=2, silenced=1, woken=1, sign_changed=4, rank_changed=1 + 1 + 2
    )


def test_the_best_of_a_group_is_rank_one() -> None:
    # Below the best, one rank becomes two: only the last response has another one.
    assert compare([1, 0, 0], [1, 0, -1], ["a"] * 3).rank_changed == 1


def test_a_shift_or_a_factor_moves_no_rank() -> None:
    values = [0.3, -0.1, 0.3, 7.0]
    assert compare(values, [5 * x + 100 for x in values], ["a"] * 4).rank_changed == 0


def test_groups_need_not_lie_together() -> None:
    old, new, ids = [1.0, 5.0, 2.0, 6.0], [2.0, 5.0, 1.0, 6.0], ["a", "b", "a", "b"]
    assert compare(old, new, ids).rank_changed == 2


def test_rounding_makes_no_rank() -> None:
    third = 0.1 + 0.2
    assert compare([0.3, 0.3, 9.0], [0.3, third, 9.0], ["a"] * 3).rank_changed == 0
    # The tolerance goes by the group: the same distance is one in a group of small values.
    assert compare([3e-17, 3e-17], [3e-17, 8e-17], ["a"] * 2).rank_changed == 1
    stored = [1.0, 1.0 + 1e-7]
    assert compare([1.0, 1.0], stored, ["a"] * 2).rank_changed == 1
    assert compare([1.0, 1.0], stored, ["a"] * 2, tolerance=1e-6).rank_changed == 0


def test_nothing() -> None:
    assert compare([], [], []) == Comparison(0, 0, 0, 0, 0, 0)
    assert compare([0, 0], [0, -0.0], ["a", "b"]) == Comparison(2, 0, 0, 0, 0, 0)


value = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 1e-3, 0.5, 1.0, 2.0])
rows = st.lists(st.tuples(value, value, st.integers(0, 3)), max_size=24)


def slow_ranks(values: list[float], ids: list[int]) -> list[int]:
    return [
        1 + len({other for other, group in zip(values, ids, strict=True) if group == own and other > mine})
        for mine, own in zip(values, ids, strict=True)
    ]


@settings(deadline=None)
@given(rows)
def test_against_a_slow_loop(given: list[tuple[float, float, int]]) -> None:
    old, new, ids = [row[0] for row in given], [row[1] for row in given], [row[2] for row in given]
    signs = [(math.copysign(x != 0, x), math.copysign(y != 0, y)) for x, y in zip(old, new, strict=True)]
    found = compare(old, new, ids)
    assert found.flipped == sum(pair in ((1, -1), (-1, 1)) for pair in signs)
    assert found.silenced == sum(x != 0 and y == 0 for x, y in signs)
    assert found.woken == sum(x == 0 and y != 0 for x, y in signs)
    assert found.sign_changed == sum(x != y for x, y in signs)
    assert found.rank_changed == sum(x != y for x, y in zip(slow_ranks(old, ids), slow_ranks(new, ids), strict=True))
    back = compare(new, old, ids)
    assert (back.flipped, back.silenced, back.woken) == (found.flipped, found.woken, found.silenced)
    assert back.rank_changed == found.rank_changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1], ["a", "a"]), "new has 1 values for 2 responses"),
        (([1, math.nan], [1, 2], ["a", "a"]), r"old\[1\] is nan: no value may be missing"),
        (([1, 2], [1, 2], ["a"]), "group_ids has 1 values"),
        (([1, 2], [1, 2], ["a", None]), "a group id must not be missing"),
    ],
)
def test_bad_data_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(*arguments)
