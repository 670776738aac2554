"""Chunks of the projection against the whole of it under autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from papo.engines.training.projection import Projection

VOCABULARY, WIDTH, TOKENS = 70_000, 8, 23  # at 1 MiB of logits a chunk has 3 tokens


def world(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    return *(tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)), targets  # type: ignore[return-value]  # a star


def objective(logprobs: Any, entropies: Any, part: slice) -> Any:
    return (torch.arange(TOKENS)[part] - 9.0) * (logprobs.exp() + logprobs) + 0.3 * entropies.square()


def of_logprobs(logprobs: Any, entropies: Any, part: slice) -> Any:
    return (torch.arange(TOKENS)[part] - 9.0) * logprobs


def whole(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, loss: Any) -> tuple[Any, Any, Any]:
    every = ((hidden @ weight.T + (0.0 if bias is None else bias)) / temperature).log_softmax(-1)
    logprobs, entropies = every[range(TOKENS), targets], -(every.exp() * every).sum(-1)
    return loss(logprobs, entropies, slice(0, TOKENS)).sum(), logprobs, entropies


@pytest.mark.parametrize("loss", [objective, of_logprobs])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("logits_mb", [1, None])
def test_chunks_give_loss_and_gradients_of_the_whole(
    logits_mb: int | None, temperature: float, with_bias: bool, loss: Any
) -> None:
    hidden, weight, bias, targets = world()
    given = [hidden, weight, *([bias] if with_bias else [])]
    expected = whole(hidden, weight, bias if with_bias else None, targets, temperature, loss)
    wanted = torch.autograd.grad(2.5 * expected[0], given)
    small = [tensor.detach().float().requires_grad_() for tensor in given]
    projection = Projection(small[1], small[2] if with_bias else None, temperature, logits_mb)
    found = projection.loss(small[0], targets, loss)
    assert found.loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    torch.testing.assert_close(found.logprobs.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropies.double(), expected[2], rtol=1e-4, atol=1e-4)
    for got, want in zip(torch.autograd.grad(2.5 * found.loss, small), wanted, strict=True):
        # Autograd in float32 is as far off: 2.8e-5 of the gradient by states, which is a difference of larger numbers.
        assert ((got - want).norm() / want.norm()).item() < 5e-5
    torch.testing.assert_close(projection.logprobs(small[0], targets), found.logprobs, rtol=1e-6, atol=1e-6)


def test_a_projection_that_is_not_trained_gets_no_gradient_and_its_states_do() -> None:
    hidden, weight, _, targets = world(torch.float32)
    frozen = weight.detach()
    found = Projection(frozen, None, 1.0, 1).loss(hidden, targets, of_logprobs)
    found.loss.backward()
    (wanted,) = torch.autograd.grad(whole(hidden, weight, None, targets, 1.0, of_logprobs)[0], hidden)
    assert hidden.grad is not None
    assert ((hidden.grad - wanted).norm() / wanted.norm()).item() < 5e-5
    assert frozen.grad is None


def test_a_micro_batch_without_tokens_gives_a_gradient_of_zero() -> None:
    hidden, weight, _, targets = world(torch.float32)
    Projection(weight, None, 1.0, 1).loss(hidden[:0], targets[:0], of_logprobs).loss.backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_under_autocast_the_projection_is_in_bfloat16_and_log_probs_are_not() -> None:
    hidden, weight, _, targets = world(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = Projection(weight, None, 1.0, 1).loss(hidden, targets, of_logprobs)
    found.loss.backward()
    exact = Projection(weight, None, 1.0, 1).logprobs(hidden.detach(), targets)
    assert found.logprobs.dtype == torch.float32
    assert 1e-4 < (found.logprobs - exact).abs().max().item() < 0.2
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    wanted = torch.autograd.grad(whole(hidden, weight, None, targets, 1.0, of_logprobs)[0], weight)[0]
    assert ((weight.grad - wanted).norm() / wanted.norm()).item() < 0.05
