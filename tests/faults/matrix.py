"""The table of what became of every case, and the points that the code has."""

from __future__ import annotations

import ast
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from faults.cases import FAULTS
from faults.world import STAGES, At, Outcome

import papo

STORED = Path(__file__).parents[2] / "build/fault-outcomes.jsonl"
"""A line a case; what the page on faults can be made of without another run."""
PACKAGE = Path(papo.__file__).parent


def line_of(code: str, one: Outcome) -> str:
    """An outcome as JSON, with the digest of the code that it is of."""
    return json.dumps({"code": code, **asdict(one)})


def read_line(line: str) -> tuple[str, Outcome]:
    """What `line_of` made."""
    value = json.loads(line)
    return value.pop("code"), Outcome(**{**value, "at": At(**value["at"])})


def points_of_code() -> set[str]:
    """Every literal that the package calls `reached` with."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reached":
                found.add(ast.literal_eval(node.args[0]))
    return found


def summed_up(outcomes: Sequence[Outcome]) -> str:
    """The line that says it all."""
    survived, refused = (
        sum(one.result == result and not one.problems for one in outcomes) for result in ("survived", "refused")
    )
    failed = sum(bool(one.problems) for one in outcomes)
    cpu = [one.cpu_seconds for one in outcomes]
    of_cpu = f"{sum(cpu):.0f} s of CPU, " if all(cpu) else ""
    return (
        f"{len(outcomes)} cases: {survived} survived, {refused} refused, {failed} failed; rows lost {sum(one.lost for one in outcomes)}, "
        f"rows repeated {sum(one.repeated for one in outcomes)}; {of_cpu}"
        f"{sum(one.seconds for one in outcomes):.0f} s in all."
    )


def by_stage(outcomes: Sequence[Outcome]) -> str:
    """Stages by faults: how many cases, and how they came out."""
    return _table("stage", STAGES, [(one.step.split()[0], one) for one in outcomes])


def by_point(outcomes: Sequence[Outcome]) -> str:
    """Points by faults, over all stages; every point of the code has a row."""
    return _table("point", sorted(points_of_code()), [(one.at.point, one) for one in outcomes])


def shown_points(page: str) -> tuple[set[str], set[str]]:
    """The stages and the points that a page has rows for."""
    found = []
    for name in ("stage", "point"):
        table = page[page.index(f"\n| {name} |") + 1 :].split("\n\n")[0]
        found.append({line.split("|")[1].strip() for line in table.splitlines()[2:] if line.startswith("|")})
    return found[0], found[1]


def in_full(outcomes: Sequence[Outcome]) -> str:
    """Every stage, point and fault."""
    found: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for one in outcomes:
        found[one.step.split()[0], one.at.point, one.fault].append(one)
    lines = ["| stage | point | fault | cases | outcome | seconds |", "|---|---|---|---|---|---|"]
    for (stage, point, fault), cases in found.items():
        seconds = sum(one.seconds for one in cases)
        lines.append(f"| {stage} | {point} | {fault} | {len(cases)} | {_said(cases)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _table(name: str, keys: Iterable[str], outcomes: Sequence[tuple[str, Outcome]]) -> str:
    shown = [fault for fault in FAULTS if any(one.fault == fault for _, one in outcomes)]
    lines = [f"| {name} | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for key in keys:
        cells = [_cell([one for k, one in outcomes if k == key and one.fault == fault]) for fault in shown]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(cases: Sequence[Outcome]) -> str:
    """`12`, all survived; `3 + 4 refused`; `FAILED 1`."""
    if any(one.problems for one in cases):
        return f"FAILED {sum(bool(one.problems) for one in cases)} of {len(cases)}"
    counts = Counter(one.result for one in cases)
    parts = [str(counts["survived"])] if counts["survived"] else []
    parts += [f"{counts['refused']} refused"] if counts["refused"] else []
    return " + ".join(parts) or "-"


def _said(cases: Sequence[Outcome]) -> str:
    counts = Counter("failed" if one.problems else one.result for one in cases)
    return ", ".join(f"{name} {count}" if len(counts) > 1 else name for name, count in counts.items())
