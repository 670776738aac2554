"""score_orm: one verdict a response, null and a reason where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import HANG, Asked, ChatServer, Raw, chat_server

from papo.engines.protocols import Progress, Verdict, VerifyItem
from papo.engines.second_opinion import ChatSecondOpinion
from papo.errors import DataError, FailedRowsError, SetupError
from papo.params import AdvantageParams, ScoreOrmParams, SecondOpinionParams
from papo.schemas import FAILED_STATUSES, ORM, ORM_STATUSES, PROBLEMS, Grading
from papo.stages import advantage, score_orm
from papo.store.layout import manifest_path
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_columns, read_rows, read_table, write_rows

pytestmark = pytest.mark.usefixtures("keyless")
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
    assert {(row["detail"], row["second_opinion"], row["second_opinion_status"]) for row in rows} == {
        (None, None, "not_asked")
    }
    assert manifest.counts == {"ok": 5, "no_answer": 1, "timeout": 1, "error": 1}
    assert manifest.metrics == {"accuracy": 4 / 6}


def test_what_became_of_a_program_is_kept_and_counted(tmp_path: Path, small_round: Any, context: Context) -> None:
    details = ["passed", "failed", "failed", "timeout", "memory", "killed", "blocked"]
    ran = [Verdict(float(detail == "passed"), "code", "ok", detail) for detail in details]
    manifest = run(small_round, tmp_path / "orm.parquet", FakeVerifier([*ran, NONE]), context)
    assert [row["detail"] for row in read_rows(tmp_path / "orm.parquet", ORM)] == [*details, None]
    assert manifest.counts == {
        "ok": 7, "no_answer": 1, "program passed": 1, "program failed": 2, "program timeout": 1, "program memory": 1,
        "program killed": 1, "program blocked": 1,
    }  # fmt: skip


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


# ---- the second opinion ----

OUTCOME = ("round", "problem_id", "sample_index", "orm_score", "extracted", "status", "detail")
# Of the first problem, whose gold answer is 3, then of the second, whose is 9.
VERDICTS = [
    RIGHT, Verdict(0.0, "three", "ok"), Verdict(0.0, "4", "ok"), Verdict(0.0, "three", "ok"),
    Verdict(0.0, "4", "ok"), Verdict(0.0, "", "no_answer"), TIMEOUT, Verdict(0.0, None, "ok"),
]  # fmt: skip


def asking(server: ChatServer | None, **change: Any) -> ScoreOrmParams:
    given = {"model": "m", "base_url": server.url if server else None, "timeout_s": 20.0} | change
    return ScoreOrmParams(second_opinion=SecondOpinionParams(**given), max_failed_share=0.5)


def run_asking(
    world: Any, out: Path, context: Context, params: ScoreOrmParams, verdicts: Sequence[Verdict] = VERDICTS
) -> Manifest:
    inputs = score_orm.Inputs(0, world.rollouts(), world.problems())
    assert params.second_opinion is not None
    second = ChatSecondOpinion(params.second_opinion)
    return score_orm.run(params, inputs, out, engine=FakeVerifier(verdicts), second_opinion=second, context=context)


def knows_words(asked: Asked) -> str:
    return "equivalent" if asked.answer == "three" else "different"


def test_only_wrong_mathematics_is_asked_about_and_each_question_once(
    tmp_path: Path, small_round: Any, context: Context, warned: list[str]
) -> None:
    """The same two answers to another problem are another question: what they mean may depend on it."""
    with chat_server(knows_words) as server:
        manifest = run_asking(small_round, tmp_path / "orm.parquet", context, asking(server))
        questions = sorted((a.between("problem"), a.between("reference answer"), a.answer) for a in server.asked)
    assert questions == [("1+2=?\n", "3", "4"), ("1+2=?\n", "3", "three"), ("4+5=?\n", "9", "4")]
    rows = read_rows(tmp_path / "orm.parquet", ORM)
    assert [row["second_opinion"] for row in rows] == [None, 1.0, 0.0, 1.0, 0.0, None, None, None]
    assert [row["second_opinion_status"] for row in rows] == ["not_asked", *["ok"] * 4, *["not_asked"] * 3]
    assert manifest.counts == {
        "ok": 6, "no_answer": 1, "timeout": 1, "second_opinion/asked": 4, "second_opinion/disagreed": 2
    }  # fmt: skip
    assert manifest.metrics == {"accuracy": 1 / 7, "second_opinion/disagreed_share": 0.5}
    assert set(manifest.versions) == {"fake", "openai"}
    assert warned == []


@pytest.mark.parametrize("kind", ["choice", "code"])
def test_only_mathematics_is_asked_about(tmp_path: Path, small_round: Any, context: Context, kind: str) -> None:
    """Whatever the verifier found wrong in the second problem."""
    problems = small_round.problems()
    first, second = read_rows(problems, PROBLEMS)
    write_rows(problems, PROBLEMS, [first, second | {"grading": Grading(kind=kind).model_dump_json()}])
    with chat_server(knows_words) as server:
        params = asking(server)
        assert params.second_opinion is not None
        manifest = score_orm.run(
            params,
            score_orm.Inputs(0, small_round.rollouts(), problems),
            tmp_path / "orm.parquet",
            engine=FakeVerifier([WRONG] * 8),
            second_opinion=ChatSecondOpinion(params.second_opinion),
            context=context,
        )
        assert [asked.between("problem") for asked in server.asked] == [first["prompt"]]
    assert manifest.counts["second_opinion/asked"] == 4


def test_nothing_wrong_asks_nothing(tmp_path: Path, small_round: Any, context: Context) -> None:
    with chat_server(knows_words) as server:
        manifest = run_asking(small_round, tmp_path / "orm.parquet", context, asking(server), [RIGHT] * 8)
        assert server.asked == []
    assert manifest.counts == {"ok": 8, "second_opinion/asked": 0, "second_opinion/disagreed": 0}
    assert manifest.metrics == {"accuracy": 1.0}


def advantages_of(world: Any, orm: Path, out: Path, context: Context) -> bytes:
    inputs = advantage.Inputs(round=0, rollouts=world.rollouts(), orm=orm, prm=world.prm([1.0, *[None] * 7]))
    advantage.run(AdvantageParams(), inputs, out, context=context)
    return out.read_bytes()


@pytest.mark.parametrize("reply", ["equivalent", "different", "maybe"])
def test_the_outcome_is_the_same_bytes_with_it_and_without(
    tmp_path: Path, small_round: Any, context: Context, reply: str
) -> None:
    """And so is what is made of the outcome."""
    with chat_server(lambda asked: reply) as server:
        on = run_asking(small_round, tmp_path / "on/orm.parquet", context, asking(server))
        assert len(server.asked) == 3
    inputs = score_orm.Inputs(0, small_round.rollouts(), small_round.problems())
    plain = ScoreOrmParams(max_failed_share=0.5)
    off = score_orm.run(plain, inputs, tmp_path / "off/orm.parquet", engine=FakeVerifier(VERDICTS), context=context)
    tables = [read_table(tmp_path / f"{name}/orm.parquet", ORM) for name in ("on", "off")]
    assert tables[0].select(OUTCOME).equals(tables[1].select(OUTCOME), check_metadata=True)
    scores = [table["orm_score"].combine_chunks() for table in tables]
    assert [buffer.to_pybytes() for buffer in scores[0].buffers()] == [b.to_pybytes() for b in scores[1].buffers()]
    assert not tables[0].equals(tables[1])
    assert on.metrics["accuracy"] == off.metrics["accuracy"]
    assert {name: count for name, count in on.counts.items() if "/" not in name} == off.counts
    advantages = [
        advantages_of(small_round, tmp_path / f"{name}/orm.parquet", tmp_path / f"{name}/advantages.parquet", context)
        for name in ("on", "off")
    ]
    assert advantages[0] == advantages[1]


def test_a_server_that_answers_nothing_readable_costs_no_outcome_and_is_said(
    tmp_path: Path, small_round: Any, context: Context, warned: list[str]
) -> None:
    replies: dict[str, Raw | str] = {"three": Raw(b"<html>", status=404), "4": "equivalent or different"}
    with chat_server(lambda asked: replies[asked.answer]) as server:
        manifest = run_asking(small_round, tmp_path / "orm.parquet", context, asking(server))
    rows = read_columns(tmp_path / "orm.parquet", ORM, "second_opinion", "second_opinion_status")
    assert {row["second_opinion"] for row in rows} == {None}
    assert [row["second_opinion_status"] for row in rows[:5]] == [
        "not_asked",
        "error",
        "unparsable",
        "error",
        "unparsable",
    ]
    assert manifest.counts | {"ok": 0, "no_answer": 0, "timeout": 0} == {
        "ok": 0, "no_answer": 0, "timeout": 0, "second_opinion/asked": 4, "second_opinion/disagreed": 0,
        "second_opinion/error": 2, "second_opinion/unparsable": 2,
    }  # fmt: skip
    assert manifest.metrics == {"accuracy": 1 / 7}  # no share of nothing
    (message,) = warned
    assert message == (
        "second opinion in round 0: 3 of 3 questions got no answer: 2 unparsable (neither equivalent nor different), "
        "1 error (HTTP 404); the outcomes do not depend on it"
    )


@pytest.mark.parametrize(("hanging", "said"), [(2, 0), (3, 1)])
def test_it_is_said_if_more_than_half_of_the_questions_failed(
    tmp_path: Path, small_round: Any, context: Context, warned: list[str], hanging: int, said: int
) -> None:
    verdicts = [*(Verdict(0.0, str(n), "ok") for n in range(4, 8)), *[RIGHT] * 4]
    with chat_server(lambda asked: HANG if int(asked.answer) < 4 + hanging else "different") as server:
        manifest = run_asking(small_round, tmp_path / "orm.parquet", context, asking(server, timeout_s=1.0), verdicts)
    assert manifest.counts["second_opinion/timeout"] == hanging
    assert manifest.metrics["second_opinion/disagreed_share"] == 0.0
    assert len(warned) == said


def test_what_it_takes_is_looked_for_before_the_answers_are_verified(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    params, verifier = asking(None), FakeVerifier(VERDICTS)
    assert params.second_opinion is not None
    inputs = score_orm.Inputs(0, small_round.rollouts(), small_round.problems())
    second = ChatSecondOpinion(params.second_opinion)
    with pytest.raises(SetupError, match="OPENAI_API_KEY holds no key"):
        score_orm.run(params, inputs, tmp_path / "orm.parquet", engine=verifier, second_opinion=second, context=context)
    assert verifier.asked == []
    assert not (tmp_path / "orm.parquet").exists()


def test_a_stage_that_is_done_asks_nothing_and_needs_no_key(
    tmp_path: Path, small_round: Any, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is in no file of the stage: another key, or none, is no reason to ask again."""
    out = tmp_path / "orm.parquet"
    monkeypatch.setenv("MY_KEY", "sk-Secret123")
    with chat_server(knows_words) as server:
        params = asking(server, api_key_env="MY_KEY")
        run_asking(small_round, out, context, params)
        assert {asked.key for asked in server.asked} == {"Bearer sk-Secret123"}
        count = len(server.asked)
        monkeypatch.delenv("MY_KEY")
        assert run_asking(small_round, out, context, params).skipped
        assert len(server.asked) == count
    assert b"Secret123" not in out.read_bytes() + manifest_path(out).read_bytes()


def test_a_stage_that_fails_has_asked_nothing(tmp_path: Path, small_round: Any, context: Context) -> None:
    with chat_server(knows_words) as server, pytest.raises(FailedRowsError):
        run_asking(small_round, tmp_path / "orm.parquet", context, asking(server), [*[TIMEOUT] * 5, *[WRONG] * 3])
    assert server.asked == []
