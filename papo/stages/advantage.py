"""advantage: the decoupled advantages of a round, and the signals that say how training is going."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from papo.core.advantages import Advantages, compute_advantages, process_needed
from papo.core.credit import TokenAdvantages, split_steps, token_advantages, token_steps
from papo.core.groups import BoolArray, FloatArray, IndexArray
from papo.core.overlong import overlong_penalties
from papo.core.process_reward import Rule, process_rewards
from papo.core.signals import round_signals, verification_flags
from papo.engines.protocols import Aligner
from papo.errors import DataError, ParamsError
from papo.params import AdvantageParams
from papo.schemas import ADVANTAGES, OK, ORM, PRM, ROLLOUTS
from papo.stages.rows import check_same_rows
from papo.store.faults import reached
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import (
    PART_ROWS,
    codes,
    lengths,
    numbers,
    read_columns,
    read_parts,
    read_table,
    values,
    write_parts,
)

CODE = (
    "stages/advantage.py",
    "stages/rows.py",
    "core/advantages.py",
    "core/credit.py",
    "core/groups.py",
    "core/overlong.py",
    "core/process_reward.py",
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
    scored = Scored.read(inputs)
    tokens: Sequence[list[float] | None] | None = None
    reached("compute")
    if params.variant == "capo":
        rollouts = read_columns(
            inputs.rollouts, ROLLOUTS, "problem_id", "completion", "completion_ids", "max_new_tokens"
        )
        orm = read_columns(inputs.orm, ORM, "orm_score")
        prm = read_columns(inputs.prm, PRM, "prm_score", "status", "wrong_steps")
        advantages, tokens = compute(params, rollouts, orm, prm, inputs.prm, engine)
    else:
        advantages = _by_response(params, scored.outcomes, scored.process, scored.groups, scored.lengths, scored.limits)
    rows = write_parts(out, ADVANTAGES, _parts(inputs.round, scored.keys, advantages, tokens))
    signals = round_signals(
        orm_scores=scored.outcomes,
        prm_scores=scored.process,
        group_ids=scored.groups,
        advantages=advantages,
        completion_lengths=scored.lengths,
        truncated=scored.truncated,
        prm_statuses=scored.statuses,
        verification=_verification(inputs.rollouts),
        variant=params.variant,
        lam=params.lam,
        eps=params.eps,
        penalties=penalties_of(params, scored.lengths, scored.limits),
        unpenalised=_unpenalised(params, scored),
    )
    signals |= logprob_differences(inputs.rollouts)
    return task.finish(rows=rows, metrics=signals, versions=engine.versions() if engine else None)


@dataclass(frozen=True)
class Scored:
    """The responses of a round in arrays, one value a response. `groups`: their problems by number; `limits`: of new tokens."""

    keys: pa.Table
    groups: IndexArray
    outcomes: FloatArray
    process: FloatArray
    lengths: npt.NDArray[np.int64]
    limits: npt.NDArray[np.int64]
    truncated: BoolArray
    statuses: list[str]

    @classmethod
    def read(cls, inputs: Inputs) -> Scored:
        """
        Raises:
            DataError: the scores are not those of the rollouts.
        """
        keys = read_table(inputs.rollouts, ROLLOUTS, "problem_id", "sample_index", "finish_reason", "max_new_tokens")
        orm = read_table(inputs.orm, ORM, "problem_id", "sample_index", "orm_score")
        prm = read_table(inputs.prm, PRM, "problem_id", "sample_index", "prm_score", "status")
        check_same_rows(keys, orm, inputs.orm)
        check_same_rows(keys, prm, inputs.prm)
        reasons, names = codes(keys, "finish_reason")
        statuses, words = codes(prm, "status")
        return cls(
            keys=keys.select(["problem_id", "sample_index"]),
            groups=codes(keys, "problem_id")[0],
            outcomes=numbers(orm, "orm_score"),
            process=numbers(prm, "prm_score"),
            lengths=completion_lengths(inputs.rollouts),
            limits=keys["max_new_tokens"].to_numpy().astype(np.int64),
            truncated=np.array([name == "length" for name in names], dtype=np.bool_)[reasons],
            statuses=[words[code] for code in statuses],
        )


def completion_lengths(rollouts: Path) -> npt.NDArray[np.int64]:
    """(N,) tokens of each completion of a table."""
    parts = [lengths(part, "completion_ids") for part in read_parts(rollouts, ROLLOUTS, "completion_ids")]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _verification(rollouts: Path) -> BoolArray:
    parts = read_parts(rollouts, ROLLOUTS, "completion")
    found = [verification_flags(values(part, "completion")) for part in parts]
    return np.concatenate([np.empty(0, dtype=np.bool_), *found])


def _parts(
    round_: int, keys: pa.Table, advantages: Advantages, tokens: Sequence[list[float] | None] | None
) -> Iterator[pa.Table]:
    kinds = {name: ADVANTAGES.schema.field(name).type for name, _ in ADVANTAGES.columns}
    for start in range(0, len(keys), PART_ROWS):
        part = slice(start, min(start + PART_ROWS, len(keys)))
        count = part.stop - part.start
        some = keys.slice(start, count).combine_chunks()
        whole = {
            "outcome_advantage": advantages.outcome,
            "process_advantage": advantages.process,
            "advantage": advantages.total,
        }
        arrays = [
            pa.array(np.full(count, round_), kinds["round"]),
            *some.columns,
            *(pa.array(numbers[part], kinds[name]) for name, numbers in whole.items()),
            pa.array([None] * count if tokens is None else tokens[part], kinds["token_advantages"]),
        ]
        yield pa.table(arrays, schema=ADVANTAGES.schema)


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
    ids = [row["problem_id"] for row in rollouts]
    advantages = _by_response(
        params, _scores(orm, "orm_score"), _scores(prm, "prm_score"), ids, *map(np.array, _lengths(rollouts))
    )
    return advantages, [None] * len(rollouts)


def _by_response(
    params: AdvantageParams,
    outcomes: FloatArray,
    process: FloatArray,
    groups: Iterable[Any],
    lengths: npt.NDArray[np.int64],
    limits: npt.NDArray[np.int64],
) -> Advantages:
    return compute_advantages(
        outcomes, rewards_of(params, outcomes, process, groups, lengths, limits), groups,
        variant=params.variant, lam=params.lam, scale=params.scale, eps=params.eps, guard=params.guard,
        penalties=penalties_of(params, lengths, limits),
    )  # fmt: skip


def rule_of(missing: str, length_neutral: bool, length_cost: float) -> Rule | None:
    """None where process rewards are the judge's scores."""
    rule = Rule(missing, length_neutral, length_cost)
    return rule if rule != Rule() else None


