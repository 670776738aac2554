"""What a run of some size will take, by rates that another run was measured at: seconds, tokens, money and bytes.

    sampling      completion tokens / (rate x devices / devices measured x parameters measured / parameters), and the start of the engine
    training      the same; or, where no rate was measured and a share of the peak is given,
                  operations / (share x peak x devices), operations 2 N T (forward, sampling) or 6 N T (training) of N parameters
                  and T tokens of prompts and completions; attention is not counted
    scoring       responses / rate; of the judge, those that are asked about
    evaluation    as sampling, by completions
    disk          bytes a token and a response as measured; a policy 4 bytes a parameter, moments 8 (2 in 8 bits); every round is kept
    network       weights to each server of other machines, a policy a round; gradients between training devices, 2 (d-1)/d x 4 bytes
                  a parameter, step and device (ddp), weights as well, 3 (d-1)/d (fsdp, deepspeed)

What was not measured is None, and so is all that it is part of: nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WEIGHT_BYTES = 4
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}


@dataclass(frozen=True)
class Rates:
    """What a run was measured at; a second is one of wall time, of all its devices together.

    `start_s`: until an engine had the policy, a round. `once_s`: of the stages that run once, without evaluation. Bytes are of what is
    stored: `token_bytes` of rollouts.parquet, a token of prompt and completion; `score_bytes` of the other tables, a response.
    `judge_calls`: a response that was asked about; tokens are those of a call.
    """

    parameters: float | None = None
    sampling_devices: int = 1
    training_devices: int = 1
    prompt_tokens: float | None = None
    completion_tokens: float | None = None
    sampling_tokens_per_s: float | None = None
    start_s: float | None = None
    training_tokens_per_s: float | None = None
    verifications_per_s: float | None = None
    judgements_per_s: float | None = None
    advantages_per_s: float | None = None
    evaluations_per_s: float | None = None
    once_s: float | None = None
    asked_share: float | None = None
    judge_calls: float | None = None
    judge_prompt_tokens: float | None = None
    judge_completion_tokens: float | None = None
    token_bytes: float | None = None
    score_bytes: float | None = None


@dataclass(frozen=True)
class Plan:
    """The run that is asked about.

    Args:
        parameters: of the policy; None: as many as the measured one.
        prompt_tokens, completion_tokens: means a response; None: as measured.
        evaluated: completions that the evaluation samples and verifies; None: not known.
        remote_servers: that take the policy over the network, once a round.
        prices: of a million prompt and completion tokens of the judge.
        judge_devices: that the judge has for as long as it is asked.
        sampling_share, training_share: of `peak_tflops` a device, where no rate was measured.
    """

    rounds: int
    prompts_per_round: int
    group_size: int
    minibatch_prompts: int
    parameters: float | None = None
    prompt_tokens: float | None = None
    completion_tokens: float | None = None
    sampling_devices: int = 1
    training_devices: int = 1
    training_kind: str = "ddp"
    optimizer: str = "adamw"
    evaluated: int | None = None
    asks_judge: bool = True
    judge_devices: int = 0
    remote_servers: int = 0
    prices: tuple[float, float] | None = None
    sampling_share: float | None = None
    training_share: float | None = None
    peak_tflops: float | None = None


@dataclass(frozen=True)
class Line:
    """One amount: of a round and of the whole run, in `unit` (s, device-s, tokens, calls, money, bytes); `by`: from what it follows."""

    what: str
    unit: str
    round: float | None
    run: float | None
    by: str


def cost(plan: Plan, rates: Rates) -> list[Line]:
    """What the plan takes, a line an amount; the totals last. None where a rate that it takes was not measured."""
    size = plan.parameters if plan.parameters is not None else rates.parameters
    prompt = plan.prompt_tokens if plan.prompt_tokens is not None else rates.prompt_tokens
    completion = plan.completion_tokens if plan.completion_tokens is not None else rates.completion_tokens
    responses = plan.prompts_per_round * plan.group_size
    new = _times(responses, completion)
    whole = _times(responses, _sum([prompt, completion]))
    asked = _times(responses, rates.asked_share) if plan.asks_judge else 0.0
    smaller = _over(rates.parameters, size)
    rounds = plan.rounds

    def line(what: str, unit: str, a_round: float | None, by: str) -> Line:
        return Line(what, unit, a_round, _times(rounds, a_round), "no measured rate" if a_round is None else by)

    def work(rate: float | None, devices: float, operations: float, share: float | None) -> tuple[float | None, str]:
        """Seconds of a round, and by what."""
        if rate is not None:
            by = f"measured {rate:,.0f} tokens/s{'' if devices == 1 else f' x {devices:g}'}"
            return _over(new, _times(rate, devices, smaller)), by + _size_words(smaller)
        if share is None or plan.peak_tflops is None:
            return None, "no measured rate"
        total = {2.0: plan.sampling_devices, 6.0: plan.training_devices}[operations]
        speed = share * plan.peak_tflops * 1e12 * total
        return _over(
            _times(operations, size, whole), speed
        ), f"{operations:g} N T at {share:.0%} of {total} devices' peak"

    sampled, sampled_by = work(
        rates.sampling_tokens_per_s, plan.sampling_devices / rates.sampling_devices, 2.0, plan.sampling_share
    )
    sampled = _sum([sampled, rates.start_s or 0.0])
    trained, trained_by = work(
        rates.training_tokens_per_s, plan.training_devices / rates.training_devices, 6.0, plan.training_share
    )
    verified = _over(responses, rates.verifications_per_s)
    judged = 0.0 if asked == 0 else _over(asked, rates.judgements_per_s)
    weighed = _over(responses, rates.advantages_per_s)
    seconds = [
        line("rollout", "s", sampled, sampled_by),
        line("score_orm", "s", verified, _rate_words(rates.verifications_per_s)),
        line("score_prm", "s", judged, "nobody is asked" if asked == 0 else _rate_words(rates.judgements_per_s)),
        line("advantage", "s", weighed, _rate_words(rates.advantages_per_s)),
        line("train", "s", trained, trained_by),
    ]
    faster = plan.sampling_devices / rates.sampling_devices
    longer = _over(completion, rates.completion_tokens)
    pace = _over(_times(rates.evaluations_per_s, faster, smaller), longer)
    evaluated = _over(plan.evaluated, pace)
    seconds.append(Line("evaluate", "s", None, evaluated, _rate_words(rates.evaluations_per_s)))
    seconds.append(
        Line(
            "prepare, warmstart, report",
            "s",
            None,
            rates.once_s,
            "no measured rate" if rates.once_s is None else "as measured",
        )
    )

    calls = _times(asked, rates.judge_calls)
    read, said = _times(calls, rates.judge_prompt_tokens), _times(calls, rates.judge_completion_tokens)
    judge = []
    if plan.asks_judge and rates.judge_calls is not None:
        judge = [
            line("judge", "calls", calls, "measured calls a response asked about"),
            line("judge reads", "tokens", read, "measured tokens a call"),
            line("judge writes", "tokens", said, "measured tokens a call"),
        ]
        if plan.prices is not None:
            bill = _sum([_times(read, plan.prices[0] / 1e6), _times(said, plan.prices[1] / 1e6)])
            judge.append(line("judge", "money", bill, "score_prm.prices"))

    policy = _times(WEIGHT_BYTES, size)
    disk = [
        line("rollouts", "bytes", _times(whole, rates.token_bytes), "measured bytes a token"),
        line("scores and advantages", "bytes", _times(responses, rates.score_bytes), "measured bytes a response"),
        line("policy", "bytes", policy, "4 bytes a parameter"),
        line(
            "optimizer state", "bytes", _times(MOMENT_BYTES[plan.optimizer], size),
            f"{MOMENT_BYTES[plan.optimizer]} bytes a parameter",
        ),
    ]  # fmt: skip
    others = plan.training_devices - 1
    steps = math.ceil(plan.prompts_per_round / plan.minibatch_prompts)
    copies = 2 if plan.training_kind == "ddp" else 3
    network = [
        line("policy to servers", "bytes", _times(plan.remote_servers, policy), f"{plan.remote_servers} servers elsewhere"),
        line(
            "between training devices", "bytes", _times(copies * others * steps, policy),
            f"{plan.training_kind}, {steps} steps, {plan.training_devices} devices",
        ),
    ]  # fmt: skip
    wall = Line(
        "wall time", "s",
        _sum(one.round for one in seconds if one.round is not None or one.what in STAGES),
        _sum(one.run for one in seconds), "the stages one after the other",
    )  # fmt: skip
    used = Line(
        "devices", "device-s",
        _sum([_times(sampled, plan.sampling_devices), _times(trained, plan.training_devices), _times(judged, plan.judge_devices)]),
        _sum(
            [
                _times(rounds, sampled, plan.sampling_devices), _times(rounds, trained, plan.training_devices),
                _times(rounds, judged, plan.judge_devices), _times(evaluated, plan.sampling_devices),
            ]
        ), "while they sample, train, judge and evaluate",
    )  # fmt: skip
    stored = Line("on disk", "bytes", _sum(one.round for one in disk), _sum(one.run for one in disk), "the four above")
    return [*seconds, *judge, *disk, *network, wall, used, stored]


STAGES = ("rollout", "score_orm", "score_prm", "advantage", "train")


def _sum(parts: Iterable[float | None]) -> float | None:
    """None if a part is."""
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _times(*parts: float | None) -> float | None:
    """None if a part is, unless another is 0."""
    known = [part for part in parts if part is not None]
    if 0 in known:
        return 0.0
    return math.prod(known) if len(known) == len(parts) else None


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _rate_words(rate: float | None) -> str:
    return "no measured rate" if rate is None else f"measured {rate:,.0f}/s"


def _size_words(smaller: float | None) -> str:
    return "" if smaller in (None, 1.0) else f", x {smaller:.3g} for the parameters"
