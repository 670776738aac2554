"""What the prose of docs/results.md says beside the tables of an ablation: its runs at their first and last round, and their starts.

    python tests/benchmarks/rounds_of_ablation.py runs/ablations/lam

By run, as its folder is named but for the seed, as means over seeds: signals of the first and of the last round, the accuracy of the warm
start, and the least and the most inversions of a round. Then the pairs of runs with and without the rank guard whose final policies are
the same bytes, and of the first run how many responses of its first round have at least eight steps (`=`), right and wrong.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from papo.schemas import ORM, ROLLOUTS
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.manifest import Manifest
from papo.store.tables import read_rows

SHOWN = ("prm_mean_correct", "zero_advantage_share", "groups_process_active_share")
LONG = 8


def rounds_of(workspace: Workspace) -> list[dict[str, float]]:
    """The signals of each round."""
    last = sum(folder.name.isdigit() for folder in (workspace.artifacts / "rounds").iterdir())
    return [Manifest.read(workspace.table(number, "advantages")).metrics for number in range(last)]


def lines_of(name: str, runs: list[Workspace]) -> list[str]:
    signals = [rounds_of(run) for run in runs]
    told = []
    for key in SHOWN:
        first, last = ([rounds[at].get(key, np.nan) for rounds in signals] for at in (0, -1))
        told.append(f"{key} {np.mean(first):.3f} to {np.mean(last):.3f}")
    inversions = [row["inversions"] for rounds in signals for row in rounds]
    starts = defaultdict(list)
    for run in runs:
        for key, value in Manifest.read(run.evaluation / "metrics.json").metrics.items():
            if key.endswith("/warmstart/avg_at_k"):
                starts[key.partition("/")[0]].append(value)
    told += [f"inversions {min(inversions):.0f} to {max(inversions):.0f}"]
    told += [f"start of {benchmark} {np.mean(values):.3f}" for benchmark, values in starts.items()]
    return [f"{name} ({len(runs)} seeds)", *(f"  {one}" for one in told)]


def guarded(root: Path) -> str:
    """Of the runs with the guard and the same without."""
    same = differ = 0
    for one in sorted(root.glob("*guard-rank-seed*")):
        pair = [Workspace(folder) for folder in (one, root / one.name.replace("guard-rank", "guard-none"))]
        left, right = (digest(run.policy(len(rounds_of(run)) - 1)) for run in pair)
        same, differ = same + (left == right), differ + (left != right)
    return f"pairs with and without the guard: {same} the same, {differ} not"


def long_responses(run: Workspace) -> str:
    rows = zip(read_rows(run.table(0, "rollouts"), ROLLOUTS), read_rows(run.table(0, "orm"), ORM), strict=True)
    counts = {True: [0, 0], False: [0, 0]}
    for rollout, score in rows:
        right = score["orm_score"] == 1.0
        counts[right][0] += rollout["completion"].count("=") >= LONG
        counts[right][1] += 1
    parts = (f"{long} of {of} {'right' if right else 'wrong'}" for right, (long, of) in counts.items())
    return f"{run.root.name}, first round, {LONG} steps or more: {', '.join(parts)}"


def main(root: Path) -> None:
    arms: dict[str, list[Workspace]] = defaultdict(list)
    for folder in sorted(root.glob("*-seed*")):
        arms[folder.name.rpartition("-seed")[0]].append(Workspace(folder))
    for name, runs in arms.items():
        print("\n".join([*lines_of(name, runs), f"  {long_responses(runs[0])}"]))
    print(guarded(root))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
