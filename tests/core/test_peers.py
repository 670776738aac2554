"""GDPO as TRL and as verl compute it: by hand, and against slow loops. tests/engines/test_trl_oracle.py holds the first against TRL."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.core.advantages import compute_advantages
from papo.core.peers import trl_gdpo, verl_gdpo
from papo.errors import DataError, ParamsError

NAN = math.nan
HALF = math.sqrt(3) / 2  # Z(1) in a group of two right, two wrong: 0.5 / sqrt(1/3)
WITHIN = math.sqrt(0.5)

score = st.sampled_from([0.0, 0.5, 1.0, 1 / 3, NAN])
response = st.tuples(st.sampled_from([0.0, 1.0, NAN]), score, st.integers(0, 3), st.integers(0, 40))
batches = st.lists(response, min_size=0, max_size=30)


def columns(batch: Sequence[tuple[float, float, int, int]]) -> Any:
    return ([row[at] for row in batch] for at in range(4))


def test_trl_by_hand() -> None:
    # Missing on the wrong ones: a = (HALF + WITHIN, HALF - WITHIN, -HALF, -HALF), mean 0, sum of squares 2 (3/4 + 1/2) + 3/2 = 4.
    found = trl_gdpo([1, 1, 0, 0], [1, 0, NAN, NAN], ["a"] * 4)
    std = math.sqrt(4 / 3)
    np.testing.assert_allclose(found, np.array([HALF + WITHIN, HALF - WITHIN, -HALF, -HALF]) / std, atol=1e-3)


def test_trl_gives_nothing_where_there_is_nothing() -> None:
    assert trl_gdpo([], [], []).tolist() == []
    assert trl_gdpo([1], [1], ["a"]).tolist() == [0]
    assert trl_gdpo([1, 1, 1], [2 / 3] * 3, ["a"] * 3).tolist() == [0, 0, 0]
    # The third response has no reward at all: it is 0, and the others are as if it were not there.
    found = trl_gdpo([1, 0, NAN], [NAN, NAN, NAN], ["a"] * 3)
    np.testing.assert_allclose(found, [WITHIN, -WITHIN, 0], rtol=1e-3)
    assert found[2] == 0


def test_verl_by_hand() -> None:
    # Missing is 0: r_proc = (1, 0, 0, 0) has mean 1/4 and std 1/2, so a = (HALF + 3/2, HALF - 1/2, -HALF - 1/2, -HALF - 1/2).
    lengths = [10, 20, 30, 40]
    a = [HALF + 1.5, HALF - 0.5, -HALF - 0.5, -HALF - 0.5]
    mean = (10 * a[0] + 20 * a[1] + 70 * a[2]) / 100
    std = math.sqrt(sum(n * (x - mean) ** 2 for n, x in zip(lengths, a, strict=True)) / 99)
    found = verl_gdpo([1, 1, 0, 0], [1, 0, NAN, NAN], ["a"] * 4, lengths)
    np.testing.assert_allclose(found, [(x - mean) / std for x in a], rtol=1e-5)


def test_verl_pushes_a_group_without_any_signal() -> None:
    """Whitening over tokens: the long wrong response of group a shifts the mean, and with it the all-correct group b."""
    found = verl_gdpo([1, 0, 1, 1], [1, NAN, 1, 1], ["a", "a", "b", "b"], [10, 90, 10, 10])
    assert (found[2:] > 0.5).all()
    assert trl_gdpo([1, 0, 1, 1], [1, NAN, 1, 1], ["a", "a", "b", "b"])[2:].tolist() == [0, 0]


def test_verl_gives_nothing_where_there_is_nothing() -> None:
    assert verl_gdpo([], [], [], []).tolist() == []
    assert verl_gdpo([1], [1], ["a"], [1]).tolist() == [0]
    assert verl_gdpo([1, 0], [1, 0], ["a", "a"], [0, 0]).tolist() == [0, 0]
    assert verl_gdpo([1, 1], [0.5, 0.5], ["a", "a"], [3, 4]).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_missing_on_wrong_ones_trl_is_papo_up_to_a_factor_and_verl_is_not(seed: int) -> None:
    stream = np.random.default_rng(seed)
    orm = stream.integers(0, 2, 64).astype(float)
    prm = np.where(orm == 1, stream.choice([0, 0.5, 1], 64), NAN)
    ids = np.repeat(np.arange(8), 8)
    ours = compute_advantages(orm, prm, ids).total
    assert off_by_more_than_a_factor(trl_gdpo(orm, prm, ids), ours) < 1e-3
    assert off_by_more_than_a_factor(verl_gdpo(orm, prm, ids, stream.integers(5, 50, 64)), ours) > 0.1


def off_by_more_than_a_factor(found: Any, expected: Any) -> float:
    factor = float(found @ expected / (expected @ expected))
    return float(np.abs(found - factor * expected).max() / np.abs(found).max())


def slow_mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values)


@settings(deadline=None)
@given(batch=batches, lam=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_trl_against_a_slow_loop(batch: list[tuple[float, float, int, int]], lam: float) -> None:
    orm, prm, ids, _ = columns(batch)
    total = [0.0] * len(batch)
    for scores, weight in ((orm, 1.0), (prm, lam)):
        for group in set(ids):
            rows = [i for i, own in enumerate(ids) if own == group and not math.isnan(scores[i])]
            if len(rows) >= 2:
                mean, std = slow_mean_std([scores[i] for i in rows])
                for i in rows:
                    total[i] += weight * (scores[i] - mean) / (std + 1e-4)
    scored = [i for i in range(len(batch)) if not (math.isnan(orm[i]) and math.isnan(prm[i]))]
    expected = [0.0] * len(batch)
    if len(scored) >= 2:
        mean, std = slow_mean_std([total[i] for i in scored])
        for i in scored:
            expected[i] = (total[i] - mean) / (std + 1e-4)
    np.testing.assert_allclose(trl_gdpo(orm, prm, ids, lam=lam), expected, rtol=1e-7, atol=1e-9)


@settings(deadline=None)
@given(batch=batches, lam=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_verl_against_a_slow_loop(batch: list[tuple[float, float, int, int]], lam: float) -> None:
    orm, prm, ids, lengths = columns(batch)
    total = [0.0] * len(batch)
    for scores, weight in ((orm, 1.0), (prm, lam)):
        filled = [0.0 if math.isnan(x) else x for x in scores]
        for group in set(ids):
            rows = [i for i, own in enumerate(ids) if own == group]
            mean, std = slow_mean_std([filled[i] for i in rows]) if len(rows) > 1 else (0.0, 1.0)
            for i in rows:
                total[i] += weight * (filled[i] - mean) / (std + 1e-6)
    tokens = [x for x, length in zip(total, lengths, strict=True) for _ in range(length)]
    expected = [0.0] * len(batch)
    if len(tokens) >= 2:
        mean, std = slow_mean_std(tokens)
        expected = [(x - mean) / math.sqrt(std * std + 1e-8) for x in total]
    np.testing.assert_allclose(verl_gdpo(orm, prm, ids, lengths, lam=lam), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orm": [1, 0.5]}, r"orm_scores\[1\] is 0.5"),
        ({"prm": [1]}, "prm_scores has 1 values for 2 responses"),
        ({"ids": ["a"]}, "group_ids has 1 values"),
        ({"lengths": [1, -1]}, r"lengths\[1\] is below 0"),
        ({"lengths": [1, NAN]}, "no value may be missing"),
    ],
)
def test_bad_data_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"orm": [1, 0], "prm": [1, 0], "ids": ["a", "a"], "lengths": [1, 1]} | change
    with pytest.raises(DataError, match=message):
        verl_gdpo(given["orm"], given["prm"], given["ids"], given["lengths"])
    if "lengths" not in change:
        with pytest.raises(DataError, match=message):
            trl_gdpo(given["orm"], given["prm"], given["ids"])


@pytest.mark.parametrize("lam", [-0.1, NAN, math.inf])
def test_bad_lam_is_named(lam: float) -> None:
    with pytest.raises(ParamsError, match="lam is"):
        trl_gdpo([1, 0], [1, 0], ["a", "a"], lam=lam)
    with pytest.raises(ParamsError, match="lam is"):
        verl_gdpo([1, 0], [1, 0], ["a", "a"], [1, 1], lam=lam)
