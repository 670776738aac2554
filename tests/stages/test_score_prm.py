"""score_prm: the judge is asked only where the variant needs it, and a failure is no number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from papo.engines.protocols import JudgeItem, Judgement, Progress
from papo.errors import DataError, FailedRowsError
from papo.params import AdvantageParams, ScorePrmParams, Variant
from papo.schemas import ADVANTAGES, PRM, PROBLEMS, Grading
from papo.stages import advantage, score_prm
from papo.store.layout import manifest_path
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows, write_rows

GOOD = Judgement(
    1.0, "ok", "fine", votes=[1.0], wrong_steps=[0.0, 0.5], prompt_tokens=5, completion_tokens=2, cached=True
)
POOR = Judgement(0.5, "ok", "short", votes=[0.5])
TIMEOUT = Judgement(None, "timeout", "no answer in 3 s", prompt_tokens=5)


class FakeJudge:
    name, rubric, digest, apart = "fake", "rubric/1", "", True

    def __init__(self, *judgements: Judgement) -> None:
        self._judgements = judgements
        self.asked: list[JudgeItem] = []

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        self.asked += items
        return [self._judgements[index % len(self._judgements)] for index in range(len(items))]

    def metrics(self, not_asked: int) -> dict[str, float]:
        return {"not_asked_calls": float(not_asked)}

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


# Two groups of four: three right and one without a verdict; one right.
OUTCOMES = [1.0, 1.0, None, 1.0, 0.0, 1.0, 0.0, 0.0]
ASKED = {
    "orm": [],
    "papo": [0, 1, 3],
    "convex": [0, 1, 3],
    "mult": [0, 1, 3, 5],
    "fullnorm": [0, 1, 3, 5],
    "prm": list(range(8)),
    "gdpo": list(range(8)),
    "capo": [0, 1, 3],
}


def run(
    world: Any, out: Path, engine: FakeJudge, context: Context,
    *, variant: Variant = "papo", outcomes: Sequence[float | None] = OUTCOMES, limit: float = 0.2,
) -> Manifest:  # fmt: skip
    inputs = score_prm.Inputs(
        round=0,
        variant=variant,
        rollouts=world.rollouts(completion=[str(n) for n in range(8)]),
        orm=world.orm(outcomes),
        problems=world.problems(),
    )
    return score_prm.run(ScorePrmParams(max_failed_share=limit), inputs, out, engine=engine, context=context)


def test_the_judge_is_told_how_the_problem_is_graded(small_round: Any, tmp_path: Path, context: Context) -> None:
    gradings = ['{"kind":"code","entry_point":"solve"}', "{}"]
    path = small_round.problems()
    rows = [row | {"grading": grading} for row, grading in zip(read_rows(path, PROBLEMS), gradings, strict=True)]
    write_rows(path, PROBLEMS, rows)
    small_round.problems = lambda: path
    judge = FakeJudge(GOOD)
    run(small_round, tmp_path / "prm.parquet", judge, context, variant="prm")
    assert [item.grading for item in judge.asked] == [Grading(kind="code", entry_point="solve")] * 4 + [Grading()] * 4


def test_the_table_names_every_variant() -> None:
    assert set(ASKED) == set(get_args(Variant))


@pytest.mark.parametrize("variant", ASKED)
def test_the_judge_is_asked_only_where_the_variant_needs_it(
    tmp_path: Path, small_round: Any, context: Context, variant: Variant
) -> None:
    engine = FakeJudge(GOOD)
    manifest = run(small_round, tmp_path / "prm.parquet", engine, context, variant=variant)
    expected = ASKED[variant]
    assert [int(item.response) for item in engine.asked] == expected
    rows = read_rows(tmp_path / "prm.parquet", PRM)
    assert [row["prm_score"] for row in rows] == [1.0 if n in expected else None for n in range(8)]
    assert [row["status"] for row in rows] == ["ok" if n in expected else "not_asked" for n in range(8)]
    assert manifest.metrics == {"asked_share": len(expected) / 8, "not_asked_calls": 8.0 - len(expected)}


def test_the_rows(tmp_path: Path, small_round: Any, context: Context) -> None:
    engine = FakeJudge(GOOD, POOR)
    run(small_round, tmp_path / "prm.parquet", engine, context)
    assert engine.asked[0] == JudgeItem("1+2=?\n", "1+2=?\n is 3", "0")
    rows = read_rows(tmp_path / "prm.parquet", PRM)
    assert [(row["problem_id"], row["sample_index"]) for row in rows] == [key[1:] for key in small_round.keys]
    assert rows[0] == {
        "round": 0, "problem_id": small_round.keys[0][1], "sample_index": 0, "prm_score": 1.0, "status": "ok",
        "reason": "fine", "votes": [1.0], "wrong_steps": [0.0, 0.5], "judge": "fake", "rubric": "rubric/1",
        "prompt_tokens": 5, "completion_tokens": 2, "cached": True,
    }  # fmt: skip
    assert [rows[n]["prm_score"] for n in (1, 3)] == [0.5, 1.0]
    assert [rows[n]["wrong_steps"] for n in (1, 2, 3)] == [None, None, [0.0, 0.5]]


@pytest.mark.parametrize("variant", get_args(Variant))
def test_to_ask_only_what_counts_changes_no_advantage(
    tmp_path: Path, small_round: Any, context: Context, variant: Variant
) -> None:
    """Groups of every kind, a judge that fails now and then: the tables are those of a judge that was asked about everything."""
    small_round.group, small_round.answers = 8, {f"{n}+1=?\n": str(n + 1) for n in range(40)}
    random = np.random.default_rng(7)
    outcomes = [None if draw < 0.03 else float(draw < 0.5) for draw in random.random(320)]
    texts = [f"step {n}\nand another" for n in range(320)]
    scores = random.choice([0.0, 0.5, 1.0, np.nan], 320)
    judgements = [
        Judgement(None, "timeout", "")
        if np.isnan(score)
        else Judgement(score, "ok", "", wrong_steps=[1.0 - score, 0.0])
        for score in scores
    ]

    class Judge(FakeJudge):
        def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
            self.asked += items
            return [judgements[texts.index(item.response)] for item in items]

    class Aligner:
        def starts(self, completion_ids: Sequence[int], completion: str) -> list[int]:
            return [0, len(completion) - 3]

        def versions(self) -> dict[str, str]:
            return {}

    rollouts = small_round.rollouts(completion=texts, completion_ids=[[1, 2]] * 320)
    orm, problems = small_round.orm(outcomes), small_round.problems()
    found, asked = [], []
    for asking in (variant, "prm"):  # the second asks about everything
        out, judge = tmp_path / asking / "prm.parquet", Judge()
        inputs = score_prm.Inputs(0, asking, rollouts, orm, problems)
        score_prm.run(ScorePrmParams(max_failed_share=1.0), inputs, out, engine=judge, context=context)
        params = AdvantageParams(variant=variant, lam=0.5)
        tokenizer = rollouts if variant == "capo" else None
        table = out.with_name("advantages.parquet")
        sources = advantage.Inputs(0, rollouts, orm, out, tokenizer)
        advantage.run(params, sources, table, engine=Aligner() if tokenizer else None, context=context)
        found.append(table.read_bytes())
        asked.append(len(judge.asked))
        manifest_path(out).unlink()
    assert found[0] == found[1]
    assert asked[1] == 320
    assert asked[0] == {"orm": 0, "prm": 320, "gdpo": 320}.get(variant, asked[0]) < 321
    assert any(row["advantage"] for row in read_rows(table, ADVANTAGES))


def test_a_second_run_asks_nothing_and_another_variant_does(tmp_path: Path, small_round: Any, context: Context) -> None:
    run(small_round, tmp_path / "prm.parquet", FakeJudge(GOOD), context)
    engine = FakeJudge(GOOD)
    assert run(small_round, tmp_path / "prm.parquet", engine, context).skipped
    assert engine.asked == []
    assert not run(small_round, tmp_path / "prm.parquet", engine, context, variant="prm").skipped


def test_a_timeout_of_the_judge_is_never_a_zero(tmp_path: Path, small_round: Any, context: Context) -> None:
    """The response keeps its outcome advantage; those that were judged are compared among themselves."""
    out = tmp_path / "prm.parquet"
    manifest = run(small_round, out, FakeJudge(GOOD, TIMEOUT, POOR), context, limit=0.5)
    rows = read_rows(out, PRM)
    assert (rows[1]["prm_score"], rows[1]["status"], rows[1]["prompt_tokens"]) == (None, "timeout", 5)
    assert manifest.counts == {"ok": 2, "timeout": 1, "not_asked": 5}

    inputs = advantage.Inputs(0, small_round.rollouts(), small_round.orm(OUTCOMES), out)
    advantage.run(AdvantageParams(), inputs, tmp_path / "advantages.parquet", context=context)
    judged, missing, _, other = read_rows(tmp_path / "advantages.parquet", ADVANTAGES)[:4]
    assert missing["process_advantage"] == 0.0
    assert missing["advantage"] == missing["outcome_advantage"]
    assert judged["process_advantage"] == pytest.approx(-other["process_advantage"])
    assert judged["process_advantage"] > 0.5


def test_too_many_failures_stop_the_stage(tmp_path: Path, small_round: Any, context: Context) -> None:
    """The share is of the responses asked about, not of all."""
    refused = Judgement(None, "refused", "no")
    with pytest.raises(FailedRowsError, match="2 of 3 rows failed: 1 refused, 1 timeout") as caught:
        run(small_round, tmp_path / "prm.parquet", FakeJudge(TIMEOUT, GOOD, refused), context, limit=0.6)
    assert "score_prm.max_failed_share" in caught.value.fix
    assert not (tmp_path / "prm.parquet").exists()


def test_nothing_to_ask_is_no_failure(tmp_path: Path, small_round: Any, context: Context) -> None:
    engine = FakeJudge(TIMEOUT)
    assert run(small_round, tmp_path / "prm.parquet", engine, context, outcomes=[0.0] * 8).counts == {"not_asked": 8}


def test_outcomes_of_other_rollouts_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    orm = small_round.orm(OUTCOMES)
    small_round.answers = dict(reversed(small_round.answers.items()))
    inputs = score_prm.Inputs(0, "papo", small_round.rollouts(), orm, small_round.problems())
    with pytest.raises(DataError, match="8 rows are not the 8 rows of the rollouts") as caught:
        score_prm.run(ScorePrmParams(), inputs, tmp_path / "prm.parquet", engine=FakeJudge(GOOD), context=context)
    assert caught.value.where == str(orm)


def test_rollouts_of_other_problems_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    rollouts, orm = small_round.rollouts(), small_round.orm(OUTCOMES)
    small_round.answers = {"1+2=?\n": "3"}
    inputs = score_prm.Inputs(0, "papo", rollouts, orm, small_round.problems())
    with pytest.raises(DataError, match="1 problems of the rollouts are not in the problem set"):
        score_prm.run(ScorePrmParams(), inputs, tmp_path / "prm.parquet", engine=FakeJudge(GOOD), context=context)
