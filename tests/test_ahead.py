"""Scoring while others are sampled: what comes of it is what the stages alone come to, and nothing is scored twice."""

from __future__ import annotations

import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from judging import attempt_of, judging, write_round
from servers.chat import chat_process
from servers.completions import BOXES, save_policy

from papo.ahead import Ahead
from papo.cli import main
from papo.engines.protocols import JudgeItem, Judgement, Progress, Verdict, VerifyItem
from papo.errors import ServerDownError
from papo.params import AdvantageParams, OverlongParams, ScoreOrmParams, load_params
from papo.pipeline import Step, make_ahead, run_step
from papo.schemas import ADVANTAGES, ORM, PRM, ROLLOUTS, TRIED
from papo.stages import score_orm
from papo.store.files import read_json
from papo.store.layout import Workspace, manifest_path
from papo.store.manifest import Context
from papo.store.tables import read_rows


class Verifier:
    """A response that says `good` is right; one that says `late` has no verdict the first time."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.asked: Counter[str] = Counter()
        self._wait = wait

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        self._wait()
        self.asked.update(item.completion for item in items)
        progress(len(items))
        return [self._one(item.completion) for item in items]

    def versions(self) -> dict[str, str]:
        return {"verifier": "1"}

    def _one(self, text: str) -> Verdict:
        if "late" in text and self.asked[text] == 1:
            return Verdict(None, None, "timeout")
        return Verdict(float("good" in text), "3", "ok")


class Judge:
    """Scores by the length; fails if told to."""

    name, rubric, digest, apart = "fake", "r", "", False

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: Counter[str] = Counter()
        self.error = error

    def check(self) -> None: ...

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        if self.error is not None:
            raise self.error
        self.asked.update(item.response for item in items)
        return [Judgement(len(item.response) / 100, "ok", "because") for item in items]

    def metrics(self, not_asked: int) -> dict[str, float]:
        return {}

    def versions(self) -> dict[str, str]:
        return {}


@pytest.fixture
def tables(small_round: Any) -> Any:
    texts = ["good", "good, too", "bad", "late good", "good", "bad", "bad", "worse"]
    small_round.texts = [f"{text} {number}" for number, text in enumerate(texts)]
    small_round.path = small_round.rollouts(completion=small_round.texts)
    small_round.groups = read_rows(small_round.path, ROLLOUTS)
    return small_round


def ahead_of(tables: Any, verifier: Verifier, judge: Judge | None, variant: Any = "papo") -> Ahead:
    return Ahead(tables.problems(), AdvantageParams(variant=variant), verifier, judge)


def orm_of(tables: Any, engine: Any, out: Path) -> list[dict[str, Any]]:
    inputs = score_orm.Inputs(0, tables.path, tables.problems())
    context = Context(work=out.parent / ".papo")
    score_orm.run(ScoreOrmParams(max_failed_share=1.0), inputs, out, engine=engine, context=context)
    return read_rows(out, ORM)


def test_the_stage_takes_the_outcomes_that_are_there_and_asks_for_the_others(tables: Any, tmp_path: Path) -> None:
    verifier = Verifier()
    with ahead_of(tables, verifier, None) as ahead:
        ahead.add(tables.groups[:4])
        rows = orm_of(tables, ahead.verifier(), tmp_path / "ahead" / "orm.parquet")
    late = next(text for text in tables.texts if "late" in text)
    assert verifier.asked == Counter({text: 2 if text == late else 1 for text in tables.texts})
    assert [row["orm_score"] for row in rows] == [1, 1, 0, 1, 1, 0, 0, 0]
    whole = Verifier()
    whole.asked[late] = 1
    assert rows == orm_of(tables, whole, tmp_path / "alone" / "orm.parquet")


def test_a_stage_begins_once_nothing_is_under_way(tables: Any, tmp_path: Path) -> None:
    go, done = threading.Event(), list[str]()
    verifier = Verifier(lambda: (go.wait(60), done.append("verified")))
    with ahead_of(tables, verifier, None) as ahead:
        ahead.add(tables.groups)
        assert done == []
        threading.Timer(0.2, go.set).start()
        orm_of(tables, ahead.verifier(), tmp_path / "orm.parquet")
    assert done[0] == "verified"
    assert max(count for text, count in verifier.asked.items() if "late" not in text) == 1


@pytest.mark.parametrize("variant", ["orm", "prm", "papo"])
def test_groups_are_scored_as_the_stages_score_them(tables: Any, variant: str) -> None:
    judge = None if variant == "orm" else Judge()
    with ahead_of(tables, Verifier(), judge, variant) as ahead:
        ahead.add(tables.groups[:4])
        ahead.add(tables.groups[4:])
        found = ahead.score(tables.groups)
    assert [outcome for outcome, _ in found] == [1, 1, 0, None, 1, 0, 0, 0]
    advantages = [advantage for _, advantage in found]
    if variant == "prm":
        # Asked about all, the right and the wrong ones.
        assert judge is not None
        assert sum(judge.asked.values()) == 8
    elif variant == "papo":
        assert judge is not None
        assert set(judge.asked) == {tables.texts[0], tables.texts[1]}
        assert advantages[1] > advantages[0]
        assert advantages[1] > 0 > advantages[2]
    else:
        assert advantages[0] == advantages[1] > 0 > advantages[2]
    assert sum(advantages[4:]) == pytest.approx(0.0, abs=1e-9)


def test_groups_are_scored_with_the_penalty_for_length(tables: Any) -> None:
    """The wrong ones of a group have an advantage, too, where their lengths differ: its group is not dropped."""
    params = AdvantageParams(variant="orm", overlong=OverlongParams(buffer=4))
    lengths = [2, 2, 2, 2, 2, 6, 8, 8]
    rows = [row | {"completion_ids": [5] * length} for row, length in zip(tables.groups, lengths, strict=True)]
    rows[4] |= {"completion": "bad, and short"}
    with Ahead(tables.problems(), params, Verifier(), None) as ahead:
        ahead.add(rows)
        found = ahead.score(rows)
    assert [outcome for outcome, _ in found[4:]] == [0, 0, 0, 0]
    # Penalties 0, 1/4, 1/2, 1/2 have mean 5/16; deviations 5, 1, -3, -3 sixteenths, whose squares sum to 44/256.
    expected = [deviation / 16 / math.sqrt(44 / 256 / 3) for deviation in (5, 1, -3, -3)]
    assert [advantage for _, advantage in found[4:]] == pytest.approx(expected, rel=1e-4)


def test_a_judge_that_fails_is_left_to_the_stage_and_stops_who_needs_the_advantages(tables: Any) -> None:
    judge = Judge(ServerDownError("no server is left"))
    with ahead_of(tables, Verifier(), judge) as ahead:
        ahead.add(tables.groups)
        with pytest.raises(ServerDownError, match="no server is left"):
            ahead.score(tables.groups)
        waiting = ahead.judge()
        assert waiting is not None
        judge.error = None
        (judgement,) = waiting.judge([JudgeItem("1+2", None, "good")], lambda done: None)
        assert judgement.status == "ok"
        ahead.add(tables.groups)  # nobody works on it any more, and nobody waits
        assert ahead.verifier().verify([], lambda done: None) == []


def test_what_has_not_begun_is_dropped_when_a_run_ends(tables: Any) -> None:
    begun, go = threading.Event(), threading.Event()
    verifier, judge = Verifier(lambda: (begun.set(), go.wait(60))), Judge()
    with ahead_of(tables, verifier, judge) as ahead:
        ahead.add(tables.groups[:4])
        assert begun.wait(60)
        ahead.add(tables.groups[4:])
        threads = [thread for thread in threading.enumerate() if thread.name == "papo-verifying-ahead"]
    go.set()
    for thread in threads:
        thread.join(60)
    assert set(verifier.asked) == set(tables.texts[:4])
    assert not judge.asked
    waiting = ahead.judge()
    assert waiting is not None
    assert waiting.judge([], lambda done: None) == []  # nobody waits for what was dropped


# ---- in the pipeline ----


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "artifacts/rounds/0").glob("*.parquet")}


SHARDS = ("rollout.prompts_per_round=4", "train.minibatch_prompts=2", "rollout.prompts_per_shard=1")


def test_a_run_gives_the_same_tables_with_and_without_overlap(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for overlap in ("true", "false"):
        folder = tmp_path / overlap
        shutil.copytree(started, folder)
        monkeypatch.chdir(folder)
        given = [f"run.overlap={overlap}", "tracking.enabled=false", *SHARDS]
        assert main(["run", "--no-dvc", *(word for one in given for word in ("--set", one))]) == 0
        found.append(outputs(folder))
    assert found[0] == found[1]
    assert {"rollouts.parquet", "tried.parquet", "orm.parquet", "prm.parquet", "advantages.parquet"} <= found[0].keys()


def test_a_model_that_judges_is_asked_once_about_a_response_and_the_account_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the store of verdicts is
    workspace = Workspace(tmp_path)
    write_round(workspace)
    rows = read_rows(workspace.table(0, "rollouts"), ROLLOUTS)
    with chat_process(reply="servers.replies:strict") as server:
        params = load_params(None, overrides=["advantage.variant=prm"])
        prm = params.score_prm.model_validate(judging(server))
        params = params.model_copy(update={"score_prm": prm})
        context = Context(work=workspace.work)
        with make_ahead(params, workspace, context, 0) as ahead:
            ahead.add(rows[:24])
            ahead.add(rows[24:])
            manifest = run_step(Step("score_prm", 0), params, workspace, context, ahead)
        asked = Counter(attempt_of(one["body"]) for one in server.asked)
    assert set(asked.values()) == {1}
    assert manifest.metrics["calls"] == len(asked) == 63
    assert manifest.metrics["cached_share"] == pytest.approx(1 / 64)
    assert {row["status"] for row in read_rows(workspace.table(0, "prm"), PRM)} == {"ok"}


def test_dynamic_sampling_from_the_command_line(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dynamic"
    shutil.copytree(started, folder)
    monkeypatch.chdir(folder)
    workspace = Workspace(folder)
    shutil.rmtree(workspace.warmstart)
    save_policy(workspace.warmstart, BOXES)  # now and then it is right
    given = [
        "rollout.max_prompts=24",
        "rollout.group_size=8",
        "advantage.variant=orm",
        *SHARDS,
        "rollout.prompts_per_round=2",
    ]
    words = [word for one in given for word in ("--set", one)]
    for stage in ("rollout", "score-orm", "score-prm", "advantage"):
        assert main([stage, "--round", "0", *words]) == 0
    manifest = read_json(manifest_path(workspace.table(0, "rollouts")))
    assert {"score_orm", "score_prm", "advantage", "rubric", "code"} == manifest["inputs"]["scoring"].keys()
    tried = {row["problem_id"]: row["status"] for row in read_rows(workspace.table(0, "tried"), TRIED)}
    kept = {name for name, status in tried.items() if status == "kept"}
    assert len(kept) == 2
    assert "no_advantage" in tried.values()
    advantages = read_rows(workspace.table(0, "advantages"), ADVANTAGES)
    assert {row["problem_id"] for row in advantages} == kept
    assert {row["problem_id"] for row in advantages if row["advantage"] != 0.0} == kept
    # Another weight of the process score may keep other groups.
    again = main(["rollout", "--round", "0", *words, "--set", "advantage.lam=0.5"])
    assert again == 0
    assert read_json(manifest_path(workspace.table(0, "rollouts")))["identity"] != manifest["identity"]
