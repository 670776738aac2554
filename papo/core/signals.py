"""Signals of a training round: whether the reward still teaches, and whether the judge is being gamed.

A signal without data (no correct response, no judge asked, nothing to correlate) is left out rather than reported as
NaN or 0, so that a plot shows a gap there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.advantages import Advantages, component_weights, compute_advantages, count_inversions, lam_max
from papo.core.groups import (
    BoolArray,
    FloatArray,
    IndexArray,
    as_outcomes,
    as_penalties,
    as_scores,
    group_index,
    group_normalise,
)
from papo.errors import DataError

FAILURES = ("timeout", "refused", "unparsable", "too_long", "rate_limited", "error")
STATUSES = ("ok", "not_asked", *FAILURES)

_EQUAL = 1e-9  # a standard deviation at or below this is rounding

_Signals = dict[str, float]


class _Round(NamedTuple):
    """The checked arrays of a round, one value per response; `group` numbers their prompts."""

    orm: FloatArray
    prm: FloatArray
    group: IndexArray
    groups: int
    lengths: FloatArray
    correct: BoolArray
    wrong: BoolArray
    judged_correct: BoolArray


def round_signals(
    *,
    orm_scores: npt.ArrayLike,
    prm_scores: npt.ArrayLike,
    group_ids: Iterable[Any],
    advantages: Advantages,
    completion_lengths: npt.ArrayLike,
    truncated: npt.ArrayLike,
    prm_statuses: Sequence[str],
    verification: npt.ArrayLike | None = None,
    variant: str = "papo",
    lam: float = 1.0,
    eps: float = 1e-6,
    penalties: npt.ArrayLike | None = None,
    unpenalised: npt.ArrayLike | None = None,
) -> dict[str, float]:
    """Every signal of one round of N responses in P groups, as finite floats under flat names.

    "Correct" is an outcome of 1 and "wrong" one of 0, whatever the penalties; a missing outcome is neither. Shares are of all N
    responses unless the name or this table says otherwise.

        responses, groups, lam                  counts, and the weight in use
        accuracy, outcome_missing_share         mean outcome of those known; share of unknown outcomes
        zero_advantage_share                    total advantage exactly 0, and its three parts, which sum to it:
          .._all_correct, .._all_wrong, .._other   in groups whose known outcomes are all 1, all 0, mixed or all unknown
        groups_two_correct_share                share of groups with two or more correct responses
        groups_process_active_share             share of groups where A_proc (Eq. 4) is not all 0
        advantage_{mean,min}_{correct,wrong}    of the total advantage
        negative_correct_share                  share of correct responses with a total below 0
        outcome_alignment                       in groups with correct and wrong responses, how much more advantage correct
                                                ones get on average, over how much more A_out without penalties gives them: 1
                                                in `orm` and `papo` without penalties, 0 where the reward does not care,
                                                negative where it prefers wrong ones
        inversions                              correct responses that do not outrank a wrong one of their group
        outcome_advantage_share, process_..     share of sum |A| that comes from each weighted component
        lam_max, lam_max_exceeded               `papo` only: bound for the largest group without penalties (if finite); 0 or 1
        prm_mean, prm_mean_correct              of the process scores present
        prm_correct_0, _half, _1                share of judged correct responses below 0.25, below 0.75, the rest
        judge_failure_share, .._<status>        of the responses that the judge was asked about
        length_mean, length_p95, length_max     completion tokens
        truncated_share
        overlong_share, overlong_penalty_mean   with `penalties` only: share of responses that have one; mean over all
        length_prm_correlation                  Pearson, among judged correct responses, both centred on their group
        verification_share, .._correct          flagged responses: of all, and of the correct

    Args:
        orm_scores, prm_scores, group_ids, variant, lam, eps: as given to `compute_advantages`.
        advantages: what it returned.
        completion_lengths: (N,) tokens.
        truncated: (N,) whether a response was cut off at the length limit.
        prm_statuses: (N,) each one of STATUSES.
        verification: (N,) flags such as `verification_flags` gives, or None to leave their signals out.
        penalties: as given to `compute_advantages`.
        unpenalised: (N,) the `outcome` that it gives without penalties; needed with `penalties`.

    Raises:
        DataError: lengths differ, an unknown status, or malformed scores; penalties without `unpenalised`.
    """
    ids = group_ids if isinstance(group_ids, np.ndarray) else list(group_ids)
    orm = as_outcomes(orm_scores, "orm_scores")
    size = orm.size
    prm = as_scores(prm_scores, "prm_scores", length=size)
    index, groups = group_index(ids, length=size)
    lengths = as_scores(completion_lengths, "completion_lengths", length=size, missing_ok=False)
    correct = orm == 1.0
    data = _Round(orm, prm, index, groups, lengths, correct, orm == 0.0, correct & ~np.isnan(prm))
    parts = Advantages(*(as_scores(a, "advantages", length=size, missing_ok=False) for a in advantages))

    signals = {"responses": float(size), "groups": float(groups), "lam": float(lam)}
    signals |= _mean("accuracy", orm[~np.isnan(orm)]) | _mean("outcome_missing_share", np.isnan(orm))
    signals |= _zero_advantages(data, parts.total) | _process_activity(data, eps) | _advantages(data, parts.total)
    if penalties is not None:
        penalty = as_penalties(penalties, length=size)
        signals |= _mean("overlong_share", penalty < 0.0) | _mean("overlong_penalty_mean", penalty)
    signals |= _outcome_alignment(data, parts.total, _unpenalised(parts, penalties, unpenalised))
    signals |= _component_shares(parts, component_weights(variant, lam))
    signals["inversions"] = float(count_inversions(parts.total, orm, index))
    if variant == "papo":
        signals |= _rank_bound(data, lam)
    signals |= _process_scores(data) | _judge_failures(prm_statuses, size) | _lengths(data)
    signals |= _mean("truncated_share", _flags(truncated, "truncated", size))
    if verification is not None:
        flags = _flags(verification, "verification", size)
        signals |= _mean("verification_share", flags) | _mean("verification_share_correct", flags[correct])
    return signals


# "check" alone is too common a noun (a bank check, checkers), so that it needs a self-addressed frame around it.
_WORDS = re.compile(
    r"""\b(?:
        (?:double|cross|sanity)[-\s]?check\w* | re-?check\w*
      | verif(?:y|ies|ied|ying|ication)
      | (?:let(?:'|\N{RIGHT SINGLE QUOTATION MARK})?s|let\s+(?:us|me)|to|we|i|i'll|we'll|will|should|can|must|now)
            \s+(?:now\s+|also\s+|quickly\s+)? check
      | check(?:ing)? \s+ (?:that|whether|if|our|my|the|this|these|by|each|again)\b
      | (?:substitut|plug)\w* (?:\s+[^\s.;]+){0,6}? \s+ (?:back|in\s+again)
      | (?:substitut|plug)\w* (?:\s+[^\s.;]+){0,6}? \s+ into \s+ the \s+ original
    )\b | ^[^\w\n]*check(?:ing)?\s*: """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
# Repeats are bounded, so that a degenerate response of 30,000 digits costs linear time.
_EQUATION = re.compile(
    r"(?<![\d.])\d[\d.,]{0,15}(?:[ ]?[-+*/^\u00b7\u00d7\u00f7][ ]?\d[\d.,]{0,15}){1,8}[ ]?=[ ]?-?\d[\d.,]{0,15}"
)
_CHECK_MARK = re.compile("[\N{CHECK MARK}\N{HEAVY CHECK MARK}\N{WHITE HEAVY CHECK MARK}]|\\\\checkmark")


def verification_flags(texts: Iterable[str]) -> BoolArray:
    """Which responses contain a step of self-verification; one boolean per text.

    A text is flagged when it holds at least one of:
        1. a phrase of checking: verify, verification, double-check, cross-check, sanity check, recheck, "let us check",
           "check that / whether / if / our ...", "Check:" opening a line, "substitute / plug ... back", or the same
           "... into the original";
        2. a check mark;
        3. the same arithmetic equation between numbers, such as `3 * 4 = 12`, stated twice (spaces ignored).

    It looks at words, not at whether the check is right, and knows English only. Compare rates between policies under
    this one detector; do not compare them with those of another.
    """
    return np.array([_verifies(text) for text in texts], dtype=np.bool_)


def _verifies(text: str) -> bool:
    if _WORDS.search(text) or _CHECK_MARK.search(text):
        return True
    equations = [found.replace(" ", "").rstrip(".,") for found in _EQUATION.findall(text)]
    return len(set(equations)) < len(equations)


def _zero_advantages(data: _Round, total: FloatArray) -> _Signals:
    some_correct = np.bincount(data.group[data.correct], minlength=data.groups) > 0
    some_wrong = np.bincount(data.group[data.wrong], minlength=data.groups) > 0
    zero = total == 0.0
    all_correct, all_wrong = (some_correct & ~some_wrong)[data.group], (some_wrong & ~some_correct)[data.group]
    return (
        _mean("zero_advantage_share", zero)
        | _mean("zero_advantage_share_all_correct", zero & all_correct)
        | _mean("zero_advantage_share_all_wrong", zero & all_wrong)
        | _mean("zero_advantage_share_other", zero & ~all_correct & ~all_wrong)
    )


def _process_activity(data: _Round, eps: float) -> _Signals:
    """Counted from the scores, so that it says the same for every variant: also what `orm` leaves unused."""
    process = compute_advantages(data.orm, data.prm, data.group, variant="papo", eps=eps).process
    active = np.bincount(data.group[process != 0.0], minlength=data.groups) > 0
    two_correct = np.bincount(data.group[data.correct], minlength=data.groups) >= 2
    return _mean("groups_two_correct_share", two_correct) | _mean("groups_process_active_share", active)


def _advantages(data: _Round, total: FloatArray) -> _Signals:
    signals: _Signals = {}
    for name, rows in (("correct", data.correct), ("wrong", data.wrong)):
        signals |= _mean(f"advantage_mean_{name}", total[rows])
        if rows.any():
            signals[f"advantage_min_{name}"] = float(total[rows].min())
    return signals | _mean("negative_correct_share", total[data.correct] < 0.0)


def _unpenalised(parts: Advantages, penalties: npt.ArrayLike | None, given: npt.ArrayLike | None) -> FloatArray:
    """A_out without penalties."""
    if given is not None:
        return as_scores(given, "unpenalised", length=parts.outcome.size, missing_ok=False)
    if penalties is not None:
        raise DataError(
            "penalties without the outcome advantages that there would be without them",
            where="unpenalised",
            fix="Give the `outcome` of compute_advantages without penalties.",
        )
    return parts.outcome


def _outcome_alignment(data: _Round, total: FloatArray, outcome: FloatArray) -> _Signals:
    right, wrong = (np.bincount(data.group[rows], minlength=data.groups) for rows in (data.correct, data.wrong))
    mixed = (right > 0) & (wrong > 0)

    def lead(values: FloatArray) -> float:
        """Mean of the correct less that of the wrong, summed over the mixed groups."""
        means = [
            np.bincount(data.group[rows], values[rows], minlength=data.groups)[mixed] / count[mixed]
            for rows, count in ((data.correct, right), (data.wrong, wrong))
        ]
        return float(np.sum(means[0] - means[1]))

    given = lead(outcome)
    return {"outcome_alignment": lead(total) / given} if given > 0.0 else {}


def _component_shares(parts: Advantages, weights: tuple[float, float]) -> _Signals:
    outcome, process = weights[0] * np.abs(parts.outcome).sum(), weights[1] * np.abs(parts.process).sum()
    if outcome + process == 0.0:
        return {}
    share = float(outcome / (outcome + process))
    return {"outcome_advantage_share": share, "process_advantage_share": 1.0 - share}


def _rank_bound(data: _Round, lam: float) -> _Signals:
    bound = lam_max(int(np.bincount(data.group).max())) if data.groups else math.inf
    exceeded = {"lam_max_exceeded": float(lam >= bound)}
    return exceeded if math.isinf(bound) else exceeded | {"lam_max": bound}


def _process_scores(data: _Round) -> _Signals:
    correct = data.prm[data.judged_correct]
    return (
        _mean("prm_mean", data.prm[~np.isnan(data.prm)])
        | _mean("prm_mean_correct", correct)
        | _mean("prm_correct_0", correct < 0.25)
        | _mean("prm_correct_half", (correct >= 0.25) & (correct < 0.75))
        | _mean("prm_correct_1", correct >= 0.75)
    )


def _judge_failures(statuses: Sequence[str], size: int) -> _Signals:
    found = np.asarray(statuses, dtype=np.str_)
    if found.shape != (size,):
        raise DataError(f"prm_statuses has shape {found.shape} for {size} responses", where="prm_statuses")
    unknown = sorted(set(found.tolist()) - set(STATUSES))
    if unknown:
        raise DataError(
            f"unknown status {unknown[0]!r}", where="prm_statuses", fix=f"Use one of {', '.join(STATUSES)}."
        )
    asked = found[found != "not_asked"]
    signals = _mean("judge_failure_share", asked != "ok")
    for status in FAILURES:
        signals |= _mean(f"judge_failure_share_{status}", asked == status)
    return signals


def _lengths(data: _Round) -> _Signals:
    if not data.lengths.size:
        return {}
    signals = {"length_p95": float(np.percentile(data.lengths, 95)), "length_max": float(data.lengths.max())}
    signals |= _mean("length_mean", data.lengths)
    length, prm = (
        group_normalise(values, data.judged_correct, data.group, data.groups, scale="mean_only", eps=_EQUAL)
        for values in (data.lengths, data.prm)
    )
    spread = math.sqrt(float(np.sum(length * length)) * float(np.sum(prm * prm)))
    if spread > 0.0:
        signals["length_prm_correlation"] = float(np.sum(length * prm)) / spread
    return signals


def _flags(values: npt.ArrayLike, name: str, size: int) -> BoolArray:
    flags: BoolArray = as_outcomes(as_scores(values, name, missing_ok=False), name, length=size) == 1.0
    return flags


def _mean(name: str, values: npt.NDArray[Any]) -> _Signals:
    """The mean under its name, or nothing where there is nothing to average."""
    return {name: float(values.mean())} if values.size else {}
