"""advantage: scores in, decoupled advantages and signals out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from papo.errors import DataError
from papo.params import AdvantageParams
from papo.schemas import ADVANTAGES
from papo.stages import advantage
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows

OUTCOMES = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
PROCESS = [1.0, 0.5, None, None, 1.0, 1.0, 0.0, 0.0]


def inputs(
    world: Any, outcomes: list[float | None] = OUTCOMES, process: list[float | None] = PROCESS
) -> advantage.Inputs:
    return advantage.Inputs(0, world.rollouts(), world.orm(outcomes), world.prm(process))


def run(given: advantage.Inputs, out: Path, context: Context, **params: Any) -> Manifest:
    return advantage.run(AdvantageParams(**params), given, out, context=context)


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_rows(out, ADVANTAGES)]


def test_the_rows(tmp_path: Path, small_round: Any, context: Context) -> None:
    """By hand: outcomes 1 1 0 0 have mean 1/2 and sample deviation 1/sqrt 3; scores 1 and 1/2 of the right ones +-1/sqrt 2."""
    out = tmp_path / "advantages.parquet"
    manifest = run(inputs(small_round), out, context)
    rows = read_rows(out, ADVANTAGES)
    assert [(row["round"], row["problem_id"], row["sample_index"]) for row in rows] == [
        (0, *key[1:]) for key in small_round.keys
    ]
    assert all(row["token_advantages"] is None for row in rows)
    outcome, process = column(out, "outcome_advantage"), column(out, "process_advantage")
    assert outcome[2] == outcome[3] == -outcome[0] == -outcome[1] < 0
    assert outcome[4:] == [0.0] * 4
    assert process[:4] == pytest.approx([process[0], -process[0], 0.0, 0.0])
    assert process[4] == process[5] == -process[6] == -process[7] > 0
    assert column(out, "advantage") == pytest.approx([a + b for a, b in zip(outcome, process, strict=True)])
    assert manifest.metrics["accuracy"] == 0.75
    assert manifest.rows == 8


def test_lam_weighs_the_process_advantage(tmp_path: Path, small_round: Any, context: Context) -> None:
    totals = {}
    for lam in (0.0, 0.5, 1.0):
        run(inputs(small_round), tmp_path / f"{lam}.parquet", context, lam=lam)
        totals[lam] = column(tmp_path / f"{lam}.parquet", "advantage")
    assert totals[0.0] == column(tmp_path / "0.0.parquet", "outcome_advantage")
    assert totals[0.5] == pytest.approx([(a + b) / 2 for a, b in zip(totals[0.0], totals[1.0], strict=True)])


def test_a_response_without_an_outcome_has_no_advantage_and_moves_no_other(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    run(inputs(small_round, [1.0, None, 0.0, None, *OUTCOMES[4:]], [None] * 8), tmp_path / "a.parquet", context)
    first = column(tmp_path / "a.parquet", "advantage")[:4]
    assert first[1] == first[3] == 0.0
    assert first[0] == -first[2] > 0


def test_a_second_run_does_nothing_and_other_params_do(tmp_path: Path, small_round: Any, context: Context) -> None:
    given, out = inputs(small_round), tmp_path / "advantages.parquet"
    assert [run(given, out, context).skipped for _ in range(2)] == [False, True]
    assert not run(given, out, context, lam=0.5).skipped


@pytest.mark.parametrize("table", ["orm", "prm"])
def test_rows_of_another_round_are_refused(tmp_path: Path, small_round: Any, context: Context, table: str) -> None:
    given = inputs(small_round)
    small_round.answers = dict(reversed(small_round.answers.items()))
    path = small_round.orm(OUTCOMES) if table == "orm" else small_round.prm(PROCESS)
    with pytest.raises(DataError, match="are not the 8 rows of the rollouts") as caught:
        run(given, tmp_path / "advantages.parquet", context)
    assert caught.value.where == str(path)
    assert not (tmp_path / "advantages.parquet").exists()


def test_fewer_rows_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    given = inputs(small_round)
    small_round.answers = {"1+2=?\n": "3"}
    small_round.orm(OUTCOMES[:4])
    with pytest.raises(DataError, match="its 4 rows are not the 8 rows"):
        run(given, tmp_path / "advantages.parquet", context)
