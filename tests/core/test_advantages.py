"""Advantages against hand-computed tables, a slow loop, and the properties that the method promises."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from papo.core.advantages import (
    GUARDS,
    SCALES,
    VARIANTS,
    Advantages,
    component_weights,
    compute_advantages,
    count_inversions,
    lam_max,
)
from papo.errors import DataError, ParamsError

NAN = math.nan
WITH_OUTCOME = tuple(v for v in VARIANTS if v not in ("prm", "mult"))
HALF = math.sqrt(3) / 2  # N(1) in a group of two right, two wrong: 0.5 / sqrt(1/3)


def one_group(orm: Sequence[float], prm: Sequence[float], **settings: Any) -> Advantages:
    return compute_advantages(orm, prm, ["a"] * len(orm), **settings)


# ---------------------------------------------------------------------------------------------- hand-computed tables

# r_out = (1, 1, 0, 0) and r_proc = (1, 0, 1, 0.5). Over the group, r_proc has mean 5/8 and variance 11/48, and
# r_out * r_proc = (1, 0, 0, 0) has mean 1/4 and variance 1/4; over the correct ones r_proc has mean and variance 1/2.
S = math.sqrt(11 / 48)
OUT = [HALF, HALF, -HALF, -HALF]
ALL = [0.375 / S, -0.625 / S, 0.375 / S, -0.125 / S]
PRODUCT = [1.5, -0.5, -0.5, -0.5]
WITHIN = [math.sqrt(0.5), -math.sqrt(0.5), 0.0, 0.0]
# gdpo: sum of squares of OUT + ALL = 3 + 3 + 2 * HALF * (0.375 - 0.625 - 0.375 + 0.125) / S
WHITE = math.sqrt((6 - HALF / S) / 3)


@pytest.mark.parametrize(
    ("variant", "lam", "process", "total"),
    [
        ("orm", 1.0, [0, 0, 0, 0], OUT),
        ("prm", 1.0, ALL, ALL),
        ("mult", 1.0, PRODUCT, PRODUCT),
        ("fullnorm", 0.5, PRODUCT, [o + 0.5 * p for o, p in zip(OUT, PRODUCT, strict=True)]),
        ("papo", 1.0, WITHIN, [o + p for o, p in zip(OUT, WITHIN, strict=True)]),
        ("papo", 0.5, WITHIN, [o + 0.5 * p for o, p in zip(OUT, WITHIN, strict=True)]),
        ("gdpo", 1.0, ALL, [(o + p) / WHITE for o, p in zip(OUT, ALL, strict=True)]),
        ("convex", 0.25, WITHIN, [0.25 * o + 0.75 * p for o, p in zip(OUT, WITHIN, strict=True)]),
    ],
)
def test_each_variant_by_hand(variant: str, lam: float, process: list[float], total: list[float]) -> None:
    found = one_group([1, 1, 0, 0], [1, 0, 1, 0.5], variant=variant, lam=lam)
    np.testing.assert_allclose(found.outcome, OUT, rtol=1e-5)
    np.testing.assert_allclose(found.process, process, rtol=1e-5)
    np.testing.assert_allclose(found.total, total, rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "total"),
    [
        ("orm", [0.5, 0.5, -0.5, -0.5]),
        ("prm", [0.375, -0.625, 0.375, -0.125]),
        ("mult", [0.75, -0.25, -0.25, -0.25]),
        ("fullnorm", [1.25, 0.25, -0.75, -0.75]),
        ("papo", [1.0, 0.0, -0.5, -0.5]),
        ("convex", [0.5, 0.5, -0.5, -0.5]),
    ],
)
def test_mean_only_drops_the_divisions(variant: str, total: list[float]) -> None:
    assert one_group([1, 1, 0, 0], [1, 0, 1, 0.5], variant=variant, scale="mean_only").total.tolist() == total


def test_a_timed_out_judge_leaves_a_correct_response_at_its_outcome_advantage() -> None:
    found = one_group([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, NAN, NAN, NAN, NAN, NAN])
    np.testing.assert_allclose(found.total, [0.9354] * 4 + [-0.9354] * 4, atol=1e-4)
    scored_as_zero = one_group([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, NAN, NAN, NAN, NAN])
    assert scored_as_zero.total[3] == pytest.approx(-0.57, abs=0.01)


@pytest.mark.parametrize(
    ("variant", "process"),
    [
        ("papo", [0.5**0.5, -(0.5**0.5), 0, 0, 0]),
        ("fullnorm", [1.5, -0.5, 0, -0.5, -0.5]),  # the wrong ones count as 0 whatever the judge said
        ("mult", [1.5, -0.5, 0, -0.5, -0.5]),
        ("prm", [5 / 6, -7 / 6, 0, -1 / 2, 5 / 6]),
    ],
)
def test_a_missing_process_score_leaves_the_statistics(variant: str, process: list[float]) -> None:
    prm = [1, 0, NAN, 1 / 3, 1]
    found = one_group([1, 1, 1, 0, 0], prm, variant=variant)
    np.testing.assert_allclose(found.process, process, rtol=1e-5)
    np.testing.assert_allclose(found.outcome, [4 / 30**0.5] * 3 + [-6 / 30**0.5] * 2, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_outcome_leaves_everything(variant: str) -> None:
    full = one_group([1, NAN, 1, 0], [1, 0, 0.5, 0.5], variant=variant)
    without = one_group([1, 1, 0], [1, 0.5, 0.5], variant=variant)
    for found, expected in zip(full, without, strict=True):
        assert found[1] == 0.0
        assert np.delete(found, 1).tolist() == expected.tolist()


def test_groups_may_be_ragged_and_interleaved() -> None:
    orm, prm = [1, 0, 1, 0, 1, 1], [1, NAN, 0, NAN, 0.5, 0.5]
    found = compute_advantages(orm, prm, ["x", "y", "x", "x", "z", "y"])
    third = math.sqrt(3)
    np.testing.assert_allclose(found.outcome, [1 / third, -(0.5**0.5), 1 / third, -2 / third, 0, 0.5**0.5], rtol=1e-5)
    np.testing.assert_allclose(found.process, [0.5**0.5, 0, -(0.5**0.5), 0, 0, 0], rtol=1e-5)


def test_all_correct_groups_stay_alive() -> None:
    found = one_group([1, 1, 1, 1], [1, 1, 1, 0])
    assert found.outcome.tolist() == [0.0] * 4
    np.testing.assert_allclose(found.total, [0.5, 0.5, 0.5, -1.5], rtol=1e-5)


# ------------------------------------------------------------------------------------------------- degenerate cases


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("score", [2 / 3, 0.1, 1 / 7, 1e-9, -1e6 / 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 49])
def test_equal_scores_are_exactly_zero(size: int, score: float, variant: str, scale: str) -> None:
    found = one_group([1] * size, [score] * size, variant=variant, scale=scale)
    assert not np.any(np.concatenate(found))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("orm", "prm"),
    [([], []), ([1], [0.5]), ([NAN] * 3, [0.0, 0.5, 1.0]), ([0, 0, 0], [NAN] * 3), ([1, 1], [1, 1 + 1e-9])],
)
def test_nothing_to_compare_is_zero(variant: str, orm: list[float], prm: list[float]) -> None:
    found = one_group(orm, prm, variant=variant)
    assert found.total.shape == (len(orm),)
    assert not np.any(np.concatenate(found))


def test_one_correct_response_is_orm() -> None:
    found = one_group([1, 0, 0], [0.0, 1.0, 1.0])
    assert found.total.tolist() == one_group([1, 0, 0], [NAN] * 3, variant="orm").total.tolist()


def test_dead_groups_stay_exactly_zero_under_whitening() -> None:
    found = compute_advantages(
        [1, 0, 0, 1, 1, 1], [1, 0.1, 0.7, 2 / 3, 2 / 3, 2 / 3], [0, 0, 0, 1, 1, 1], variant="gdpo"
    )
    assert found.total[3:].tolist() == [0.0, 0.0, 0.0]
    assert found.total.std(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_scores_far_from_zero_keep_their_precision() -> None:
    np.testing.assert_allclose(one_group([1] * 3, [1e9, 1e9 + 1, 1e9 + 2]).process, [-1, 0, 1], rtol=1e-5)


@pytest.mark.parametrize(
    "ids",
    [
        [1, 1, 2, 2],
        np.array([5, 5, -3, -3], dtype=np.int16),
        np.array([0.5, 0.5, 1.5, 1.5]),
        ["a", "a", "b", "b"],
        np.array(["a", "a", "b", "b"]),
        np.array(["1", "1", 1, 1], dtype=object),
        ["1", "1", 1, 1],
        [("p", 1), ("p", 1), ("p", 2), ("p", 2)],
        (letter for letter in "aabb"),
    ],
)
def test_ids_of_many_kinds(ids: Any) -> None:
    assert np.sign(compute_advantages([1, 0, 0, 0], [NAN] * 4, ids).total).tolist() == [1, -1, 0, 0]


def test_none_is_missing() -> None:
    assert one_group([1, None, 0], [None, None, None]).total[1] == 0.0  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prm_scores": [1.0]}, "prm_scores has 1 values for 2 responses"),
        ({"group_ids": ["a"]}, "group_ids has 1 values for 2 responses"),
        ({"prm_scores": [0.0, math.inf]}, r"prm_scores\[1\] is inf"),
        ({"orm_scores": [1, 0.7]}, r"orm_scores\[1\] is 0.7: the outcome is a binary accuracy"),
        ({"orm_scores": [-math.inf, 0]}, r"orm_scores\[0\] is -inf"),
        ({"orm_scores": ["right", "wrong"]}, "orm_scores are not all numbers"),
        ({"orm_scores": [[1, 0]]}, "orm_scores has 2 dimensions"),
        ({"group_ids": ["a", None]}, r"group_ids\[1\] is None"),
        ({"group_ids": ["a", NAN]}, r"group_ids\[1\] is nan"),
        ({"group_ids": np.array([NAN, 1.0])}, r"group_ids\[0\] is nan"),
        ({"group_ids": np.array([[1], [1]])}, "group_ids has 2 dimensions"),
    ],
)
def test_data_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"orm_scores": [1, 0], "prm_scores": [1, 0], "group_ids": ["a", "a"]} | change
    with pytest.raises(DataError, match=message):
        compute_advantages(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "grpo"}, "unknown variant 'grpo'"),
        ({"scale": "mad"}, "unknown scale 'mad'"),
        ({"guard": "clip"}, "unknown guard 'clip'"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"lam": NAN}, "lam is nan"),
        ({"lam": math.inf}, "lam is inf"),
        ({"lam": 1.1, "variant": "convex"}, "lam is 1.1; convex needs 0 <= lam <= 1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": NAN}, "eps is nan"),
        ({"guard": "rank", "variant": "prm"}, "guard 'rank' needs an outcome part"),
        ({"guard": "rank", "variant": "convex", "lam": 0.0}, "guard 'rank' needs an outcome part"),
        ({"variant": "capo"}, r"one advantage a token(.|\n)*papo\.core\.credit\.token_advantages"),
    ],
)
def test_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        one_group([1, 0], [1, 0], **change)


# ------------------------------------------------------------------------------------------------- against a slow loop


def slow_normalise(scores: dict[int, float], scale: str) -> dict[int, float]:
    if len(scores) < 2 or (std := statistics.stdev(scores.values())) <= 1e-6:
        return dict.fromkeys(scores, 0.0)
    mean = statistics.fmean(scores.values())
    return {row: (score - mean) / (std + 1e-6 if scale == "std" else 1.0) for row, score in scores.items()}


def slow_advantages(orm: list[float], prm: list[float], ids: list[int], variant: str, lam: float, scale: str) -> Any:
    """The definition, one response at a time."""
    outcome, process = [0.0] * len(orm), [0.0] * len(orm)
    known = [row for row in range(len(orm)) if not math.isnan(orm[row])]
    for group in set(ids):
        rows = [row for row in known if ids[row] == group]
        for row, value in slow_normalise({row: orm[row] for row in rows}, scale).items():
            outcome[row] = value
        scores: dict[int, float] = {}
        for row in rows:
            judged = not math.isnan(prm[row])
            if variant in ("prm", "gdpo") and judged:
                scores[row] = prm[row]
            if variant in ("papo", "convex") and judged and orm[row] == 1:
                scores[row] = prm[row]
            if variant in ("mult", "fullnorm") and (orm[row] == 0 or judged):
                scores[row] = prm[row] if orm[row] == 1 else 0.0
        for row, value in slow_normalise(scores, scale).items():
            process[row] = value
    by_variant = {"orm": (1.0, 0.0), "prm": (0.0, 1.0), "mult": (0.0, 1.0), "convex": (lam, 1 - lam)}
    weights = by_variant.get(variant, (1.0, lam))
    total = [weights[0] * o + weights[1] * p for o, p in zip(outcome, process, strict=True)]
    if variant == "gdpo":
        white = slow_normalise({row: total[row] for row in known}, "std")
        total = [white.get(row, 0.0) for row in range(len(orm))]
    return outcome, process, total


LEVELS = [0.0, 0.5, 1.0]
prm_levels = st.sampled_from([*LEVELS, NAN])
prm_floats = st.one_of(st.floats(-10, 10).map(lambda x: round(x, 3)), st.just(NAN))
lams = st.sampled_from([0.0, 0.3, 1.0, 1.7, 40.0])


@st.composite
def batches(draw: st.DrawFn, prm: st.SearchStrategy[float] = prm_floats) -> tuple[list[float], list[float], list[int]]:
    size = draw(st.integers(1, 24))
    orm = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, NAN]), min_size=size, max_size=size))
    ids = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return orm, draw(st.lists(prm, min_size=size, max_size=size)), ids


@settings(deadline=None, max_examples=150)
@given(batches(), st.sampled_from(VARIANTS), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(SCALES))
def test_equals_the_slow_loop(
    batch: tuple[list[float], list[float], list[int]], variant: str, lam: float, scale: str
) -> None:
    found = compute_advantages(*batch, variant=variant, lam=lam, scale=scale)
    for fast, slow in zip(found, slow_advantages(*batch, variant, lam, scale), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- properties


@settings(deadline=None)
@given(batches(), st.sampled_from(["papo", "fullnorm"]))
def test_lam_zero_is_orm(batch: tuple[list[float], list[float], list[int]], variant: str) -> None:
    found = compute_advantages(*batch, variant=variant, lam=0.0)
    assert found.total.tolist() == compute_advantages(*batch, variant="orm").total.tolist()


@settings(deadline=None)
@given(batches(prm_levels), st.sampled_from(VARIANTS), st.randoms(use_true_random=False))
def test_order_of_the_rows_does_not_matter(
    batch: tuple[list[float], list[float], list[int]], variant: str, random: Any
) -> None:
    order = list(range(len(batch[0])))
    random.shuffle(order)
    found = compute_advantages(*batch, variant=variant, lam=0.5)
    shuffled = compute_advantages(*([column[row] for row in order] for column in batch), variant=variant, lam=0.5)
    if variant == "gdpo":  # the whitening sums rounded numbers
        np.testing.assert_allclose(shuffled.total, found.total[order], rtol=1e-12)
    else:
        assert shuffled.total.tolist() == found.total[order].tolist()


@settings(deadline=None)
@given(
    batches(prm_levels), st.floats(0.5, 100), st.floats(-100, 100), st.sampled_from(["papo", "convex", "prm", "gdpo"])
)
def test_process_part_is_invariant_to_an_affine_judge(
    batch: tuple[list[float], list[float], list[int]], slope: float, shift: float, variant: str
) -> None:
    orm, prm, ids = batch
    found = compute_advantages(orm, prm, ids, variant=variant).process
    rescaled = compute_advantages(orm, [slope * score + shift for score in prm], ids, variant=variant).process
    np.testing.assert_allclose(rescaled, found, rtol=1e-4, atol=1e-9)


@settings(deadline=None)
@given(batches(), lams, st.sampled_from(GUARDS))
def test_process_part_sums_to_zero_over_the_correct(
    batch: tuple[list[float], list[float], list[int]], lam: float, guard: str
) -> None:
    orm, _, ids = (np.array(column) for column in batch)
    process = compute_advantages(*batch, lam=lam, guard=guard).process
    assert not process[orm != 1].any()
    for group in range(4):
        assert process[(ids == group) & (orm == 1)].sum() == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None)
@given(batches(), lams, st.sampled_from(WITH_OUTCOME), st.sampled_from(SCALES), st.sampled_from(GUARDS))
def test_a_missing_judgement_never_turns_a_correct_response_negative(
    batch: tuple[list[float], list[float], list[int]], lam: float, variant: str, scale: str, guard: str
) -> None:
    assume(variant != "convex" or lam in (0.3, 1.0))
    found = compute_advantages(*batch, variant=variant, lam=lam, scale=scale, guard=guard)
    unjudged = (np.array(batch[0]) == 1) & np.isnan(batch[1])
    assert np.all(found.total[unjudged] >= 0.0)
    assert np.array_equal(found.total[unjudged] > 0.0, found.outcome[unjudged] > 0.0)


@settings(deadline=None, max_examples=200)
@given(batches(), lams, st.sampled_from(WITH_OUTCOME), st.sampled_from(SCALES))
def test_the_rank_guard_never_inverts_and_leaves_good_groups_alone(
    batch: tuple[list[float], list[float], list[int]], lam: float, variant: str, scale: str
) -> None:
    assume(variant != "convex" or lam in (0.3, 1.0))
    orm, _, ids = (np.array(column) for column in batch)
    free = compute_advantages(*batch, variant=variant, lam=lam, scale=scale)
    kept = compute_advantages(*batch, variant=variant, lam=lam, scale=scale, guard="rank")
    assert count_inversions(kept.total.astype(np.float32), orm, ids) == 0
    weights = component_weights(variant, lam)
    sums = weights[0] * free.outcome + weights[1] * free.process
    for group in range(4):
        right, wrong = sums[(ids == group) & (orm == 1)], sums[(ids == group) & (orm == 0)]
        if right.size == 0 or wrong.size == 0 or right.min() - wrong.max() > 0.01:
            assert kept.process[ids == group].tolist() == free.process[ids == group].tolist()


def test_the_rank_guard_scales_down_by_no_more_than_needed() -> None:
    orm, prm = [1] * 6 + [0] * 2, [1, 1, 1, 1, 1, 0] + [NAN] * 2
    free, kept = one_group(orm, prm, lam=3.0), one_group(orm, prm, lam=3.0, guard="rank")
    assert count_inversions(free.total, orm, [0] * 8) == 1
    factor = kept.process[0] / free.process[0]
    np.testing.assert_allclose(kept.process, factor * free.process)
    gap = kept.outcome[0] - kept.outcome[-1]
    assert kept.total[5] - kept.total[-1] == pytest.approx(1e-3 * gap)


# ------------------------------------------------------------------------------------------ how far lam may go


@pytest.mark.parametrize(("size", "bound"), [(4, 1.732), (8, 1.058), (9, 0.98), (16, 0.69), (32, 0.47)])
def test_lam_max_of_common_group_sizes(size: int, bound: float) -> None:
    assert lam_max(size) == pytest.approx(bound, abs=0.005)


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7, 8])
def test_lam_max_is_tight(size: int) -> None:
    """Every multiset of the three levels over every number of correct responses, as one batch."""
    groups = [levels for k in range(2, size) for levels in itertools.combinations_with_replacement(LEVELS, k)]
    orm = np.concatenate([[1.0] * len(levels) + [0.0] * (size - len(levels)) for levels in groups])
    prm = np.concatenate([[*levels, *[NAN] * (size - len(levels))] for levels in groups])
    ids = np.repeat(np.arange(len(groups)), size)

    def inversions(lam: float) -> int:
        return count_inversions(compute_advantages(orm, prm, ids, lam=lam).total, orm, ids)

    assert inversions(lam_max(size) * (1 - 1e-4)) == 0
    assert inversions(lam_max(size) * (1 + 1e-4)) > 0


def test_the_parts_of_a_token_level_variant_are_summed_as_they_are() -> None:
    assert component_weights("capo", 0.3) == (1.0, 1.0)


@pytest.mark.parametrize("size", range(3, 200))
def test_lam_max_is_the_minimum_over_k(size: int) -> None:
    bounds = [size * (size - 1) / ((size - k) * (k - 1) ** 2) for k in range(2, size)]
    assert lam_max(size) == pytest.approx(math.sqrt(min(bounds)))


def test_lam_max_of_tiny_groups() -> None:
    assert lam_max(1) == lam_max(2) == math.inf
    with pytest.raises(ParamsError, match="group_size is 0"):
        lam_max(0)


def test_count_inversions_by_hand() -> None:
    total = [1.0, 0.0, -2.0, 0.0, 5.0, -1.0, 9.0]
    correct = [1, 1, 1, 0, 0, 1, NAN]
    ids = ["a", "a", "a", "a", "b", "c", "c"]
    assert count_inversions(total, correct, ids) == 2  # the tie at 0.0 and the -2.0; the unknown one is not wrong
    assert count_inversions(total, np.array(correct) == 1, ids) == 3
    assert count_inversions([], [], []) == 0
