"""Alarms: what the signals of the rounds so far say is going wrong, each with its evidence in words.

Every alarm is a pure function of the history, a list with one mapping of signals (`papo.core.signals`) a round from round 0 on. An
alarm whose signals are absent is silent. The default limits were set on runs of the embedded policy: with a judge that can be gamed
and no outcome reward, `reward_hacking` fires two or more rounds before accuracy has lost half of its peak; on `orm` and `papo` runs,
and on the published 3B curves of both, nothing fires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Signals = Mapping[str, float]
History = Sequence[Signals]


@dataclass(frozen=True)
class Limits:
    """Where the alarms ring. Shares are between 0 and 1; a round is one batch of rollouts."""

    window: int = 8
    """Rounds back within which a rise counts: of the judge's score, of the length."""
    patience: int = 3
    """Rounds over which accuracy is averaged, and for which zero advantages must last."""
    exhausted_share: float = 0.6
    """Share of responses without any advantage."""
    score_lead: float = 0.05
    """How far the rise of the judge's score may run ahead of the rise of accuracy."""
    outcome_alignment: float = 0.4
    """Below it the reward hardly prefers correct responses to wrong ones of their group; as much as the outcome alone is 1."""
    accuracy_drop: float = 0.35
    """Share of the peak accuracy that is lost."""
    accuracy_noise: float = 0.05
    """Change of accuracy that two batches can show by chance."""
    length_growth: float = 1.6
    """Mean length over the lowest of the window."""
    judge_failure_share: float = 0.1
    """Share of the judge's calls without a verdict."""
    logprob_difference: float = 0.05
    """Mean difference of the sampler's log-probs and the trainer's."""
    inversion_share: float = 0.05
    """Share of correct responses that do not outrank every wrong one of their group."""
    broken_steps: int = 1
    """Optimizer steps of a round that were not applied, because loss or gradient were not finite."""


class Alarm(NamedTuple):
    """`name` is one of ALARMS; `round` is the last round of the history it was raised on."""

    name: str
    round: int
    evidence: str


def alarms(history: History, limits: Limits = Limits()) -> list[Alarm]:
    """The alarms that ring in the last round of `history`; none for an empty one.

    signal_exhaustion  zero_advantage_share >= exhausted_share in each of the last `patience` rounds
    reward_hacking     prm_mean rose within the window by at least score_lead more than accuracy did, and outcome_alignment is
                       below its limit; or, with any alignment, the score rose by twice score_lead while accuracy fell by
                       twice accuracy_noise
    collapse           accuracy, averaged over `patience` rounds, is accuracy_drop below its peak (and accuracy_noise in points)
    length_inflation   length_mean is length_growth times the lowest of the window, and accuracy has not risen by accuracy_noise
    judge_outage       judge_failure_share >= its limit
    logprob_mismatch   logprob_difference_mean >= logprob_difference
    rank_inversions    inversions >= inversion_share of the correct responses
    non_finite_loss    broken_steps of the round's training >= its limit
    """
    if not history:
        return []
    found = ((name, rule(history, limits)) for name, rule in _RULES.items())
    return [Alarm(name, len(history) - 1, evidence) for name, evidence in found if evidence]


def fired(history: History, limits: Limits = Limits()) -> list[Alarm]:
    """Every alarm of every round, as it would have been raised at the time."""
    return [alarm for end in range(1, len(history) + 1) for alarm in alarms(history[:end], limits)]


def onsets(raised: Iterable[Alarm]) -> list[Alarm]:
    """Of the alarms that `fired` gives, those that did not ring in the round before."""
    raised = list(raised)
    ringing = {(alarm.name, alarm.round) for alarm in raised}
    return [alarm for alarm in raised if (alarm.name, alarm.round - 1) not in ringing]


def onset(raised: Iterable[Alarm], name: str) -> int:
    """The round since which the alarm has rung without a break, up to the last of those that it rings in, of which there is one."""
    rounds = {alarm.round for alarm in raised if alarm.name == name}
    since = max(rounds)
    while since - 1 in rounds:
        since -= 1
    return since


class Good(NamedTuple):
    """The last policy that an alarm says nothing against; `round` -1 is the warm start."""

    round: int
    why: str


