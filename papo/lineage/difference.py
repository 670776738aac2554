"""Two runs side by side: which stage made other bytes first and why, and what that came to in data, judge, alarms and metrics."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from papo.core.statistics import Estimate
from papo.errors import PapoError
from papo.lineage.find import Known
from papo.lineage.record import RunRecord, StepRecord
from papo.pipeline import CODE
from papo.schemas import EVALUATION
from papo.stages.evaluate import FINAL, paired_gain
from papo.store.files import digest
from papo.store.tables import read_columns

NOT_COMPARED = {"report": "it shows how long things took"}
"""Stages whose output holds times, and is no input of another."""

JUDGING = ("calls", "prompt_tokens", "completion_tokens", "cost")

Pair = tuple[Any, Any]


def difference(a: Known, b: Known) -> dict[str, Any]:
    """All that differs between two runs, as `papo diff --json` prints it; of each pair the first is of `a`.

    Outputs are compared by the digests on record; problem sets, evaluation rows and rubrics are read where they are still those of the
    record, and what is not at hand is said.
    """
    steps = compare_steps(a.record.steps, b.record.steps)
    metrics = _metrics(a, b)
    return {
        "a": _brief(a),
        "b": _brief(b),
        **steps,
        "params": changed(flat(a.record.params), flat(b.record.params)),
        "sources": changed(a.record.sources, b.record.sources),
        "data": _data(a, b),
        "code": _code(a.record, b.record),
        "environment": changed(a.record.environment, b.record.environment),
        "judge": _judge(a.record, b.record),
        "alarms": _alarms(a.record, b.record),
        "metrics": metrics,
        "judging": _differing({name: (_judged(a.record, name), _judged(b.record, name)) for name in JUDGING}),
        "seconds": _seconds(a.record, b.record),
    }


def compare_steps(a: Iterable[StepRecord], b: Iterable[StepRecord]) -> dict[str, Any]:
    """`byte_equal`; `first`: the first step whose outputs differ, which of them, and why; `differing`; steps that only one has."""
    ours, theirs = ({step.name: step for step in steps} for steps in (a, b))
    both = [name for name in ours if name in theirs]
    compared = [name for name in both if ours[name].stage not in NOT_COMPARED]
    found = {name: outputs for name in compared if (outputs := _outputs(ours[name], theirs[name]))}
    only_a, only_b = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    first = next(iter(found), None)
    return {
        "byte_equal": bool(compared) and not (found or only_a or only_b),
        "first": None
        if first is None
        else {"step": first, "outputs": found[first], "why": why(ours[first], theirs[first])},
        "compared": len(compared),
        "differing": list(found),
        "only_a": only_a,
        "only_b": only_b,
        "not_compared": {name: NOT_COMPARED[ours[name].stage] for name in both if name not in compared},
    }


def _outputs(a: StepRecord, b: StepRecord) -> list[str]:
    """Names of the outputs that differ in more than how their rows were come by."""
    names = sorted(a.outputs.keys() | b.outputs.keys())
    return [name for name in names if not _same(a, b, name)]


def _same(a: StepRecord, b: StepRecord, name: str) -> bool:
    if a.outputs.get(name) == b.outputs.get(name):
        return True
    return name in a.content and a.content[name] == b.content.get(name)


def why(a: StepRecord, b: StepRecord) -> list[str]:
    """What of a step's identity differs, a line each; one line that says so if nothing does."""
    lines = [f"param {key}: {_text(pair[0])} -> {_text(pair[1])}" for key, pair in _moved(a.params, b.params)]
    lines += [f"input {key}: {_text(pair[0])} -> {_text(pair[1])}" for key, pair in _moved(a.inputs, b.inputs)]
    if a.code != b.code:
        lines.append(f"code: {a.code[:12]} -> {b.code[:12]}")
    versions = changed(a.versions, b.versions)
    lines += [f"version of {name}: {_text(pair[0])} -> {_text(pair[1])}" for name, pair in versions.items()]
    return lines or [
        "params, inputs, code and libraries are the same: the machine, its threads or a server answered otherwise"
    ]


