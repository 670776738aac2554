"""The terms of the policy loss, on the N completion tokens of a micro-batch, one after the other without padding.

Tensors are (N,) and floating, of one dtype and device. The loss of a step is the sum over its tokens of

    token_weights * (importance_weights * clipped_surrogate + coefficient * kl_penalty).

A log-prob that is NaN or infinite makes the term of its token NaN, its gradient included: clipping and capping would else turn it into
a number like any other. A finite log-ratio whose exponential overflows is clipped and capped as its size demands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from papo.errors import ParamsError


def clipped_surrogate(
    logprobs: Tensor,
    proximal: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped loss of each token (arXiv 1707.06347), with r = exp(logprobs - proximal):

        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    With `dual_clip` c, where A < 0: -max(that min, c A) (arXiv 1912.09729), which is TRL's delta for c >= 1 + clip_high.
    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476).

    Args:
        logprobs: of the policy in training; the only ones with a gradient.
        proximal: of the policy that the ratio is against.
        clip_low: 0 < clip_low < 1.
        clip_high: > 0.
        dual_clip: > 1.
    """
    # The same as clipping r, min and max written out by the sign of A; in logs, so that no clipped token has a gradient 0 * inf.
    log_ratio = _log_ratio(logprobs, proximal)
    raised = log_ratio.clamp(max=math.log1p(clip_high))
    lowered = log_ratio.clamp(math.log1p(-clip_low), None if dual_clip is None else math.log(dual_clip))
    loss = -advantages * torch.where(advantages < 0, lowered, raised).exp()
    return loss + log_ratio * _nan_or_zero(log_ratio)  # clamp gives a NaN no gradient


def clipped(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Tokens whose gradient clipping takes away: (r < 1 - clip_low and A < 0, r > 1 + clip_high and A > 0), both (N,) bool.

    Their shares are TRL's clip_ratio/low_mean and high_mean. What `dual_clip` holds back is in neither.
    """
    log_ratio = logprobs - proximal
    low = (log_ratio < math.log1p(-clip_low)) & (advantages < 0)
    high = (log_ratio > math.log1p(clip_high)) & (advantages > 0)
    return low, high


def kl_penalty(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3 of each token, an unbiased estimate of KL(policy || reference) in nats that is never below 0 (joschu.net/blog/kl-approx.html):

        k3 = exp(d) - d - 1,  d = reference - logprobs

    Its gradient is (1 - exp(d)) grad logprobs. For tokens that the policy itself sampled, the mean of that is the gradient of
    KL(reference || policy), not of KL(policy || reference); both pull towards the reference.
    """
    ahead = _log_ratio(reference, logprobs)
    return torch.expm1(ahead) - ahead  # exp(d) - d - 1 loses all digits for a small d in float32


def importance_weights(proximal: Tensor, behaviour: Tensor, rows: Tensor, level: str, cap: float) -> Tensor:
    """Truncated weights of the trainer's policy against the sampler's, without gradient; d = proximal - behaviour:

        token: min(exp(d), cap)    sequence: min(exp(sum of d over the row), cap), for each of its tokens    none: 1

    As TRL's token_truncate and sequence_truncate.

    Args:
        rows: (N,) long, the number of the row that a token belongs to; need not be in order.

    Raises:
        ParamsError: another level.
    """
    log_weights = _log_ratio(proximal.detach(), behaviour.detach())
    if level == "none":
        return torch.ones_like(log_weights)
    if level == "sequence":
        count = int(rows.max()) + 1 if rows.numel() else 0
        # float64, as a GPU adds in any order, which no bit of the rounded sum should show.
        sums = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add_(0, rows, log_weights.double())
        log_weights = sums[rows].to(log_weights.dtype)
    elif level != "token":
        raise ParamsError(f"unknown level {level!r}", where="importance", fix="Choose one of none, token, sequence.")
    return log_weights.exp().clamp(max=cap)


def token_weights(lengths: Sequence[int], loss: str, constant: float | None = None) -> list[float]:
    """What each token of a row counts in the loss of a step with rows of these lengths.

        token_mean     1 / sum of lengths          DAPO, arXiv 2503.14476
        sequence_mean  1 / (rows * length)         GRPO, arXiv 2402.03300
        dr_grpo        1 / (rows * constant)       arXiv 2503.20783

    A row of length 0 is one of the rows, and its weight is 0.

    Args:
        constant: dr_grpo: the tokens that a row is taken to have, > 0, such as the limit on new tokens.

    Raises:
        ParamsError: another loss, or dr_grpo without its constant.
    """
    if loss == "token_mean":
        counts = [sum(lengths)] * len(lengths)
    elif loss == "sequence_mean":
        counts = [len(lengths) * length for length in lengths]
    elif loss == "dr_grpo" and constant is not None and constant > 0:
        return [1.0 / (len(lengths) * constant) if length else 0.0 for length in lengths]
    elif loss == "dr_grpo":
        raise ParamsError(f"dr_grpo divides by a constant above 0, not by {constant}", where="loss")
    else:
        raise ParamsError(
            f"unknown loss {loss!r}", where="loss", fix="Choose one of token_mean, sequence_mean, dr_grpo."
        )
    return [1.0 / count if length else 0.0 for length, count in zip(lengths, counts, strict=True)]


def _log_ratio(of: Tensor, against: Tensor) -> Tensor:
    """of - against; NaN where either is not finite."""
    difference = of - against
    return difference + _nan_or_zero(difference)


def _nan_or_zero(values: Tensor) -> Tensor:
    """NaN where a value is not finite, else 0; without gradient."""
    return (values - values).detach()
