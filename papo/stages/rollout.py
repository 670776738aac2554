"""rollout: G samples a prompt from the policy of the round, with the log-probs that training will clip against."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from papo.engines.protocols import Sampler, SampleRequest
from papo.errors import DataError
from papo.params import RolloutParams
from papo.schemas import PROBLEMS, ROLLOUTS, row_seed
from papo.store.files import digest
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_rows, write_table

CODE = ("stages/rollout.py", "engines/samplers", "engines/policy.py")


@dataclass(frozen=True)
class Inputs:
    round: int
    seed: int
    problems: Path
    policy: Path


def run(params: RolloutParams, inputs: Inputs, out: Path, *, engine: Sampler, context: Context = Context()) -> Manifest:
    """Writes the rollouts of one round to `out`, prompt by prompt in the order they were drawn.

    A shard holds `prompts_per_shard` prompts and is one batch of the sampler, whether the stage was interrupted or not: that makes
    the rows of a restarted stage equal to those of an undisturbed one to the last bit.
    """
    task = Task("rollout", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    problems = choose(read_rows(inputs.problems, PROBLEMS), inputs.round, params.prompts_per_round, inputs.seed)
    policy = digest(inputs.policy)
    size = params.prompts_per_shard
    shards = [problems[start : start + size] for start in range(0, len(problems), size)]
    with context.progress(f"rollout {inputs.round}", len(problems) * params.group_size) as progress:
        parts = []
        for index, shard in enumerate(shards):
            make = partial(_sample, shard, params, inputs, policy, engine, progress)
            parts.append(task.shard(index, ROLLOUTS, make))
    table = pa.concat_tables(parts)
    write_table(out, ROLLOUTS, table)
    lengths = pc.list_value_length(table["completion_ids"]).to_numpy()
    reasons = Counter(str(reason) for reason in table["finish_reason"].to_pylist())
    metrics = {"length_mean": lengths.mean(), "truncated_share": reasons["length"] / len(lengths)}
    return task.finish(rows=len(table), counts=reasons, metrics=metrics, versions=engine.versions())


def choose(problems: list[dict[str, Any]], round_: int, count: int, seed: int) -> list[dict[str, Any]]:
    """The `count` problems of a round, none of them twice: epochs of random order, in each as many whole rounds as it gives.

    Raises:
        DataError: there are fewer problems than that.
    """
    if count > len(problems):
        raise DataError(
            f"rollout.prompts_per_round is {count}, but there are only {len(problems)} training problems",
            where="data/problems/train.parquet",
            fix="lower rollout.prompts_per_round, or prepare more problems",
        )
    epoch, part = divmod(round_, len(problems) // count)
    order = list(range(len(problems)))
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return [problems[index] for index in order[part * count : (part + 1) * count]]


def _sample(
    problems: list[dict[str, Any]], params: RolloutParams, inputs: Inputs, policy: str, engine: Sampler, progress: Any
) -> list[dict[str, Any]]:
    keys = [(problem, index) for problem in problems for index in range(params.group_size)]
    requests = [
        SampleRequest(problem["prompt"], row_seed(inputs.seed, inputs.round, problem["problem_id"], index))
        for problem, index in keys
    ]
    samples = engine.sample(requests, progress)
    return [
        {
            "round": inputs.round,
            "problem_id": problem["problem_id"],
            "sample_index": index,
            "prompt": problem["prompt"],
            "prompt_ids": sample.prompt_ids,
            "completion": sample.completion,
            "completion_ids": sample.completion_ids,
            "logprobs": sample.logprobs,
            "finish_reason": sample.finish_reason,
            "policy_digest": policy,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": request.seed,
        }
        for (problem, index), request, sample in zip(keys, requests, samples, strict=True)
    ]
