"""advantage: the decoupled advantages of a round, and the signals that say how training is going."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from papo.core.advantages import compute_advantages
from papo.core.signals import round_signals, verification_flags
from papo.params import AdvantageParams
from papo.schemas import ADVANTAGES, ORM, PRM, ROLLOUTS
from papo.stages.rows import check_aligned
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_columns, write_rows

CODE = ("stages/advantage.py", "stages/rows.py", "core/advantages.py", "core/groups.py", "core/signals.py")


@dataclass(frozen=True)
class Inputs:
    round: int
    rollouts: Path
    orm: Path
    prm: Path


def run(
    params: AdvantageParams, inputs: Inputs, out: Path, *, engine: None = None, context: Context = Context()
) -> Manifest:
    """Writes one advantage a response to `out`; the manifest's metrics are the round's signals."""
    task = Task("advantage", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    rollouts = read_columns(
        inputs.rollouts, ROLLOUTS, "problem_id", "sample_index", "completion", "completion_ids", "finish_reason"
    )
    orm = read_columns(inputs.orm, ORM, "problem_id", "sample_index", "orm_score")
    prm = read_columns(inputs.prm, PRM, "problem_id", "sample_index", "prm_score", "status")
    check_aligned(rollouts, orm, inputs.orm)
    check_aligned(rollouts, prm, inputs.prm)
    groups = [row["problem_id"] for row in rollouts]
    outcomes, process = _scores(orm, "orm_score"), _scores(prm, "prm_score")
    advantages = compute_advantages(
        outcomes, process, groups,
        variant=params.variant, lam=params.lam, scale=params.scale, eps=params.eps, guard=params.guard,
    )  # fmt: skip
    rows = [
        {
            "round": inputs.round,
            "problem_id": row["problem_id"],
            "sample_index": row["sample_index"],
            "outcome_advantage": a_out,
            "process_advantage": a_proc,
            "advantage": total,
            "token_advantages": None,
        }
        for row, a_out, a_proc, total in zip(rollouts, *(part.tolist() for part in advantages), strict=True)
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
    )
    return task.finish(rows=len(rows), metrics=signals)


def _scores(rows: list[dict[str, Any]], column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if row[column] is None else row[column] for row in rows], dtype=np.float64)
