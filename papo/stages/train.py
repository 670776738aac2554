"""train: one pass over a round's advantages, from the policy that sampled them to the next."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.engines.protocols import Trainer, TrainJob, TrainRow
from papo.errors import CheckpointError, DataError
from papo.params import TrainParams
from papo.schemas import ADVANTAGES, ROLLOUTS
from papo.stages.rows import check_same_rows
from papo.store.faults import reached
from papo.store.files import digest, replacing
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import codes, read_parts, read_table

CODE = ("stages/train.py", "stages/rows.py", "engines/training", "engines/policy.py", "core/schedules.py")


_KEY = ("problem_id", "sample_index")


@dataclass(frozen=True)
class Inputs:
    """`state` is the optimizer state of the round before, none in round 0; `reference` the warm start, where the params need one."""

    round: int
    seed: int
    rollouts: Path
    advantages: Path
    policy: Path
    state: Path | None
    reference: Path | None
    temperature: float
    max_new_tokens: int


def run(params: TrainParams, inputs: Inputs, out: Path, *, engine: Trainer, context: Context = Context()) -> Manifest:
    """Writes the next policy to the folder `out` and the optimizer state to the folder `trainer` beside it.

    Raises:
        CheckpointError: the rollouts were sampled from another policy.
        DataError: the advantages are not those of the rollouts, or a row holds what cannot be trained on.
    """
    state = out.with_name("trainer")
    task = Task("train", params, inputs, [out, state], code=CODE, context=context)
    if done := task.done():
        return done
    groups = _groups(inputs)
    steps = -(-len(groups) // params.minibatch_prompts)
    with (
        replacing(out) as policy_folder,
        replacing(state) as state_folder,
        context.progress(f"train {inputs.round}", steps) as progress,
    ):
        job = TrainJob(
            round=inputs.round,
            groups=groups,
            policy=inputs.policy,
            state=inputs.state,
            reference=inputs.reference,
            out=policy_folder,
            out_state=state_folder,
            work=task.work,
        )
        reached("train")
        history = engine.train(job, progress)
        reached("trained")
    first = {f"first_step_{name}": history[0][name] for name in ("ratio_min", "ratio_max") if name in history[0]}
    rows = sum(map(len, groups))
    return task.finish(rows=rows, metrics=_summed_up(history) | first, history=history, versions=engine.versions())


def _summed_up(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the steps that have the metric; of what adds up over a round, the sum; the least, the most."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for row in history for name in row if name != "step"):
        values = [row[name] for row in history if name in row]
        if name in ("skipped_responses", "broken"):
            found[name] = sum(values)
        elif name == "peak_memory_mb":
            found[name] = max(values)
        else:
            found[name] = sum(values) / len(values)
    return found


def _groups(inputs: Inputs) -> list[list[TrainRow]]:
    sampled_from = codes(read_table(inputs.rollouts, ROLLOUTS, "policy_digest"), "policy_digest")[1]
    given = digest(inputs.policy)
    if sampled_from != [given]:
        raise CheckpointError(
            f"the rollouts were sampled from policy {min(sampled_from, default='none')[:12]}, this one is {given[:12]}",
            where=str(inputs.policy),
            fix="run rollout of this round again",
        )
    advantages = read_table(
        inputs.advantages, ADVANTAGES, "problem_id", "sample_index", "advantage", "token_advantages"
    )
    check_same_rows(read_table(inputs.rollouts, ROLLOUTS, *_KEY), advantages, inputs.advantages)
    groups: dict[str, list[TrainRow]] = {}
    done = 0
    columns = ("prompt_ids", "completion_ids", "logprobs", "finish_reason")
    for part in read_parts(inputs.rollouts, ROLLOUTS, *_KEY, *columns):
        beside = advantages.slice(done, len(part)).select(["advantage", "token_advantages"]).to_pylist()
        done += len(part)
        for rollout, advantage in zip(part.to_pylist(), beside, strict=True):
            group = groups.setdefault(rollout["problem_id"], [])
            group.append(_row(rollout | advantage, inputs, group[0] if group else None))
    return list(groups.values())


def _row(row: Mapping[str, Any], inputs: Inputs, first: TrainRow | None) -> TrainRow:
    """`first` of its group, with which it shares what is the same."""
    if not row["prompt_ids"]:
        name = f"row {row['problem_id']}/{row['sample_index']}"
        raise DataError(f"{name}: no prompt_ids", where=str(inputs.rollouts), fix="run rollout of this round again")
    _check_numbers(row, "logprobs", row["logprobs"], inputs.rollouts, "rollout", length=len(row["completion_ids"]))
    _check_numbers(row, "advantage", [row["advantage"]], inputs.advantages, "advantage", length=1)
    if (tokens := row["token_advantages"]) is not None:
        length = len(row["completion_ids"])
        _check_numbers(row, "token_advantages", tokens, inputs.advantages, "advantage", length=length)
    # Tokens and log-probs lie in arrays of four bytes a value, as they are stored; a list of Python's takes ten times that.
    prompt = array("i", row["prompt_ids"])
    return TrainRow(
        prompt_ids=first.prompt_ids if first is not None and first.prompt_ids == prompt else prompt,
        completion_ids=array("i", row["completion_ids"]),
        logprobs=array("f", row["logprobs"]),
        advantage=row["advantage"],
        token_advantages=None if tokens is None else array("f", tokens),
        truncated=row["finish_reason"] == "length",
        problem_id=row["problem_id"] if first is None else first.problem_id,
        sample_index=row["sample_index"],
    )


def _check_numbers(
    row: Mapping[str, Any], column: str, values: Sequence[float], table: Path, stage: str, *, length: int
) -> None:
    """Refuses what would make every weight of the policy NaN, or shift the tokens of a row."""
    name = f"row {row['problem_id']}/{row['sample_index']}"
    if len(values) != length:
        what = f"{name}: {len(values)} {column} for {length} tokens"
    elif bad := [value for value in values if value is None or not math.isfinite(value)]:
        what = f"{name}: {column} holds {bad[0]}"
    else:
        return
    raise DataError(what, where=str(table), fix=f"run {stage} of this round again")
