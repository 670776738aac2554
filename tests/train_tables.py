"""Rollouts and advantages of a round as the train stage reads them, of rows in memory, and the stage on them with the real trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from papo.engines.protocols import TrainRow
from papo.engines.training import make_trainer
from papo.params import TrainParams
from papo.schemas import ADVANTAGES, ROLLOUTS
from papo.stages import train
from papo.store.files import digest
from papo.store.manifest import Context, Manifest
from papo.store.tables import write_rows

SAMPLED = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "engine": "fake", "engine_version": "1", "seed": 0}


def name(number: int) -> str:
    """The problem of a group."""
    return f"p{number}"


def write_tables(
    rollouts: Path, advantages: Path, policy: Path, groups: Sequence[Sequence[TrainRow]], round_: int = 0
) -> None:
    rows = [
        ({"round": round_, "problem_id": name(number), "sample_index": index}, row)
        for number, group in enumerate(groups)
        for index, row in enumerate(group)
    ]
    sampled = [
        key | SAMPLED | {
            "prompt": "", "completion": "", "prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "logprobs": row.logprobs,
            "finish_reason": "length" if row.truncated else "stop", "policy_digest": digest(policy),
        }
        for key, row in rows
    ]  # fmt: skip
    write_rows(rollouts, ROLLOUTS, sampled)
    scored = [
        key | {
            "outcome_advantage": row.advantage, "process_advantage": 0.0, "advantage": row.advantage,
            "token_advantages": row.token_advantages,
        }
        for key, row in rows
    ]  # fmt: skip
    write_rows(advantages, ADVANTAGES, scored)


def inputs_of(folder: Path, policy: Path, groups: Sequence[Sequence[TrainRow]], **change: Any) -> train.Inputs:
    """Tables of the groups in a folder, as the stage takes them."""
    rollouts, advantages = folder / "rollouts.parquet", folder / "advantages.parquet"
    write_tables(rollouts, advantages, policy, groups)
    given = {
        "round": 0, "seed": 0, "rollouts": rollouts, "advantages": advantages, "policy": policy, "state": None, "reference": None,
        "temperature": 1.0, "max_new_tokens": SAMPLED["max_new_tokens"],
    }  # fmt: skip
    return train.Inputs(**given | change)


def run_stage(
    params: TrainParams,
    inputs: train.Inputs,
    folder: Path,
    warn: Callable[[str], None] = lambda message: None,
    *,
    told: Callable[[int], None] = lambda steps: None,
) -> Manifest:
    """To the folders `policy` and `trainer` in `folder`, with its folder `.papo` for work; `told` is called with steps as they are done."""
    engine = make_trainer(
        params, temperature=inputs.temperature, max_new_tokens=inputs.max_new_tokens, seed=inputs.seed, warn=warn
    )
    context = Context(work=folder / ".papo", warn=warn, progress=lambda description, total: nullcontext(told))
    return train.run(params, inputs, folder / "policy", engine=engine, context=context)
