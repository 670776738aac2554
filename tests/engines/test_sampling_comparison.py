"""Which of two policies log-probs are of: decided where it can be known, for whatever the noise is like, and left open elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from papo.engines.samplers.comparison import SURE, Place, place

SEQUENCES, LENGTH = 24, 40


def policies(stream: np.random.Generator, away: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probs of the wanted policy and of another; `away`: the root of their mean squared difference."""
    wanted = [-stream.exponential(2.0, LENGTH) for _ in range(SEQUENCES)]
    return wanted, [one + away * stream.standard_normal(LENGTH) for one in wanted]


def noise_of(stream: np.random.Generator, kind: str) -> list[np.ndarray]:
    """Of mean square 0.05 ** 2: alike on all tokens, of few tokens, or one for all of a sequence."""
    if kind == "shared":
        return [0.05 * stream.standard_normal() * np.ones(LENGTH) for _ in range(SEQUENCES)]
    drawn = [0.05 * stream.standard_normal(LENGTH) for _ in range(SEQUENCES)]
    if kind == "few":
        return [one * math.sqrt(10) * (stream.random(LENGTH) < 0.1) for one in drawn]
    return drawn


def test_where_there_is_no_noise_it_is_exact() -> None:
    wanted, other = policies(np.random.default_rng(0), 0.1)
    for found, at in ((wanted, 0.0), (other, 1.0)):
        of = place(found, wanted, other)
        assert of.at == pytest.approx(at, abs=1e-12)
        assert of.error <= 1e-6
        assert (of.is_told, of.is_other) == (at == 0.0, at == 1.0)


@pytest.mark.parametrize("kind", ["alike", "few", "shared"])
@pytest.mark.parametrize("away", [0.002, 0.02, 0.1])
def test_no_right_policy_is_refused_and_no_other_taken_for_it(kind: str, away: float) -> None:
    stream = np.random.default_rng(1)
    for _ in range(300):
        wanted, other = policies(stream, away)
        rounding = noise_of(stream, kind)
        right = place([one + noise for one, noise in zip(wanted, rounding, strict=True)], wanted, other)
        wrong = place([one + noise for one, noise in zip(other, rounding, strict=True)], wanted, other)
        assert not right.is_other
        assert not wrong.is_told
        if away == 0.1:
            assert right.is_told
            assert wrong.is_other


@pytest.mark.parametrize("kind", ["alike", "few", "shared"])
def test_the_standard_error_is_that_of_noise_which_a_sequence_shares_and_else_above(kind: str) -> None:
    stream = np.random.default_rng(2)
    found = []
    for _ in range(1000):
        wanted, other = policies(stream, 0.05)
        if kind == "shared":  # the way between policies is one for all of a sequence, too
            other = [one + 0.05 * stream.standard_normal() for one in wanted]
        noise = noise_of(stream, kind)
        found.append(place([one + add for one, add in zip(wanted, noise, strict=True)], wanted, other))
    spread, said = float(np.std([of.at for of in found])), float(np.mean([of.error for of in found]))
    assert abs(np.mean([of.at for of in found])) < 4 * spread / math.sqrt(len(found))
    assert 0.8 * spread < said
    assert said < 1.2 * spread or kind != "shared"


def test_two_policies_that_are_one_are_not_told_apart() -> None:
    wanted, _ = policies(np.random.default_rng(3), 0.1)
    of = place([one + 0.01 for one in wanted], wanted, wanted)
    assert of.margin == 0.0
    assert not of.is_told
    assert not of.is_other


def test_one_sequence_tells_nothing() -> None:
    wanted, other = policies(np.random.default_rng(4), 0.1)
    assert place(other[:1], wanted[:1], other[:1]) == Place(0.0, math.inf)


@pytest.mark.parametrize(
    ("at", "error", "told", "other"),
    [
        (0.0, 0.1, True, False),
        (0.0, 0.25, False, False),
        (1.0, 0.1, False, True),
        (1.0, 0.25, False, False),
        (0.4, 0.05, True, False),  # some third policy, of which the largest difference tells
        (0.6, 0.05, True, True),
        (3.0, 0.1, False, True),  # one further back than the other
        (-2.0, 0.1, True, False),
    ],
)
def test_what_a_place_says(at: float, error: float, told: bool, other: bool) -> None:
    of = Place(at, error)
    assert of.margin == pytest.approx((1 - at) / error)
    assert (of.is_told, of.is_other) == (told, other)
    assert SURE == 5.0
