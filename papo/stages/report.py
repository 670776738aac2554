"""report: one static page, series for DVC's plots, pictures for the record."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from papo.core.alarms import Limits, fired, onsets, trained
from papo.core.costs import totals
from papo.engines.reporting.page import render
from papo.engines.reporting.plots import PLOTS, draw
from papo.engines.reporting.responses import RESPONSE_PLOTS, Responses, read_responses
from papo.engines.reporting.results import EVALUATION, Calibration, Run
from papo.errors import DataError
from papo.params import ReportParams
from papo.store.faults import reached
from papo.store.files import read_json, replacing, write_json
from papo.store.manifest import Context, Manifest, Task

CODE = (
    "stages/report.py",
    "engines/reporting",
    "core/advantages.py",
    "core/alarms.py",
    "core/costs.py",
    "core/credit.py",
    "core/groups.py",
)

# Columns of rounds.csv that DVC's plots name; they are there even where a run has no such signal.
PLOTTED = ("accuracy", "prm_mean_correct", "zero_advantage_share", "length_mean", "length_p95")


@dataclass(frozen=True)
class Inputs:
    """Manifests of the process scores, the advantages and of training by round, and the evaluation's metrics.json; `limits` of the alarms.

    `calibrations`: those of the run's judge by name, as `papo calibrate-judge` wrote them; there may be none. `accepted`: by alarm, who
    let the run go on in spite of it, and when. `lineage`: what the run is a run of, for `papo lineage`; "" if nobody asks.
    """

    params: dict[str, Any]
    limits: dict[str, Any]
    judging: dict[str, Path]
    advantages: dict[str, Path]
    training: dict[str, Path]
    evaluation: Path
    calibrations: dict[str, Path] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    lineage: str = ""
    tables: dict[str, Path] = field(default_factory=dict)
    """Those of the last round, by the names of papo.engines.reporting.TABLES; none: no responses are shown."""


def run(
    params: ReportParams, inputs: Inputs, out: Path, *, engine: None = None, context: Context = Context()
) -> Manifest:
    """Writes index.html, rounds.csv, training.csv, summary.json and plots/*.png to the folder `out`.

    Equal inputs give equal bytes. The params of `tracking` are left out: they change no result and may name a password.

    Raises:
        MissingInputError, DataError: a manifest, metrics.json or a calibration is absent or damaged.
    """
    inputs = replace(inputs, params={k: v for k, v in inputs.params.items() if not k.startswith("tracking.")})
    task = Task("report", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    shown = _read(inputs)
    summary = _summary(shown)
    with replacing(out) as folder:
        (folder / "plots").mkdir(parents=True)
        plots = [(plot, draw(plot, shown, folder / "plots")) for plot in PLOTS]
        responses = _responses(params, inputs)
        drawn = [(plot, draw(plot, responses, folder / "plots")) for plot in RESPONSE_PLOTS] if responses else []
        reached("write", out / "index.html")
        page = render(params.title, shown, plots, responses, drawn)
        (folder / "index.html").write_text(page, encoding="utf-8")
        (folder / "rounds.csv").write_text(_csv(shown.rounds, ["round"], PLOTTED), encoding="utf-8")
        (folder / "training.csv").write_text(_csv(shown.steps, ["round", "step"]), encoding="utf-8")
        write_json(folder / "summary.json", summary)
    versions = {name: version(name) for name in ("matplotlib", "jinja2")}
    return task.finish(rows=len(shown.rounds), metrics=summary, versions=versions)


def _responses(params: ReportParams, inputs: Inputs) -> Responses | None:
    if not inputs.tables:
        return None
    settings = {name: inputs.params[f"advantage.{name}"] for name in ("lam", "scale", "eps")}
    return read_responses(max(map(int, inputs.advantages)), inputs.tables, groups=params.gallery, **settings)


def _read(inputs: Inputs) -> Run:
    signals = [(int(key), _manifest(inputs.advantages[key])) for key in sorted(inputs.advantages, key=int)]
    judging = [(int(key), _manifest(inputs.judging[key])) for key in sorted(inputs.judging, key=int)]
    training = [(int(key), _manifest(inputs.training[key])) for key in sorted(inputs.training, key=int)]
    steps = [{"round": float(key), **row} for key, manifest in training for row in manifest.history]
    by_round = dict(training)
    history = [
        trained(manifest.metrics, by_round[key].metrics, len(by_round[key].history))
        if key in by_round
        else manifest.metrics
        for key, manifest in signals
    ]
    try:
        evaluation = EVALUATION.validate_python(read_json(inputs.evaluation))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(
            f"not the metrics of an evaluation: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
            where=str(inputs.evaluation),
            fix="delete it and run `papo evaluate` again",
        ) from None
    # In a table of all signals, the metrics of score_prm need a name that says whose they are.
    cost = {key: {f"judge_{name}": value for name, value in manifest.metrics.items()} for key, manifest in judging}
    return Run(
        params=inputs.params,
        rounds=[{"round": float(key), **manifest.metrics, **cost.get(key, {})} for key, manifest in signals],
        steps=[{**row, "step": float(number)} for number, row in enumerate(steps, 1)],  # counted over the whole run
        evaluation=dict(sorted(evaluation.items(), key=lambda item: _place(item[0], inputs.params))),
        alarms=onsets(fired(history, Limits(**inputs.limits))),
        accepted=inputs.accepted,
        calibrations=[_calibration(inputs.calibrations[name]) for name in sorted(inputs.calibrations)],
        judging=[{"round": float(key), **manifest.metrics} for key, manifest in judging],
        lineage=inputs.lineage,
        judging_total=totals([m.metrics for _, m in judging], [m.rows for _, m in judging]),
    )


def _calibration(path: Path) -> Calibration:
    try:
        return Calibration.model_validate(read_json(path))
    except ValidationError as error:
        raise DataError(
            f"not the calibration of a judge: {error.error_count()} fields are wrong",
            where=str(path),
            fix="delete it, or run `papo calibrate-judge` again",
        ) from None


def _place(benchmark: str, params: Mapping[str, Any]) -> tuple[int, str]:
    """Benchmarks in the order of the params."""
    named = list(params.get("evaluate.benchmarks", []))
    return (named.index(benchmark) if benchmark in named else len(named), benchmark)


def _manifest(path: Path) -> Manifest:
    return Manifest.read(path.with_name(path.name.removesuffix(".manifest.json")))


def _summary(shown: Run) -> dict[str, float]:
    """Flat numbers; first and last are those of the first and last round that have the signal."""
    summary: dict[str, float] = {}
    for name, benchmark in shown.evaluation.items():
        summary |= {
            f"{name}/accuracy_warmstart": benchmark.ends[0].value,
            f"{name}/accuracy": benchmark.ends[1].value,
            f"{name}/gain": benchmark.gain.value,
            f"{name}/gain_low": benchmark.gain.low,
            f"{name}/gain_high": benchmark.gain.high,
        }
    for signal in ("zero_advantage_share", "length_mean", "prm_mean"):
        if values := [row[signal] for row in shown.rounds if signal in row]:
            summary |= {f"{signal}_first": values[0], f"{signal}_last": values[-1]}
    return summary


def _csv(rows: Sequence[Mapping[str, float]], first: Sequence[str], always: Iterable[str] = ()) -> str:
    columns = [*first, *sorted({name for row in rows for name in row}.union(always) - set(first))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{name: int(row[name]) for name in first}} for row in rows)
    return text.getvalue()
