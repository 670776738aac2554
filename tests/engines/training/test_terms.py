"""Each option of the loss, through the trainer, against the same written out in plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from updates import ONE_STEP, Groups, PlainTorch, apart, off_policy, train_round

from papo.params import DevicesParams, KlParams, ScheduleParams, TrainParams


@pytest.fixture(scope="module")
def reference(policy: Path, groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy some steps away from the one in training."""
    params = TrainParams(minibatch_prompts=1, learning_rate=0.01)
    return train_round(params, policy, groups, tmp_path_factory.mktemp("reference")).policy


def cut_off(groups: Groups) -> list[list[Any]]:
    """The same rows, every third of which the limit on new tokens has cut off."""
    return [
        [replace(row, truncated=(place + index) % 3 == 0) for index, row in enumerate(group)]
        for place, group in enumerate(groups)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "dual_clip": {"dual_clip": 1.1},
    "kl": {"kl": KlParams(coefficient=0.3)},
    "entropy": {"entropy_bonus": 0.2},
    "truncated": {"mask_truncated": True},
    "importance by token": {"importance": "token", "importance_cap": 1.2},
    "importance by sequence": {"importance": "sequence", "importance_cap": 1.5},
    "all": {
        "dual_clip": 1.1,
        "kl": KlParams(coefficient=0.3),
        "entropy_bonus": 0.2,
        "mask_truncated": True,
        "importance": "token",
    },
}


@pytest.mark.parametrize("loss", ["token_mean", "sequence_mean", "dr_grpo"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_gradient_with_an_option_is_that_of_plain_torch(
    policy: Path, groups: Groups, reference: Path, tmp_path: Path, option: str, loss: str
) -> None:
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch_tokens": 150, **OPTIONS[option]})
    rows = cut_off(off_policy(groups))
    ours = train_round(params, policy, rows, tmp_path, reference=reference, temperature=0.7)
    plain = PlainTorch(params, policy, 0.7, reference).train(rows)
    assert apart(ours.gradient(), plain.gradients[0]) < 1e-5
    assert ours.metrics[0]["loss"] == pytest.approx(plain.losses[0], rel=1e-4, abs=1e-6)
    without = PlainTorch(ONE_STEP.model_copy(update={"loss": loss}), policy, 0.7).train(rows)
    assert apart(plain.gradients[0], without.gradients[0]) > 1e-3  # the option says something here


@pytest.mark.parametrize("option", OPTIONS)
def test_several_steps_with_an_option_give_the_weights_of_plain_torch(
    policy: Path, groups: Groups, reference: Path, tmp_path: Path, option: str
) -> None:
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3, microbatch_tokens=60, **OPTIONS[option])
    rows = cut_off(off_policy(groups))
    ours = train_round(params, policy, rows, tmp_path, reference=reference)
    plain = PlainTorch(params, policy, reference=reference)
    before = {name: weight.clone() for name, weight in plain.weights().items()}
    after = plain.train(rows).weights()
    # AdamW makes a step of the same size of a gradient that is mere rounding, so the whole way is compared and not each weight.
    moved = [{name: end[name] - before[name] for name in before} for end in (ours.weights, after)]
    assert apart(*moved) < 1e-3


@pytest.mark.parametrize("option", [{"kl": KlParams(coefficient=0.1)}, {"entropy_bonus": 0.1}], ids=str)
def test_rows_without_advantage_are_computed_where_they_have_a_gradient(
    policy: Path, groups: Groups, tmp_path: Path, option: dict[str, Any]
) -> None:
    plain, more = (
        train_round(ONE_STEP.model_copy(update=update), policy, groups, tmp_path / str(index), reference=policy)
        for index, update in enumerate(({}, option))
    )
    assert (plain.metrics[0]["skipped_responses"], more.metrics[0]["skipped_responses"]) == (4.0, 0.0)


def test_the_kl_coefficient_is_adapted_after_each_step_and_goes_on_in_the_next_round(
    policy: Path, groups: Groups, reference: Path, tmp_path: Path
) -> None:
    kl = KlParams(coefficient=0.1, target=1e-4, horizon=16)
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, kl=kl)
    first = train_round(params, policy, groups, tmp_path / "0", reference=reference)
    # Four times as far as the target or more: a fifth up, times 8 of 16 responses a step.
    assert all(row["kl_reference"] > 4e-4 for row in first.metrics)
    assert [row["kl_coefficient"] for row in first.metrics] == pytest.approx([0.1, 0.11])
    second = train_round(params, first.policy, groups, tmp_path / "1", state=first.state, reference=reference, round_=1)
    assert second.metrics[0]["kl_coefficient"] == pytest.approx(0.121)
    fixed = params.model_copy(update={"kl": KlParams(coefficient=0.1)})
    third = train_round(fixed, first.policy, groups, tmp_path / "2", state=first.state, reference=reference, round_=1)
    assert [row["kl_coefficient"] for row in third.metrics] == [0.1, 0.1]


def test_the_learning_rate_follows_its_schedule_through_rounds(policy: Path, groups: Groups, tmp_path: Path) -> None:
    schedule = ScheduleParams(kind="linear", warmup_rounds=1, rounds=3, floor=0.1)
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, schedule=schedule)
    rates = [
        row["learning_rate"]
        for round_ in range(4)
        for row in train_round(params, policy, groups, tmp_path / str(round_), round_=round_).metrics
    ]
    # Half a round a step: up within one round, down to a tenth in the next two, and there it stays.
    assert rates == pytest.approx([5e-4, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4, 1e-4, 1e-4])


def test_bfloat16_is_near_and_weights_stay_float32(policy: Path, groups: Groups, tmp_path: Path) -> None:
    half = train_round(
        ONE_STEP.model_copy(update={"dtype": "bfloat16", "devices": DevicesParams(device="cpu")}),
        policy,
        groups,
        tmp_path / "half",
    )
    full = train_round(ONE_STEP, policy, groups, tmp_path / "full")
    assert 1e-4 < apart(half.gradient(), full.gradient()) < 0.05
    assert {str(tensor.dtype) for tensor in half.weights.values()} == {"torch.float32"}
    assert {str(tensor.dtype) for tensor in half.moments.values()} == {"torch.float32"}
