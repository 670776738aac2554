"""advantage: the decoupled advantages of a round, and the signals that say how training is going."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from papo.core.advantages import Advantages, compute_advantages, process_needed
from papo.core.credit import TokenAdvantages, split_steps, token_advantages, token_steps
from papo.core.groups import FloatArray
from papo.core.overlong import overlong_penalties
from papo.core.signals import round_signals, verification_flags
from papo.engines.protocols import Aligner
from papo.errors import DataError, ParamsError
from papo.params import AdvantageParams
from papo.schemas import ADVANTAGES, OK, ORM, PRM, ROLLOUTS
from papo.stages.rows import check_aligned
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_columns, write_rows

CODE = (
    "stages/advantage.py",
    "stages/rows.py",
    "core/advantages.py",
    "core/credit.py",
    "core/groups.py",
    "core/overlong.py",
    "core/signals.py",
    "engines/tokenizer.py",
)
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """`tokenizer`: the policy's, by which `capo` finds the tokens of a step; no other variant needs it."""

    round: int
    rollouts: Path
    orm: Path
    prm: Path
    tokenizer: Path | None = None


def run(
    params: AdvantageParams, inputs: Inputs, out: Path, *, engine: Aligner | None = None, context: Context = Context()
) -> Manifest:
    """Writes one advantage a response to `out`, in `capo` also one a token; the manifest's metrics are the round's signals.

    Raises:
        DataError: the scores are not those of the rollouts; in `capo`, the critiques are not those of the completions' steps.
        ParamsError: `capo` without an engine.
    """
    task = Task("advantage", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    rollouts = read_columns(
        inputs.rollouts, ROLLOUTS, "problem_id", "sample_index", "completion", "completion_ids", "finish_reason",
        "max_new_tokens", "logprob_difference_mean", "logprob_difference_max",
    )  # fmt: skip
    orm = read_columns(inputs.orm, ORM, "problem_id", "sample_index", "orm_score")
    prm = read_columns(inputs.prm, PRM, "problem_id", "sample_index", "prm_score", "status", "wrong_steps")
    check_aligned(rollouts, orm, inputs.orm)
    check_aligned(rollouts, prm, inputs.prm)
    groups = [row["problem_id"] for row in rollouts]
    outcomes, process = _scores(orm, "orm_score"), _scores(prm, "prm_score")
    advantages, tokens = compute(params, rollouts, orm, prm, inputs.prm, engine)
    rows = [
        {
            "round": inputs.round,
            "problem_id": row["problem_id"],
            "sample_index": row["sample_index"],
            "outcome_advantage": a_out,
            "process_advantage": a_proc,
            "advantage": total,
            "token_advantages": values,
        }
        for row, a_out, a_proc, total, values in zip(
            rollouts, *(part.tolist() for part in advantages), tokens, strict=True
        )
    ]
    write_rows(out, ADVANTAGES, rows)
    signals = round_signals(
        orm_scores=outcomes,
        prm_scores=process,
        group_ids=groups,
        advantages=advantages,
        completion_lengths=np.array([len(row["completion_ids"]) for row in rollouts]),
        truncated=np.array([row["finish_reason"] == "length" for row in rollouts]),
        prm_statuses=[row["status"] for row in prm],
        verification=verification_flags([row["completion"] for row in rollouts]),
        variant=params.variant,
        lam=params.lam,
        eps=params.eps,
        penalties=penalties_of(params, rollouts),
        unpenalised=_unpenalised(params, rollouts, outcomes),
    )
    signals |= logprob_differences(rollouts)
    return task.finish(rows=len(rows), metrics=signals, versions=engine.versions() if engine else None)


def compute(
    params: AdvantageParams, rollouts: Rows, orm: Rows, prm: Rows, path: Path, engine: Aligner | None
) -> tuple[Advantages, Sequence[list[float] | None]]:
    """The advantages by response, in `capo` also by token, from the rows of three tables in one order; `path` is that of `prm`.

    Raises:
        DataError, ParamsError: as `run`.
    """
    if params.variant == "capo":
        by_token = by_tokens(params, rollouts, orm, prm, path, engine)
        return Advantages(*by_token[:3]), [values.tolist() for values in by_token.tokens]
    advantages = compute_advantages(
        _scores(orm, "orm_score"), _scores(prm, "prm_score"), [row["problem_id"] for row in rollouts],
        variant=params.variant, lam=params.lam, scale=params.scale, eps=params.eps, guard=params.guard,
        penalties=penalties_of(params, rollouts),
    )  # fmt: skip
    return advantages, [None] * len(rollouts)


def by_tokens(
    params: AdvantageParams, rollouts: Rows, orm: Rows, prm: Rows, path: Path, engine: Aligner | None
) -> TokenAdvantages:
    """The advantages of `capo` from the rows of three tables; `path` is that of `prm`.

    Raises:
        DataError, ParamsError: as `run`.
    """
    outcomes, ids = _scores(orm, "orm_score"), [row["problem_id"] for row in rollouts]
    # Critiques that another variant asked for, of wrong responses for instance, do not make this one's result another.
    debits = zip(_debits(rollouts, prm, path, engine), process_needed("capo", outcomes, ids), strict=True)
    return token_advantages(
        outcomes,
        [debit if needed else None for debit, needed in debits],
        np.array([len(row["completion_ids"]) for row in rollouts]),
        ids,
        w_whole=params.w_whole,
        w_proc=params.w_proc,
        scale=params.scale,
        eps=params.eps,
        penalties=penalties_of(params, rollouts),
    )


def penalties_of(params: AdvantageParams, rollouts: Rows) -> FloatArray | None:
    """(N,) penalties for length, by the limit that each response was sampled under; None without `overlong`.

    Raises:
        ParamsError: the buffer is not below that limit.
    """
    if params.overlong is None:
        return None
    lengths = [len(row["completion_ids"]) for row in rollouts]
    limits = [row["max_new_tokens"] for row in rollouts]
    return overlong_penalties(lengths, limits, params.overlong.buffer, params.overlong.factor)


def logprob_differences(rollouts: Rows) -> dict[str, float]:
    """Mean and largest difference between the sampler's log-probs and the trainer's, of the responses where both are known."""
    found = {}
    for name, of in (("logprob_difference_mean", np.mean), ("logprob_difference_max", np.max)):
        if values := [row[name] for row in rollouts if row[name] is not None]:
            found[name] = float(of(values))
    return found


def _unpenalised(params: AdvantageParams, rollouts: Rows, outcomes: FloatArray) -> FloatArray | None:
    """The outcome advantages without `overlong`; None where there is none."""
    if params.overlong is None:
        return None
    ids, without = [row["problem_id"] for row in rollouts], np.full(outcomes.size, np.nan)
    if params.variant != "capo":
        return compute_advantages(outcomes, without, ids, variant="orm", scale=params.scale, eps=params.eps).outcome
    return token_advantages(
        outcomes, [None] * outcomes.size, [len(row["completion_ids"]) for row in rollouts], ids,
        w_whole=params.w_whole, w_proc=0.0, scale=params.scale, eps=params.eps,
    ).outcome  # fmt: skip


def _debits(rollouts: Rows, prm: Rows, path: Path, engine: Aligner | None) -> list[FloatArray | None]:
    """For each response one debit a token, None where there is no critique. `path` is that of the table `prm`."""
    if engine is None:
        raise ParamsError("capo needs to know where tokens stand", where="advantage.variant", fix="hand in an Aligner")
    votes = [row["wrong_steps"] if row["status"] == OK else None for row in prm]
    if any(row["status"] == OK for row in prm) and all(vote is None for vote in votes):
        raise DataError(
            "the judge names no wrong steps, so that capo has nothing to debit",
            where=str(path),
            fix="choose a score_prm.judge that names them, or another advantage.variant",
        )
    return [
        None if vote is None else _debit(row, vote, f"{path}, row {number}", engine)
        for number, (row, vote) in enumerate(zip(rollouts, votes, strict=True))
    ]


def _debit(row: dict[str, Any], vote: list[float], where: str, engine: Aligner) -> FloatArray:
    """(T,) the vote on the step that each token is in; 0 for a token without text."""
    steps = split_steps(row["completion"])
    if len(vote) != len(steps):
        raise DataError(
            f"wrong_steps has {len(vote)} values for a completion of {len(steps)} steps",
            where=where,
            fix="run score_prm of this round again",
        )
    numbers = token_steps(engine.starts(row["completion_ids"], row["completion"]), steps)
    # A token in no step has the number -1, which is the 0 at the end.
    return np.array([*vote, 0.0])[numbers]


def _scores(rows: Rows, column: str) -> FloatArray:
    return np.array([np.nan if row[column] is None else row[column] for row in rows], dtype=np.float64)