def _moved(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[tuple[str, Pair]]:
    return changed(flat(a), flat(b)).items()


def changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Key -> both values, where they differ; None for the one that has no such key."""
    return _differing({key: (a.get(key), b.get(key)) for key in sorted({*a, *b})})


def _differing(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _text(value: Any) -> str:
    """A digest by its first digits."""
    text = str(value)
    return text[:12] if len(text) == 64 and not text.strip("0123456789abcdef") else text


def _brief(one: Known) -> dict[str, Any]:
    record = one.record
    return {
        "id": record.id,
        "name": record.name,
        "workspace": str(one.workspace.root),
        "began": record.starts[0].at,
        "state": record.state,
        "commit": record.last.commit,
    }


# ---- data ----


def _data(a: Known, b: Known) -> list[dict[str, Any]]:
    """A row a problem set that differs; its counts are None where a file is no longer at hand."""
    return [
        {"file": file, "digests": pair} | _problems(a, b, file)
        for file, pair in changed(a.record.data, b.record.data).items()
    ]


def _problems(a: Known, b: Known, file: str) -> dict[str, Any]:
    rows = [_rows_by_prompt(one, file) for one in (a, b)]
    counts: dict[str, Any] = {"rows": tuple(None if found is None else len(found) for found in rows)}
    ours, theirs = rows
    if ours is None or theirs is None:
        return counts | {"only_a": None, "only_b": None, "changed": None}
    both = ours.keys() & theirs.keys()
    return counts | {
        "only_a": len(ours.keys() - theirs.keys()),
        "only_b": len(theirs.keys() - ours.keys()),
        "changed": sum(ours[key] != theirs[key] for key in both),
    }


def _rows_by_prompt(one: Known, file: str) -> dict[str, Any] | None:
    path = one.workspace.root / file
    if not _at_hand(path, one.record.data.get(file)):
        return None
    rows = pq.read_table(path).to_pylist()
    return {str(row.get("prompt", number)): row for number, row in enumerate(rows)}


def _at_hand(path: Path, recorded: str | None) -> bool:
    return recorded is not None and path.is_file() and digest(path) == recorded


# ---- code, judge, alarms ----


def _code(a: RunRecord, b: RunRecord) -> dict[str, Any]:
    return {
        "stages": [stage for stage in CODE if a.code.get(stage) != b.code.get(stage)],
        "files": list(changed(a.files, b.files)),
        "commits": _differing({"commit": (a.last.commit, b.last.commit), "changes": (a.last.diff, b.last.diff)}),
    }


def _judge(a: RunRecord, b: RunRecord) -> dict[str, Any]:
    names = ("name", "model", "rubric", "digest", "calibrations")
    found: dict[str, Any] = _differing({name: (getattr(a.judge, name), getattr(b.judge, name)) for name in names})
    before, after = ((judge.text or "").splitlines() for judge in (a.judge, b.judge))
    lines = list(difflib.unified_diff(before, after, a.judge.rubric or "", b.judge.rubric or "", lineterm=""))
    return found | ({"rubric_text": lines} if lines and a.judge.text and b.judge.text else {})


def _alarms(a: RunRecord, b: RunRecord) -> dict[str, list[str]]:
    ours, theirs = ([f"{one['name']} from round {one['round']}" for one in record.alarms] for record in (a, b))
    return {
        "only_a": [line for line in ours if line not in theirs],
        "only_b": [line for line in theirs if line not in ours],
        "both": [line for line in ours if line in theirs],
    }


# ---- metrics ----


def _metrics(a: Known, b: Known) -> list[dict[str, Any]]:
    """A row a benchmark that both have: the final policies by their metric, b minus a by problem, and their mean lengths."""
    rows = []
    for name in a.record.evaluation:
        if name not in b.record.evaluation:
            continue
        ours, theirs = (one.record.evaluation[name] for one in (a, b))
        metric = ours.get("gain", {}).get("metric", "avg_at_k")
        gain, note = _paired(name, metric, a, b)
        rows.append(
            {
                "benchmark": name,
                "metric": metric,
                "value": tuple(one.get(FINAL, {}).get(metric) for one in (ours, theirs)),
                "difference": None if gain is None else gain._asdict(),
                "note": note,
                "length": tuple(one.get(FINAL, {}).get("length_mean") for one in (ours, theirs)),
            }
        )
    return rows


def _paired(name: str, metric: Any, a: Known, b: Known) -> tuple[Estimate | None, str]:
    """The difference on the problems that both evaluated, and what is to be said of it."""
    tables = [_samples(one, name) for one in (a, b)]
    missing = [str(one.workspace.root) for one, rows in zip((a, b), tables, strict=True) if rows is None]
    if missing:
        return None, f"the samples are not at hand in {' and '.join(missing)}"
    ours, theirs = (rows or [] for rows in tables)
    shared = {row["problem_id"] for row in ours} & {row["problem_id"] for row in theirs}
    left_out = len({row["problem_id"] for row in (*ours, *theirs)}) - len(shared)
    params = b.record.params["evaluate"]
    try:
        gain = paired_gain(
            metric,
            [row for row in theirs if row["problem_id"] in shared],
            [row for row in ours if row["problem_id"] in shared],
            k=min(one.record.params["evaluate"]["samples_per_problem"] for one in (a, b)),
            confidence=params["confidence"],
            seed=b.record.params["run"]["seed"],
        )
    except PapoError as error:
        return None, error.what
    return gain, f"{left_out} problems that only one of them has are left out" if left_out else ""


def _samples(one: Known, name: str) -> list[dict[str, Any]] | None:
    step, path = one.record.step("evaluate"), one.workspace.evaluation / f"{name}.parquet"
    if step is None or not _at_hand(path, step.outputs.get(path.name)):
        return None
    columns = ("policy", "problem_id", "orm_score", "extracted")
    return [row for row in read_columns(path, EVALUATION, *columns) if row["policy"] == FINAL]


def _judged(record: RunRecord, name: str) -> float:
    return sum(step.metrics.get(name, 0.0) for step in record.steps if step.stage == "score_prm")


def _seconds(a: RunRecord, b: RunRecord) -> dict[str, Pair]:
    totals: list[dict[str, float]] = []
    for record in (a, b):
        found: dict[str, float] = defaultdict(float)
        for step in record.steps:
            found[step.stage] += step.seconds
        totals.append(found)
    return {stage: tuple(round(total.get(stage, 0.0), 3) for total in totals) for stage in CODE}  # type: ignore[misc]  # a pair
