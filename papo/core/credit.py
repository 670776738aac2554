r"""Credit by token where a judge names the wrong steps (CAPO, arXiv 2508.02298).

For token t of response i with outcome reward r_out[i] in {0, 1}, and debit[i, t] in [0, 1], the vote that the step which holds the
token is wrong:

    R[i, t] = w_whole * r_out[i] - w_proc * debit[i, t]
    A[i, t] = (R[i, t] - mean(R)) / (std(R) + eps)        over all tokens of the group's responses

A long response weighs more in the mean than a short one. As w_proc <= w_whole, no token of a correct response is worth less than
one of a wrong response.

A penalty p[i] <= 0 on the outcome, such as one for length (`papo.core.overlong`), counts in every token of the response: r_out[i] + p[i]
takes the place of r_out[i]. The order above then holds for penalties of up to 1 - w_proc / w_whole.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.advantages import SCALES
from papo.core.groups import (
    LARGEST,
    FloatArray,
    IndexArray,
    as_outcomes,
    as_penalties,
    as_scores,
    group_index,
    group_normalise,
)
from papo.errors import DataError, ParamsError

VOTES = ("intersection", "majority", "union", "average")

ROUNDING = 1e-12
"""Size up to which an advantage is a rounding error and 0: a token that takes the mean debit of the others is worth their mean."""

# `\\` and `\$` are read as a whole, so that neither the bracket of `\\[2pt]` nor the dollars of `\$$` open anything.
# Repeats are bounded or tied to the start of a line, so that a degenerate response costs linear time.
_MARK = re.compile(r"\\[\\$\[\]]|\\(?:begin|end)\{[^{}\s]{1,40}\}|\$\$|^[ \t]*```", re.MULTILINE)


class Span(NamedTuple):
    """The characters `start` to `end` of a text, `end` not among them."""

    start: int
    end: int


class TokenAdvantages(NamedTuple):
    """Float64 arrays. `tokens` has one array a response; the others are means over its tokens: total = outcome + process."""

    outcome: FloatArray
    process: FloatArray
    total: FloatArray
    tokens: list[FloatArray]


def split_steps(text: str) -> list[Span]:
    r"""The steps of a response: its paragraphs if it has any, else its lines.

    A step begins with the first line after a blank line (of white space only). Where no step would begin so, every line that is not
    blank begins one. No step begins inside

        a fence, from a line that starts with ``` to the next such line
        $$ to the next $$,  \[ to the next \],  \begin{name} to its \end{name}

    of which the one that opens first counts, and what stands in it opens nothing. What is never closed protects nothing.

    The steps tile the text: line ends, blank lines and trailing white space belong to the step before them, leading white space of
    the text to the first step. An empty text has no step, white space alone is one. Lines end with \n; a \r before it is white space.
    """
    if not text:
        return []
    protected = _protected(text)
    lines, paragraphs = [], []
    begun = blank = False
    position = 0
    for line in text.split("\n"):
        if not line.strip():
            blank = True
        else:
            if begun and not _inside(position, protected):
                lines.append(position)
                if blank:
                    paragraphs.append(position)
            begun, blank = True, False
        position += len(line) + 1
    return [Span(*pair) for pair in pairwise([0, *(paragraphs or lines), len(text)])]


def token_steps(starts: npt.ArrayLike, steps: Sequence[Span]) -> IndexArray:
    """The step, numbered from 0, that holds the first character of each token.

    Args:
        starts: (T,) the character of the text at which each token starts.
        steps: as `split_steps` gives them.

    Returns:
        (T,) numbers; -1 for a token that starts at or after the end of the text, as one without any text (end of sequence) does.

    Raises:
        DataError: a start is negative or no whole number; the steps do not tile a text.
    """
    positions = as_scores(starts, "starts", missing_ok=False)
    _refuse(
        (positions < 0.0) | (positions != np.floor(positions)), positions, "starts", "a whole number from 0 is needed"
    )
    if any(one.end != other.start or other.end <= other.start for one, other in pairwise([Span(0, 0), *steps])):
        raise DataError("the steps do not tile the text", where="steps", fix="Give them as split_steps does.")
    numbers: IndexArray = np.searchsorted([step.end for step in steps], positions, side="right").astype(np.intp)
    numbers[numbers == len(steps)] = -1
    return numbers


def combine_votes(critiques: npt.ArrayLike, vote: str = "majority") -> FloatArray:
    """One value in [0, 1] a step of what k critiques say of it.

        intersection   1 where all call it wrong
        majority       1 where at least k / 2 do
        union          1 where any does
        average        the share that does

    Args:
        critiques: (k, n) of 0 and 1, k >= 1; 1 where the critique calls the step wrong.
        vote: one of VOTES.

    Returns:
        (n,) values.

    Raises:
        DataError: not two-dimensional, no critique, or a value that is neither 0 nor 1.
        ParamsError: an unknown vote.
    """
    if vote not in VOTES:
        raise ParamsError(f"unknown vote {vote!r}", where="vote", fix=f"Choose one of {', '.join(VOTES)}.")
    wrong = _critiques(critiques)
    share: FloatArray = wrong.mean(axis=0)
    if vote == "average":
        return share
    least = {"intersection": len(wrong), "majority": len(wrong) / 2, "union": 1}[vote]
    combined: FloatArray = (wrong.sum(axis=0) >= least).astype(np.float64)
    return combined


def token_advantages(
    orm_scores: npt.ArrayLike,
    debits: Sequence[npt.ArrayLike | None],
    lengths: npt.ArrayLike,
    group_ids: Iterable[Any],
    *,
    w_whole: float = 2.0,
    w_proc: float = 1.0,
    scale: str = "std",
    eps: float = 1e-6,
    penalties: npt.ArrayLike | None = None,
) -> TokenAdvantages:
    """One advantage a token of N responses, and their means by response.

    `total` is the mean of A over the tokens of the response, `outcome` the same with w_proc = 0, `process` what remains.

    Degenerate cases:
        All tokens of a group worth the same (std <= eps): exactly 0.
        Missing outcome: the response leaves the statistics and all its tokens are 0.
        No critique: a wrong response has no debit, as nobody asks about it. Each token of a correct one takes the mean debit of the
            group's correct responses that have a critique, over their tokens (0 if none has one): it is neither praised nor
            blamed. In a group of correct responses its advantage is 0, and it never falls below, but for a penalty of its own.
        A response without tokens: its three values are 0.

    Args:
        orm_scores: (N,) outcome rewards 0 or 1; NaN or None means missing.
        debits: N arrays with one value in [0, 1] a token, 0 where it is in no wrong step; None where there is no critique.
        lengths: (N,) tokens of each response.
        group_ids: (N,) ids of the prompts, in any order; groups may differ in size.
        w_whole: weight of the outcome, above 0.
        w_proc: weight of a debit, from 0 to w_whole: a correct response whose every step is wrong is still no worse than a wrong one.
        scale: `std`, or `mean_only`, which centres and does not divide.
        eps: added to the std, and the std at or below which A is 0.
        penalties: (N,) finite numbers, 0 or below, on the outcomes; None for none. Which debits count stays by the outcome.

    Raises:
        DataError: numbers of responses or tokens differ, a debit is outside [0, 1], an outcome is not binary, an id is missing, a penalty
            is missing or above 0.
        ParamsError: an impossible weight, eps or scale.
    """
    _check_settings(w_whole, w_proc, scale, eps)
    orm = as_outcomes(orm_scores, "orm_scores")
    sizes = _lengths(lengths, orm.size)
    index, groups = group_index(group_ids, length=orm.size)

    row = np.repeat(np.arange(orm.size), sizes)
    group, outcome = index[row], orm[row]
    debit = _filled(_flat(debits, sizes, row), outcome == 1.0, group, groups)
    known = ~np.isnan(outcome)
    reward = w_whole * (outcome + as_penalties(penalties, length=orm.size)[row])

    def normalised(values: FloatArray) -> FloatArray:
        values = group_normalise(values, known, group, groups, scale=scale, eps=eps)
        return np.where(np.abs(values) <= ROUNDING, 0.0, values)

    def means(values: FloatArray) -> FloatArray:
        return np.bincount(row, values, minlength=orm.size) / np.maximum(sizes, 1)

    tokens = normalised(reward - w_proc * debit)
    whole, total = means(normalised(reward)), means(tokens)
    return TokenAdvantages(whole, total - whole, total, np.split(tokens, np.cumsum(sizes))[:-1])


def _protected(text: str) -> list[Span]:
    """The spans in which no step begins, in order and apart from each other."""
    marks = list(_MARK.finditer(text))
    spans: list[Span] = []
    for number, close in _pairs([mark[0].strip() for mark in marks]):
        start = marks[number].start()
        if not spans or start >= spans[-1].end:
            spans.append(Span(start, marks[close].end()))
    return spans


def _inside(position: int, spans: Sequence[Span]) -> bool:
    before = bisect_left(spans, position, key=lambda span: span.start) - 1
    return before >= 0 and position < spans[before].end


def _pairs(marks: Sequence[str]) -> list[tuple[int, int]]:
    """The numbers of (opener, closer) of every mark that is closed, in order of the openers.

    A fence or a pair of dollars may be either: each is taken to open, and to close the one before it. Environments nest.
    """
    found: list[tuple[int, int]] = []
    following: dict[str, int] = {}
    nested: dict[str, list[int]] = {}
    for number in reversed(range(len(marks))):
        mark = marks[number]
        if mark.startswith("\\end{"):
            nested.setdefault(mark.removeprefix("\\end"), []).append(number)
        elif mark.startswith("\\begin{"):
            if ends := nested.get(mark.removeprefix("\\begin")):
                found.append((number, ends.pop()))
        elif mark == "\\[":
            if "\\]" in following:
                found.append((number, following["\\]"]))
        elif mark in ("$$", "```") and mark in following:
            found.append((number, following[mark]))
        following[mark] = number
    return found[::-1]


