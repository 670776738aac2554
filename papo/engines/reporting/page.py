"""The words, tables and notes of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from papo.engines.reporting.judging import asked_sentence, judging_table
from papo.engines.reporting.plots import DARK, LIGHT, Plot
from papo.engines.reporting.responses import PAID, Responses
from papo.engines.reporting.results import Benchmark, Estimate, Run

COLUMNS = {
    "accuracy": "Accuracy",
    "prm_mean": "Judge's score",
    "judge_failure_share": "Judge failures",
    "zero_advantage_share": "Zero advantage",
    "groups_process_active_share": "A_proc active",
    "negative_correct_share": "Correct with A < 0",
    "outcome_alignment": "Outcome alignment",
    "inversions": "Inversions",
    "length_mean": "Mean length",
    "truncated_share": "Truncated",
    "verification_share": "Verifying",
}


def render(
    title: str,
    shown: Run,
    plots: Sequence[tuple[Plot, str | None]],
    responses: Responses | None = None,
    response_plots: Sequence[tuple[Plot, str | None]] = (),
) -> str:
    """The page; `responses`: of the last round, with their plots."""
    present = {name for row in shown.rounds for name in row}
    return fill(
        "page.html.j2",
        {"percent": _percent, "interval": _interval, "sentence": _sentence, "signed": _signed},
        title=title,
        verdict=_verdict(shown.evaluation),
        setup=_setup(shown.params),
        notes=_notes(shown),
        confidence=_percent(shown.params.get("evaluate.confidence", 0.95), 0),
        columns=[name for name in COLUMNS if name in present],
        labels=COLUMNS,
        light=LIGHT,
        dark=DARK,
        plots=plots,
        rounds=shown.rounds,
        evaluation=shown.evaluation,
        calibrations=shown.calibrations,
        judging=judging_table(shown),
        asked=asked_sentence(shown),
        params=shown.params,
        lineage=shown.lineage,
        responses=responses,
        response_plots=response_plots,
        paid=PAID,
    )


def fill(template: str, filters: Mapping[str, Callable[..., object]], **values: Any) -> str:
    """A page by the name of its template, which lies here; text is escaped, and a value that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= filters
    return environment.get_template(template).render(**values) + "\n"


def _verdict(evaluation: Mapping[str, Benchmark]) -> str:
    """One sentence; a benchmark whose interval of the paired gain holds 0 shows no clear change."""
    gains = {name: benchmark.gain for name, benchmark in evaluation.items()}
    clauses = [
        ("raised accuracy on", [name for name, gain in gains.items() if gain.low > 0]),
        ("lowered it on" if any(g.low > 0 for g in gains.values()) else "lowered accuracy on",
         [name for name, gain in gains.items() if gain.high < 0]),
        ("made no clear difference on", [name for name, gain in gains.items() if gain.low <= 0 <= gain.high]),
    ]  # fmt: skip
    return f"Training {_listed([f'{verb} {_listed(names)}' for verb, names in clauses if names])}."


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _sentence(benchmark: Benchmark, confidence: str) -> str:
    (first, last), gain = benchmark.ends, benchmark.gain
    return (
        f"{benchmark.metric} from {_percent(first.value)} ({_interval(first)}) with the warm start to {_percent(last.value)} "
        f"({_interval(last)}) with the final policy: a paired difference of {_points(gain.value)} points "
        f"({_points(gain.low)} to {_points(gain.high)}) on {gain.problems} problems; {confidence} intervals."
    )


def _setup(params: Mapping[str, Any]) -> str:
    names = {
        "variant {}": "advantage.variant", "λ = {:g}": "advantage.lam", "{} rounds": "run.rounds",
        "{} prompts a round": "rollout.prompts_per_round", "{} responses a prompt": "rollout.group_size",
        "judge {}": "score_prm.model.model" if params.get("score_prm.judge") == "model" else "score_prm.judge", "seed {}": "run.seed",
    }  # fmt: skip
    unused = {"advantage.lam", names["judge {}"]} if params.get("advantage.variant") == "orm" else set()
    shown = [(text, params[key]) for text, key in names.items() if params.get(key) is not None and key not in unused]
    return " · ".join(text.format(value) for text, value in shown)


def _notes(shown: Run) -> list[str]:
    """What a reader should know before believing the curves."""
    notes = [
        f"Alarm from round {a.round}, {a.name.replace('_', ' ')}: {a.evidence}."
        + (f" It was {shown.accepted[a.name]}." if a.name in shown.accepted else "")
        for a in shown.alarms
    ]
    if np.any(shown.signal("lam_max_exceeded") == 1.0):
        notes.append(
            f"λ is at or above {np.nanmin(shown.signal('lam_max')):.3g}, the bound for this group size below which "
            f"every correct response outranks every wrong one; inversions: {np.nansum(shown.signal('inversions')):.0f}."
        )
    failures = shown.signal("judge_failure_share")
    if np.any(failures > 0.05):
        worst = int(np.nanargmax(failures))
        notes.append(f"The judge failed on {_percent(failures[worst])} of what it was asked in round {worst}.")
    for name, benchmark in shown.evaluation.items():
        if missing := benchmark.gain.missing:
            notes.append(f"{missing} samples on {name} have no verdict and are left out of its accuracy.")
    return notes


def _percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float) -> str:
    """An advantage with its sign; a dash where there is none."""
    if value != value:
        return "\N{EN DASH}"
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{100 * estimate.high:.1f}"
