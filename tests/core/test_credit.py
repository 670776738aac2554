"""Credit by token against hand-computed tables, a slow loop, and what the method promises; steps against brute force."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.core.advantages import SCALES
from papo.core.credit import (
    VOTES,
    Span,
    TokenAdvantages,
    combine_votes,
    split_steps,
    token_advantages,
    token_steps,
)
from papo.errors import DataError, ParamsError

NAN = math.nan


def one_group(orm: list[Any], debits: list[Any], lengths: list[int], **settings: Any) -> TokenAdvantages:
    return token_advantages(orm, debits, lengths, ["a"] * len(orm), **settings)


# ------------------------------------------------------------------------------------------------------------ steps


def steps_of(text: str) -> list[str]:
    return [text[start:end] for start, end in split_steps(text)]


@pytest.mark.parametrize(
    "steps",
    [
        [],
        ["a"],
        [" \n\t\n"],
        ["a\n", "b\n", "c"],
        ["a\r\n", "b\r\n"],
        ["a\n", "  b\n", "c \n"],
        ["\n  \n a\n", "b"],
        ["a\nb\n\n", "c\nd\n"],
        ["a\r\nb\r\n\r\n", "c"],
        ["a\n \t\n\n", "  b"],
        ["a\n", "b\n\n \n"],
        ["3+5=8\n", "8-2=6\n", "\\boxed{6}"],
        ["a\rb\x0bc\u2028d"],
        # Fences: from the start of a line to the start of a line.
        ["a\n", "```py\nx\n\ny\n```\n", "b"],
        ["a\n", "  ```\nx\n  ```\n", "b"],
        ["a\n\n", "```\nx\n\ny\n```\n\n", "b"],
        ["a ```\n", "b\n", "c ```"],
        ["a\n", "```\n", "x\n", "y"],
        ["```\n$$\n```\n", "a\n", "b $$\nc $$"],
        # Displayed mathematics.
        ["a $$\nx\n\ny\n$$ b\n", "c"],
        ["a\n", "\\[\nx\n\\]\n", "b"],
        ["a \\[\n", "x\n", "b"],
        ["a \\]\n", "b \\[ c\nd \\]"],
        ["a $$ b\n", "c"],
        ["$$\na\n$$ $$\nb\n$$\n", "c\n", "d $$"],
        ["\\[ x \\\\[2pt]\n y \\]\n", "a \\\\[\n", "b \\]"],
        ["\\$$\n", "x\n", "$$"],
        # Environments nest, and are told apart by name.
        ["\\begin{align*}\na\n\\end{align*}\n", "b"],
        ["\\begin{a}\n\\begin{a}\nx\n\\end{a}\ny\n\\end{a}\n", "b"],
        ["\\begin{a}\n\\begin{b}\nx\n\\end{a}\n", "y\n", "\\end{b}"],
        ["\\begin{a}\n", "\\begin{a}\nx\n\\end{a}\n", "y"],
        ["\\begin{a}\n", "x\n", "\\end{b}"],
        ["\\end{a}\n", "\\begin{a}\n", "x"],
        # A blank line counts as a boundary only where it is one.
        ["a\n", "$$\nx\n\n$$\n", "b"],
        ["a\n$$\nx\n\n$$\nb\n\n", "c"],
    ],
)
def test_steps_by_hand(steps: list[str]) -> None:
    assert steps_of("".join(steps)) == steps


PIECES = [
    "a",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "```",
    "\n```\n",
    "$$",
    "\\[",
    "\\]",
    "\\\\",
    "\\$",
    "\\begin{a}",
    "\\end{a}",
    "\\end{b}",
    "\t",
]
texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@given(texts)
def test_steps_tile_the_text(text: str) -> None:
    steps = split_steps(text)
    assert "".join(text[start:end] for start, end in steps) == text
    assert all(start < end for start, end in steps)
    assert [step.start for step in steps] == [0, *(step.end for step in steps)][: len(steps)]
    if text.strip():
        assert all(text[start:end].strip() for start, end in steps)
        assert all(text[start - 1] == "\n" for start, _ in steps[1:])


@given(st.lists(st.text(alphabet="ab $\\[]`", max_size=6).filter(lambda line: "$$" not in line), max_size=12))
def test_no_display_of_mathematics_is_cut(lines: list[str]) -> None:
    body = "\n".join(lines)
    display = f"$$\n{body}\n\n{body} $$"
    assert any(display in step for step in steps_of(f"before\n\n{display}\n\nafter"))


@pytest.mark.parametrize(
    "junk",
    ["\n", "a\n", " ", "\n ", "```\n", " ```", "$", "$$\n", "\\", "\\[\n", "\\]", "\\begin{", "\\begin{a}\n", "\\begin{a}\\end{a}\n",
     "{a}", "\r\n"],
)  # fmt: skip
def test_junk_costs_linear_time(junk: str) -> None:
    start = time.process_time()
    split_steps(junk * (100_000 // len(junk)))
    split_steps("\\begin{a}" + junk * (100_000 // len(junk)) + "x")
    assert time.process_time() - start < 2.0


def test_distinct_environments_cost_linear_time() -> None:
    names = [f"\\begin{{{number}}}\n" for number in range(10_000)]
    start = time.process_time()
    assert len(split_steps("".join(names))) == 10_000
    assert time.process_time() - start < 2.0


@given(texts, st.lists(st.integers(0, 100), max_size=20))
def test_a_token_is_in_the_step_of_its_first_character(text: str, starts: list[int]) -> None:
    steps = split_steps(text)
    found = token_steps(starts, steps)
    expected = [next((n for n, (a, b) in enumerate(steps) if a <= start < b), -1) for start in starts]
    assert found.tolist() == expected


def test_tokens_without_text_are_in_no_step() -> None:
    assert token_steps([0, 1, 2, 3, 4], [Span(0, 2), Span(2, 3)]).tolist() == [0, 0, 1, -1, -1]
    assert token_steps([0, 0], []).tolist() == [-1, -1]
    assert token_steps([], [Span(0, 2)]).tolist() == []


@pytest.mark.parametrize(
    ("starts", "steps", "message"),
    [
        ([0, -1], [Span(0, 2)], r"starts\[1\] is -1"),
        ([0.5], [Span(0, 2)], r"starts\[0\] is 0.5"),
        ([NAN], [Span(0, 2)], r"starts\[0\] is nan"),
        ([0], [Span(1, 2)], "do not tile"),
        ([0], [Span(0, 2), Span(3, 4)], "do not tile"),
        ([0], [Span(0, 2), Span(2, 1)], "do not tile"),
    ],
)
def test_starts_and_steps_that_cannot_be_are_refused(starts: list[float], steps: list[Span], message: str) -> None:
    with pytest.raises(DataError, match=message):
        token_steps(starts, steps)


# ------------------------------------------------------------------------------------------------------------ votes


@pytest.mark.parametrize(
    ("vote", "combined"),
    [
        ("intersection", [0, 0, 0, 0, 1]),
        ("majority", [0, 0, 1, 1, 1]),
        ("union", [0, 1, 1, 1, 1]),
        ("average", [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_votes_by_hand(vote: str, combined: list[float]) -> None:
    critiques = [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert combine_votes(critiques, vote).tolist() == combined
    assert combine_votes(critiques).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("vote", VOTES)
def test_one_critique_is_the_vote_and_no_step_is_no_vote(vote: str) -> None:
    assert combine_votes([[0, 1, 1]], vote).tolist() == [0, 1, 1]
    assert combine_votes([[], []], vote).tolist() == []


@pytest.mark.parametrize(
    ("critiques", "message"),
    [
        ([], r"shape \(0,\)"),
        ([0, 1], r"shape \(2,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        ([[0, 1], [0, 0.5]], r"critiques\[1\]\[1\] is 0.5"),
        ([[0, NAN]], r"critiques\[0\]\[1\] is nan"),
        ([[0, 1], [0]], "not all numbers, one a step"),
        ([["x"]], "not all numbers"),
    ],
)
def test_critiques_that_are_none_are_refused(critiques: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        combine_votes(critiques)


def test_an_unknown_vote_is_refused() -> None:
    with pytest.raises(ParamsError, match="unknown vote 'most'") as caught:
        combine_votes([[1]], "most")
    assert "majority" in caught.value.fix


# ------------------------------------------------------------------------------------------- hand-computed advantages


def test_one_right_one_wrong() -> None:
    """Rewards 2 1 | 0 0: mean 3/4, squares 25/16 + 1/16 + 2 * 9/16, variance 11/12."""
    found = one_group([1, 0], [[0, 1], None], [2, 2])
    deviation = math.sqrt(11 / 12)
    np.testing.assert_allclose(found.tokens[0], [1.25 / deviation, 0.25 / deviation], rtol=1e-5)
    np.testing.assert_allclose(found.tokens[1], [-0.75 / deviation] * 2, rtol=1e-5)
    np.testing.assert_allclose(found.total, [0.75 / deviation, -0.75 / deviation], rtol=1e-5)
    # Without debits 2 2 | 0 0: mean 1, variance 4/3.
    np.testing.assert_allclose(found.outcome, [math.sqrt(0.75), -math.sqrt(0.75)], rtol=1e-5)
    np.testing.assert_allclose(found.process, found.total - found.outcome, rtol=1e-12)


def test_mean_only_does_not_divide() -> None:
    found = one_group([1, 0], [[0, 1], None], [2, 2], scale="mean_only")
    assert [tokens.tolist() for tokens in found.tokens] == [[1.25, 0.25], [-0.75, -0.75]]
    assert [part.tolist() for part in found[:3]] == [[1.0, -1.0], [-0.25, 0.25], [0.75, -0.75]]


def test_all_right() -> None:
    """The outcome says nothing; rewards 2 2 1 | 2: mean 7/4, variance 1/4."""
    found = one_group([1, 1], [[0, 0, 1], [0]], [3, 1])
    np.testing.assert_allclose(found.tokens[0], [0.5, 0.5, -1.5], rtol=1e-5)
    np.testing.assert_allclose(found.tokens[1], [0.5], rtol=1e-5)
    assert found.outcome.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found.total, [-0.5 / 3, 0.5], rtol=1e-5)


@pytest.mark.parametrize("debits", [[None, None], [[0.5, 0.5], [0.5]], [[2 / 3] * 2, [2 / 3]]])
@pytest.mark.parametrize("outcome", [0, 1])
def test_a_group_of_equals_is_exactly_zero(outcome: int, debits: list[Any]) -> None:
    found = one_group([outcome, outcome], debits, [2, 1])
    assert not np.any(np.concatenate([*found[:3], *found.tokens]))


def test_the_weights() -> None:
    """Rewards 3 3-2/4 | 0 = 3, 2.5, 0."""
    found = one_group([1, 0], [[0, 0.25], None], [2, 1], w_whole=3.0, w_proc=2.0, scale="mean_only")
    mean = 5.5 / 3
    np.testing.assert_allclose(np.concatenate(found.tokens), [3 - mean, 2.5 - mean, -mean])


def test_a_debit_of_a_wrong_response_counts_where_somebody_asked() -> None:
    found = one_group([1, 0], [[0], [0, 1]], [1, 2], scale="mean_only")
    np.testing.assert_allclose(np.concatenate(found.tokens), [5 / 3, -1 / 3, -4 / 3])


def test_a_long_response_weighs_more() -> None:
    """Rewards 2 | 0 0 0: mean 1/2."""
    found = one_group([1, 0], [None, None], [1, 3], scale="mean_only")
    assert found.outcome.tolist() == found.total.tolist() == [1.5, -0.5]


@pytest.mark.parametrize("missing", [NAN, None])
@pytest.mark.parametrize("debit", [None, [1, 0, 1]])
def test_a_missing_outcome_leaves_everything(missing: float | None, debit: list[float] | None) -> None:
    found = one_group([1, missing, 0], [[0, 1], debit, None], [2, 3, 2])
    without = one_group([1, 0], [[0, 1], None], [2, 2])
    assert found.tokens[1].tolist() == [0.0] * 3
    for ours, theirs in zip(found[:3], without[:3], strict=True):
        assert ours[1] == 0.0
        assert np.delete(ours, 1).tolist() == theirs.tolist()


def test_a_missing_critique_among_correct_responses_is_zero() -> None:
    """Debits 1 0 0 | 0: the third response takes their mean, 1/4."""
    found = one_group([1, 1, 1], [[1, 0, 0], [0], None], [3, 1, 2], scale="mean_only")
    np.testing.assert_allclose(found.tokens[0], [-0.75, 0.25, 0.25])
    assert found.tokens[2].tolist() == [0.0, 0.0]
    # Thirds and tenths round, and yet.
    assert not one_group([1, 1, 1], [[1 / 3, 0.1], [0.7, 0.1, 0.2], None], [2, 3, 2]).tokens[2].any()


def test_a_missing_critique_beside_wrong_responses() -> None:
    """Rewards 1 | 1 (filled) | 0, and 2 | 0 where no correct response has a critique."""
    filled = one_group([1, 1, 0], [[1], None, None], [1, 1, 1], scale="mean_only")
    np.testing.assert_allclose(np.concatenate(filled.tokens), [1 / 3, 1 / 3, -2 / 3])
    alone = one_group([1, 0], [None, None], [1, 1], scale="mean_only")
    assert np.concatenate(alone.tokens).tolist() == [1.0, -1.0]


def test_a_missing_critique_takes_nothing_from_another_group_or_from_wrong_responses() -> None:
    found = token_advantages([1, 1, 1, 0], [[0], None, [1], [1]], [1] * 4, ["a", "b", "a", "b"], scale="mean_only")
    np.testing.assert_allclose(np.concatenate(found.tokens), [0.5, 1.5, -0.5, -1.5])


def test_a_response_without_tokens_is_zero() -> None:
    found = one_group([1, 1, 0], [[], [0, 1], None], [0, 2, 0])
    assert [part[[0, 2]].tolist() for part in found[:3]] == [[0.0, 0.0]] * 3
    assert [tokens.size for tokens in found.tokens] == [0, 2, 0]
    np.testing.assert_allclose(found.tokens[1], [math.sqrt(0.5), -math.sqrt(0.5)], rtol=1e-5)
    none = one_group([1, None], [None, []], [0, 0])
    assert [part.tolist() for part in none[:3]] == [[0.0, 0.0]] * 3


def test_no_responses() -> None:
    found = token_advantages([], [], [], [])
    assert [part.size for part in found[:3]] == [0, 0, 0]
    assert found.tokens == []


# -------------------------------------------------------------------------------------------------------- properties

Batch = tuple[list[Any], list[Any], list[int], list[str]]
levels = st.sampled_from([0.0, 0.0, 0.25, 1 / 3, 0.5, 2 / 3, 1.0])


@st.composite
def batches(draw: st.DrawFn, *, missing: bool = True) -> Batch:
    """Outcomes, debits, lengths and groups of up to 14 responses."""
    size = draw(st.integers(1, 14))
    orm = draw(
        st.lists(st.sampled_from([0.0, 1.0, 1.0, None] if missing else [0.0, 1.0]), min_size=size, max_size=size)
    )
    lengths = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    groups = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=size, max_size=size))
    debits = [draw(st.lists(levels, min_size=n, max_size=n)) if draw(st.booleans()) else None for n in lengths]
    return orm, debits, lengths, groups


def slowly(batch: Batch, *, w_whole: float, w_proc: float, scale: str, eps: float) -> list[list[float]]:
    """Tokens of each response, one group after the other, by the definition."""
    orm, debits, lengths, groups = batch
    found = [[0.0] * length for length in lengths]
    for group in set(groups):
        rows = [n for n, (g, outcome) in enumerate(zip(groups, orm, strict=True)) if g == group and outcome is not None]
        told = [debit for n in rows if orm[n] == 1.0 and debits[n] is not None for debit in debits[n] or []]
        fill = sum(told) / len(told) if told else 0.0
        rewards = {}
        for n in rows:
            given = debits[n]
            debit = given if given is not None else [fill if orm[n] == 1.0 else 0.0] * lengths[n]
            rewards[n] = [w_whole * (orm[n] or 0.0) - w_proc * one for one in debit]
        flat = [reward for row in rewards.values() for reward in row]
        deviation = statistics.stdev(flat) if len(flat) > 1 else 0.0
        for n, row in rewards.items():
            if deviation > eps:
                divisor = deviation + eps if scale == "std" else 1.0
                found[n] = [(reward - statistics.fmean(flat)) / divisor for reward in row]
    return found


@given(batches(), st.sampled_from([(2.0, 1.0), (1.0, 1.0), (3.0, 0.5), (2.0, 0.0)]), st.sampled_from(SCALES))
def test_the_same_as_a_slow_loop(batch: Batch, weights: tuple[float, float], scale: str) -> None:
    w_whole, w_proc = weights
    found = token_advantages(*batch, w_whole=w_whole, w_proc=w_proc, scale=scale)
    tokens = slowly(batch, w_whole=w_whole, w_proc=w_proc, scale=scale, eps=1e-6)
    whole = slowly(batch, w_whole=w_whole, w_proc=0.0, scale=scale, eps=1e-6)
    for ours, theirs in zip(found.tokens, tokens, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    np.testing.assert_allclose(found.total, [sum(row) / max(len(row), 1) for row in tokens], atol=1e-9)
    np.testing.assert_allclose(found.outcome, [row[0] if row else 0.0 for row in whole], atol=1e-9)
    np.testing.assert_allclose(found.outcome + found.process, found.total, atol=1e-12)


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_responses_does_not_matter(batch: Batch, random: Any) -> None:
    order = list(range(len(batch[0])))
    random.shuffle(order)
    found = token_advantages(*batch)
    orm, debits, lengths, groups = ([part[n] for n in order] for part in batch)
    shuffled = token_advantages(orm, debits, lengths, groups)
    for ours, theirs in zip(shuffled[:3], found[:3], strict=True):
        np.testing.assert_allclose(ours, theirs[order], atol=1e-9)
    for place, n in enumerate(order):
        np.testing.assert_allclose(shuffled.tokens[place], found.tokens[n], atol=1e-9)


@given(batches(missing=False))
def test_the_tokens_of_a_group_sum_to_zero(batch: Batch) -> None:
    found = token_advantages(*batch)
    for group in set(batch[3]):
        assert sum(
            tokens.sum() for tokens, g in zip(found.tokens, batch[3], strict=True) if g == group
        ) == pytest.approx(0)


@given(batches(), st.sampled_from(SCALES))
def test_without_a_process_weight_the_debits_do_not_matter(batch: Batch, scale: str) -> None:
    orm, debits, lengths, groups = batch
    found = token_advantages(*batch, w_proc=0.0, scale=scale)
    assert not found.process.any()
    bare = token_advantages(orm, [None] * len(debits), lengths, groups, scale=scale)
    np.testing.assert_allclose(found.total, bare.total, atol=1e-12)
    assert all(len(set(tokens.tolist())) <= 1 for tokens in found.tokens)


@given(batches(), st.sampled_from(SCALES), st.floats(0.0, 1.0))
def test_a_missing_critique_never_pushes_a_correct_response_below_zero(batch: Batch, scale: str, share: float) -> None:
    orm, debits, _, groups = batch
    found = token_advantages(*batch, w_proc=2.0 * share, scale=scale)
    for n, tokens in enumerate(found.tokens):
        if orm[n] == 1.0 and debits[n] is None:
            assert (tokens >= -1e-9).all()
            if all(orm[m] != 0.0 for m, group in enumerate(groups) if group == groups[n]):
                np.testing.assert_allclose(tokens, 0.0, atol=1e-9)


@given(batches())
def test_no_token_of_a_correct_response_is_worth_less_than_one_of_a_wrong_one(batch: Batch) -> None:
    found = token_advantages(*batch, w_whole=1.0, w_proc=1.0)
    for group in set(batch[3]):
        rows = [n for n, g in enumerate(batch[3]) if g == group and batch[2][n]]
        right, wrong = ([found.tokens[n] for n in rows if batch[0][n] == outcome] for outcome in (1.0, 0.0))
        if right and wrong:
            assert min(tokens.min() for tokens in right) >= max(tokens.max() for tokens in wrong) - 1e-9


def test_a_batch_of_a_million_tokens_is_quick() -> None:
    lengths = np.full(1024, 1000)
    debits = [np.zeros(1000) if n % 2 else None for n in range(1024)]
    start = time.process_time()
    token_advantages(np.arange(1024) % 3 == 0, debits, lengths, np.arange(1024) // 8)
    assert time.process_time() - start < 5.0


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_whole": 0.0}, "w_whole is 0.0"),
        ({"w_whole": -1.0}, "w_whole is -1.0"),
        ({"w_whole": NAN}, "w_whole is nan"),
        ({"w_whole": math.inf}, "w_whole is inf"),
        ({"w_proc": -0.1}, "w_proc is -0.1"),
        ({"w_proc": 2.1}, "w_proc is 2.1"),
        ({"w_proc": NAN}, "w_proc is nan"),
        ({"scale": "mad"}, "unknown scale 'mad'"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": NAN}, "eps is nan"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        one_group([1, 0], [[0, 1], None], [2, 2], **change)


@pytest.mark.parametrize(
    ("orm", "debits", "lengths", "message"),
    [
        ([1, 0], [[0, 1], [0, 1, 1]], [2, 2], r"debits\[1\] has 3 values for 2 tokens"),
        ([1, 0], [[0, 1]], [2, 2], "debits has 1 entries for 2 responses"),
        ([1, 0], [[0, 1.5], None], [2, 2], r"debits\[0\] holds 1.5"),
        ([1, 0], [None, [0, -0.1]], [2, 2], r"debits\[1\] holds -0.1"),
        ([1, 0], [None, [0, NAN]], [2, 2], r"debits\[1\]\[1\] is nan"),
        ([1, 0], [None, [0, math.inf]], [2, 2], r"debits\[1\]\[1\] is inf"),
        ([1, 0], [None, [[0, 1]]], [2, 2], r"debits\[1\] has 2 dimensions"),
        ([1, 0], [None, ["x", 1]], [2, 2], r"debits\[1\] are not all numbers"),
        ([1, 0], [None, None], [2], "lengths has 1 values for 2 responses"),
        ([1, 0], [None, None], [2, -1], r"lengths\[1\] is -1"),
        ([1, 0], [None, None], [2, 0.5], r"lengths\[1\] is 0.5"),
        ([1, 0.5], [None, None], [2, 2], r"orm_scores\[1\] is 0.5"),
    ],
)
def test_malformed_rows_are_refused_by_name(
    orm: list[Any], debits: list[Any], lengths: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        one_group(orm, debits, lengths)


def test_missing_group_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"group_ids\[1\]"):
        token_advantages([1, 0], [None, None], [1, 1], ["a", None])


def test_a_penalty_counts_in_every_token_and_changes_no_debit() -> None:
    """By hand: rewards 2 x 3/4 = 1.5, of the wrong step 0.5, and 0 of the wrong response, with mean 3.5 / 4."""
    found = one_group([1, 0], [[0, 1, 0], None], [3, 1], scale="mean_only", penalties=[-0.25, 0])
    assert found.tokens[0].tolist() == [0.625, -0.375, 0.625]
    assert found.tokens[1].tolist() == [-0.875]
    assert found.outcome.tolist() == [0.375, -1.125]
    assert found.process == pytest.approx([0.875 / 3 - 0.375, 0.25])


def test_a_penalised_response_without_a_critique_is_below_the_others_by_its_penalty_alone() -> None:
    found = one_group([1, 1, 1], [[0, 1], None, None], [2, 2, 2], scale="mean_only", penalties=[0, -0.5, 0])
    assert found.tokens[1] == pytest.approx(found.tokens[2] - 1.0)
    assert found.tokens[2] == pytest.approx([1 / 3] * 2)


@pytest.mark.parametrize(
    ("penalties", "message"),
    [
        ([0.5, 0], r"penalties\[0\] is 0.5: a penalty is 0 or below"),
        ([0, NAN], r"penalties\[1\] is nan"),
        ([0], "1 values for 2"),
    ],
)
def test_what_is_no_penalty_is_refused(penalties: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one_group([1, 0], [None, None], [2, 2], penalties=penalties)
