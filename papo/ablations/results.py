"""The results of an ablation as a folder: index.html, results.md, results.json, comparisons.csv, claims.csv, plots/*.svg and *.png."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from papo.ablations.evidence import Answered, Compared, Level, answer, compare, levels
from papo.ablations.markdown import as_markdown
from papo.ablations.measures import Measured
from papo.ablations.plan import Arm, Plan, Run
from papo.ablations.plots import TITLES, Line, Panel, panel, stacked
from papo.ablations.scaling import Fit, fits
from papo.ablations.words import SHARES, difference, level, listed, percent, ticked
from papo.ablations.work import Found, Place, look
from papo.engines.reporting.page import fill
from papo.engines.reporting.plots import DARK, LIGHT, Plot, draw, standalone
from papo.engines.versioning import git_commit
from papo.store.files import read_json, replacing, write_json
from papo.store.layout import Workspace


@dataclass(frozen=True)
class Saved:
    """Seconds of work: what was done, and what it would have been if every arm had made its own start and its own run.

    `verdicts`: of them, those that the store had.
    """

    runs: int
    wanted: int
    starts: int
    worked: float
    alone: float
    wall: float
    nights: int
    verdicts: float

    @property
    def share(self) -> float:
        return 1.0 - self.worked / self.alone if self.alone else 0.0


@dataclass(frozen=True)
class Results:
    """Everything that the runs of a plan show so far. `runs`: those that are done, by arm's name and seed."""

    name: str
    plan: Plan
    found: list[Found]
    runs: Mapping[str, Mapping[int, Measured]]
    compared: list[Compared]
    answered: list[Answered]
    levels: list[Level]
    fits: list[Fit]
    saved: Saved

    @property
    def done(self) -> int:
        return sum(one.state == "done" for one in self.found)

    @property
    def failed(self) -> list[Found]:
        """Those that an error or an alarm ended."""
        return [one for one in self.found if one.state in ("failed", "stopped")]

    @property
    def verdict(self) -> str:
        """The first sentence of the page."""
        whole = "" if self.done == len(self.found) else f" So far: {self.done} of {len(self.found)} runs are done."
        if self.answered:
            counts = [
                (sum(one.answer == word for one in self.answered), word)
                for word in ("holds", "does not hold", "undecided")
            ]
            told = {"holds": "hold", "does not hold": "do not hold", "undecided": "are undecided"}
            one = {"holds": "holds", "does not hold": "does not hold", "undecided": "is undecided"}
            parts = [f"{count} {(one if count == 1 else told)[word]}" for count, word in counts if count]
            return f"Of {len(self.answered)} claims {listed(parts)}.{whole}"
        decided = [one for one in self.compared if one.verdict is not None and one.verdict.word != "undecided"]
        return f"{len(decided)} of {len(self.compared)} comparisons are decided.{whole}"


def gather(name: str, plan: Plan, runs: Sequence[Run], place: Place) -> Results:
    """Reads what is done.

    Raises:
        ParamsError: a measure of the plan that the runs do not have.
        DataError: a table is not what was written.
    """
    found = [look(run, place) for run in runs]
    by_arm: dict[str, dict[int, Measured]] = defaultdict(dict)
    for one in found:
        if one.state == "done":
            for arm in one.run.arms:
                by_arm[arm.name][one.run.seed] = Measured(one, place.workspace(one.run))
    return Results(
        name=name,
        plan=plan,
        found=found,
        runs=by_arm,
        compared=compare(plan, by_arm),
        answered=answer(plan, by_arm),
        levels=levels(plan, plan.arms, summed_up(plan, runs), by_arm),
        fits=fits(plan, by_arm),
        saved=_saved(found, place),
    )


