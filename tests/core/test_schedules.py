"""The learning rate's schedule and the adapted coefficient against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.core.schedules import adapted_coefficient, rate_factor
from papo.errors import ParamsError

KINDS = ("constant", "linear", "cosine")
AFTER_TWO: dict[str, Any] = {"warmup_rounds": 2.0, "rounds": 10, "floor": 0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_of_a_warm_up_has_a_rate_and_the_last_one_has_all_of_it(kind: str) -> None:
    # 4 steps a round: the first ends at 0.25 of the 2 rounds of warm-up, the fifth at 1.25, the eighth at 2.
    found = [rate_factor(kind, done, **AFTER_TWO) for done in (0.25, 1.25, 2.0)]
    assert found == pytest.approx([0.125, 0.625, 1.0], rel=1e-15)


@pytest.mark.parametrize(
    ("kind", "done", "factor"),
    [
        ("constant", 6.0, 1.0),
        ("constant", 50.0, 1.0),
        ("linear", 4.0, 0.775),  # 2 of the 8 rounds after the warm-up: 1 - 0.9 / 4
        ("linear", 6.0, 0.55),  # 1 - 0.9 / 2
        ("linear", 10.0, 0.1),
        ("linear", 50.0, 0.1),
        ("cosine", 4.0, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # cos(pi / 4)
        ("cosine", 6.0, 0.55),  # cos(pi / 2) = 0
        ("cosine", 10.0, 0.1),
        ("cosine", 50.0, 0.1),
    ],
)
def test_each_kind_by_hand(kind: str, done: float, factor: float) -> None:
    assert rate_factor(kind, done, **AFTER_TWO) == pytest.approx(factor, rel=1e-14)


def test_without_a_warm_up_it_begins_below_the_top_by_one_step() -> None:
    assert rate_factor("linear", 0.25, warmup_rounds=0.0, rounds=1, floor=0.0) == 0.75
    assert rate_factor("constant", 0.25, warmup_rounds=0.0, rounds=None, floor=0.0) == 1.0


def test_the_middle_of_a_fall_is_halfway_to_the_floor_and_a_floor_of_0_is_reached() -> None:
    for kind in ("linear", "cosine"):
        assert rate_factor(kind, 8.0, warmup_rounds=0.0, rounds=16, floor=0.0) == pytest.approx(0.5, rel=1e-15)
        assert rate_factor(kind, 16.0, warmup_rounds=0.0, rounds=16, floor=0.0) == 0.0


def test_a_floor_of_1_is_the_constant_kind() -> None:
    for done in (0.5, 3.0, 7.25, 99.0):
        for kind in KINDS:
            assert rate_factor(kind, done, warmup_rounds=1.0, rounds=9, floor=1.0) == min(1.0, done)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    warmup=st.floats(0.0, 9.0),
    floor=st.floats(0.0, 1.0),
    steps=st.integers(1, 8),
)
def test_it_rises_to_1_and_never_again_after(kind: str, warmup: float, floor: float, steps: int) -> None:
    ends = [step / steps for step in range(1, 12 * steps + 1)]
    found = [rate_factor(kind, done, warmup_rounds=warmup, rounds=10, floor=floor) for done in ends]
    rising = [factor for done, factor in zip(ends, found, strict=True) if done < warmup]
    falling = found[len(rising) :]
    assert rising == sorted(rising)
    assert all(0.0 < factor <= 1.0 for factor in rising)
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(falling))
    assert all(floor - 1e-15 <= factor <= 1.0 for factor in falling)
    assert rate_factor(kind, warmup, warmup_rounds=warmup, rounds=10, floor=floor) == 1.0


@pytest.mark.parametrize(
    ("kind", "rounds", "said"),
    [
        ("linear", None, "linear needs more than 2 rounds, not None"),
        ("cosine", 2, "cosine needs more than 2 rounds, not 2"),
        ("linear", 1, "linear needs more than 2 rounds, not 1"),
        ("exponential", 10, "unknown kind 'exponential'"),
    ],
)
def test_a_kind_that_has_no_end_or_is_none_is_refused(kind: str, rounds: int | None, said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        rate_factor(kind, 3.0, warmup_rounds=2.0, rounds=rounds, floor=0.0)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.010, 1.0),  # at the target
        (0.011, 1.00384),  # 10 % above it, over 384 of 10000 responses: 1 + 0.1 * 0.0384
        (0.0095, 0.99808),  # 5 % below: 1 - 0.05 * 0.0384
        (0.012, 1.00768),  # 20 % above, where clipping begins: 1 + 0.2 * 0.0384
        (9.0, 1.00768),
        (math.inf, 1.00768),
        (0.0, 0.99232),  # clipped at -0.2
        (-1.0, 0.99232),
    ],
)
def test_the_coefficient_by_hand(kl: float, factor: float) -> None:
    assert adapted_coefficient(0.05, kl, 0.01, 384, 10_000) == pytest.approx(0.05 * factor, rel=1e-12)


def test_a_kl_that_is_no_number_is_not_taken_for_one() -> None:
    assert math.isnan(adapted_coefficient(0.05, math.nan, 0.01, 384, 10_000))


def test_a_horizon_below_the_responses_changes_it_by_a_fifth_at_most() -> None:
    for horizon in (384, 100, 1):
        assert adapted_coefficient(0.05, 9.0, 0.01, 384, horizon) == pytest.approx(0.06, rel=1e-12)
        assert adapted_coefficient(0.05, 0.0, 0.01, 384, horizon) == pytest.approx(0.04, rel=1e-12)


@settings(deadline=None)
@given(st.floats(1e-6, 10.0), st.floats(0.0, 100.0), st.floats(1e-4, 1.0), st.integers(0, 10**6), st.integers(1, 10**6))
def test_it_goes_up_above_the_target_and_down_below_and_stays_positive(
    coefficient: float, kl: float, target: float, responses: int, horizon: int
) -> None:
    found = adapted_coefficient(coefficient, kl, target, responses, horizon)
    assert 0.8 * coefficient * (1 - 1e-12) <= found <= 1.2 * coefficient * (1 + 1e-12)
    assert found >= coefficient if kl >= target else found <= coefficient
    if responses == 0:
        assert found == coefficient


def test_a_policy_whose_kl_falls_with_the_coefficient_ends_at_the_target() -> None:
    coefficient = 0.001
    for _ in range(400):
        coefficient = adapted_coefficient(coefficient, 0.002 / coefficient, 0.05, 500, 2_000)
    assert 0.002 / coefficient == pytest.approx(0.05, rel=1e-6)