def _critiques(values: npt.ArrayLike) -> FloatArray:
    """(k, n) checked critiques."""
    try:
        critiques: FloatArray = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"critiques are not all numbers, one a step: {error}", where="critiques") from error
    if critiques.ndim != 2 or not len(critiques):
        raise DataError(
            f"critiques have the shape {critiques.shape} and need (k, n) with k >= 1",
            where="critiques",
            fix="Give one row a critique; a response without any has no votes to combine.",
        )
    for row, critique in enumerate(critiques):
        _refuse((critique != 0.0) & (critique != 1.0), critique, f"critiques[{row}]", "a step is wrong (1) or not (0)")
    return critiques


def _lengths(values: npt.ArrayLike, responses: int) -> IndexArray:
    lengths = as_scores(values, "lengths", length=responses, missing_ok=False)
    _refuse((lengths < 0.0) | (lengths != np.floor(lengths)), lengths, "lengths", "a number of tokens is needed")
    return lengths.astype(np.intp)


def _flat(debits: Sequence[npt.ArrayLike | None], lengths: IndexArray, row: IndexArray) -> FloatArray:
    """The debits of all tokens, one response after the other; NaN where there is no critique."""
    if len(debits) != lengths.size:
        raise DataError(f"debits has {len(debits)} entries for {lengths.size} responses", where="debits")
    parts = [np.empty(0)]
    for number, (debit, length) in enumerate(zip(debits, lengths.tolist(), strict=True)):
        name = f"debits[{number}]"
        part = np.full(length, np.nan) if debit is None else as_scores(debit, name, missing_ok=False)
        if part.size != length:
            raise DataError(f"{name} has {part.size} values for {length} tokens", where=name, fix="Give one a token.")
        parts.append(part)
    flat = np.concatenate(parts)
    outside = (flat < 0.0) | (flat > 1.0)
    if outside.any():
        token = int(np.argmax(outside))
        raise DataError(
            f"debits[{row[token]}] holds {flat[token]}: a debit is from 0 to 1", where=f"debits[{row[token]}]"
        )
    return flat


