"""How far the log-probs of a run's rollouts are from those of the policy that they were sampled from, over all rows and rounds.

    python tests/benchmarks/logprobs_of_run.py                  # the run in this folder
    python tests/benchmarks/logprobs_of_run.py runs/served

The policy of each round computes them anew in float32; a run itself does that for `rollout.checked_rows` rows of a round.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from papo.engines.recompute import PolicyRecomputer
from papo.schemas import ROLLOUTS
from papo.store.layout import Workspace
from papo.store.tables import read_rows


def main() -> None:
    workspace = Workspace(Path(*sys.argv[1:2]))
    found, rows = [], 0
    round_ = 0
    while (table := workspace.table(round_, "rollouts")).is_file():
        given = read_rows(table, ROLLOUTS)
        recomputer = PolicyRecomputer(workspace.policy(round_ - 1), temperature=given[0]["temperature"])
        anew = recomputer.logprobs([(row["prompt_ids"], row["completion_ids"]) for row in given])
        found += [np.abs(np.subtract(values, row["logprobs"])) for values, row in zip(anew, given, strict=True)]
        rows, round_ = rows + len(given), round_ + 1
    everyone = np.concatenate(found)
    print(
        f"{round_} rounds, {rows} rows, {len(everyone)} tokens: at most {everyone.max():.2g}, mean {everyone.mean():.2g}"
    )


if __name__ == "__main__":
    main()
