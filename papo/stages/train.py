"""train: one pass over a round's advantages, from the policy that sampled them to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.engines.protocols import Trainer, TrainRow
from papo.errors import CheckpointError
from papo.params import TrainParams
from papo.schemas import ADVANTAGES, ROLLOUTS
from papo.stages.rows import check_aligned
from papo.store.files import digest, replacing
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_columns

CODE = ("stages/train.py", "stages/rows.py", "engines/trainer.py", "engines/policy.py")


@dataclass(frozen=True)
class Inputs:
    """`state` is the optimizer state of the round before, none in round 0."""

    round: int
    seed: int
    rollouts: Path
    advantages: Path
    policy: Path
    state: Path | None
    temperature: float


def run(params: TrainParams, inputs: Inputs, out: Path, *, engine: Trainer, context: Context = Context()) -> Manifest:
    """Writes the next policy to the folder `out` and the optimizer state to the folder `trainer` beside it.

    Raises:
        CheckpointError: the rollouts were sampled from another policy.
        DataError: the advantages are not those of the rollouts.
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
        history = engine.train(inputs.policy, inputs.state, groups, policy_folder, state_folder, progress)
    means = {name: sum(row[name] for row in history) / len(history) for name in history[0] if name != "step"}
    first = {f"first_step_{name}": history[0][name] for name in ("ratio_min", "ratio_max")}
    rows = sum(map(len, groups))
    return task.finish(rows=rows, metrics=means | first, history=history, versions=engine.versions())


def _groups(inputs: Inputs) -> list[list[TrainRow]]:
    rollouts = read_columns(
        inputs.rollouts, ROLLOUTS,
        "problem_id", "sample_index", "prompt_ids", "completion_ids", "logprobs", "policy_digest",
    )  # fmt: skip
    sampled_from, given = {row["policy_digest"] for row in rollouts}, digest(inputs.policy)
    if sampled_from != {given}:
        raise CheckpointError(
            f"the rollouts were sampled from policy {sorted(sampled_from)[0][:12]}, this one is {given[:12]}",
            where=str(inputs.policy),
            fix="run rollout of this round again",
        )
    advantages = read_columns(
        inputs.advantages, ADVANTAGES, "problem_id", "sample_index", "advantage", "token_advantages"
    )
    check_aligned(rollouts, advantages, inputs.advantages)
    groups: dict[str, list[TrainRow]] = {}
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        groups.setdefault(rollout["problem_id"], []).append(_row(rollout | advantage))
    return list(groups.values())


def _row(row: dict[str, Any]) -> TrainRow:
    return TrainRow(
        prompt_ids=row["prompt_ids"],
        completion_ids=row["completion_ids"],
        logprobs=row["logprobs"],
        advantage=row["advantage"],
        token_advantages=row["token_advantages"],
    )
