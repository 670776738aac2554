"""Process-aware advantages: each reward is normalised only where its values compare (arXiv 2603.26535, Eq. 3-5).

For a prompt with G responses, outcome reward r_out in {0, 1}, process reward r_proc and C = {i : r_out[i] = 1}:

    A_out[i]  = (r_out[i] - mean(r_out)) / (std(r_out) + eps)           over the group                        Eq. 3
    A_proc[i] = (r_proc[i] - mean_C(r_proc)) / (std_C(r_proc) + eps)    if i in C and |C| >= 2, else 0        Eq. 4
    A[i]      = A_out[i] + lam * A_proc[i]                                                                    Eq. 5

The ablations of the paper and its peers differ only in which process scores enter Eq. 4 and in the two weights of
Eq. 5, so that they are one function here.

A penalty on the reward, such as one for length (`papo.core.overlong`), is added to r_out in Eq. 3 and never moves C, which stays by the
outcome alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.groups import (
    LARGEST,
    BoolArray,
    FloatArray,
    IndexArray,
    as_outcomes,
    as_penalties,
    as_scores,
    extreme,
    group_index,
    group_normalise,
)
from papo.errors import ParamsError

VARIANTS = ("orm", "prm", "mult", "fullnorm", "papo", "gdpo", "convex")
SCALES = ("std", "mean_only")
GUARDS = ("none", "rank")

RANK_MARGIN = 1e-3
"""Share of the gap between right and wrong that `guard="rank"` keeps free: the order then survives float32 storage."""

GUARDED_PENALTY = 0.9
"""The most that a penalty may be under `guard="rank"`: a penalised correct response is then still worth more than any wrong one."""

ONE_REWARD = ("prm", "mult")
"""Variants with one reward, which a penalty is added to."""


class Advantages(NamedTuple):
    """Float64 arrays with one value per response, in the order given. `outcome` and `process` are before weighting."""

    outcome: FloatArray
    process: FloatArray
    total: FloatArray


def compute_advantages(
    orm_scores: npt.ArrayLike,
    prm_scores: npt.ArrayLike,
    group_ids: Iterable[Any],
    *,
    variant: str = "papo",
    lam: float = 1.0,
    scale: str = "std",
    eps: float = 1e-6,
    guard: str = "none",
    penalties: npt.ArrayLike | None = None,
) -> Advantages:
    """Turn the scores of N responses into advantages (arXiv 2603.26535, Eq. 3-5).

    `outcome` is A_out for every variant. N(x | S) is the normalisation of Eq. 3 of x over the responses S of the group,
    0 outside S:

        variant   process                                   total
        orm       0                                         outcome
        prm       N(r_proc | all)                           process
        mult      N(r_out * r_proc | all)                   process
        fullnorm  N(r_out * r_proc | all)                   outcome + lam * process
        papo      N(r_proc | correct)                       outcome + lam * process
        gdpo      N(r_proc | all)                           (outcome + lam * process) / (its std over the batch + eps)
        convex    N(r_proc | correct)                       lam * outcome + (1 - lam) * process

    Standard deviations are unbiased (ddof = 1).

    With `penalties` p, `outcome` is N(r_out + p | all) in every variant, and the one reward of `prm` and `mult` has p added:
    N(r_proc + p | all) and N(r_out * r_proc + p | all). No other process part, no set of responses and nothing that is missing
    changes. Where all outcomes of a group are equal, differences of p alone are normalised, however small, unless scale is `mean_only`.
    `lam_max` is no bound then, as a penalty narrows the gap between right and wrong.

    Degenerate cases:
        Fewer than two scores, or a std <= eps: N is exactly 0.0, also for equal scores such as 2/3 whose mean rounds.
        Missing outcome: the response leaves every statistic and its three values are 0.
        Missing process score: the response leaves the process statistics and its process part is 0, so that its total
        is A_out (0 in `prm` and `mult`). In `mult` and `fullnorm` a wrong response counts as 0 whatever the judge said.

    Args:
        orm_scores: (N,) outcome rewards 0 or 1; NaN or None means missing (verifier timeout, unparsable gold).
        prm_scores: (N,) process rewards, any finite float; NaN or None means missing (judge not asked, or failed).
        group_ids: (N,) ids of the prompts, ints or strings, in any order; groups may differ in size.
        variant: one of VARIANTS.
        lam: weight of the process part, >= 0; in `convex` the weight of the outcome part, within [0, 1]. Unused by
            `orm`, `prm` and `mult`.
        scale: `std`, or `mean_only` (Dr.GRPO, arXiv 2503.20783), which centres and does not divide. The whitening of
            `gdpo` always divides.
        eps: added to each std, and the std at or below which a component is 0. Keep it well below 1 / sqrt(G).
        guard: `none`, or `rank`: in a group where a correct response would come within RANK_MARGIN of the gap between
            correct and wrong A_out of a wrong one, or fall below it, the process part of the whole group is multiplied
            by the largest factor that keeps this distance. Every correct response then strictly outranks every wrong
            one, for any lam and G, and whatever the penalties, which may not be more than GUARDED_PENALTY. Other groups are
            left as they are.
        penalties: (N,) finite numbers, 0 or below, such as `overlong_penalties` gives; None for none.

    Raises:
        DataError: lengths differ, a score is infinite, an outcome is not binary, an id is missing, a penalty is missing or above 0.
        ParamsError: an unknown or impossible setting; `guard="rank"` where the outcome has no weight to rank by, or a penalty is too
            large for it.
    """
    weights = _checked_weights(variant, lam, scale, eps, guard)
    orm = as_outcomes(orm_scores, "orm_scores")
    prm = as_scores(prm_scores, "prm_scores", length=orm.size)
    index, groups = group_index(group_ids, length=orm.size)

    penalty = as_penalties(penalties, length=orm.size)
    if guard == "rank":
        _check_guarded(penalty)

    known, correct = ~np.isnan(orm), orm == 1.0
    outcome = group_normalise(orm + penalty, known, index, groups, scale=scale, eps=eps)
    scores, population = _process_scores(variant, prm, known, correct)
    if variant in ONE_REWARD:
        scores = scores + penalty
    process = group_normalise(scores, population, index, groups, scale=scale, eps=eps)
    if guard == "rank":
        process *= _rank_factor(outcome, process, correct, known & ~correct, index, groups, weights)[index]
    total = weights[0] * outcome + weights[1] * process
    if variant == "gdpo":
        total = _whiten(total, int(known.sum()), eps)
    return Advantages(outcome, process, total)


def process_needed(variant: str, orm_scores: npt.ArrayLike, group_ids: Iterable[Any]) -> BoolArray:
    """(N,) responses whose process score the variant uses: the only ones that a judge has to be asked about.

        orm                 none
        papo, convex, capo  correct ones in groups with at least two
        mult, fullnorm      correct ones
        prm, gdpo           all

    Raises:
        DataError, ParamsError: as in `compute_advantages`.
    """
    if variant not in (*VARIANTS, "capo"):
        raise ParamsError(
            f"unknown variant {variant!r}", where="variant", fix=f"Choose one of {', '.join(VARIANTS)}, capo."
        )
    orm = as_outcomes(orm_scores, "orm_scores")
    index, groups = group_index(group_ids, length=orm.size)
    needed: BoolArray = orm == 1.0
    if variant in ("papo", "convex", "capo"):
        needed &= (np.bincount(index[needed], minlength=groups) >= 2)[index]
    elif variant not in ("mult", "fullnorm"):
        needed[:] = variant != "orm"
    return needed


def component_weights(variant: str, lam: float) -> tuple[float, float]:
    """Weights (of `outcome`, of `process`) in the total of a variant; for `gdpo` those before its whitening."""
    fixed = {
        "orm": (1.0, 0.0),
        "prm": (0.0, 1.0),
        "mult": (0.0, 1.0),
        "convex": (lam, 1.0 - lam),
        "capo": (1.0, 1.0),
    }
    return fixed.get(variant, (1.0, lam))


def lam_max(group_size: int) -> float:
    """Bound below which `papo` ranks every correct response above every wrong one, whatever the judge says.

    With k of G correct, the gap in A_out is 1 / std = sqrt(G (G-1) / (k (G-k))) and the lowest possible A_proc is
    -(k-1) / sqrt(k), reached by one low score among equal ones. The order holds for all k exactly when

        lam^2 < G (G-1) / ((G-k) (k-1)^2)    for 2 <= k <= G-1,

    that is lam < lam_max: 1.732 for G = 4, 1.058 for G = 8, 0.691 for G = 16. The bound is tight up to eps.

    Args:
        group_size: G, the number of responses to a prompt. For G <= 2 no such k exists and the bound is infinite.

    Raises:
        ParamsError: G < 1.
    """
    size = operator.index(group_size)
    if size < 1:
        raise ParamsError(f"group_size is {size}; a group has at least one response", where="lam_max")
    if size <= 2:
        return math.inf
    # (G-1-x) x^2 with x = k-1 rises up to x = 2(G-1)/3 and falls after it: its integer maximum is at a neighbour.
    peak = 2 * (size - 1) // 3
    worst = max((size - 1 - x) * x * x for x in (peak, peak + 1))
    return math.sqrt(size * (size - 1) / worst)


def count_inversions(total: npt.ArrayLike, correct: npt.ArrayLike, group_ids: Iterable[Any]) -> int:
    """Count the correct responses that do not strictly outrank every wrong response of their group.

    Args:
        total: (N,) advantages.
        correct: (N,) booleans or outcome scores 0 and 1; a missing one (NaN) is neither correct nor wrong.
        group_ids: (N,) ids of the prompts.

    Raises:
        DataError: as in `compute_advantages`.
    """
    outcomes = as_outcomes(correct, "correct")
    advantages = as_scores(total, "total", length=outcomes.size, missing_ok=False)
    index, groups = group_index(group_ids, length=outcomes.size)
    best_wrong = extreme(np.maximum, -np.inf, advantages, outcomes == 0.0, index, groups)
    return int(np.count_nonzero((outcomes == 1.0) & (advantages <= best_wrong[index])))


def _process_scores(
    variant: str, prm: FloatArray, known: BoolArray, correct: BoolArray
) -> tuple[FloatArray, BoolArray]:
    """The process scores of a variant, and the mask of the responses that they are normalised over."""
    judged = ~np.isnan(prm)
    if variant in ("mult", "fullnorm"):
        return np.where(correct, prm, 0.0), known & (judged | ~correct)
    if variant == "orm":
        return prm, np.zeros_like(known)
    return prm, judged & (correct if variant in ("papo", "convex") else known)


def _rank_factor(
    outcome: FloatArray,
    process: FloatArray,
    correct: BoolArray,
    wrong: BoolArray,
    index: IndexArray,
    groups: int,
    weights: tuple[float, float],
) -> FloatArray:
    """(P,) factors <= 1 on the process part, so that the worst correct total stays above the best wrong one."""

    def lead(values: FloatArray) -> FloatArray:
        lowest_correct = extreme(np.minimum, np.inf, values, correct, index, groups)
        return lowest_correct - extreme(np.maximum, -np.inf, values, wrong, index, groups)

    # A group without correct or without wrong responses leads by infinity, and is never bounded.
    room = weights[0] * (1.0 - RANK_MARGIN) * lead(outcome)
    loss = weights[1] * np.maximum(-lead(process), 0.0)
    return np.divide(room, loss, out=np.ones(groups), where=loss > room)


def _whiten(total: FloatArray, count: int, eps: float) -> FloatArray:
    """Divide by the std over the `count` responses with a known outcome (the others are 0).

    The batch mean is 0 by construction, as each part sums to 0 over its group. Subtracting its rounding error would
    only turn the exact zeros of the dead groups into noise.
    """
    # np.sum and not a dot product, whose bits would depend on the number of BLAS threads.
    std = math.sqrt(float(np.sum(total * total)) / (count - 1)) if count > 1 else 0.0
    return total / (std + eps) if std > eps else np.zeros_like(total)


def _check_guarded(penalty: FloatArray) -> None:
    worst = float(penalty.min(initial=0.0))
    if worst < -GUARDED_PENALTY:
        raise ParamsError(
            f"guard 'rank' keeps the order with penalties of at most {GUARDED_PENALTY:g}, and one is {-worst:g}",
            where="guard",
            fix="Use smaller penalties, such as a lower overlong factor, or guard 'none'.",
        )


def _checked_weights(variant: str, lam: float, scale: str, eps: float, guard: str) -> tuple[float, float]:
    if variant == "capo":
        raise ParamsError(
            "variant 'capo' gives one advantage a token, not one a response",
            where="variant",
            fix="Use papo.core.credit.token_advantages, which takes the wrong steps by token.",
        )
    for name, value, allowed in (("variant", variant, VARIANTS), ("scale", scale, SCALES), ("guard", guard, GUARDS)):
        if value not in allowed:
            raise ParamsError(f"unknown {name} {value!r}", where=name, fix=f"Choose one of {', '.join(allowed)}.")
    highest = 1.0 if variant == "convex" else LARGEST
    if not 0.0 <= lam <= highest:
        raise ParamsError(f"lam is {lam}; {variant} needs 0 <= lam <= {highest:g}", where="lam")
    if not 0.0 < eps < math.inf:
        raise ParamsError(f"eps is {eps} and must be a positive number", where="eps")
    weights = component_weights(variant, lam)
    if guard == "rank" and weights[0] == 0.0:
        raise ParamsError(
            f"guard 'rank' needs an outcome part to rank by, and {variant} with lam = {lam:g} gives it no weight",
            where="guard",
            fix="Use guard 'none', or a variant with an outcome part (papo, fullnorm, gdpo, convex with lam > 0).",
        )
    return weights
