"""What a judge cost over a run."""

from __future__ import annotations

import math

import pytest

from papo.core.costs import model_asked, money, totals


def test_counts_add_up_and_shares_are_weighted() -> None:
    rounds = [
        {"asked_share": 0.5, "calls": 40.0, "cost": 0.1, "cached_share": 0.2, "vote_agreement": 1.0},
        {"asked_share": 0.25, "calls": 10.0, "cost": 0.2, "cached_share": 0.8},
        {"asked_share": 0.0},
    ]
    found = totals(rounds, [100, 40, 60])
    assert found == pytest.approx(
        {
            "calls": 50.0,
            "cost": 0.3,
            "asked_share": 60 / 200,
            "cached_share": (0.2 * 50 + 0.8 * 10) / 60,
            "vote_agreement": 1.0,
        }
    )
    assert totals([], []) == {}
    assert totals([{"asked_share": 0.0, "cached_share": 0.0}], [8]) == {"asked_share": 0.0}


def test_a_share_that_stands_alone_costs_nothing() -> None:
    assert not model_asked({"asked_share": 0.4})
    assert model_asked({"asked_share": 0.4, "cached_share": 1.0})
    assert model_asked({"calls": 0.0})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (12345.678, "12,346"), (1234567.8, "1,234,568"), (1.23456, "1.235"), (0.00123456, "0.001235"),
        (9.99996, "10.00"), (0.5, "0.5000"), (-2.0, "-2.000"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_money_has_four_significant_digits_and_no_exponent(value: float, shown: str) -> None:
    assert money(value) == shown
