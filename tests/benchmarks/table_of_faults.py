"""What becomes of a round when the server of its judge misbehaves: every fault of tests/servers/chat.py, at three rates.

    python tests/benchmarks/table_of_faults.py

All responses of eight groups are judged, once without and once with the fault. The advantages of both tables are compared, and the stage
is run again without the fault, on what the first run left.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from judging import (
    CONCURRENCY,
    REPLY,
    attempts,
    delivered,
    judging,
    paid_tries,
    prm_rows,
    run_stage,
    store_of,
    write_round,
)
from servers.chat import FAULTS, ChatProcess, chat_process

import papo.engines.chat
from papo.core.advantages import compute_advantages
from papo.errors import PapoError
from papo.params import ChatParams, ScorePrmParams
from papo.schemas import ORM
from papo.store.layout import Workspace
from papo.store.ledger import Spent
from papo.store.tables import read_rows
from papo.store.verdicts import VerdictStore

RATES = {"first": "first try", "all": "all tries", "share": "10 %"}
COMPARED = ("papo", "prm")
FIRST_WAIT_S = 0.01
DEADLINE_S = 5.0
"""Of a call where the server hangs: enough for 64 of them to reach it. Elsewhere a call has a minute."""
ALIKE = 10_000
"""Groups of each kind in which scores are lost by chance."""

_ZERO = 1e-12


class Effect(NamedTuple):
    """Rows whose advantage is another one, by how much at most, and whose sign is the opposite: of rows without a score, of others."""

    changed: int
    largest: float
    own_flips: int
    other_flips: int


@dataclass(frozen=True)
class Cell:
    """One fault at one rate.

    `delivered` and `again`: by response, verdicts that the server sent whole, and requests of the run without the fault that followed.
    `paid`: tries by the ledger; `spent`: the whole of it.
    """

    rows: list[dict[str, Any]]
    after: list[dict[str, Any]]
    requests: int
    billed: int
    delivered: Counter[str]
    again: Counter[str]
    paid: int
    spent: Spent
    effects: dict[str, Effect]

    @property
    def statuses(self) -> Counter[str]:
        return Counter(row["status"] for row in self.rows)


class Matrix:
    """The same round for every cell, and what becomes of it without a fault."""

    def __init__(self, server: ChatProcess, folder: Path) -> None:
        self.server, self.folder = server, folder
        workspace = Workspace(folder / "undisturbed")
        write_round(workspace)
        server.set(fault="none", when="all")
        run_stage(workspace, judging(server))
        self.names, self.rows, self.requests = attempts(workspace), prm_rows(workspace), server.seen.requests.total()
        orm = read_rows(workspace.table(0, "orm"), ORM)
        self.orm, self.groups = [row["orm_score"] for row in orm], [row["problem_id"] for row in orm]

    def _fresh(self) -> Workspace:
        workspace = Workspace(Path(tempfile.mkdtemp(dir=self.folder)))
        write_round(workspace)
        return workspace

    def advantages(self, rows: list[dict[str, Any]], variant: str) -> Any:
        return compute_advantages(self.orm, [row["prm_score"] for row in rows], self.groups, variant=variant)

    def effect(self, rows: list[dict[str, Any]], variant: str) -> Effect:
        before, after = self.advantages(self.rows, variant).total, self.advantages(rows, variant).total
        change = np.abs(after - before)
        flipped = flips(before, after)
        own = np.array([row["prm_score"] is None for row in rows])
        return Effect(
            int(np.sum(change > _ZERO)), float(change.max()), int(np.sum(flipped & own)), int(np.sum(flipped & ~own))
        )

    def cell(self, fault: str, when: str) -> Cell:
        server, workspace = self.server, self._fresh()
        server.set(fault=fault, when=when, retry_after_s=0.0)
        run_stage(workspace, params_of(server, fault))
        seen, sent, rows = server.seen, delivered(server), prm_rows(workspace)
        with VerdictStore.open(store_of(workspace)) as store:
            spent = store.spent("run")
        paid = paid_tries(store_of(workspace))
        server.set(fault="none", when="all")
        run_stage(workspace, judging(server), out="again")
        again = delivered(server)
        assert again.total() == server.seen.requests.total()
        effects = {variant: self.effect(rows, variant) for variant in COMPARED}
        return Cell(
            rows, prm_rows(workspace, "again"), seen.requests.total(), seen.billed.total(), sent, again, paid, spent, effects,
        )  # fmt: skip

    def stop(self, fault: str, when: str) -> str:
        """The error that ends the stage where the server is given up and failures are counted as by default; empty if none does."""
        workspace = self._fresh()
        self.server.set(fault=fault, when=when, retry_after_s=0.0)
        params = params_of(self.server, fault)
        params["model"]["breaker"] = ChatParams.model_fields["breaker"].default
        params["max_failed_share"] = ScorePrmParams.model_fields["max_failed_share"].default
        try:
            run_stage(workspace, params)
        except PapoError as error:
            return type(error).__name__
        return "-"


def params_of(server: ChatProcess, fault: str) -> dict[str, Any]:
    hangs = fault in ("hang", "drip")
    return judging(server, model={"timeout_s": DEADLINE_S, "concurrency": 64} if hangs else {})


def cells_of(cell: Cell) -> list[str]:
    """A line of the table, without the fault and its rate."""
    statuses = ", ".join(
        f"{count} {status}" for status, count in sorted(cell.statuses.items(), key=lambda item: -item[1])
    )
    effects = [
        text
        for effect in cell.effects.values()
        for text in (str(effect.changed), f"{effect.largest:.2f}", f"{effect.own_flips} + {effect.other_flips}")
    ]
    return [
        statuses,
        str(cell.requests),
        str(cell.billed),
        f"{cell.paid} ({cell.spent.failed})",
        *effects,
        str(cell.again.total()),
    ]


def line_of(matrix: Matrix, fault: str, when: str) -> str:
    cells = cells_of(matrix.cell(fault, when))
    if fault == "no-schema":
        assert int(cells[1]) <= matrix.requests + CONCURRENCY
        cells[1] = f"up to {matrix.requests + CONCURRENCY}"
    return " | ".join(["-", *cells, "-"] if fault == "none" else [RATES[when], *cells, matrix.stop(fault, when)])


HEAD = [
    "fault", "met by", "rows", "requests", "billed", "paid (failed calls)",
    *(f"{variant}: {what}" for variant in COMPARED for what in ("changed", "largest", "flips")),
    "asked again", "stopped by",
]  # fmt: skip


def table(matrix: Matrix) -> list[str]:
    """Lines of markdown; faults that have the same effect at all rates share theirs."""
    same: dict[str, list[str]] = {}
    for fault in ("none", *FAULTS):
        rates = ["all"] if fault == "none" else list(RATES)
        same.setdefault("\n".join(line_of(matrix, fault, when) for when in rates), []).append(fault)
    rows = [HEAD, ["---"] * len(HEAD)]
    rows += [[", ".join(faults), line] for lines, faults in same.items() for line in lines.split("\n")]
    return _markdown(rows)


def lost_scores(correct: int, variant: str, lost: int) -> tuple[float, float]:
    """Share of the responses without a score, and of the others that are asked about, whose advantage has the opposite sign.

    Groups of eight with so many correct responses, scores drawn by chance from 0, 0.5 and 1; of the responses that the variant asks about
    `lost`, drawn by chance, have none.
    """
    chance = np.random.default_rng(correct)
    orm = np.tile(np.arange(8) < correct, (ALIKE, 1)).astype(float)
    asked = correct if variant == "papo" else 8
    scores = chance.choice([0.0, 0.5, 1.0], size=(ALIKE, 8))
    own = chance.random((ALIKE, asked)).argsort(axis=1) < lost
    less = scores.copy()
    less[:, :asked][own] = np.nan
    groups = np.repeat(np.arange(ALIKE), 8)
    before, after = (
        compute_advantages(orm.ravel(), prm.ravel(), groups, variant=variant).total.reshape(-1, 8)
        for prm in (scores, less)
    )
    flipped = flips(before, after)[:, :asked]
    return float(flipped[own].mean()), float(flipped[~own].mean())


def table_of_lost_scores() -> list[str]:
    """How often a sign flips, by variant and number of correct responses, where one or three scores of a group are lost."""
    head = [
        "variant",
        "correct of 8",
        "1 lost: its sign",
        "1 lost: sign of another",
        "3 lost: their signs",
        "3 lost: sign of another",
    ]
    rows = [
        [
            variant,
            str(correct) if variant == "papo" else "any",
            *(f"{share:.1%}" for lost in (1, 3) for share in lost_scores(correct, variant, lost)),
        ]
        for variant in COMPARED
        for correct in ((4, 5, 6, 7, 8) if variant == "papo" else (8,))
    ]
    return _markdown([head, ["---"] * len(head), *rows])


def flips(before: Any, after: Any) -> Any:
    """Where the sign is the opposite; an advantage of 0 has none."""
    return (before * after < 0) & (np.minimum(np.abs(before), np.abs(after)) > _ZERO)


def _markdown(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    papo.engines.chat.FIRST_WAIT_S = FIRST_WAIT_S
    with chat_process(reply=REPLY) as server, tempfile.TemporaryDirectory() as folder:
        print("\n".join(table(Matrix(server, Path(folder)))), "", *table_of_lost_scores(), sep="\n")


if __name__ == "__main__":
    main()
