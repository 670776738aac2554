"""What becomes a process reward of the judge's score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from papo.core.advantages import compute_advantages
from papo.core.process_reward import process_rewards
from papo.errors import DataError, ParamsError

NAN = math.nan
ORM = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
PRM = [1.0, 0.5, NAN, NAN, 0.0, 1.0, NAN, 0.5]
IDS = ["a"] * 4 + ["b"] * 4
LENGTHS = [10, 20, 30, 40, 10, 30, 5, 50]
LIMITS = [100] * 8
NEEDED = [True, True, True, False, True, True, False, False]


def rewards(**given: Any) -> list[float]:
    return process_rewards(PRM, ORM, IDS, LENGTHS, LIMITS, needed=NEEDED, **given).tolist()


def test_by_default_it_is_the_score() -> None:
    assert rewards() == pytest.approx(PRM, nan_ok=True)


def test_a_missing_score_is_zero_only_where_it_was_asked_for() -> None:
    assert rewards(missing="zero") == pytest.approx([1.0, 0.5, 0.0, NAN, 0.0, 1.0, NAN, 0.5], nan_ok=True)


def test_missing_as_zero_punishes_who_was_not_judged() -> None:
    """The trap that `missing` avoids: the correct response that the judge did not answer about is pushed down."""
    honest = compute_advantages(ORM, rewards(), IDS).total
    zero = compute_advantages(ORM, rewards(missing="zero"), IDS).total
    assert honest[2] > 0.0 > zero[2]


def test_a_cost_of_length_reaches_correct_responses_alone() -> None:
    assert rewards(length_cost=0.5) == pytest.approx([0.95, 0.4, NAN, NAN, -0.05, 0.85, NAN, 0.5], nan_ok=True)


def test_length_neutral_rewards_do_not_follow_length() -> None:
    # By hand: deviations -5, 5 and -10, 10 tokens; 0.25, -0.25 and -0.5, 0.5: slope (-1.25 -1.25 + 5 + 5) / 250 = 0.03.
    assert rewards(length_neutral=True) == pytest.approx([1.15, 0.35, NAN, NAN, 0.3, 0.7, NAN, 0.5], nan_ok=True)
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(5, 90, 400), np.repeat(np.arange(50), 8)
    orm = (rng.random(400) < 0.7).astype(float)
    prm = 0.01 * lengths + rng.random(400)
    found = process_rewards(prm, orm, groups, lengths, np.full(400, 96), needed=orm == 1.0, length_neutral=True)
    centred = [(lengths[rows] - lengths[rows].mean()) @ (found[rows] - found[rows].mean())
               for group in range(50) if len(rows := np.flatnonzero((groups == group) & (orm == 1.0))) > 1]  # fmt: skip
    assert sum(centred) == pytest.approx(0.0, abs=1e-9)
    assert (found[orm == 0.0] == prm[orm == 0.0]).all()


def test_where_lengths_do_not_differ_nothing_is_taken_out() -> None:
    found = process_rewards([1, 0], [1, 1], [0, 0], [9, 9], [90, 90], needed=[1, 1], length_neutral=True)
    assert found.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        ({"missing": "wrong"}, ParamsError, "unknown missing"),
        ({"length_cost": -1.0}, ParamsError, "at least 0"),
        ({"lengths": [1]}, DataError, "lengths has 1 values"),
        ({"limits": [NAN] * 8}, DataError, "may be missing"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], error: type[Exception], what: str) -> None:
    arguments: dict[str, Any] = {"lengths": LENGTHS, "limits": LIMITS, "needed": NEEDED} | given
    with pytest.raises(error, match=what):
        process_rewards(PRM, ORM, IDS, **arguments)
