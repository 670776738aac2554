"""score_orm: one verdict a response, null and a reason where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.engines.protocols import Progress, Verdict, VerifyItem
from papo.errors import DataError, FailedRowsError
from papo.params import ScoreOrmParams
from papo.schemas import FAILED_STATUSES, ORM, ORM_STATUSES, Grading
from papo.stages import score_orm
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows

RIGHT, WRONG, NONE = Verdict(1.0, "3", "ok"), Verdict(0.0, "4", "ok"), Verdict(0.0, None, "no_answer")
TIMEOUT = Verdict(None, None, "timeout")


class FakeVerifier:
    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self._verdicts = verdicts
        self.asked: list[VerifyItem] = []

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        self.asked += items
        return list(self._verdicts)

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


def run(world: Any, out: Path, engine: FakeVerifier, context: Context, limit: float = 0.5) -> Manifest:
    inputs = score_orm.Inputs(0, world.rollouts(completion=[str(n) for n in range(8)]), world.problems())
    return score_orm.run(ScoreOrmParams(max_failed_share=limit), inputs, out, engine=engine, context=context)


def test_the_rows(tmp_path: Path, small_round: Any, context: Context) -> None:
    verdicts = [RIGHT, WRONG, NONE, TIMEOUT, RIGHT, RIGHT, RIGHT, Verdict(None, None, "error")]
    engine = FakeVerifier(verdicts)
    manifest = run(small_round, tmp_path / "orm.parquet", engine, context)
    expected = [*(("3", str(n)) for n in range(4)), *(("9", str(n)) for n in range(4, 8))]
    assert [(item.gold, item.completion) for item in engine.asked] == expected
    assert {item.grading for item in engine.asked} == {Grading()}
    rows = read_rows(tmp_path / "orm.parquet", ORM)
    assert [(row["problem_id"], row["sample_index"]) for row in rows] == [key[1:] for key in small_round.keys]
    assert [Verdict(row["orm_score"], row["extracted"], row["status"]) for row in rows] == verdicts
    assert manifest.counts == {"ok": 5, "no_answer": 1, "timeout": 1, "error": 1}
    assert manifest.metrics == {"accuracy": 4 / 6}


def test_a_second_run_asks_nothing(tmp_path: Path, small_round: Any, context: Context) -> None:
    run(small_round, tmp_path / "orm.parquet", FakeVerifier([RIGHT] * 8), context)
    engine = FakeVerifier([])
    assert run(small_round, tmp_path / "orm.parquet", engine, context).skipped
    assert engine.asked == []


def test_too_many_failures_stop_the_stage_and_are_named(tmp_path: Path, small_round: Any, context: Context) -> None:
    verdicts = [TIMEOUT, TIMEOUT, Verdict(None, None, "error"), *[NONE] * 5]
    with pytest.raises(FailedRowsError, match="3 of 8 rows failed: 1 error, 2 timeout") as caught:
        run(small_round, tmp_path / "orm.parquet", FakeVerifier(verdicts), context, limit=0.3)
    assert caught.value.exit_code == 1
    assert "stage score_orm, limit 30%" in caught.value.where
    assert "score_orm.max_failed_share" in caught.value.fix
    assert not (tmp_path / "orm.parquet").exists()


def test_failures_at_the_limit_are_allowed_and_an_answer_that_is_none_is_no_failure(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    verdicts = [TIMEOUT, TIMEOUT, *[NONE] * 6]
    manifest = run(small_round, tmp_path / "orm.parquet", FakeVerifier(verdicts), context, limit=0.25)
    assert manifest.metrics == {"accuracy": 0.0}


def test_without_any_score_there_is_no_accuracy(tmp_path: Path, small_round: Any, context: Context) -> None:
    manifest = run(small_round, tmp_path / "orm.parquet", FakeVerifier([TIMEOUT] * 8), context, limit=1.0)
    assert manifest.metrics == {}


def test_rollouts_of_other_problems_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    rollouts = small_round.rollouts()
    small_round.answers = {"1+2=?\n": "3"}
    inputs = score_orm.Inputs(0, rollouts, small_round.problems())
    with pytest.raises(DataError, match="1 problems of the rollouts are not in the problem set") as caught:
        score_orm.run(ScoreOrmParams(), inputs, tmp_path / "orm.parquet", engine=FakeVerifier([]), context=context)
    assert "run rollout again" in caught.value.fix


def test_only_these_statuses_are_failures() -> None:
    assert set(ORM_STATUSES) - FAILED_STATUSES == {"ok", "no_answer"}