def _filled(debit: FloatArray, correct: npt.NDArray[np.bool_], group: IndexArray, groups: int) -> FloatArray:
    """The debits, with those of the tokens without a critique (NaN) filled in: see `token_advantages`."""
    critiqued = ~np.isnan(debit)
    told = critiqued & correct
    sums = np.bincount(group[told], debit[told], minlength=groups)
    mean = sums / np.maximum(np.bincount(group[told], minlength=groups), 1)
    return np.where(critiqued, debit, np.where(correct, mean[group], 0.0))


def _check_settings(w_whole: float, w_proc: float, scale: str, eps: float) -> None:
    if not 0.0 < w_whole <= LARGEST:
        raise ParamsError(f"w_whole is {w_whole} and must be a positive number", where="w_whole")
    if not 0.0 <= w_proc <= w_whole:
        raise ParamsError(
            f"w_proc is {w_proc} and must be from 0 to w_whole, which is {w_whole}",
            where="w_proc",
            fix="Above it, a correct response with wrong steps would fall below a wrong one.",
        )
    if scale not in SCALES:
        raise ParamsError(f"unknown scale {scale!r}", where="scale", fix=f"Choose one of {', '.join(SCALES)}.")
    if not 0.0 < eps < math.inf:
        raise ParamsError(f"eps is {eps} and must be a positive number", where="eps")


def _refuse(bad: npt.NDArray[np.bool_], values: FloatArray, name: str, rule: str) -> None:
    if bad.any():
        place = int(np.argmax(bad))
        raise DataError(f"{name}[{place}] is {values[place]}: {rule}", where=name)
