"""The responses of one round, for the page: how advantages spread, length against score, and some groups in full."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from papo.core.advantages import compute_advantages, process_needed
from papo.core.credit import split_steps
from papo.core.groups import BoolArray, FloatArray, IndexArray
from papo.engines.reporting.plots import LIGHT, Plot, axes_of, legend
from papo.schemas import ADVANTAGES, ORM, PRM, ROLLOUTS
from papo.store.tables import codes, lengths, numbers, read_parts, read_table, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAID = ("orm", "prm", "mult", "fullnorm", "papo")
"""Variants whose advantages the gallery shows beside the stored ones."""
MOST_RESPONSES = 8
MOST_CHARS = 1500
MOST_DOTS = 2000


@dataclass(frozen=True)
class Shown:
    """A response of the gallery. `steps`: text and whether the judge calls it wrong, None where it did not say; `paid` by variant, NaN
    where that one asks for a score that is not there."""

    sample: int
    correct: bool | None
    score: float | None
    status: str
    reason: str
    tokens: int
    steps: list[tuple[str, bool | None]]
    outcome: float
    process: float
    advantage: float
    paid: dict[str, float]


@dataclass(frozen=True)
class Group:
    """The responses to one problem, at most MOST_RESPONSES of them, and why it is shown."""

    problem_id: str
    prompt: str
    why: str
    responses: list[Shown]
    left_out: int


@dataclass(frozen=True)
class Responses:
    """One value a response of a round; `gallery` has some groups in full."""

    round: int
    outcomes: FloatArray
    scores: FloatArray
    advantages: FloatArray
    tokens: FloatArray
    gallery: list[Group] = field(default_factory=list)


def read_responses(
    round_: int, tables: Mapping[str, Path], *, groups: int, lam: float, scale: str, eps: float
) -> Responses:
    """Reads the tables of a round, by the names of papo.engines.reporting.TABLES.

    Args:
        groups: how many are shown in full.
        lam, scale, eps: as the advantages were computed, and the variants beside them are.

    Raises:
        DataError, DamagedError: a table is not what was written.
    """
    orm = read_table(tables["orm"], ORM, "problem_id", "orm_score")
    prm = read_table(tables["prm"], PRM, "prm_score", "status")
    made = read_table(tables["advantages"], ADVANTAGES, "outcome_advantage", "process_advantage", "advantage")
    index, names = codes(orm, "problem_id")
    outcomes, scores = numbers(orm, "orm_score"), numbers(prm, "prm_score")
    parts = [numbers(made, name) for name in ("outcome_advantage", "process_advantage", "advantage")]
    counted = [lengths(part, "completion_ids") for part in read_parts(tables["rollouts"], ROLLOUTS, "completion_ids")]
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *counted]).astype(np.float64)
    paid = {name: _paid(name, outcomes, scores, index, lam=lam, scale=scale, eps=eps) for name in PAID}
    chosen = choose(index, outcomes, scores, parts[1], parts[2], groups)
    gallery = _gallery(tables, chosen, index, names, outcomes, scores, parts, tokens, paid)
    return Responses(round_, outcomes, scores, parts[2], tokens, gallery)


def _paid(variant: str, outcomes: FloatArray, scores: FloatArray, index: IndexArray, **settings: Any) -> FloatArray:
    """(N,) advantages by a variant from the same scores; NaN in groups where it asks for a score that is not there."""
    total = compute_advantages(outcomes, scores, index, variant=variant, **settings).total
    lacking = process_needed(variant, outcomes, index) & np.isnan(scores)
    total[np.isin(index, index[lacking])] = np.nan
    return total


def choose(
    index: IndexArray, outcomes: FloatArray, scores: FloatArray, process: FloatArray, total: FloatArray, groups: int
) -> list[tuple[int, str]]:
    """(group, why) of those that say most: one of each kind, then further ones by how much their process part moves.

    The kinds: the judge tells correct responses apart; a correct response is pushed down; all are right; all are wrong; a wrong response
    has a better score than a correct one.
    """
    correct, wrong = outcomes == 1.0, outcomes == 0.0
    count = int(index.max(initial=-1)) + 1
    rights, wrongs, sizes = (
        np.bincount(index, mask, minlength=count) for mask in (correct, wrong, np.ones(index.size))
    )
    moved = np.bincount(index, np.abs(process), minlength=count)
    best_wrong, least_right = np.full(count, -np.inf), np.full(count, np.inf)
    known = ~np.isnan(scores)
    np.maximum.at(best_wrong, index[wrong & known], scores[wrong & known])
    np.minimum.at(least_right, index[correct & known], scores[correct & known])
    down = np.bincount(index, correct & (total < 0.0), minlength=count) > 0
    kinds: list[tuple[str, BoolArray]] = [
        ("the judge tells its correct responses apart", (moved > 0) & (wrongs > 0) & ~down),
        ("a correct response is pushed down", down),
        ("a wrong response has a better score than a correct one", best_wrong > least_right),
        ("all are right, and the outcome teaches nothing", rights == sizes),
        ("all are wrong", wrongs == sizes),
    ]
    found: list[tuple[int, str]] = []
    order = np.argsort(-moved, kind="stable")
    while len(found) < groups:
        before = len(found)
        for why, mask in kinds:
            taken = {at for at, _ in found}
            fitting = [at for at in order.tolist() if mask[at] and at not in taken]
            if fitting and len(found) < groups:
                found.append((fitting[0], why))
        if len(found) == before:
            break
    return found


def _gallery(
    tables: Mapping[str, Path], chosen: Sequence[tuple[int, str]], index: IndexArray, names: Sequence[str], outcomes: FloatArray,
    scores: FloatArray, parts: Sequence[FloatArray], tokens: FloatArray, paid: Mapping[str, FloatArray],
) -> list[Group]:  # fmt: skip
    rows_of = {at: np.flatnonzero(index == at).tolist() for at, _ in chosen}
    wanted = {row for rows in rows_of.values() for row in rows[:MOST_RESPONSES]}
    texts = _rows(tables["rollouts"], ROLLOUTS, wanted, "sample_index", "prompt", "completion")
    judged = _rows(tables["prm"], PRM, wanted, "status", "reason", "wrong_steps")
    groups = []
    for at, why in chosen:
        rows = rows_of[at]
        shown = [
            Shown(
                sample=texts[row]["sample_index"],
                correct=None if np.isnan(outcomes[row]) else bool(outcomes[row] == 1.0),
                score=None if np.isnan(scores[row]) else float(scores[row]),
                status=judged[row]["status"],
                reason=judged[row]["reason"] if judged[row]["status"] != "not_asked" else "",
                tokens=int(tokens[row]),
                steps=_steps(texts[row]["completion"], judged[row]["wrong_steps"]),
                outcome=float(parts[0][row]),
                process=float(parts[1][row]),
                advantage=float(parts[2][row]),
                paid={name: float(values[row]) for name, values in paid.items()},
            )
            for row in rows[:MOST_RESPONSES]
        ]
        prompt = texts[rows[0]]["prompt"][:MOST_CHARS]
        groups.append(Group(names[at], prompt, why, shown, max(len(rows) - MOST_RESPONSES, 0)))
    return groups


def _steps(completion: str, wrong: Sequence[float] | None) -> list[tuple[str, bool | None]]:
    pieces = [completion[span.start : span.end] for span in split_steps(completion)]
    marks: list[bool | None] = [None] * len(pieces)
    if wrong is not None and len(wrong) == len(pieces):
        marks = [vote >= 0.5 for vote in wrong]
    left, found = MOST_CHARS, list[tuple[str, bool | None]]()
    for piece, mark in zip(pieces, marks, strict=True):
        if left <= 0:
            found.append(("…", None))
            break
        found.append((piece[:left], mark))
        left -= len(piece)
    return found


def _rows(path: Path, table: Any, wanted: set[int], *columns: str) -> dict[int, dict[str, Any]]:
    """The rows with these numbers; a part of the table is in memory at a time."""
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    start = 0
    for part in read_parts(path, table, *columns):
        here = sorted(row - start for row in wanted if start <= row < start + len(part))
        taken = part.take(pa.array(here, pa.int64()))  # also where no row of this part is wanted
        for name in columns:
            for row, value in zip(here, values(taken, name), strict=True):
                found[start + row][name] = value
        start += len(part)
    return found


# ---- plots ----


def _histogram(figure: Figure, shown: Responses) -> bool:
    known = ~np.isnan(shown.outcomes)
    if not known.any():
        return False
    axes = axes_of(figure, percent=False, xlabel="advantage")
    axes.locator_params(axis="x", integer=False)
    reach = max(float(np.abs(shown.advantages).max(initial=0.0)), 0.5)
    edges = np.linspace(-reach, reach, 42)
    kinds = (("wrong", shown.outcomes == 0.0, "hard"), ("correct", shown.outcomes == 1.0, "easy"))
    base = np.zeros(edges.size - 1)
    for label, mask, colour in kinds:
        counts, _ = np.histogram(shown.advantages[mask], edges)
        if mask.any():
            axes.stairs(
                base + counts,
                edges,
                baseline=base,
                fill=True,
                color=LIGHT[colour],
                alpha=0.85,
                label=label,
                linewidth=0,
            )
        base = base + counts
    axes.axvline(0.0, color=LIGHT["muted"], linewidth=0.8)
    legend(figure, axes)
    return True


def _length_score(figure: Figure, shown: Responses) -> bool:
    known = np.flatnonzero(~np.isnan(shown.scores))
    if not known.size:
        return False
    axes = axes_of(figure, percent=False, xlabel="tokens")
    figure.subplots_adjust(left=0.14)
    axes.set_ylabel("judge's score")
    rng = np.random.default_rng(0)
    known = np.sort(rng.permutation(known)[:MOST_DOTS])
    spread = rng.uniform(-0.02, 0.02, known.size)  # equal scores would lie on one another
    for label, value, colour, marker in (("wrong", 0.0, "hard", "x"), ("correct", 1.0, "easy", "o")):
        mask = shown.outcomes[known] == value
        if mask.any():
            axes.plot(
                shown.tokens[known][mask], (shown.scores[known] + spread)[mask], marker, color=LIGHT[colour], label=label, alpha=0.5,
                markersize=3.5,
            )  # fmt: skip
    axes.margins(x=0.05, y=0.08)
    legend(figure, axes)
    return True


RESPONSE_PLOTS = (
    Plot(
        "advantages", "Advantages of the last round",
        "Correct responses left of zero are pushed down: right, and worse reasoned than their group.",
        _histogram, "No response has an outcome.", png=True,
    ),
    Plot(
        "length_score", "Length against the judge's score, last round",
        "A score that rises with length among correct responses teaches length.",
        _length_score, "The judge was asked nothing in this round.", png=True,
    ),
)  # fmt: skip
