"""evaluate: avg@k, pass@k and maj@k of the warm start, the final policy and those in between that were asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from papo.core.answers import normalise
from papo.core.statistics import (
    Estimate,
    avg_at_k,
    maj_at_k,
    paired_bootstrap,
    paired_bootstrap_of_values,
    pass_at_k,
)
from papo.engines.protocols import Sampler, SampleRequest, Verifier, VerifyItem
from papo.params import EvaluateParams, Metric
from papo.schemas import EVALUATION, PROBLEMS, SAMPLES, Grading, row_seed
from papo.stages.rows import check_failures
from papo.store.faults import reached
from papo.store.files import digest, write_json
from papo.store.kept import kept_rows
from papo.store.manifest import Context, Manifest, Task, code_digest
from papo.store.tables import read_rows, write_rows

FINAL = "final"
SAMPLER = ("engines/samplers", "engines/policy.py")
CODE = (
    "stages/evaluate.py",
    "stages/rows.py",
    "core/groups.py",
    "core/statistics.py",
    "core/answers.py",
    "core/code.py",
    *SAMPLER,
    "engines/verifiers",
    "engines/sandbox.py",
    "engines/in_sandbox.py",
)


@dataclass(frozen=True)
class Inputs:
    """`policies` by name, from the baseline to the one whose gain over it is told; `sampler` is `rollout.sampler`.

    `metrics`: what the gain on a benchmark is a difference of, where that is not avg@k.
    """

    seed: int
    sampler: str
    policies: dict[str, Path]
    benchmarks: dict[str, Path]
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """A sampler for the policy in a folder, and the verifier of its answers."""

    sampler: Callable[[Path], Sampler]
    verifier: Verifier


def run(params: EvaluateParams, inputs: Inputs, out: Path, *, engine: Engine, context: Context = Context()) -> Manifest:
    """Writes <benchmark>.parquet and metrics.json to the folder `out`.

    A sample that has no verdict is missing, not wrong: it leaves avg@k and the gain, which say how many are missing. pass@k needs k
    samples a problem, so there it counts as not passed, which makes pass@k a lower bound; a difference of pass@k
    leaves the problem out.

    With `checkpoint` best the policy with the highest avg@k on `choose_on`, of equals the earliest, is the final one on all benchmarks.

    Raises:
        FailedRowsError: more than `max_failed_share` of the samples have no verdict.
    """
    tables = [out / f"{name}.parquet" for name in inputs.benchmarks]
    task = Task("evaluate", params, inputs, [out / "metrics.json", *tables], code=CODE, context=context)
    if done := task.done():
        return done
    problems = {name: read_rows(path, PROBLEMS) for name, path in inputs.benchmarks.items()}
    total = len(inputs.policies) * params.samples_per_problem * sum(map(len, problems.values()))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in problems}
    versions: dict[str, str] = {}
    with context.progress("evaluate", total) as progress:
        shards = itertools.count()
        for policy, path in inputs.policies.items():
            sampler = engine.sampler(path)  # one at a time: two policies need not fit in memory together
            versions |= sampler.versions()
            for name, asked in problems.items():
                for start in range(0, len(asked), params.problems_per_shard):
                    part = asked[start : start + params.problems_per_shard]
                    sample = _kept(params, inputs, policy, sampler, context.work / "samples", progress)
                    make = _sampling(params, inputs, policy, part, sample, engine.verifier)
                    rows[name] += task.shard(next(shards), EVALUATION, make).to_pylist()
    versions |= engine.verifier.versions()  # which of its libraries were needed is known now
    counts = Counter(row["status"] for each in rows.values() for row in each)
    check_failures("evaluate", counts, params.max_failed_share)
    names = list(inputs.policies)
    of = names[-1]
    if params.choose_on is not None:
        of = _best(rows[params.choose_on], names[1:])
        names = [*(name for name in names if name != of), FINAL]
        for row in itertools.chain.from_iterable(rows.values()):
            row["policy"] = FINAL if row["policy"] == of else row["policy"]
    for name in problems:
        write_rows(out / f"{name}.parquet", EVALUATION, rows[name])
    metrics = {name: _metrics(name, rows[name], names, of, params, inputs) for name in problems}
    write_json(out / "metrics.json", metrics)
    flat = {
        f"{benchmark}/{policy}/avg_at_k": values["avg_at_k"]["value"]
        for benchmark, policies in metrics.items()
        for policy, values in policies.items()
        if "avg_at_k" in values
    }
    return task.finish(rows=total, counts=counts, metrics=flat, versions=versions)


def _sampling(
    params: EvaluateParams, inputs: Inputs, policy: str, problems: list[dict[str, Any]],
    sample: Callable[[list[SampleRequest]], list[dict[str, Any]]], verifier: Verifier,
) -> Callable[[], list[dict[str, Any]]]:  # fmt: skip
    def make() -> list[dict[str, Any]]:
        keys = [(problem, index) for problem in problems for index in range(params.samples_per_problem)]
        # Round -1: the seeds of evaluation are none of training's, and the same for every policy.
        seeds = [row_seed(inputs.seed, -1, problem["problem_id"], index) for problem, index in keys]
        requests = [SampleRequest(problem["prompt"], seed) for (problem, _), seed in zip(keys, seeds, strict=True)]
        samples = sample(requests)
        items = [
            VerifyItem(problem["answer"], row["completion"], Grading.model_validate_json(problem["grading"]))
            for (problem, _), row in zip(keys, samples, strict=True)
        ]
        reached("verify")
        verdicts = verifier.verify(items, lambda done: None)
        reached("verified")
        return [
            {
                "policy": policy,
                "policy_digest": digest(inputs.policies[policy]),
                "problem_id": problem["problem_id"],
                "sample_index": index,
                "tier": problem["tier"],
                **row,
                "orm_score": verdict.score,
                "extracted": verdict.extracted,
                "status": verdict.status,
                "seed": seed,
            }
            for (problem, index), seed, row, verdict in zip(keys, seeds, samples, verdicts, strict=True)
        ]

    return make


def _kept(
    params: EvaluateParams, inputs: Inputs, policy: str, sampler: Sampler, folder: Path, progress: Callable[[int], None]
) -> Callable[[list[SampleRequest]], list[dict[str, Any]]]:
    """Samples the policy, or reads what it gave when it was last asked the same; verdicts and metrics are made anew each time."""

    def sample(requests: list[SampleRequest]) -> list[dict[str, Any]]:
        identity = {
            "policy": digest(inputs.policies[policy]),
            "requests": [dataclasses.astuple(request) for request in requests],
            "sampling": [inputs.sampler, params.temperature, params.top_p, params.max_new_tokens],
            "sampler": [sampler.versions(), code_digest(SAMPLER)],
        }
        asked = False

        def make() -> list[dict[str, Any]]:
            nonlocal asked
            asked = True
            reached("sample")
            samples = sampler.sample(requests, progress)
            reached("sampled", detail=f"{len(samples)} rows of {policy}")
            return [
                {
                    "completion": found.completion,
                    "completion_tokens": len(found.completion_ids),
                    "finish_reason": found.finish_reason,
                }
                for found in samples
            ]

        rows = kept_rows(folder, SAMPLES, identity, make)
        if not asked:
            progress(len(rows))
        return rows

    return sample


def _best(rows: list[dict[str, Any]], names: list[str]) -> str:
    """The policy with the highest avg@k, of equals the one that is named first."""
    values = {name: avg_at_k(_scores(mine), _ids(mine)).value for name in names if (mine := _of(name, rows))}
    return max(values, key=values.__getitem__)


def _metrics(
    benchmark: str, rows: list[dict[str, Any]], names: list[str], of: str, params: EvaluateParams, inputs: Inputs
) -> dict[str, Any]:
    metrics: dict[str, Any] = {name: _policy_metrics(_of(name, rows), params) for name in names}
    if len(names) == 1:
        return metrics
    metric = inputs.metrics.get(benchmark, "avg_at_k")
    candidate, baseline = _of(names[-1], rows), _of(names[0], rows)
    k, confidence = params.samples_per_problem, params.confidence
    gain = paired_gain(metric, candidate, baseline, k=k, confidence=confidence, seed=inputs.seed)
    return metrics | {"gain": {**_plain(gain), "metric": metric, "of": of}}


def paired_gain(
    metric: Metric,
    candidate: list[dict[str, Any]],
    baseline: list[dict[str, Any]],
    *,
    k: int,
    confidence: float,
    seed: int,
) -> Estimate:
    """The difference of a metric between two policies by problem, from rows of their evaluations with `k` samples a problem.

    Raises:
        DataError: no problem has scored samples of both; for avg@k also if one has problems that the other has not.
    """
    if metric == "avg_at_k":
        return paired_bootstrap(
            _scores(candidate), _ids(candidate), _scores(baseline), _ids(baseline), seed=seed, confidence=confidence
        )
    values = [_by_problem(metric, rows, k) for rows in (candidate, baseline)]
    gain = paired_bootstrap_of_values(*values, seed=seed, confidence=confidence)
    return gain._replace(missing=sum(row["orm_score"] is None for row in (*candidate, *baseline)))


def _by_problem(metric: Metric, rows: list[dict[str, Any]], k: int) -> dict[str, float]:
    """One value of the metric a problem; none where too few of its samples have a verdict: k for pass@k, else one."""
    problems: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["orm_score"] is not None:
            problems[row["problem_id"]].append(row)
    least = k if metric == "pass_at_k" else 1
    return {name: _estimate(metric, mine, k).value for name, mine in problems.items() if len(mine) >= least}


def _estimate(metric: Metric, rows: list[dict[str, Any]], k: int, confidence: float = 0.95) -> Estimate:
    if metric == "pass_at_k":
        return pass_at_k(_scores(rows), _ids(rows), k, confidence=confidence, missing="wrong")
    if metric == "maj_at_k":
        answers = [_canonical(row["extracted"]) for row in rows]
        return maj_at_k(answers, _scores(rows), _ids(rows), confidence=confidence)
    return avg_at_k(_scores(rows), _ids(rows), confidence=confidence)


def _of(policy: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["policy"] == policy]


def _policy_metrics(rows: list[dict[str, Any]], params: EvaluateParams) -> dict[str, Any]:
    k, confidence = params.samples_per_problem, params.confidence
    metrics: dict[str, Any] = {name: _plain(_estimate(name, rows, k, confidence)) for name in get_args(Metric)} | {
        "k": k,
        "length_mean": float(np.mean([row["completion_tokens"] for row in rows])),
        "truncated_share": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "no_answer_share": sum(row["status"] == "no_answer" for row in rows) / len(rows),
        "timeout_share": sum(row["status"] == "timeout" for row in rows) / len(rows),
    }
    tiers = sorted({row["tier"] for row in rows if row["tier"] is not None and row["orm_score"] is not None})
    return metrics | {"tiers": {tier: _tier(rows, tier, confidence) for tier in tiers}}


def _tier(rows: list[dict[str, Any]], tier: str, confidence: float) -> dict[str, Any]:
    mine = [row for row in rows if row["tier"] == tier]
    return _plain(avg_at_k(_scores(mine), _ids(mine), confidence=confidence))


def _canonical(answer: str | None) -> str | None:
    """Answers vote together when they read the same."""
    return None if answer is None else normalise(answer)


def _scores(rows: list[dict[str, Any]]) -> list[float]:
    return [float("nan") if row["orm_score"] is None else row["orm_score"] for row in rows]


def _ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["problem_id"] for row in rows]


def _plain(estimate: Estimate) -> dict[str, Any]:
    """As JSON has it: an interval that cannot be computed is null."""
    return {name: None if value != value else value for name, value in estimate._asdict().items()}
