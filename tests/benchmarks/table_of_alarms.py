"""When each alarm began to ring in the runs given, and how many rounds before accuracy had lost half of its peak.

    python tests/benchmarks/table_of_alarms.py runs/*

A cell is the first round of the alarm; in brackets the rounds it came ahead, where accuracy was lost at all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from papo.core.alarms import ALARMS
from papo.inspection import signals_and_alarms
from papo.params import load_params
from papo.store.layout import Workspace
from papo.store.manifest import Manifest


def half_lost(accuracy: list[float]) -> int | None:
    """The first round whose accuracy is below half of the best before it."""
    return next((at for at, value in enumerate(accuracy) if value < max(accuracy[: at + 1]) / 2), None)


def row(folder: Path) -> list[str]:
    workspace = Workspace(folder)
    rounds, raised = signals_and_alarms(load_params().alarms, workspace)
    accuracy = [Manifest.read(workspace.table(k, "advantages")).metrics["accuracy"] for k in range(rounds)]
    lost = half_lost(accuracy)
    first = {alarm.name: alarm.round for alarm in reversed(raised)}
    ahead = {name: "" if lost is None else f" ({lost - at:+d})" for name, at in first.items()}
    cells = [f"{first[name]}{ahead[name]}" if name in first else "-" for name in ALARMS]
    return [folder.name, str(rounds), f"{max(accuracy):.2f}", "-" if lost is None else str(lost), *cells]


def main() -> None:
    rows = [["run", "rounds", "best accuracy", "half lost in", *ALARMS], *(row(Path(name)) for name in sys.argv[1:])]
    rows.insert(1, ["---"] * len(rows[0]))
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
