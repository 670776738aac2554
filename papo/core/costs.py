"""What asking a judge cost, over the rounds of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SUMS = (
    "calls",
    "calls_failed",
    "prompt_tokens",
    "completion_tokens",
    "cost",
    "cache_tokens",
    "cache_saved",
    "not_asked_calls",
    "not_asked_tokens",
    "not_asked_saved",
)
SHARES = ("cached_share", "vote_agreement")


def model_asked(metrics: Mapping[str, float]) -> bool:
    """Whether the judge of a round was a model, whose verdicts cost something or had done so before."""
    return "calls" in metrics or "cached_share" in metrics


def totals(rounds: Sequence[Mapping[str, float]], responses: Sequence[int]) -> dict[str, float]:
    """The metrics of score_prm over all rounds, each of which has a number of responses.

    Counts, tokens and money are added up; `asked_share` is that of all responses, the other shares are means over those that were asked
    about, in the rounds that have them. What no round has is absent.
    """
    found = {
        name: math.fsum(row[name] for row in rounds if name in row)
        for name in SUMS
        if any(name in row for row in rounds)
    }
    asked = [row.get("asked_share", 0.0) * count for row, count in zip(rounds, responses, strict=True)]
    for name in ("asked_share", *SHARES):
        weights = responses if name == "asked_share" else asked
        weighted = [(row[name], weight) for row, weight in zip(rounds, weights, strict=True) if name in row]
        if total := sum(weight for _, weight in weighted):
            found[name] = math.fsum(value * weight for value, weight in weighted) / total
    return found


def money(value: float) -> str:
    """Four significant digits without an exponent, thousands set apart; more where they stand before the point: `12,346`, `0.001235`."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 3 - int(f"{value:.3e}".split("e")[1]))
    return f"{value:,.{decimals}f}"
