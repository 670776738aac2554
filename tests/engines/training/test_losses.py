"""The terms of the policy loss against numbers worked out by hand, their definitions, their derivatives and TRL's own loss."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from papo.engines.training.losses import (
    clipped,
    clipped_surrogate,
    importance_weights,
    kl_penalty,
    token_weights,
)
from papo.errors import ParamsError

NAN, INF = math.nan, math.inf
LOW, HIGH = 0.2, 0.28
TINY = {"rtol": 1e-12, "atol": 1e-15}

logs = st.floats(-30.0, 5.0)
advantages = st.one_of(st.just(0.0), st.floats(-10.0, 10.0))
tokens = st.lists(st.tuples(logs, logs, advantages), min_size=1, max_size=8)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_ratio(*ratios: float) -> tuple[Tensor, Tensor]:
    """Log-probs, with a gradient, and the proximal ones that give these ratios."""
    proximal = torch.full((len(ratios),), math.log(0.05), dtype=torch.float64)
    return (proximal + numbers(*ratios).log()).requires_grad_(), proximal


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), of)
    return found


def by_definition(ratio: float, advantage: float, dual_clip: float | None) -> float:
    bounded = min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    return -max(bounded, dual_clip * advantage) if dual_clip is not None and advantage < 0 else -bounded


# ------------------------------------------------------------------------------------------------- the clipped surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # at ratio 1 the loss is -A, and so is its derivative by the log-prob
        (1.0, -3.0, 3.0, 3.0),
        (1.2, 1.0, -1.2, -1.2),  # within the bounds: -r A
        (1.2, -1.0, 1.2, 1.2),
        (1.5, 1.0, -1.28, 0.0),  # min(1.5, 1.28)
        (1.5, -1.0, 1.5, 1.5),  # min(-1.5, -1.28): what made it likelier is not held back
        (0.5, 1.0, -0.5, -0.5),  # min(0.5, 0.8)
        (0.5, -1.0, 0.8, 0.0),  # min(-0.5, -0.8)
        (1.5, 0.0, 0.0, 0.0),
        (0.5, 0.0, 0.0, 0.0),
        (5.0, -2.0, 10.0, 10.0),  # nothing bounds it without dual_clip
    ],
)
def test_the_loss_of_a_token_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprobs, proximal = at_ratio(ratio)
    found = clipped_surrogate(logprobs, proximal, numbers(advantage), LOW, HIGH)
    torch.testing.assert_close(found.detach(), numbers(loss), **TINY)
    torch.testing.assert_close(gradient(found, logprobs), numbers(slope), **TINY)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (5.0, -2.0, 6.0, 0.0),  # -max(-10, 3 * -2)
        (2.9, -2.0, 5.8, 5.8),  # below c nothing changes
        (0.5, -1.0, 0.8, 0.0),
        (5.0, 2.0, -2.56, 0.0),  # not in force for A > 0: -1.28 * 2, where c A is 6
        (1.2, 2.0, -2.4, -2.4),
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_dual_clip_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprobs, proximal = at_ratio(ratio)
    found = clipped_surrogate(logprobs, proximal, numbers(advantage), LOW, HIGH, dual_clip=3.0)
    torch.testing.assert_close(found.detach(), numbers(loss), **TINY)
    torch.testing.assert_close(gradient(found, logprobs), numbers(slope), **TINY)


def test_a_dual_clip_within_the_bounds_holds_where_it_stands() -> None:
    logprobs, proximal = at_ratio(1.2, 1.2)
    found = clipped_surrogate(logprobs, proximal, numbers(-1.0, 1.0), LOW, HIGH, dual_clip=1.1)
    torch.testing.assert_close(found.detach(), numbers(1.1, -1.2), **TINY)


@settings(deadline=None)
@given(tokens, st.one_of(st.none(), st.floats(1.01, 10.0)))
def test_it_is_its_definition(rows: list[tuple[float, float, float]], dual_clip: float | None) -> None:
    logprobs, proximal, advantage = (numbers(*column) for column in zip(*rows, strict=True))
    found = clipped_surrogate(logprobs, proximal, advantage, LOW, HIGH, dual_clip)
    wanted = [by_definition(math.exp(new - old), a, dual_clip) for new, old, a in rows]
    torch.testing.assert_close(found, numbers(*wanted), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(tokens)
def test_its_derivative_is_minus_r_a_and_0_for_the_tokens_that_are_clipped(
    rows: list[tuple[float, float, float]],
) -> None:
    new, old, advantage = (numbers(*column) for column in zip(*rows, strict=True))
    for dtype in (torch.float32, torch.float64):
        logprobs, proximal, a = new.to(dtype).requires_grad_(), old.to(dtype), advantage.to(dtype)
        low, high = clipped(logprobs, proximal, a, LOW, HIGH)
        wanted = torch.where(low | high, 0.0, -a * torch.exp(logprobs.detach() - proximal))
        found = gradient(clipped_surrogate(logprobs, proximal, a, LOW, HIGH), logprobs)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
        assert not found[low | high].any()


def test_the_proximal_policy_and_the_advantages_get_their_own_gradients_only_where_asked() -> None:
    logprobs, proximal = at_ratio(1.1, 0.9)
    advantage = numbers(1.0, -1.0)
    clipped_surrogate(logprobs, proximal, advantage, LOW, HIGH).sum().backward()
    assert proximal.grad is None
    assert advantage.grad is None


def test_a_higher_upper_bound_lets_an_unlikely_token_rise_further() -> None:
    logprobs, proximal = at_ratio(1.25)
    symmetric = clipped_surrogate(logprobs, proximal, numbers(1.0), 0.2, 0.2)
    higher = clipped_surrogate(logprobs, proximal, numbers(1.0), 0.2, 0.28)
    torch.testing.assert_close(gradient(symmetric, logprobs), numbers(0.0), **TINY)
    torch.testing.assert_close(gradient(higher, logprobs), numbers(-1.25), **TINY)


def test_a_ratio_beyond_all_numbers_is_clipped_like_any_other() -> None:
    logprobs = torch.tensor([500.0, 500.0, 500.0, -500.0], requires_grad=True)  # exp(500) is infinite in float32
    advantage = torch.tensor([1.0, -2.0, 0.0, -1.0])
    found = clipped_surrogate(logprobs, torch.zeros(4), advantage, LOW, HIGH, dual_clip=3.0)
    torch.testing.assert_close(found.detach(), torch.tensor([-1.28, 6.0, 0.0, 0.8]))
    assert gradient(found, logprobs).tolist() == [0.0, 0.0, 0.0, 0.0]
    unbounded = clipped_surrogate(logprobs, torch.zeros(4), advantage, LOW, HIGH)
    torch.testing.assert_close(unbounded.detach(), torch.tensor([-1.28, INF, 0.0, 0.8]))
    assert gradient(unbounded, logprobs).tolist() == [0.0, INF, 0.0, 0.0]


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize(("new", "old"), [*itertools.product([NAN, INF, -INF], [-1.0]), (-1.0, NAN), (-1.0, -INF)])
def test_a_log_prob_that_is_no_number_is_never_clipped_into_one(
    new: float, old: float, advantage: float, dual_clip: float | None
) -> None:
    logprobs = numbers(-1.0, new, -2.0).requires_grad_()
    found = clipped_surrogate(logprobs, numbers(-1.0, old, -2.0), numbers(1.0, advantage, -1.0), LOW, HIGH, dual_clip)
    assert found.isnan().tolist() == [False, True, False]
    assert gradient(found, logprobs).isnan().tolist() == [False, True, False]


def test_an_advantage_that_is_no_number_is_seen_in_the_loss() -> None:
    logprobs, proximal = at_ratio(1.0, 1.0)
    assert clipped_surrogate(logprobs, proximal, numbers(NAN, 1.0), LOW, HIGH, 3.0).isnan().tolist() == [True, False]


def test_clipped_tokens_are_counted_by_side() -> None:
    # r:       0.5 and 0.79 are below 0.8, 1.29 and 2 above 1.28
    ratios = (0.5, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 2.0, 0.5, 2.0)
    signs = numbers(-1, 1, -2, -1, 1, 1, 1, 3, -1, 0, 0)
    logprobs, proximal = at_ratio(*ratios)
    low, high = clipped(logprobs, proximal, signs, LOW, HIGH)
    assert low.tolist() == [True, False, True] + [False] * 8
    assert high.tolist() == [False] * 6 + [True, True] + [False] * 3
    assert low.dtype == high.dtype == torch.bool


def test_a_token_right_on_the_bound_is_not_clipped_and_keeps_its_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        edge = torch.tensor([math.log1p(HIGH), math.log1p(-LOW)], dtype=dtype, requires_grad=True)
        advantage = torch.tensor([1.0, -1.0], dtype=dtype)
        low, high = clipped(edge, torch.zeros(2, dtype=dtype), advantage, LOW, HIGH)
        assert not (low | high).any()
        assert gradient(clipped_surrogate(edge, torch.zeros(2, dtype=dtype), advantage, LOW, HIGH), edge).all()


# ---------------------------------------------------------------------------------------------------------------- the KL


def test_the_kl_penalty_by_hand() -> None:
    logprobs = numbers(0.5, 0.25, 0.1).log().requires_grad_()
    found = kl_penalty(logprobs, numbers(0.25, 0.5, 0.1).log())
    # d = -ln 2: 1/2 + ln 2 - 1;  d = ln 2: 2 - ln 2 - 1;  d = 0
    torch.testing.assert_close(found.detach(), numbers(math.log(2) - 0.5, 1 - math.log(2), 0.0), **TINY)
    torch.testing.assert_close(gradient(found, logprobs), numbers(0.5, -1.0, 0.0), **TINY)  # 1 - exp(d)


def test_a_small_kl_keeps_its_digits_in_float32() -> None:
    # k3 = d^2 / 2 + d^3 / 6 + ...; at d = 1e-4 exp(d) - d - 1 is 0 or 1.2e-7 in float32, 24 times too much
    distance = torch.tensor([1e-4, -1e-4, 1e-3])
    wanted = [d * d / 2 + d**3 / 6 for d in distance.double().tolist()]
    assert kl_penalty(torch.zeros(3), distance).tolist() == pytest.approx(wanted, rel=2e-3)


@settings(deadline=None)
@given(st.lists(st.tuples(logs, logs), min_size=1, max_size=8))
def test_the_kl_penalty_is_never_below_0_and_has_its_derivative(rows: list[tuple[float, float]]) -> None:
    logprobs, reference = (numbers(*column) for column in zip(*rows, strict=True))
    logprobs.requires_grad_()
    found = kl_penalty(logprobs, reference)
    ahead = (reference - logprobs).detach()
    assert (found >= -1e-15 * ahead.abs()).all()
    torch.testing.assert_close(gradient(found, logprobs), 1 - ahead.exp(), rtol=1e-9, atol=1e-9)


def test_over_all_tokens_it_is_the_kl_and_its_gradient_that_of_the_kl_the_other_way() -> None:
    logits = numbers(0.3, -1.0, 0.7).requires_grad_()
    reference = numbers(1.0, 0.2, -0.4).log_softmax(0)
    logprobs = logits.log_softmax(0)
    chance = logprobs.exp().detach()
    found = (chance * kl_penalty(logprobs, reference)).sum()
    torch.testing.assert_close(found.detach(), (chance * (logprobs - reference)).sum().detach(), **TINY)
    backwards = (reference.exp() * (reference - logits.log_softmax(0))).sum()
    torch.testing.assert_close(gradient(found, logits), gradient(backwards, logits), **TINY)


@pytest.mark.parametrize(("new", "old"), [*itertools.product([NAN, INF, -INF], [-1.0]), (-1.0, NAN), (-1.0, -INF)])
def test_a_log_prob_that_is_no_number_is_seen_in_the_kl(new: float, old: float) -> None:
    logprobs = numbers(-1.0, new).requires_grad_()
    found = kl_penalty(logprobs, numbers(-1.0, old))
    assert found.isnan().tolist() == [False, True]
    assert gradient(found, logprobs).isnan().tolist() == [False, True]


# ------------------------------------------------------------------------------------------------ weights by importance

BEHAVIOUR = numbers(0.2, 0.4, 0.1).log()
PROXIMAL = numbers(0.3, 0.2, 0.4).log()  # 1.5, 0.5 and 4 times as likely


@pytest.mark.parametrize(
    ("level", "rows", "weights"),
    [
        ("none", [0, 0, 1], [1.0, 1.0, 1.0]),
        ("token", [0, 0, 1], [1.5, 0.5, 2.0]),  # 4 is capped
        ("sequence", [0, 0, 1], [0.75, 0.75, 2.0]),  # 1.5 * 0.5; 4 is capped
        ("sequence", [0, 1, 0], [2.0, 0.5, 2.0]),  # 1.5 * 4 is capped
        ("sequence", [1, 3, 3], [1.5, 2.0, 2.0]),  # rows 0 and 2 have no tokens; 0.5 * 4
        ("sequence", [0, 0, 0], [2.0, 2.0, 2.0]),  # 3, capped
    ],
)
def test_importance_weights_by_hand(level: str, rows: list[int], weights: list[float]) -> None:
    proximal = PROXIMAL.clone().requires_grad_()
    found = importance_weights(proximal, BEHAVIOUR, torch.tensor(rows), level, 2.0)
    torch.testing.assert_close(found, numbers(*weights), **TINY)
    assert not found.requires_grad


def test_a_higher_cap_lets_a_weight_stand() -> None:
    found = importance_weights(PROXIMAL, BEHAVIOUR, torch.tensor([0, 0, 0]), "sequence", 10.0)
    torch.testing.assert_close(found, numbers(3.0, 3.0, 3.0), **TINY)


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_of_no_tokens_there_are_no_weights(level: str) -> None:
    assert importance_weights(numbers(), numbers(), torch.zeros(0, dtype=torch.long), level, 2.0).shape == (0,)


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_policies_that_agree_weigh_everything_alike(level: str) -> None:
    for dtype in (torch.float32, torch.float64):
        same = BEHAVIOUR.to(dtype)
        found = importance_weights(same, same.clone(), torch.tensor([0, 1, 1]), level, 2.0)
        assert found.tolist() == [1.0, 1.0, 1.0]
        assert found.dtype == dtype


@settings(deadline=None)
@given(st.lists(st.tuples(logs, logs, st.integers(0, 4)), min_size=1, max_size=12), st.floats(1.0, 100.0))
def test_a_row_weighs_what_its_tokens_multiply_to_in_whatever_order_they_come(
    drawn: list[tuple[float, float, int]], cap: float
) -> None:
    proximal, behaviour = (numbers(*column) for column in list(zip(*drawn, strict=True))[:2])
    rows = torch.tensor([row for _, _, row in drawn])
    found = importance_weights(proximal, behaviour, rows, "sequence", cap)
    for at, row in enumerate(rows.tolist()):
        log_weight = math.fsum(new - old for new, old, other in drawn if other == row)
        assert found[at].item() == pytest.approx(math.exp(min(log_weight, math.log(cap))), rel=1e-9)
    alone = importance_weights(proximal, behaviour, torch.arange(len(drawn)), "sequence", cap)
    torch.testing.assert_close(alone, importance_weights(proximal, behaviour, rows, "token", cap), **TINY)


def test_the_order_of_adding_changes_no_bit_of_a_long_rows_weight() -> None:
    stream = torch.Generator().manual_seed(0)
    proximal, behaviour = (torch.randn(8192, generator=stream) * 0.1 for _ in range(2))
    rows = torch.arange(8192) % 4
    found = importance_weights(proximal, behaviour, rows, "sequence", 1e30)
    for seed in range(8):
        order = torch.randperm(8192, generator=torch.Generator().manual_seed(seed))
        again = importance_weights(proximal[order], behaviour[order], rows[order], "sequence", 1e30)
        assert torch.equal(again, found[order])


def test_without_a_cap_the_samplers_mean_becomes_the_trainers() -> None:
    sampler, trainer = numbers(0.5, 0.3, 0.2), numbers(0.2, 0.2, 0.6)
    value = numbers(1.0, -2.0, 5.0)
    pairs = list(itertools.product(range(3), repeat=2))  # every completion of two tokens, one row each
    drawn = torch.tensor(pairs).flatten()
    rows = torch.arange(len(pairs)).repeat_interleave(2)
    weights = importance_weights(trainer.log()[drawn], sampler.log()[drawn], rows, "sequence", 1e9)[::2]
    chances = torch.stack([sampler[a] * sampler[b] for a, b in pairs])
    worth = torch.stack([value[a] * value[b] for a, b in pairs])
    wanted = (trainer * value).sum() ** 2
    torch.testing.assert_close((chances * weights * worth).sum(), wanted, **TINY)


def test_a_weight_beyond_all_numbers_is_capped() -> None:
    proximal, behaviour, rows = torch.tensor([0.0, 0.0]), torch.tensor([-500.0, 500.0]), torch.tensor([0, 1])
    for level in ("token", "sequence"):
        assert importance_weights(proximal, behaviour, rows, level, 2.0).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("of", ["proximal", "behaviour"])
def test_a_log_prob_that_is_no_number_is_never_capped_into_one(of: str, bad: float) -> None:
    given = {"proximal": numbers(-1.0, -2.0, -3.0), "behaviour": numbers(-1.0, -2.0, -3.0)}
    given[of][1] = bad
    rows = torch.tensor([0, 1, 1])
    token = importance_weights(**given, rows=rows, level="token", cap=2.0)
    assert token.isnan().tolist() == [False, True, False]
    sequence = importance_weights(**given, rows=rows, level="sequence", cap=2.0)
    assert sequence.isnan().tolist() == [False, True, True]


def test_another_level_is_refused() -> None:
    with pytest.raises(ParamsError, match="unknown level 'tokens'"):
        importance_weights(PROXIMAL, BEHAVIOUR, torch.tensor([0, 0, 1]), "tokens", 2.0)


# -------------------------------------------------------------------------------------------------- what a token counts


@pytest.mark.parametrize(
    ("loss", "constant", "weights"),
    [
        ("token_mean", None, [1 / 10, 1 / 10, 0.0, 1 / 10]),  # 2 + 3 + 0 + 5 tokens
        ("sequence_mean", None, [1 / 8, 1 / 12, 0.0, 1 / 20]),  # 4 rows times 2, 3 and 5 tokens
        ("dr_grpo", 16, [1 / 64, 1 / 64, 0.0, 1 / 64]),  # 4 rows times 16
        ("dr_grpo", 2.5, [1 / 10, 1 / 10, 0.0, 1 / 10]),
    ],
)
def test_what_a_token_counts_by_hand(loss: str, constant: float | None, weights: list[float]) -> None:
    assert token_weights([2, 3, 0, 5], loss, constant) == weights


@pytest.mark.parametrize("loss", ["token_mean", "sequence_mean", "dr_grpo"])
def test_rows_without_tokens_count_nothing(loss: str) -> None:
    assert token_weights([], loss, 8) == []
    assert token_weights([0], loss, 8) == [0.0]
    assert token_weights([0, 0, 0], loss, 8) == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=64))
def test_the_weights_of_a_step_add_up_to_what_each_loss_promises(lengths: list[int]) -> None:
    def totals(loss: str, constant: float | None = None) -> list[float]:
        return [n * w for n, w in zip(lengths, token_weights(lengths, loss, constant), strict=True)]

    assert math.fsum(totals("token_mean")) == pytest.approx(1.0 if any(lengths) else 0.0)
    for length, total in zip(lengths, totals("sequence_mean"), strict=True):
        assert total == pytest.approx(1 / len(lengths) if length else 0.0)
    for length, total in zip(lengths, totals("dr_grpo", 4096), strict=True):
        assert total == pytest.approx(length / 4096 / len(lengths))


@pytest.mark.parametrize(
    ("loss", "constant", "said"),
    [
        ("dr_grpo", None, "dr_grpo divides by a constant above 0, not by None"),
        ("dr_grpo", 0, "not by 0"),
        ("dr_grpo", -8, "not by -8"),
        ("dr_grpo", NAN, "not by nan"),
        ("token_sum", 8, "unknown loss 'token_sum'"),
    ],
)
def test_a_loss_without_its_constant_or_that_is_none_is_refused(loss: str, constant: float, said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        token_weights([2, 3], loss, constant)


# ------------------------------------------------------------------------------------------------------------ TRL's own

LENGTHS = (5, 1, 0, 9, 7, 3)  # the third was cut off and is left out
LIMIT = 9
HELD = {"token_mean": ("dapo", "bnpo"), "sequence_mean": ("grpo",), "dr_grpo": ("dr_grpo",)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("dual_clip", [None, 1.3, 2.0])
@pytest.mark.parametrize("loss", list(HELD))
def test_the_loss_of_a_step_and_its_gradient_are_those_of_trl(
    loss: str, dual_clip: float | None, beta: float, weighted: bool
) -> None:
    stream = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    old, noise, far = (torch.randn(shape, generator=stream, dtype=torch.float64) for _ in range(3))
    old = -old.abs() - 0.1
    new = (old + 0.5 * noise).requires_grad_()
    reference = old + 0.3 * far
    advantage = torch.tensor([1.5, -0.5, 1.0, -1.5, 0.7, -2.0], dtype=torch.float64)
    rows = torch.arange(len(LENGTHS))[:, None].expand(shape)[mask]
    weights = importance_weights(old[mask], reference[mask], rows, "token" if weighted else "none", 1.5)

    spread = advantage[:, None].expand(shape)[mask]
    terms = weights * clipped_surrogate(new[mask], old[mask], spread, LOW, HIGH, dual_clip)
    terms = terms + beta * kl_penalty(new[mask], reference[mask])
    ours = (torch.tensor(token_weights(LENGTHS, loss, LIMIT), dtype=torch.float64)[rows] * terms).sum()
    low, high = clipped(new[mask], old[mask], spread, LOW, HIGH)
    assert low.any()  # or there would be nothing to compare
    assert high.any()

    padded = torch.ones(shape, dtype=torch.float64).masked_scatter(mask, weights)
    for loss_type in HELD[loss]:
        inputs = {
            "prompt_ids": torch.ones(len(LENGTHS), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
            "completion_ids": torch.ones(shape, dtype=torch.long),
            "completion_mask": mask.long(),
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "advantages": advantage,
            "num_items_in_batch": mask.sum(),
            "importance_sampling_ratio": padded,
        }
        theirs, metrics = trl_loss(new, inputs, loss_type=loss_type, delta=dual_clip, beta=beta, use_vllm=weighted)
        torch.testing.assert_close(ours, theirs, **TINY)
        torch.testing.assert_close(
            torch.autograd.grad(ours, new, retain_graph=True)[0], torch.autograd.grad(theirs, new)[0], **TINY
        )
        assert metrics["clip_ratio/low_mean"] == [pytest.approx(low.double().mean().item())]
        assert metrics["clip_ratio/high_mean"] == [pytest.approx(high.double().mean().item())]


def trl_loss(logprobs: Tensor, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's own `_compute_loss`, on these log-probs in place of a model's, and what it logs."""
    from trl import GRPOTrainer

    found: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=options.pop("delta"), use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        importance_sampling_level="token",
        epsilon_low=LOW,
        epsilon_high=HIGH,
        vllm_importance_sampling_correction=True,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=found,
        **options,
    )
    return GRPOTrainer._compute_loss(trainer, None, inputs), found["train"]
