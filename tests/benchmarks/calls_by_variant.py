"""How many responses each variant has its judge asked about, on the rounds of a run, and whether that changes an advantage.

    papo run && python tests/benchmarks/calls_by_variant.py [WORKSPACE]

Every response of the run is judged by `steps`, which costs nothing; the advantages of each variant are then computed with all of these
scores and with those alone that it would have asked for. A call is one of the distinct (problem, response) pairs of a round.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from papo.core.advantages import compute_advantages, process_needed
from papo.engines.judges.steps import StepsJudge
from papo.engines.protocols import JudgeItem
from papo.engines.tokenizer import TokenizerAligner
from papo.params import AdvantageParams, Variant
from papo.schemas import ORM, ROLLOUTS
from papo.stages.advantage import by_tokens
from papo.store.layout import Workspace
from papo.store.tables import read_columns

Rows = list[dict[str, Any]]
NOT_ASKED = {"prm_score": None, "status": "not_asked", "wrong_steps": None}


class Asked(NamedTuple):
    """Sums over the rounds. `changed`: responses with another advantage than if all had been asked about."""

    responses: int = 0
    asked: int = 0
    calls: int = 0
    calls_all: int = 0
    changed: int = 0

    @property
    def saved(self) -> float:
        """Share of the calls that asking about all would take."""
        return 1.0 - self.calls / self.calls_all


def asked_by_variant(workspace: Workspace) -> dict[str, Asked]:
    """Variant -> what it asked about."""
    found = {variant: Asked() for variant in get_args(Variant)}
    aligner = TokenizerAligner(workspace.warmstart / "tokenizer.json")
    round_ = 0
    while (path := workspace.table(round_, "rollouts")).exists():
        rollouts = read_columns(path, ROLLOUTS, "problem_id", "prompt", "completion", "completion_ids")
        orm = read_columns(workspace.table(round_, "orm"), ORM, "orm_score")
        pairs = [(row["prompt"], row["completion"]) for row in rollouts]
        judged = StepsJudge().judge([JudgeItem(problem, None, text) for problem, text in pairs], lambda done: None)
        everything = [{"prm_score": one.score, "status": one.status, "wrong_steps": one.wrong_steps} for one in judged]
        outcomes = np.array([np.nan if row["orm_score"] is None else row["orm_score"] for row in orm])
        for variant, before in found.items():
            needed = process_needed(variant, outcomes, [row["problem_id"] for row in rollouts]).tolist()
            asked = [row if ask else NOT_ASKED for row, ask in zip(everything, needed, strict=True)]
            params = AdvantageParams(variant=variant, lam=0.5 if variant == "convex" else 1.0)
            alone, all_asked = (totals(params, rollouts, orm, prm, aligner) for prm in (asked, everything))
            found[variant] = Asked(
                before.responses + len(rollouts),
                before.asked + sum(needed),
                before.calls + len({pair for pair, ask in zip(pairs, needed, strict=True) if ask}),
                before.calls_all + len(set(pairs)),
                before.changed + int(np.sum(alone != all_asked)),
            )
        round_ += 1
    return found


def totals(
    params: AdvantageParams, rollouts: Rows, orm: Rows, prm: Rows, aligner: TokenizerAligner
) -> npt.NDArray[np.float64]:
    """(N,) advantages, as the stage computes them."""
    if params.variant == "capo":
        return by_tokens(params, rollouts, orm, prm, Path("prm"), aligner).total
    columns = ((orm, "orm_score"), (prm, "prm_score"))
    scores = ([math.nan if row[name] is None else row[name] for row in table] for table, name in columns)
    ids = [row["problem_id"] for row in rollouts]
    return compute_advantages(*scores, ids, variant=params.variant, lam=params.lam).total


def main() -> None:
    workspace = Workspace(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    found = asked_by_variant(workspace)
    if not found["papo"].responses:
        raise SystemExit(f"{workspace.root}: no rounds here; run `papo run` first")
    print("| variant | responses | asked about | calls | calls if all were asked | saved | advantages changed |")
    print("|---|---|---|---|---|---|---|")
    for variant, one in found.items():
        print(
            f"| {variant} | {one.responses} | {one.asked} | {one.calls} | {one.calls_all} | {one.saved:.1%} | {one.changed} |"
        )


if __name__ == "__main__":
    main()
