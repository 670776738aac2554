"""rollout: G samples a prompt from the policy of the round, with the log-probs that training will clip against."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from papo.engines.protocols import Progress, Recomputer, Sample, Sampler, SampleRequest, Scorer
from papo.errors import CheckpointError, DataError
from papo.params import RolloutParams
from papo.schemas import PROBLEMS, ROLLOUTS, TRIED, row_seed
from papo.store.faults import reached
from papo.store.files import digest
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_rows, write_rows, write_table

CODE = ("stages/rollout.py", "engines/samplers", "engines/recompute.py", "engines/policy.py")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """`scoring`: params and code by which groups are kept, where only some are."""

    round: int
    seed: int
    problems: Path
    policy: Path
    scoring: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """Who samples, who computes log-probs anew, and who says what advantage a group has, where that decides whether it is kept.

    `release` is called between sampling and computing anew: whoever sampled gives the memory back.
    """

    sampler: Sampler
    recomputer: Recomputer
    scorer: Scorer | None = None
    release: Callable[[], None] = lambda: None


def run(
    params: RolloutParams,
    inputs: Inputs,
    out: Path,
    *,
    engine: Engine,
    finished: Callable[[Rows], None] | None = None,
    context: Context = Context(),
) -> Manifest:
    """Writes the rollouts of one round to `out`, prompt by prompt in the order they were drawn, and `tried.parquet` beside it.

    A shard holds `prompts_per_shard` prompts and is stored once its last sample is there; a restarted stage samples the others. With a
    sampler that is repeatable its rows equal those of an undisturbed one to the last bit; the metric `repeatable` says whether it is.

    With `max_prompts` further shards are sampled until `prompts_per_round` groups have an advantage that is not 0 for all of their
    responses; the first so many of them, in the order drawn, are the round.

    Args:
        finished: told of the rows of each shard once it is stored, or found stored.

    Raises:
        DataError: too few training problems, or none that the policy can be asked.
        CheckpointError: the policy gives log-probs that are no numbers.
        SetupError, ServerDownError: of the sampler; shards that are stored stay.
    """
    task = Task("rollout", params.deciding, inputs, [out, out.with_name("tried.parquet")], code=CODE, context=context)
    if done := task.done():
        return done
    engine.sampler.check()
    problems, unfit = _fitting(read_rows(inputs.problems, PROBLEMS), params, engine.sampler)
    drawn = choose(problems, inputs.round, params.max_prompts or params.prompts_per_round, inputs.seed)
    wanted = min(params.prompts_per_round, len(drawn))
    with context.progress(f"rollout {inputs.round}", wanted * params.group_size) as progress:
        sampling = _Sampling(task, params, inputs, engine, drawn, finished, progress)
        kept = _all(sampling, wanted) if engine.scorer is None else _with_advantage(sampling, wanted, engine.scorer)
    if len(kept) < wanted:
        context.warn(
            f"rollout {inputs.round}: {len(kept)} groups instead of {wanted}, as the others of {len(sampling.groups)} prompts have no "
            "advantage and rollout.max_prompts allows no more"
        )
    engine.release()
    table = pa.concat_tables([sampling.groups[place] for place in kept])
    table = _compared(table, params.checked_rows, engine.recomputer, inputs.policy)
    write_table(out, ROLLOUTS, table)
    tried = sampling.tried(set(kept)) + [_too_long(inputs.round, problem, why) for problem, why in unfit]
    write_rows(task.outputs[1], TRIED, tried)
    reasons = Counter(str(reason) for reason in table["finish_reason"].to_pylist())
    dropped = Counter(f"dropped_{row['status']}" for row in tried if row["status"] != "kept")
    metrics = _metrics(table, tried) | engine.sampler.metrics() | {"repeatable": float(engine.sampler.repeatable)}
    return task.finish(rows=len(table), counts=reasons + dropped, metrics=metrics, versions=_versions(table))


def choose(problems: list[dict[str, Any]], round_: int, count: int, seed: int) -> list[dict[str, Any]]:
    """The `count` problems of a round, none of them twice: epochs of random order, in each as many whole rounds as it gives.

    Raises:
        DataError: there are fewer problems than that.
    """
    if count > len(problems):
        raise DataError(
            f"a round takes {count} prompts, but there are only {len(problems)} training problems that fit the policy",
            where="data/problems/train.parquet",
            fix="lower rollout.prompts_per_round and rollout.max_prompts, prepare more problems, or raise rollout.max_prompt_tokens",
        )
    epoch, part = divmod(round_, len(problems) // count)
    order = list(range(len(problems)))
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return [problems[index] for index in order[part * count : (part + 1) * count]]


def _fitting(
    problems: list[dict[str, Any]], params: RolloutParams, sampler: Sampler
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], str]]]:
    """The problems that the policy can be asked, and the others with the reason."""
    reasons = [(problem, sampler.fits(problem["prompt"])) for problem in problems]
    return (
        [problem for problem, why in reasons if why is None],
        [(problem, why) for problem, why in reasons if why is not None],
    )


def _too_long(round_: int, problem: Mapping[str, Any], why: str) -> dict[str, Any]:
    return {"round": round_, "problem_id": problem["problem_id"], "status": "too_long", "reason": why}


class _Sampling:
    """The groups of a round that were sampled so far, by the place at which their problems were drawn."""

    def __init__(
        self,
        task: Task,
        params: RolloutParams,
        inputs: Inputs,
        engine: Engine,
        drawn: list[dict[str, Any]],
        finished: Callable[[Rows], None] | None,
        progress: Progress,
    ) -> None:
        self._task, self._params, self._inputs, self._engine = task, params, inputs, engine
        self._drawn, self._finished, self._progress = drawn, finished, progress
        self._policy = digest(inputs.policy)
        self._size = params.prompts_per_shard
        self._version = ""
        self.groups: dict[int, pa.Table] = {}
        self.scores: dict[int, list[tuple[float | None, float]]] = {}

    @property
    def left(self) -> int:
        """Prompts that were drawn and not sampled."""
        return len(self._drawn) - len(self.groups)

    def sample(self, prompts: int) -> list[int]:
        """Samples as many further prompts, in whole shards; their places."""
        first = len(self.groups)
        shards = range(first // self._size, -(-min(first + prompts, len(self._drawn)) // self._size))
        missing = []
        for shard in shards:
            if (table := self._task.stored(shard, ROLLOUTS)) is None:
                missing.append(shard)
            else:
                self._progress(len(table))
                self._take(shard, table)
        if missing:
            # Now, as whoever samples need not be there any more when the first shard is stored.
            versions = self._engine.sampler.versions()
            self._version = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
        requests = [[one for place in self._places(shard) for one in self._requests(place)] for shard in missing]
        reached("sample")
        for number, samples in self._engine.sampler.sample_shards(requests, self._progress):
            reached("sampled", detail=f"{len(samples)} rows of shard {missing[number]}")
            shard = missing[number]
            rows = self._rows(self._places(shard), requests[number], samples)
            self._take(shard, self._task.store(shard, ROLLOUTS, rows))
        return [place for shard in shards for place in self._places(shard)]

    def score(self, places: Sequence[int], scorer: Scorer) -> None:
        rows = [row for place in places for row in self.groups[place].to_pylist()]
        found = iter(scorer.score(rows))
        for place in places:
            self.scores[place] = [next(found) for _ in range(self._params.group_size)]

    def has_advantage(self, place: int) -> bool:
        return any(advantage != 0.0 for _, advantage in self.scores[place])

    def tried(self, kept: set[int]) -> list[dict[str, Any]]:
        """A row a prompt that was sampled, whether its group was kept or not."""
        return [self._tried(place, place in kept) for place in sorted(self.groups)]

    def _tried(self, place: int, kept: bool) -> dict[str, Any]:
        group = self.groups[place]
        lengths = pc.list_value_length(group["completion_ids"]).to_numpy()
        outcomes = [outcome for outcome, _ in self.scores.get(place, ()) if outcome is not None]
        status = "kept" if kept else "surplus" if self.has_advantage(place) else "no_advantage"
        reasons = {"surplus": "the round had its groups", "no_advantage": "every advantage of its group is 0"}
        return {
            "round": self._inputs.round,
            "problem_id": self._drawn[place]["problem_id"],
            "place": place,
            "status": status,
            "reason": reasons.get(status, ""),
            "prompt_tokens": len(group["prompt_ids"][0]),
            "accuracy": sum(outcomes) / len(outcomes) if outcomes else None,
            "length_mean": float(lengths.mean()),
            "truncated_share": group["finish_reason"].to_pylist().count("length") / len(group),
        }

    def _places(self, shard: int) -> range:
        return range(shard * self._size, min((shard + 1) * self._size, len(self._drawn)))

    def _requests(self, place: int) -> list[SampleRequest]:
        problem, of = self._drawn[place], self._inputs
        return [
            SampleRequest(problem["prompt"], row_seed(of.seed, of.round, problem["problem_id"], index))
            for index in range(self._params.group_size)
        ]

    def _take(self, shard: int, table: pa.Table) -> None:
        group = self._params.group_size
        for number, place in enumerate(self._places(shard)):
            self.groups[place] = table.slice(number * group, group)
        if self._finished is not None:
            self._finished(table.to_pylist())

    def _rows(
        self, places: Sequence[int], requests: Sequence[SampleRequest], samples: Sequence[Sample]
    ) -> list[dict[str, Any]]:
        keys = [(self._drawn[place], index) for place in places for index in range(self._params.group_size)]
        return [
            {
                "round": self._inputs.round,
                "problem_id": problem["problem_id"],
                "sample_index": index,
                "prompt": problem["prompt"],
                "prompt_ids": sample.prompt_ids,
                "completion": sample.completion,
                "completion_ids": sample.completion_ids,
                "logprobs": sample.logprobs,
                "finish_reason": sample.finish_reason,
                "policy_digest": self._policy,
                "temperature": self._params.temperature,
                "top_p": self._params.top_p,
                "max_new_tokens": self._params.max_new_tokens,
                "seed": request.seed,
                "engine": self._engine.sampler.name,
                "engine_version": self._version,
            }
            for (problem, index), request, sample in zip(keys, requests, samples, strict=True)
        ]


def _all(sampling: _Sampling, wanted: int) -> list[int]:
    return sampling.sample(wanted)


def _with_advantage(sampling: _Sampling, wanted: int, scorer: Scorer) -> list[int]:
    """Places of the first groups with an advantage; of the first of all, if none has one: a round is not empty."""
    kept: list[int] = []
    while len(kept) < wanted and sampling.left:
        # As many as will do if further groups are as the ones before.
        rate = len(kept) / len(sampling.groups) if kept else 1.0
        places = sampling.sample(math.ceil((wanted - len(kept)) / rate))
        sampling.score(places, scorer)
        kept += [place for place in places if sampling.has_advantage(place)]
    return kept[:wanted] or sorted(sampling.groups)[:1]


def _compared(table: pa.Table, rows: int, recomputer: Recomputer, policy: Path) -> pa.Table:
    """The table, with the differences between its log-probs and those of the trainer's model, for the `rows` rows of lowest seed.

    Raises:
        CheckpointError: the model gives what is no finite number.
    """
    chosen = np.sort(np.argsort(table["seed"].to_numpy())[:rows])
    given = table.take(chosen).to_pylist()
    columns: dict[str, list[float | None]] = {
        f"logprob_difference_{name}": [None] * len(table) for name in ("mean", "max")
    }
    reached("recompute")
    anew = recomputer.logprobs([(row["prompt_ids"], row["completion_ids"]) for row in given]) if given else []
    for place, row, values in zip(chosen, given, anew, strict=True):
        apart = np.abs(np.subtract(values, row["logprobs"]))
        if not np.isfinite(apart).all():
            raise CheckpointError(
                "the policy gives log-probs that are no finite numbers",
                where=str(policy),
                fix="go on from an earlier policy, with a lower train.learning_rate",
            )
        columns["logprob_difference_mean"][place] = float(apart.mean())
        columns["logprob_difference_max"][place] = float(apart.max())
    for name, found in columns.items():
        table = table.set_column(
            table.column_names.index(name), ROLLOUTS.schema.field(name), pa.array(found, pa.float32())
        )
    return table


def _versions(table: pa.Table) -> dict[str, str]:
    """By the rows: a stage that finds all of them stored needs no server, and one that was restarted may have met another version."""
    found: dict[str, set[str]] = {}
    for said in sorted(set(map(str, table["engine_version"].to_pylist()))):
        for part in said.split(", "):
            name, _, numbers = part.partition(" ")
            found.setdefault(name, set()).update(numbers.split(" and "))
    return {name: " and ".join(sorted(numbers)) for name, numbers in found.items()}


def _metrics(table: pa.Table, tried: Rows) -> dict[str, float]:
    """Of the rows that are kept, and of all that were sampled, whether they were kept or not."""
    lengths = pc.list_value_length(table["completion_ids"]).to_numpy()
    metrics = {
        "length_mean": lengths.mean(),
        "truncated_share": table["finish_reason"].to_pylist().count("length") / len(table),
    }
    for name, of in (("mean", np.mean), ("max", np.max)):
        values = table[f"logprob_difference_{name}"].drop_null().to_numpy()
        if len(values):
            metrics[f"logprob_difference_{name}"] = of(values)
    sampled = [row for row in tried if row["status"] != "too_long"]
    if any(row["status"] != "kept" for row in sampled):
        metrics["tried"] = len(sampled)
        for whose, rows in (("tried", sampled), ("kept", [row for row in sampled if row["status"] == "kept"])):
            for name in ("prompt_tokens", "length_mean", "accuracy"):
                if known := [row[name] for row in rows if row[name] is not None]:
                    metrics[f"{whose}_{name}"] = sum(known) / len(known)
    return metrics