def rewards_of(
    params: AdvantageParams,
    outcomes: FloatArray,
    process: FloatArray,
    groups: Iterable[Any],
    lengths: npt.ArrayLike,
    limits: npt.ArrayLike,
) -> FloatArray:
    """(N,) process rewards: the judge's scores, unless the params say what else missing ones or length count as."""
    rule = rule_of(params.missing, params.length_neutral, params.length_cost)
    if rule is None:
        return process
    groups = groups if isinstance(groups, np.ndarray) else list(groups)
    needed = process_needed(params.variant, outcomes, groups)
    return process_rewards(process, outcomes, groups, lengths, limits, needed=needed, **rule._asdict())


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
        penalties=penalties_of(params, *_lengths(rollouts)),
    )


def _lengths(rollouts: Rows) -> tuple[list[int], list[int]]:
    return [len(row["completion_ids"]) for row in rollouts], [row["max_new_tokens"] for row in rollouts]


def penalties_of(params: AdvantageParams, lengths: npt.ArrayLike, limits: npt.ArrayLike) -> FloatArray | None:
    """(N,) penalties for length, by the limit that each response was sampled under; None without `overlong`.

    Raises:
        ParamsError: the buffer is not below that limit.
    """
    if params.overlong is None:
        return None
    return overlong_penalties(lengths, limits, params.overlong.buffer, params.overlong.factor)


def logprob_differences(rollouts: Path) -> dict[str, float]:
    """Mean and largest difference between the sampler's log-probs and the trainer's, of the responses where both are known."""
    found = {}
    for name, of in (("logprob_difference_mean", np.mean), ("logprob_difference_max", np.max)):
        known = read_table(rollouts, ROLLOUTS, name)[name].drop_null().to_numpy().astype(np.float64)
        if known.size:
            found[name] = float(of(known))
    return found


def _unpenalised(params: AdvantageParams, scored: Scored) -> FloatArray | None:
    """The outcome advantages without `overlong`; None where there is none."""
    if params.overlong is None:
        return None
    outcomes, ids = scored.outcomes, scored.groups
    without = np.full(outcomes.size, np.nan)
    if params.variant != "capo":
        return compute_advantages(outcomes, without, ids, variant="orm", scale=params.scale, eps=params.eps).outcome
    return token_advantages(
        outcomes, [None] * outcomes.size, scored.lengths, ids,
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