def summed_up(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Measures of the table of arms: accuracy and length on every benchmark, and what the judge was asked."""
    benchmarks = runs[0].params.evaluate.benchmarks if runs else ()
    return [*(f"{kind}/{name}" for name in benchmarks for kind in ("accuracy", "length")), "verdicts"]


def _saved(found: Sequence[Found], place: Place) -> Saved:
    done = [one for one in found if one.state == "done" and one.record is not None]
    starts = {one.run.start: _start_seconds(place.start(one.run)) for one in done}
    worked = sum(one.seconds for one in done) + sum(starts.values())
    stored = sum(
        step.metrics.get("cached_share", 0.0) * step.metrics.get("asked_share", 0.0) * step.rows
        for one in done
        if one.record is not None
        for step in one.record.steps
        if step.stage == "score_prm"
    )
    alone = sum((one.seconds + starts[one.run.start]) * len(one.run.arms) for one in done)
    history = read_json(place.history) if place.history.is_file() else []
    return Saved(
        runs=len(done), wanted=sum(len(one.run.arms) for one in done), starts=len(starts), worked=worked, alone=alone,
        wall=sum(night["seconds"] for night in history), nights=len(history), verdicts=stored,
    )  # fmt: skip


def _start_seconds(start: Workspace) -> float:
    from papo.store.layout import manifest_path
    from papo.store.manifest import Manifest

    outputs = (start.problems, start.warmstart)
    return sum(Manifest.read(output).seconds for output in outputs if manifest_path(output).is_file())


def write(results: Results, place: Place, *, command: str) -> Path:
    """Writes the folder anew; the page's path.

    Raises:
        PapoError: it cannot be written.
    """
    content = as_json(results, command)
    out = place.report
    with replacing(out) as folder:
        (folder / "plots").mkdir(parents=True)
        drawn = [(plot, draw(plot, what, folder / "plots")) for plot, what in panels(results)]
        page = fill(
            "ablation.html.j2", {"percent": percent, "number": level, "difference": difference, "ticked": ticked},
            results=results, content=content, plots=drawn, light=LIGHT, dark=DARK, columns=_columns(results), levels=_by_arm(results),
            confidence=percent(results.plan.confidence, 0), command=command,
        )  # fmt: skip
        (folder / "index.html").write_text(page, encoding="utf-8")
        for plot, svg in drawn:
            if svg is not None:
                (folder / "plots" / f"{plot.name}.svg").write_text(standalone(svg), encoding="utf-8")
        content["plots"] = [
            {"name": plot.name, "title": plot.title, "caption": plot.caption} for plot, svg in drawn if svg
        ]
        (folder / "results.md").write_text(as_markdown(content), encoding="utf-8")
        write_json(folder / "results.json", content)
        (folder / "comparisons.csv").write_text(_csv(content["comparisons"]), encoding="utf-8")
        (folder / "claims.csv").write_text(_csv([_flat(claim) for claim in content["claims"]]), encoding="utf-8")
    return out / "index.html"


def as_json(results: Results, command: str) -> dict[str, Any]:
    """Everything that the page says, with the digests of what it was made from."""
    plan = results.plan
    records = [one.record for one in results.found if one.record is not None and one.state == "done"]
    return {
        "plan": results.name,
        "title": plan.title,
        "about": plan.about,
        "verdict": results.verdict,
        "plan_digest": plan.digest,
        "command": command,
        "commit": git_commit(Path()),
        "commits_of_runs": sorted({record.last.commit or "" for record in records}),
        "environment": dict(records[-1].environment) if records else {},
        "seeds": plan.seeds,
        "confidence": plan.confidence,
        "saved": {**results.saved.__dict__, "share": results.saved.share},
        "claims": [
            {
                "name": one.claim.name,
                "says": one.claim.says,
                "paper": one.claim.paper,
                "note": one.claim.note,
                "answer": one.answer,
                "needs": [
                    {"is": need.is_, **_compared(compared)}
                    for need, compared in zip(one.claim.needs, one.compared, strict=True)
                ],
            }
            for one in results.answered
        ],
        "comparisons": [_compared(one) for one in results.compared],
        "arms": [
            {"arm": one.arm, "measure": one.measure, "value": _plain(one.value), "low": _plain(one.low), "high": _plain(one.high),
             "by_seed": {str(seed): _plain(value) for seed, value in one.by_seed.items()}}
            for one in results.levels
        ],
        "fits": [one.as_json() for one in results.fits],
        "runs": [_run(one) for one in results.found],
    }  # fmt: skip


def _run(one: Found) -> dict[str, Any]:
    record = one.record
    last = record.step(f"train {one.run.params.run.rounds - 1}") if record is not None else None
    return {
        "run": one.run.name,
        "arms": [arm.name for arm in one.run.arms],
        "seed": one.run.seed,
        "state": one.state,
        "why": one.why,
        "id": record.id if record is not None else None,
        "lineage": record.lineage if record is not None else one.run.lineage,
        "seconds": round(one.seconds, 1),
        "cost": one.cost,
        "starts": len(record.starts) if record is not None else 0,
        "alarms": list(dict.fromkeys(alarm["name"] for alarm in record.alarms)) if record is not None else [],
        "policy": next(iter(last.outputs.values()), None) if last is not None else None,
    }


def _compared(one: Compared) -> dict[str, Any]:
    """A comparison; what it has no value of is None."""
    found, verdict, drawn = one.difference, one.verdict, one.resampled or (None, None)
    return {
        "measure": one.measure,
        "arm": one.arm,
        "against": one.against,
        "margin": one.margin,
        "verdict": one.words,
        "value": found.value if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "bootstrap_low": drawn[0],
        "bootstrap_high": drawn[1],
        "effect": _plain(found.effect) if found else None,
        "p": verdict.p if verdict else None,
        "p_same": verdict.p_same if verdict else None,
        "seeds": found.seeds if found else 0,
        "problems": found.problems if found else 0,
        "left_out": found.left_out if found else 0,
    }


def _flat(claim: Mapping[str, Any]) -> dict[str, Any]:
    first = claim["needs"][0]
    keys = ("measure", "arm", "against", "value", "low", "high", "verdict", "seeds")
    return {"claim": claim["name"], "says": claim["says"], "answer": claim["answer"]} | {
        key: first.get(key) for key in keys
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- what is drawn ----


def panels(results: Results) -> list[tuple[Plot, Panel]]:
    """Signals by round, benchmarks by round, arms along an axis, length against accuracy."""
    plan = results.plan
    found = []
    if plan.along is not None:
        found += [_along(results, benchmark, plan.along) for benchmark in _benchmarks(results)]
    for facet, arms in _facets(plan).items():
        titled = f": {facet}" if facet else ""
        found += [_signal(results, name, arms, titled) for name in plan.curves]
        found += [_evaluated(results, name, arms, titled) for name in _benchmarks(results)]
    found += [_lengths(results, name) for name in _benchmarks(results)]
    return found


def _facets(plan: Plan) -> dict[str, list[Arm]]:
    """Arms that are drawn together: those that differ on the axis with the most labels; others are plots of their own."""
    longest = _longest(plan)
    found: dict[str, list[Arm]] = defaultdict(list)
    for arm in plan.arms:
        others = {name: label for name, label in arm.labels.items() if name != longest}
        found[Arm(others, {}).name].append(arm)
    return found


def _longest(plan: Plan) -> str:
    """The axis with the most labels, which are told apart by colour."""
    return max(plan.axes, key=lambda name: len(plan.axes[name]))


def _label(plan: Plan, arm: Arm) -> str:
    longest = _longest(plan)
    return Arm({longest: arm.labels[longest]}, {}).name


def _style(plan: Plan, arm: Arm) -> int:
    longest = _longest(plan)
    return list(plan.axes[longest]).index(arm.labels[longest])


def _signal(results: Results, name: str, arms: Sequence[Arm], titled: str) -> tuple[Plot, Panel]:
    lines = []
    for arm in arms:
        values = stacked([run.signal(name) for _, run in sorted(results.runs.get(arm.name, {}).items())])
        lines.append(
            Line(_label(results.plan, arm), _style(results.plan, arm), np.arange(values.shape[1], dtype=float), values)
        )
    title = f"{TITLES.get(name, name.replace('_', ' '))}{titled}"
    caption = "By round: the mean over seeds, and a band from the lowest to the highest of them."
    return panel(_file(f"{name}{titled}"), title, caption, "curves", Panel(lines, name.endswith(SHARES)))


def _evaluated(results: Results, benchmark: str, arms: Sequence[Arm], titled: str) -> tuple[Plot, Panel]:
    lines = []
    for arm in arms:
        rows = [dict(run.accuracies(benchmark)) for _, run in sorted(results.runs.get(arm.name, {}).items())]
        x = sorted(set().union(*rows)) if rows else []
        values = np.array([[row.get(at, math.nan) for at in x] for row in rows]) if rows else np.empty((0, 0))
        lines.append(Line(_label(results.plan, arm), _style(results.plan, arm), np.array(x, dtype=float), values))
    caption = "avg@k of the policies evaluated: the mean over seeds, and a band from the lowest to the highest of them."
    title = f"Accuracy on {benchmark}{titled}"
    return panel(
        _file(f"{benchmark}{titled}"), title, caption, "curves", Panel(lines, True, xlabel="rounds of training")
    )


def _along(results: Results, benchmark: str, axis: str) -> tuple[Plot, Panel]:
    plan = results.plan
    labels = list(plan.axes[axis])
    values = {(one.arm, one.measure): one for one in results.levels}
    groups: dict[str, list[Arm]] = defaultdict(list)
    for arm in plan.arms:
        groups[Arm({name: label for name, label in arm.labels.items() if name != axis}, {}).name].append(arm)
    lines = []
    for number, (name, arms) in enumerate(groups.items()):
        there = [(labels.index(arm.labels[axis]), values[arm.name, f"accuracy/{benchmark}"])
                 for arm in arms if (arm.name, f"accuracy/{benchmark}") in values]  # fmt: skip
        if there:
            x = np.array([at for at, _ in there], dtype=float)
            lines.append(
                Line(name or benchmark, number + 1, x, np.array([(v.value, v.low, v.high) for _, v in there]).T)
            )
    caption = f"avg@k of the final policies with {percent(plan.confidence, 0)} intervals over seeds and problems."
    return panel(
        _file(f"along {axis} {benchmark}"), f"Accuracy on {benchmark}, by {axis.rpartition('.')[2]}", caption, "levels",
        Panel(lines, True, xlabel=axis, ticks=labels),
    )  # fmt: skip


def _lengths(results: Results, benchmark: str) -> tuple[Plot, Panel]:
    plan = results.plan
    by = {(one.arm, one.measure): one.by_seed for one in results.levels}
    drawn: dict[str, list[tuple[float, float]]] = defaultdict(list)
    style: dict[str, int] = {}
    for arm in plan.arms:
        lengths, accuracies = (by.get((arm.name, f"{kind}/{benchmark}"), {}) for kind in ("length", "accuracy"))
        label = _label(plan, arm)
        style[label] = _style(plan, arm)
        drawn[label] += [(lengths[seed], accuracies[seed]) for seed in lengths if seed in accuracies]
    lines = [
        Line(label, style[label], np.array([x for x, _ in points]), np.array([y for _, y in points]))
        for label, points in drawn.items()
    ]
    caption = "A mark is the final policy of one run. Up is better; to the right is longer, which somebody pays for."
    return panel(
        _file(f"length {benchmark}"), f"Length against accuracy on {benchmark}", caption, "scatter",
        Panel(lines, False, xlabel="mean tokens of an answer", ylabel="accuracy"),
    )  # fmt: skip


def _benchmarks(results: Results) -> list[str]:
    return list(results.found[0].run.params.evaluate.benchmarks) if results.found else []


def _file(name: str) -> str:
    return "-".join("".join(char if char.isalnum() else " " for char in name.lower()).split())


# ---- words ----


def _columns(results: Results) -> list[str]:
    return list(dict.fromkeys(one.measure for one in results.levels))


def _by_arm(results: Results) -> dict[str, dict[str, Level]]:
    found: dict[str, dict[str, Level]] = defaultdict(dict)
    for one in results.levels:
        found[one.arm][one.measure] = one
    return found


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
