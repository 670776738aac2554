"""Rates of a run from its manifests, the plan that params describe, and what the cost model makes of both."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from papo.core.cost_model import Plan, Rates
from papo.errors import DataError, MissingInputError
from papo.params import Params, RolloutParams, ServerParams, VllmParams
from papo.schemas import ROLLOUTS
from papo.store.files import read_json
from papo.store.layout import Workspace, manifest_path
from papo.store.manifest import Manifest
from papo.store.tables import read_columns

STARTS = ("hand_over_s", "engine_start_s")
"""Metrics of a sampler: seconds before it samples, whatever the size of the round."""


def measured_rates(workspace: Workspace, *, sampling_devices: int = 1) -> Rates:
    """Rates of the rounds of a run that are whole; each is the median of its rounds.

    Args:
        sampling_devices: that the run sampled with; no manifest says it.

    Raises:
        MissingInputError: no round of it is whole.
    """
    rounds: list[list[Manifest]] = []
    while all(manifest_path(path).is_file() for path in _outputs(workspace, len(rounds))):
        rounds.append([Manifest.read(path) for path in _outputs(workspace, len(rounds))])
    if not rounds:
        raise MissingInputError(
            "there is no round to measure",
            where=str(workspace.round(0)),
            fix="name the workspace of a run whose first round has been trained",
        )
    rollouts, orm, prm, advantages, policies = (list(column) for column in zip(*rounds, strict=True))
    numbers = range(len(rounds))
    prompts, completions = zip(*(_lengths(workspace.table(k, "rollouts")) for k in numbers), strict=True)
    starts = [sum(manifest.metrics.get(name, 0.0) for name in STARTS) for manifest in rollouts]
    sampling = [manifest.seconds - start for manifest, start in zip(rollouts, starts, strict=True)]
    asked = [manifest.rows * manifest.metrics.get("asked_share", 0.0) for manifest in prm]
    calls = [manifest.metrics.get("calls", 0.0) for manifest in prm]
    tokens = [one + other for one, other in zip(prompts, completions, strict=True)]
    scores = [
        sum(workspace.table(k, name).stat().st_size for name in ("orm", "prm", "advantages")) / rollouts[k].rows
        for k in numbers
    ]
    once = [workspace.problems, workspace.warmstart, workspace.report]
    evaluation = workspace.evaluation / "metrics.json"
    whole = all(manifest_path(path).is_file() for path in (*once, evaluation))
    made = Manifest.read(evaluation) if whole else None
    return Rates(
        parameters=float(_parameters(workspace.policy(0))),
        sampling_devices=sampling_devices,
        training_devices=int(policies[0].params.get("devices", {}).get("processes", 1)),
        prompt_tokens=sum(prompts) / sum(manifest.rows for manifest in rollouts),
        completion_tokens=sum(completions) / sum(manifest.rows for manifest in rollouts),
        sampling_tokens_per_s=_rate(completions, sampling),
        start_s=statistics.median(starts),
        training_tokens_per_s=_rate(completions, [manifest.seconds for manifest in policies]),
        verifications_per_s=_rate([manifest.rows for manifest in orm], [manifest.seconds for manifest in orm]),
        judgements_per_s=_rate(asked, [manifest.seconds for manifest in prm]),
        advantages_per_s=_rate([one.rows for one in advantages], [one.seconds for one in advantages]),
        evaluations_per_s=_rate([made.rows], [made.seconds]) if made else None,
        once_s=sum(Manifest.read(path).seconds for path in once) if whole else None,
        asked_share=sum(asked) / sum(manifest.rows for manifest in prm),
        judge_calls=sum(calls) / sum(asked) if sum(calls) and sum(asked) else None,
        judge_prompt_tokens=_share(sum(one.metrics.get("prompt_tokens", 0.0) for one in prm), sum(calls)),
        judge_completion_tokens=_share(sum(one.metrics.get("completion_tokens", 0.0) for one in prm), sum(calls)),
        token_bytes=sum(workspace.table(k, "rollouts").stat().st_size for k in numbers) / sum(tokens),
        score_bytes=statistics.median(scores),
    )


def read_rates(path: Path) -> Rates:
    """Rates that were written by `papo cost --out`.

    Raises:
        DataError: not a file of rates.
    """
    content = read_json(path)
    known = {field.name for field in dataclasses.fields(Rates)}
    wrong = [
        key
        for key, value in content.items()
        if key not in known or isinstance(value, bool) or not isinstance(value, int | float | None) or (value or 0) < 0
    ]
    if wrong:
        fix = f"known: {', '.join(sorted(known))}; each a number, or null where it was not measured"
        raise DataError(f"{', '.join(wrong)}: no rate, or no number", where=str(path), fix=fix)
    return Rates(**content)


def plan_of(
    params: Params,
    *,
    parameters: float | None = None,
    sampling_devices: int | None = None,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
    judge_devices: int = 0,
    sampling_share: float | None = None,
    training_share: float | None = None,
    peak_tflops: float | None = None,
) -> Plan:
    """The run that the params describe; what they cannot know is given."""
    price = params.score_prm.price
    return Plan(
        rounds=params.run.rounds,
        prompts_per_round=params.rollout.prompts_per_round,
        group_size=params.rollout.group_size,
        minibatch_prompts=params.train.minibatch_prompts,
        parameters=parameters,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        sampling_devices=sampling_devices or _sampling_devices(params.rollout),
        training_devices=params.train.devices.processes,
        training_kind=params.train.devices.kind,
        optimizer=params.train.optimizer,
        evaluated=_evaluated(params),
        asks_judge=params.advantage.variant != "orm",
        judge_devices=judge_devices,
        remote_servers=len(params.rollout.server.base_urls) if params.rollout.engine == "vllm-server" else 0,
        prices=(price.prompt, price.completion) if price is not None else None,
        sampling_share=sampling_share,
        training_share=training_share,
        peak_tflops=peak_tflops,
    )


def _outputs(workspace: Workspace, k: int) -> list[Path]:
    return [*(workspace.table(k, name) for name in ("rollouts", "orm", "prm", "advantages")), workspace.policy(k)]


def _lengths(rollouts: Path) -> tuple[int, int]:
    """Tokens of all prompts and of all completions."""
    rows = read_columns(rollouts, ROLLOUTS, "prompt_ids", "completion_ids")
    return sum(len(row["prompt_ids"]) for row in rows), sum(len(row["completion_ids"]) for row in rows)


def _parameters(policy: Path) -> int:
    """Of the tensors that are stored: tied ones count once."""
    total = 0
    for path in sorted(policy.glob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _rate(amounts: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Median of the rounds that took any time."""
    rates = [amount / took for amount, took in zip(amounts, seconds, strict=True) if took > 0 and amount > 0]
    return statistics.median(rates) if rates else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _sampling_devices(params: RolloutParams) -> int:
    if params.engine == "transformers":
        return 1
    engine: VllmParams | ServerParams = params.vllm if params.engine == "vllm" else params.server
    devices, options, engines = engine.devices, engine.options, 1
    if params.engine == "vllm-server":
        engines = len(params.server.base_urls) or params.server.servers
    if devices:
        return sum(len(entry.split(",")) for entry in devices)
    return engines * int(options.get("tensor_parallel_size", options.get("tensor-parallel-size", 1)))


def _evaluated(params: Params) -> int | None:
    """Completions of all benchmarks and policies; None where the params do not say how many problems a benchmark has."""
    prepare = params.prepare
    sums = {name: tier.problems for name, tier in prepare.sums.eval.items()}
    programs = {name: tier.problems for name, tier in prepare.programs.eval.items()}
    tiers = {"sums": sums, "programs": programs}.get(prepare.source, {})
    problems: list[int | None] = []
    for name in params.evaluate.benchmarks:
        if name in tiers:
            problems.append(tiers[name])
        elif name in prepare.eval_sources:
            source = prepare.eval_sources[name]
            counts = [count for count in (source.problems, source.max_problems) if count is not None]
            problems.append(min(counts) if counts else None)
        else:
            problems.append(prepare.holdout)
    known = [count for count in problems if count is not None]
    policies = 1 + len(params.evaluated_rounds)
    return sum(known) * params.evaluate.samples_per_problem * policies if len(known) == len(problems) else None
