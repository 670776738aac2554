"""`papo lineage`, `papo diff` and `papo reproduce`: what a person reads, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from papo.engines.tracking.lookup import Lookup
from papo.errors import PapoError
from papo.lineage.difference import difference
from papo.lineage.find import Found, Known, find, known_runs
from papo.lineage.record import RunRecord, StepRecord
from papo.lineage.reproduce import reproduce
from papo.params import TrackingParams, load_params
from papo.stages.evaluate import FINAL

COMMANDS = ("lineage", "diff", "reproduce")
FOLD = 12
"""Rows of a kind that are shown before the rest is counted."""


def dispatch(options: argparse.Namespace) -> int:
    """Runs one of `COMMANDS`; the exit code."""
    lookup = Lookup(_tracking(options.overrides))
    if options.command == "lineage" and options.run is None:
        found = known_runs()
        _emit(options, [_row(one) for one in found.known], _listing(found))
        return 0
    if options.command == "lineage":
        one = find(options.run, mlflow=lookup.tags)
        mlflow, note = _mlflow(one.record, lookup)
        content = one.record.model_dump(mode="json") | {"state": one.record.state, "mlflow_runs": mlflow}
        _emit(options, content, _lineage(one, mlflow, note))
        return 0
    if options.command == "diff":
        found_both = difference(find(options.a, mlflow=lookup.tags), find(options.b, mlflow=lookup.tags))
        _emit(options, found_both, _diff(found_both))
        return 0
    again = reproduce(find(options.run, mlflow=lookup.tags), options.workspace)
    _emit(options, again, _again(again))
    return 0 if again["byte_equal"] else 1


def _tracking(overrides: Sequence[str]) -> TrackingParams:
    """Where MLflow is asked; without params.yaml, the default."""
    return load_params(Path("params.yaml") if Path("params.yaml").is_file() else None, overrides=overrides).tracking


def _mlflow(record: RunRecord, lookup: Lookup) -> tuple[dict[str, str], str]:
    """Ids by name, and what is to be said of them."""
    if not record.tracking.enabled:
        return {}, "not recorded in MLflow"
    try:
        found = lookup.runs(record.id)
    except PapoError as error:
        return {}, f"not known: {error.what} ({error.where})"
    return found, "" if found else f"none has the tag papo.run_id = {record.id} there"


def _emit(options: argparse.Namespace, content: Any, parts: Sequence[Table | str]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    out = Console()
    for part in parts:
        if isinstance(part, Table):
            if not out.is_terminal:
                out.width = max(100, out.measure(part, options=out.options.update(width=1000)).maximum)
            out.print(part)
        else:
            out.print(_printable(part), markup=False, highlight=False, soft_wrap=True)


# ---- papo lineage ----


def _row(one: Known) -> dict[str, Any]:
    record = one.record
    return {
        "run": record.id,
        "state": record.state,
        "began": record.starts[0].at,
        "ended": record.last.ended,
        "name": record.name,
        "variant": record.params["advantage"]["variant"],
        "seed": record.params["run"]["seed"],
        "rounds": record.params["run"]["rounds"],
        "accuracy": {name: _value(found) for name, found in record.evaluation.items()},
        "workspace": str(one.workspace.root),
    }


def _value(benchmark: Mapping[str, Any]) -> float | None:
    value: float | None = benchmark.get(FINAL, {}).get("avg_at_k", {}).get("value")
    return value


def _listing(found: Found) -> list[Table | str]:
    lines = [f"cannot be read: {line}" for line in found.damaged]
    if not found.known:
        return ["no run is on record here or under runs/; `papo run` makes one", *lines]
    rows = []
    for row in map(_row, found.known):
        accuracy = ", ".join(f"{name} {_percent(value)}" for name, value in row["accuracy"].items())
        rows.append({**row, "ended": row["ended"] or "", "accuracy": accuracy})
    return [_table(rows), *lines]


def _lineage(one: Known, mlflow: Mapping[str, str], note: str) -> list[Table | str]:
    record, last = one.record, one.record.last
    sure = [("run", f"{record.id}, {record.state}{f': {last.why}' if last.why else ''} (found by {one.because})")]
    sure += [("name", record.name), ("workspace", str(one.workspace.root.resolve()))]
    sure += [("lineage", f"{record.lineage}: the params that decide results and the code of every stage")]
    sure += [
        (f"start {number}", _start(start, record if start is last else None))
        for number, start in enumerate(record.starts, 1)
    ]
    if record.checks:
        sure.append(("asked again", f"{len(record.checks)} times, the last {record.checks[-1]}: everything was done"))
    sure.append(("commit", _commit(record)))
    sure.append(("dvc.lock", record.dvc_lock or "not recorded with DVC"))
    sure.append(("flow run", ", ".join(start.flow_run for start in record.starts if start.flow_run) or "none"))
    sure.append(
        ("MLflow", note or ", ".join(f"{name} {run}" for name, run in mlflow.items() if name in ("experiment", "run")))
    )
    sure += [("", f"{name} {run}") for name, run in mlflow.items() if name not in ("experiment", "run")]
    judge = record.judge
    sure.append(
        (
            "judge",
            judge.name if judge.model is None else f"{judge.model} by {judge.rubric}, digest {_short(judge.digest)}",
        )
    )
    sure += [
        (
            "",
            f"calibration {name}: {', '.join(f'{key} {_number(value)}' for key, value in measured.items() if key != 'sha256')}",
        )
        for name, measured in judge.calibrations.items()
    ]
    sure += [("source", f"{name} {_short(content)}") for name, content in record.sources.items()]
    sure.append(
        ("problems", ", ".join(f"{Path(file).stem} {_short(content)}" for file, content in record.data.items()) or "-")
    )
    sure.append(("environment", ", ".join(f"{name} {value}" for name, value in record.environment.items())))
    for name, found in record.evaluation.items():
        estimate = found.get(FINAL, {}).get("avg_at_k")
        sure.append(("accuracy", f"{name}: final {_interval(estimate)} avg@{found.get(FINAL, {}).get('k', '?')}"))
    alarms = ", ".join(f"{alarm['name']} from round {alarm['round']}" for alarm in record.alarms)
    sure.append(("alarms", alarms or "none"))
    width = max(len(name) for name, _ in sure)
    return ["\n".join(f"{name:<{width}}  {text}" for name, text in sure), _steps(record.steps), *_words(record)]


def _start(start: Any, record: RunRecord | None) -> str:
    how = start.how or (record.state if record is not None else "killed")
    ended = f" to {start.ended}" if start.ended else ""
    return f"{start.at}{ended}, {how}; {start.ran} steps ran, {start.found} had been done before (process {start.pid})"


def _commit(record: RunRecord) -> str:
    last = record.last
    if last.commit is None:
        return "none: the workspace is in no git checkout"
    if last.diff is None:
        return last.commit
    return f"{last.commit}, the diff with digest {_short(last.diff)}{'' if last.kept else ', which is not kept'}"


def _steps(steps: Sequence[StepRecord]) -> Table:
    rows = [
        {
            "step": step.name,
            "": "made" if step.made else "found",
            "identity": _short(step.identity),
            "code": _short(step.code),
            "inputs": _inputs(step.inputs),
            "outputs": ", ".join(f"{name} {_short(content)}" for name, content in step.outputs.items()),
            "rows": f"{step.rows:,}",
            "seconds": f"{step.seconds:.1f}",
        }
        for step in steps
    ]
    return _table(rows)


def _inputs(inputs: Mapping[str, Any]) -> str:
    """Digests by name; what is no digest is in the params."""
    parts = []
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            parts += [f"{key} {_short(each)}" for key, each in value.items() if _is_digest(each)]
        elif _is_digest(value):
            parts.append(f"{name} {_short(value)}")
    return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


def _words(record: RunRecord) -> list[str]:
    """The chain from the problem sets to the numbers, as sentences."""
    by_name = {step.name: step for step in record.steps}
    lines = []
    if "prepare" in by_name:
        lines.append(f"problems {_short(by_name['prepare'].outputs.get('problems'))} were made by prepare")
    if "warmstart" in by_name:
        lines.append(f"policy {_short(by_name['warmstart'].outputs.get('warmstart'))} was warm-started on their traces")
    trained = [step for step in record.steps if step.stage == "train"]
    if trained:
        rounds = "1 round" if len(trained) == 1 else f"{len(trained)} rounds"
        lines.append(
            f"{rounds} of {record.params['advantage']['variant']} made policy {_short(trained[-1].outputs.get('policy'))}"
        )
    if "evaluate" in by_name:
        outputs = by_name["evaluate"].outputs
        tables = ", ".join(
            f"{name} {_short(content)}" for name, content in outputs.items() if name.endswith(".parquet")
        )
        lines.append(f"evaluation rows: {tables}; each row names the digest of its policy")
    return ["; ".join(lines) + "."] if lines else []


# ---- papo diff ----


def _diff(found: Mapping[str, Any]) -> list[Table | str]:
    a, b = found["a"], found["b"]
    parts: list[Table | str] = [
        "\n".join(
            f"{name}  {one['id']}  {one['name']}, {one['state']}, {one['workspace']}"
            for name, one in (("a", a), ("b", b))
        )
    ]
    parts.append(_verdict(found))
    for title, key in (("params", "params"), ("sources", "sources"), ("environment", "environment")):
        parts += _pairs(title, found[key])
    parts += _data(found["data"])
    parts.append(_code(found["code"]))
    parts += _judge(found["judge"])
    alarms = found["alarms"]
    if alarms["only_a"] or alarms["only_b"]:
        parts.append(
            f"alarms: only a: {', '.join(alarms['only_a']) or 'none'}; only b: {', '.join(alarms['only_b']) or 'none'}"
        )
    else:
        parts.append(f"alarms: the same, {', '.join(alarms['both']) or 'none'}")
    parts += _metrics(found["metrics"])
    parts += _pairs("judge's cost", found["judging"])
    rows = [{"stage": stage, "a": f"{x:.1f}", "b": f"{y:.1f}"} for stage, (x, y) in found["seconds"].items()]
    return [*parts, "seconds by stage, which decide nothing", _table(rows)]


def _verdict(found: Mapping[str, Any]) -> str:
    """Byte-equal, or the first step that is not."""
    beside = "".join(f"; {name} is not compared: {reason}" for name, reason in found["not_compared"].items())
    if found["byte_equal"]:
        return f"byte-equal: all outputs of {found['compared']} steps have the same digests{beside}"
    lines = []
    if first := found["first"]:
        lines.append(f"first that differs: {first['step']} ({', '.join(first['outputs'])})")
        lines += [f"  {line}" for line in _folded(first["why"])]
        others = found["differing"][1:]
        lines.append(f"after it: {', '.join(_folded(others)) or 'nothing'}")
        lines.append(
            f"{found['compared'] - len(found['differing'])} of {found['compared']} steps have the same outputs{beside}"
        )
    else:
        lines.append(f"the {found['compared']} steps that both have made the same bytes{beside}")
    for name, key in (("a", "only_a"), ("b", "only_b")):
        if found[key]:
            lines.append(f"only {name} has {', '.join(_folded(found[key]))}")
    return "\n".join(lines)


def _folded(lines: Sequence[str]) -> list[str]:
    return list(lines) if len(lines) <= FOLD else [*lines[:FOLD], f"and {len(lines) - FOLD} more"]


def _pairs(title: str, pairs: Mapping[str, Sequence[Any]]) -> list[Table | str]:
    if not pairs:
        return [f"{title}: the same"]
    rows = [{"": key, "a": _cell(pair[0]), "b": _cell(pair[1])} for key, pair in pairs.items()]
    return [f"{title} that differ" if title != "judge's cost" else title, _table(rows)]


def _data(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    if not rows:
        return ["problem sets: the same"]
    shown = [
        {"problem set": row["file"], "digest a": _cell(row["digests"][0]), "digest b": _cell(row["digests"][1]),
         "rows a": _cell(row["rows"][0]), "rows b": _cell(row["rows"][1]),
         **{name.replace("_", " "): _cell(row[name]) for name in ("only_a", "only_b", "changed")}}
        for row in rows
    ]  # fmt: skip
    gone = ["-: the file is no longer at hand"] if any(row["changed"] is None for row in rows) else []
    return ["problem sets that differ; changed: the same prompt with something else", _table(shown), *gone]


def _code(code: Mapping[str, Any]) -> str:
    commits = "; ".join(f"{name} {_cell(pair[0])} -> {_cell(pair[1])}" for name, pair in code["commits"].items())
    if not code["stages"]:
        return f"code: the same in every stage{f' ({commits})' if commits else ''}"
    files = ", ".join(_folded(code["files"]))
    return f"code differs in {', '.join(code['stages'])}: {files}{f' ({commits})' if commits else ''}"


def _judge(judge: Mapping[str, Any]) -> list[Table | str]:
    pairs = {key: pair for key, pair in judge.items() if key not in ("rubric_text", "calibrations")}
    parts = _pairs("judge", pairs)
    if "calibrations" in judge:
        parts += [
            f"calibrations of {name}: {json.dumps(found)}"
            for name, found in zip("ab", judge["calibrations"], strict=True)
        ]
    return [*parts, *(["\n".join(judge["rubric_text"])] if "rubric_text" in judge else [])]


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[Table | str]:
    if not rows:
        return ["metrics: the runs have no benchmark in common"]
    shown = [
        {
            "benchmark": row["benchmark"],
            "metric": row["metric"].replace("_at_", "@"),
            "a": _interval(row["value"][0]),
            "b": _interval(row["value"][1]),
            "b - a, paired by problem": "-" if row["difference"] is None else _interval(row["difference"], sign=True),
            "problems": "-" if row["difference"] is None else str(row["difference"]["problems"]),
            "length a": _number(row["length"][0]),
            "length b": _number(row["length"][1]),
        }
        for row in rows
    ]
    notes = [f"{row['benchmark']}: {row['note']}" for row in rows if row["note"]]
    return ["final policies, percent with intervals", _table(shown), *notes]


# ---- papo reproduce ----


def _again(found: Mapping[str, Any]) -> list[Table | str]:
    parts: list[Table | str] = [f"{found['of']} made again in {found['workspace']}", f"code: {found['code']}"]
    parts.append(_verdict(found).replace("only b has", "only the reproduction has"))
    if not found["byte_equal"] and found["environment"]:
        return [*parts, *_pairs("of the environment, which may explain it, values", found["environment"])]
    return [*parts, *(_pairs("environment: values", found["environment"]) if found["environment"] else [])]


# ---- words ----


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(*(escape(_printable(str(value))) for value in row.values()))
    return table


def _printable(text: str) -> str:
    """Without what would steer the terminal: names and rubrics may hold anything."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def _short(value: Any) -> str:
    return str(value)[:12] if _is_digest(value) else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return _short(text) if len(text) <= 64 else f"{text[:61]}..."


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(estimate: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    text = f"{100 * estimate['value']:{'+' if sign else ''}.1f}"
    if estimate["low"] is None:
        return text
    return f"{text} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