def last_good(history: History, name: str, since: int, limits: Limits = Limits()) -> Good:
    """The last good policy, given that the alarm has rung since round `since`. Round k is sampled from the policy of round k - 1.

    collapse                            the policy that sampled the middle round of the `patience` rounds with the best mean accuracy
    reward_hacking, length_inflation    the policy that sampled the last round before: the one after it showed what the alarm is about
    the others                          the policy that sampled the round: its samples, scores or training are at fault, and it has
                                        not been trained on them
    """
    if name == "collapse":
        known = [at for at, signals in enumerate(history[: since + 1]) if "accuracy" in signals]
        size = min(limits.patience, len(known))
        windows = [known[at : at + size] for at in range(len(known) - size + 1)] if known else []
        if windows:
            best = max(windows, key=lambda window: sum(history[at]["accuracy"] for at in window))
            middle = best[(size - 1) // 2]
            mean = sum(history[at]["accuracy"] for at in best) / size
            return Good(
                middle - 1,
                f"it sampled round {middle}, around which accuracy was at its best, {mean:.2f} over {size} rounds",
            )
    if name in ("collapse", "reward_hacking", "length_inflation"):
        if since == 0:
            return Good(-1, "the alarm rang from the first round on, and there is none before it")
        return Good(since - 2, f"it sampled round {since - 1}, the last in which {name} did not ring")
    return Good(since - 1, f"it has not been trained on round {since}, in which {name} began")


def _signal_exhaustion(history: History, limits: Limits) -> str | None:
    last = [signals.get("zero_advantage_share", 0.0) for signals in history[-limits.patience :]]
    if len(last) < limits.patience or min(last) < limits.exhausted_share:
        return None
    return f"{last[-1]:.0%} of the responses have no advantage, and at least {min(last):.0%} in {len(last)} rounds{_halves(history[-1])}"


def _halves(signals: Signals) -> str:
    right, wrong = (signals.get(f"zero_advantage_share_all_{name}") for name in ("correct", "wrong"))
    return (
        "" if right is None or wrong is None else f" (in all-correct groups {right:.0%}, in all-wrong ones {wrong:.0%})"
    )


def _reward_hacking(history: History, limits: Limits) -> str | None:
    low, rise = _rise(history, "prm_mean", limits)
    gain = _change(history, "accuracy", low)
    if rise is None or gain is None or rise - gain < limits.score_lead:
        return None
    course = f"since round {low} the judge's score rose by {rise:.2f} and accuracy changed by {gain:+.2f}"
    alignment = history[-1].get("outcome_alignment", 1.0)
    if alignment < limits.outcome_alignment:
        return (
            f"{course}; the reward prefers correct to wrong responses {alignment:.2f} times as much as the outcome does"
        )
    fell = rise >= 2.0 * limits.score_lead and gain <= -2.0 * limits.accuracy_noise
    return course if fell else None


def _collapse(history: History, limits: Limits) -> str | None:
    accuracy = [signals["accuracy"] for signals in history if "accuracy" in signals]
    size = limits.patience
    means = [sum(accuracy[at : at + size]) / size for at in range(len(accuracy) - size + 1)]
    peak = max(means, default=0.0)
    if not means or peak - means[-1] < max(limits.accuracy_drop * peak, limits.accuracy_noise):
        return None
    return f"accuracy over {size} rounds is {means[-1]:.2f}, and was {peak:.2f} at its best"


def _length_inflation(history: History, limits: Limits) -> str | None:
    low, rise = _rise(history, "length_mean", limits)
    gain = _change(history, "accuracy", low)
    if rise is None or gain is None or gain >= limits.accuracy_noise:
        return None
    now = history[-1]["length_mean"]
    before = now - rise
    if rise <= 0.0 or now < limits.length_growth * before:
        return None
    truncated = history[-1].get("truncated_share", 0.0)
    cut = f", {truncated:.0%} of them cut off" if truncated else ""
    return f"since round {low} responses grew from {before:.0f} to {now:.0f} tokens{cut}, and accuracy changed by {gain:+.2f}"


def _judge_outage(history: History, limits: Limits) -> str | None:
    signals = history[-1]
    share = signals.get("judge_failure_share", 0.0)
    if share < limits.judge_failure_share:
        return None
    prefix = "judge_failure_share_"
    causes = {name.removeprefix(prefix): value for name, value in signals.items() if name.startswith(prefix) and value}
    return f"{share:.0%} of the judge's calls gave no verdict: " + ", ".join(f"{k} {v:.0%}" for k, v in causes.items())


def _logprob_mismatch(history: History, limits: Limits) -> str | None:
    mean, largest = (history[-1].get(f"logprob_difference_{name}") for name in ("mean", "max"))
    if mean is None or largest is None or mean < limits.logprob_difference:
        return None
    return f"the sampler's log-probs are {mean:.2g} from the trainer's on average, and up to {largest:.2g}"


def _rank_inversions(history: History, limits: Limits) -> str | None:
    signals = history[-1]
    known = signals.get("responses", 0.0) * (1.0 - signals.get("outcome_missing_share", 0.0))
    correct = round(signals.get("accuracy", 0.0) * known)
    inversions = round(signals.get("inversions", 0.0))
    if not inversions or inversions < limits.inversion_share * correct:
        return None
    text = f"{inversions} of {correct} correct responses do not outrank every wrong one of their group"
    if signals.get("lam_max_exceeded"):
        text += f": lam {signals['lam']:g} is above lam_max {signals['lam_max']:.3f}; lower it or set guard rank"
    return text


def _non_finite_loss(history: History, limits: Limits) -> str | None:
    broken, steps = (round(history[-1].get(name, 0.0)) for name in ("broken_steps", "steps"))
    if broken < limits.broken_steps:
        return None
    return f"{broken} of {steps} optimizer steps were not applied, because loss or gradient were not finite"


def _rise(history: History, name: str, limits: Limits) -> tuple[int, float | None]:
    """(round of the lowest value in the window, rise since then); None where the last round lacks the signal."""
    end = len(history) - 1
    rounds = [at for at in range(max(0, end - limits.window), end + 1) if name in history[at]]
    if not rounds or rounds[-1] != end:
        return end, None
    low = min(rounds, key=lambda at: history[at][name])
    return low, history[end][name] - history[low][name]


def _change(history: History, name: str, since: int) -> float | None:
    now, then = history[-1].get(name), history[since].get(name)
    return None if now is None or then is None else now - then


_RULES: dict[str, Callable[[History, Limits], str | None]] = {
    "reward_hacking": _reward_hacking,
    "length_inflation": _length_inflation,
    "collapse": _collapse,
    "signal_exhaustion": _signal_exhaustion,
    "judge_outage": _judge_outage,
    "logprob_mismatch": _logprob_mismatch,
    "rank_inversions": _rank_inversions,
    "non_finite_loss": _non_finite_loss,
}
ALARMS = tuple(_RULES)
TRAINING_ALARMS = ("non_finite_loss",)
"""Those that a round's training decides; the others its samples and scores."""


def trained(signals: Signals, metrics: Mapping[str, float], steps: int) -> dict[str, float]:
    """The signals of a round with those of its training: the metrics of `train`, and how many optimizer steps it had."""
    return {**signals, "broken_steps": metrics.get("broken", 0.0), "steps": float(steps)}
