"""Which rows go where: nothing lost, nothing twice, weights as if nothing were left out, every process as many forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.engines.protocols import TrainRow
from papo.engines.training.batches import Item, Layout, Step, active, fill, plan
from papo.engines.training.losses import token_weights

SEPARATE, SHARED, PACKED = Layout(60, shared=False), Layout(60, shared=True), Layout(60, shared=False, packed=True)


def row(prompt: int, completion: int, advantage: float = 1.0, *, first: int = 7, truncated: bool = False) -> TrainRow:
    return TrainRow([first] * prompt, [3] * completion, [-1.0] * completion, advantage, truncated=truncated)


def steps(
    groups: Sequence[Sequence[TrainRow]],
    *,
    size: int = 2,
    skip_zero: bool = True,
    mask_truncated: bool = False,
    layout: Layout = SEPARATE,
    rank: int = 0,
    world: int = 1,
) -> list[Step]:
    return plan(
        groups, size=size, weigh=lambda lengths: token_weights(lengths, "token_mean"), skip_zero=skip_zero,
        mask_truncated=mask_truncated, layout=layout, rank=rank, world=world,
    )  # fmt: skip


def items(*rows: TrainRow) -> list[Item]:
    return [Item(place, row, 1.0) for place, row in enumerate(rows)]


def places(step: Step) -> list[int]:
    return sorted(item.place for batch in step.batches for item in batch.items if item.weight)


@pytest.mark.parametrize(
    ("advantage", "tokens", "found"),
    [
        (0.0, None, False),
        (-0.0, None, False),
        (-1e-30, None, True),
        (5.0, [0.0, 0.0], False),
        (0.0, [0.0, 1.0], True),
    ],
)
def test_a_row_is_active_if_a_token_has_an_advantage(advantage: float, tokens: list[float] | None, found: bool) -> None:
    assert active(TrainRow([1], [2, 3], [-1.0, -1.0], advantage, tokens)) is found


def test_rows_without_advantage_are_left_out_and_their_tokens_counted() -> None:
    groups = [[row(3, 4), row(3, 6, 0.0)], [row(5, 10, -1.0)], [row(2, 5)]]
    first, second = steps(groups)
    assert (places(first), places(second)) == ([0, 2], [3])
    assert {item.weight for batch in first.batches for item in batch.items} == {1 / 20}
    assert (first.responses, first.tokens, len(first.computed)) == (3, 20, 2)
    assert places(steps(groups, skip_zero=False)[0]) == [0, 1, 2]


def test_rows_that_were_cut_off_leave_the_denominator_too() -> None:
    (step,) = steps([[row(3, 4), row(3, 16, truncated=True)]], mask_truncated=True)
    assert (places(step), step.tokens, step.responses) == ([0], 4, 2)
    assert step.batches[0].items[0].weight == 1 / 4


@pytest.mark.parametrize("layout", [SEPARATE, SHARED, PACKED], ids=["separate", "shared", "packed"])
def test_a_step_of_which_nothing_is_left_still_has_a_gradient_of_zero_to_take(layout: Layout) -> None:
    (step,) = steps([[row(9, 9, 0.0), row(2, 3, 0.0)]], layout=layout)
    ((item,),) = (batch.items for batch in step.batches)
    assert (item.place, item.weight, step.computed) == (1, 0.0, ())


def test_micro_batches_hold_no_more_tokens_than_the_limit_but_a_single_row_may() -> None:
    batches = fill(items(row(10, 11), row(10, 11), row(10, 11), row(10, 11), row(50, 51)), SEPARATE)
    # 20 tokens a row, as the last token is only predicted.
    assert [(len(batch.items), batch.tokens) for batch in batches] == [(3, 60), (1, 20), (1, 100)]


def test_prompts_are_computed_once_where_that_is_less() -> None:
    rows = [row(20, 5, first=1), row(20, 5, first=2), row(20, 5, first=1), row(20, 5, first=2)]
    (batch,) = fill(items(*rows), SHARED)
    assert (batch.shared, batch.tokens, batch.needed) == (True, 2 * 20 + 4 * 4, 2 * 20 + 4 * 4)
    assert len(fill(items(*rows), SEPARATE)) == 2


def test_rows_of_one_length_each_of_another_prompt_are_not_split_in_two() -> None:
    (batch,) = fill(items(row(3, 9, first=1), row(3, 9, first=2)), SHARED)
    assert not batch.shared


def test_padding_is_what_is_computed_and_not_needed() -> None:
    (batch,) = fill(items(row(3, 3), row(10, 11)), SEPARATE)
    assert (batch.tokens, batch.needed) == (40, 25)
    (packed,) = fill(items(row(3, 3), row(10, 11)), PACKED)
    assert (packed.tokens, packed.needed) == (25, 25)


rows_of_any_kind = st.lists(
    st.lists(
        st.builds(
            row,
            st.integers(1, 20),
            st.integers(0, 30),
            st.sampled_from([0.0, 1.0, -0.5]),
            first=st.integers(1, 2),
            truncated=st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(
    groups=rows_of_any_kind,
    world=st.integers(1, 4),
    layout=st.sampled_from([SEPARATE, SHARED, PACKED]),
    skip_zero=st.booleans(),
    mask_truncated=st.booleans(),
)
def test_every_row_that_counts_is_computed_by_one_process_and_all_do_as_many_passes(
    groups: list[list[TrainRow]], world: int, layout: Layout, skip_zero: bool, mask_truncated: bool
) -> None:
    plans = [
        steps(groups, layout=layout, skip_zero=skip_zero, mask_truncated=mask_truncated, rank=rank, world=world)
        for rank in range(world)
    ]
    rows = [row for group in groups for row in group]
    for same in zip(*plans, strict=True):
        assert len({len(step.batches) for step in same}) == 1
        assert all(
            (step.responses, step.tokens, step.computed) == (same[0].responses, same[0].tokens, same[0].computed)
            for step in same
        )
    found = sorted(place for one in plans for step in one for place in places(step))
    assert found == [
        place
        for place, row in enumerate(rows)
        if row.completion_ids and not (mask_truncated and row.truncated) and not (skip_zero and row.advantage == 0.0)
    ]
    for batch in (batch for one in plans for step in one for batch in step.batches):
        assert len(batch.items) == 1 or batch.tokens <= layout.tokens
        assert 0 <= batch.needed <= batch.tokens


def test_rows_are_dealt_by_tokens() -> None:
    groups = [[row(1, length) for length in (40, 10, 10, 10, 10)]]
    shares = [places(steps(groups, rank=rank, world=2)[0]) for rank in range(2)]
    assert shares == [[0], [1, 2, 3, 4]]
