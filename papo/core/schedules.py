"""What changes from step to step of training: the learning rate, and the coefficient of the KL penalty."""

from __future__ import annotations

import math

from papo.errors import ParamsError


def rate_factor(kind: str, done: float, *, warmup_rounds: float, rounds: int | None, floor: float) -> float:
    """What the learning rate is multiplied by in the step at whose end `done` rounds are done, a float: round + step / steps.

    Over the warm-up it is done / warmup_rounds, above 0 in the first step already. After it, with p = the share of the rounds that
    remained then that is done, at most 1:

        constant  1        linear  1 - (1 - floor) p        cosine  floor + (1 - floor) (1 + cos(pi p)) / 2

    The step that ends at `rounds` is at the floor, and so is every later one.

    Raises:
        ParamsError: another kind, or one that falls and has no rounds after its warm-up.
    """
    if done < warmup_rounds:
        return done / warmup_rounds
    if kind == "constant":
        return 1.0
    if rounds is None or rounds <= warmup_rounds:
        raise ParamsError(f"{kind} needs more than {warmup_rounds:g} rounds, not {rounds}", where="schedule.rounds")
    share = min(1.0, (done - warmup_rounds) / (rounds - warmup_rounds))
    if kind == "linear":
        return 1.0 - (1.0 - floor) * share
    if kind == "cosine":
        return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * share)) / 2.0
    raise ParamsError(f"unknown kind {kind!r}", where="schedule.kind", fix="Choose one of constant, linear, cosine.")


def adapted_coefficient(coefficient: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """The coefficient of the KL penalty after so many responses of this mean KL (Ziegler et al., arXiv 1909.08593, section 2.2):

        coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * min(responses / horizon, 1))

    so at most a fifth up or down. The paper has no min; without it, a horizon below a fifth of the responses could turn the sign.
    A KL that is NaN gives NaN.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)  # in this order a NaN stays one
    return coefficient * (1.0 + error * min(responses / horizon, 1.0))
