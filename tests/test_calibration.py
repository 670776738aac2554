"""`papo calibrate-judge`: what it measures, writes and says, and what a run makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import papo.calibration
from papo.calibration import calibrate, calibrations, length_warnings
from papo.cli import main
from papo.engines.labelled import KINDS
from papo.engines.protocols import JudgeItem, Judgement, Progress
from papo.engines.tracking import NullTracker
from papo.errors import PapoError, StageError
from papo.params import Params, ScorePrmParams
from papo.pipeline import Step, run_step
from papo.schemas import CALIBRATION
from papo.session import Session, share_start
from papo.store.files import read_json, write_json
from papo.store.layout import Workspace
from papo.store.manifest import Context
from papo.store.tables import read_rows

SHARED = Path(__file__).parents[2] / "shared/data/step_labels.jsonl"
NOTHING = {"value": None, "low": None, "high": None}
GULLIBLE = Params(score_prm=ScorePrmParams(judge="steps-gullible"))
LIMIT = ScorePrmParams().max_length_bias


class FakeJudge:
    """Judges by a function of the item."""

    name, rubric = "fake/judge", "levels/1"

    def __init__(self, say: Callable[[JudgeItem], Judgement]) -> None:
        self._say = say

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        progress(len(items))
        return [self._say(item) for item in items]

    def versions(self) -> dict[str, str]:
        return {}


def ok(score: float, **further: Any) -> Judgement:
    return Judgement(score, "ok", "because", **further)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def judged(
    workspace: Workspace, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """(what the judge says of an item, rows of the data or none for sums) -> what was found."""

    def run(say: Callable[[JudgeItem], Judgement], *rows: dict[str, Any], **given: Any) -> dict[str, Any]:
        monkeypatch.setattr(papo.calibration, "make_judge", lambda params, purpose=None: FakeJudge(say))
        data = tmp_path / "mine.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return calibrate(Params(), workspace, context, data=str(data) if rows else "sums", **given)[1]

    return run


def labelled(count: int, label: Any = True, **further: Any) -> list[dict[str, Any]]:
    return [
        {"problem": f"p{number}", "response": "x" * (number % 7 + 1), "label": label} | further
        for number in range(count)
    ]


# ---- the judges of the embedded world ----


def test_the_honest_judge_agrees_and_has_no_bias(workspace: Workspace, context: Context) -> None:
    folder, found = calibrate(Params(), workspace, context, data="sums")
    assert folder == workspace.calibrations / "steps-sums"
    assert found["confusion"] == [[200, 0, 0], [0, 200, 0], [0, 0, 100]]
    for name in ("agreement", "kappa", "kappa_linear", "auc"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["length_bias"] == NOTHING
    assert found["length_effect"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (found["first_error"]["compared"], found["first_error"]["exact"]) == (300, 1.0)
    assert (found["statuses"], found["missing_share"], found["problems"]) == ({"ok": 1.0}, 0.0, 100)
    assert length_warnings(Params(), workspace) == []


def test_the_length_bias_of_the_gullible_judge_is_found(workspace: Workspace, context: Context) -> None:
    _, found = calibrate(GULLIBLE, workspace, context, data="sums")
    bias = found["length_bias"]
    assert LIMIT < bias["low"] < bias["value"] < bias["high"]
    assert found["length_effect"]["value"] > 0.1
    assert found["kappa"]["high"] < 0.5
    assert abs(found["answer_bias"]["value"]) < LIMIT
    by_kind = {row["kind"]: row for row in found["kinds"]}
    assert by_kind["padded"]["score"] > by_kind["full"]["score"] > by_kind["merged"]["score"]
    assert found["notes"] == [f"the length bias is above score_prm.max_length_bias, {LIMIT:g}"]
    (warning,) = length_warnings(GULLIBLE, workspace)
    assert f"correlation {bias['value']:.2f} [{bias['low']:.2f}, {bias['high']:.2f}]" in warning
    assert "steps-gullible-sums" in warning


def test_the_kinds_stand_in_the_rows_and_the_numbers_follow_from_them(workspace: Workspace, context: Context) -> None:
    folder, found = calibrate(GULLIBLE, workspace, context, data="sums", limit=100)
    rows = read_rows(folder / "rows.parquet", CALIBRATION)
    assert [row["kind"] for row in rows[:5]] == list(KINDS)
    same = [row["prm_score"] == row["label"] for row in rows]
    assert found["agreement"]["value"] == pytest.approx(sum(same) / 100)
    padded = [row["prm_score"] for row in rows if row["kind"] == "padded"]
    assert found["kinds"][2]["score"] == pytest.approx(sum(padded) / 20)
    assert read_json(folder / "calibration.json") == found


def test_the_same_again_gives_the_same(workspace: Workspace, context: Context) -> None:
    found = [calibrate(GULLIBLE, workspace, context, data="sums", limit=60)[1] for _ in range(2)]
    for one in found:
        assert one.pop("seconds") >= 0
    assert found[0] == found[1]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_solutions_that_the_judge_cannot_read_are_missing_and_said_so(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate-judge", "--data", str(SHARED)]) == 0
    shown = capsys.readouterr().out
    assert "steps (steps/1) on step_labels: 0 of 649 responses scored" in shown
    assert "no score, unparsable: 649 of 649; such as: the steps judge reads problems such as 3+5-2=?" in shown
    assert "nothing is measured" in shown
    found = read_json(checkout / "artifacts/calibration/steps-step_labels/calibration.json")
    assert (found["statuses"], found["missing_share"]) == ({"unparsable": 1.0}, 1.0)
    assert all(found[name] == NOTHING for name in papo.calibration.MEASURES)
    assert length_warnings(Params(), Workspace(checkout)) == []


# ---- what the data cannot give is null ----


def test_constant_scores_give_chance_and_no_bias(judged: Callable[..., dict[str, Any]]) -> None:
    found = judged(lambda item: ok(0.5))
    assert (found["auc"]["value"], found["kappa"]["value"]) == (0.5, 0.0)
    assert found["length_bias"] == found["answer_bias"] == NOTHING
    assert found["length_effect"]["value"] == 0.0
    assert any("the score never differs" in note for note in found["notes"])


def test_one_class_has_neither_kappa_nor_auc(judged: Callable[..., dict[str, Any]]) -> None:
    found = judged(lambda item: ok(float(len(item.response) > 3)), *labelled(40, False))
    assert (found["kappa"], found["kappa_linear"], found["auc"]) == (NOTHING, NOTHING, NOTHING)
    assert 0 < found["agreement"]["value"] < 1
    assert found["length_bias"]["value"] > 0.8
    assert "every scored response is labelled 0: kappa and AUC are not defined" in found["notes"]


def test_missing_verdicts_are_left_out_and_counted_by_status(judged: Callable[..., dict[str, Any]]) -> None:
    def say(item: JudgeItem) -> Judgement:
        if item.problem in ("p1", "p2"):
            return Judgement(None, "timeout", "60 s are over")
        return Judgement(None, "refused", "") if item.problem == "p3" else ok(1.0)

    found = judged(say, *labelled(10))
    assert found["statuses"] == {"ok": 0.7, "refused": 0.1, "timeout": 0.2}
    assert (found["scored"], found["agreement"]["value"]) == (7, 1.0)
    assert found["missing_share"] == pytest.approx(0.3)
    assert found["notes"][:2] == [
        "no score, timeout: 2 of 10; such as: 60 s are over",
        "no score, refused: 1 of 10; such as: no reason given",
    ]


def test_a_single_response_has_no_interval(judged: Callable[..., dict[str, Any]]) -> None:
    found = judged(lambda item: ok(1.0), *labelled(1))
    assert found["agreement"] == {"value": 1.0, "low": None, "high": None}


def test_a_judge_that_rewards_the_answer_is_found_out(judged: Callable[..., dict[str, Any]]) -> None:
    rows = [row | {"answer_correct": number % 3 == 0} for number, row in enumerate(labelled(60))]
    right = {row["problem"] for row in rows if row["answer_correct"]}
    found = judged(lambda item: ok(1.0 if item.problem in right else 0.5), *rows, *labelled(5))
    assert found["answer_bias"]["value"] == pytest.approx(1.0)
    assert abs(found["length_bias"]["value"]) < 0.3


def test_more_kinds_than_a_person_would_name_are_not_held_apart(judged: Callable[..., dict[str, Any]]) -> None:
    rows = [row | {"source": str(number)} for number, row in enumerate(labelled(40))]
    found = judged(lambda item: ok(len(item.response) / 7), *rows)
    assert found["kinds"] == []
    assert found["length_bias"]["value"] == pytest.approx(1.0)


def test_what_belongs_to_a_kind_is_no_bias_for_length(judged: Callable[..., dict[str, Any]]) -> None:
    # The long ones of one source score high, the short ones of the other low; within each, length makes no difference.
    short = [row | {"source": "a"} for row in labelled(40)]
    long = [row | {"source": "b", "response": f"{row['response']}{'y' * 50}"} for row in labelled(40)]
    scores = {0: 0.4, 1: 0.6}

    def say(item: JudgeItem) -> Judgement:
        return ok(scores[int(item.problem[1:]) // 7 % 2] * (1.0 if "y" in item.response else 0.5))

    found = judged(say, *short, *long)
    assert abs(found["length_bias"]["value"]) < 0.2
    everyone = judged(say, *(row | {"source": ""} for row in (*short, *long)))
    assert everyone["length_bias"]["value"] > 0.6


def test_votes_and_first_errors_by_the_steps_of_the_data(judged: Callable[..., dict[str, Any]]) -> None:
    steps = ["so\nsoon", "then", "thus"]
    rows = [
        {"problem": "p1", "steps": steps, "first_error_step": 3},
        {"problem": "p2", "steps": steps, "first_error_step": 2},
        {"problem": "p3", "steps": steps, "first_error_step": 0},
    ]
    found = judged(lambda item: ok(0.5, votes=[0, 1, 1], wrong_steps=[0.0, 0.4, 1.0]), *rows)
    assert found["votes"]["responses"] == 3
    assert found["votes"]["agreement"] == pytest.approx(1 / 3)
    assert found["first_error"] == {"compared": 3, "found": 0.5, "none_right": 0.0, "exact": pytest.approx(1 / 3)}


def test_a_judge_that_leaves_one_out_is_refused(
    workspace: Workspace, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lazy(FakeJudge):
        def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
            return super().judge(items, progress)[1:]

    monkeypatch.setattr(papo.calibration, "make_judge", lambda params, purpose=None: Lazy(lambda item: ok(1.0)))
    with pytest.raises(StageError, match="499 judgements for 500 responses"):
        calibrate(Params(), workspace, context, data="sums")
    assert not workspace.calibrations.exists()


# ---- where it goes ----


def test_the_folder_names_judge_rubric_and_data(
    judged: Callable[..., dict[str, Any]], workspace: Workspace, tmp_path: Path
) -> None:
    judged(lambda item: ok(1.0), *labelled(3))
    assert [path.name for path in workspace.calibrations.iterdir()] == ["fake-judge-levels-1-mine"]
    judged(lambda item: ok(1.0), *labelled(3), out=tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["calibration.json", "rows.parquet"]


class Recorder(NullTracker):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.calls.append((name, dict(tags)))

    def artifact(self, path: Path) -> None:
        self.calls.append(path.name)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        self.calls.append((status, dict(metrics)))


def test_the_record_has_the_measures_that_are_defined(workspace: Workspace, context: Context) -> None:
    recorder = Recorder()
    calibrate(Params(), workspace, context, data="sums", limit=50, tracker=recorder)
    (name, tags), artifact, (status, metrics) = recorder.calls
    assert (name, artifact, status) == ("calibrate-steps-sums", "calibration.json", "FINISHED")
    assert tags == {"papo.kind": "calibration", "papo.judge": "steps", "papo.rubric": "steps/1", "papo.data": "sums"}
    assert (metrics["calibration/agreement"], metrics["calibration/missing_share"]) == (1.0, 0.0)
    assert "calibration/length_bias" not in metrics


# ---- what a run makes of it ----


def test_only_calibrations_of_this_judge_and_rubric_count(workspace: Workspace, context: Context) -> None:
    calibrate(GULLIBLE, workspace, context, data="sums", limit=100)
    assert calibrations(ScorePrmParams(), workspace) == {}
    assert list(calibrations(GULLIBLE.score_prm, workspace)) == ["steps-gullible-sums"]
    path = workspace.calibrations / "steps-gullible-sums/calibration.json"
    other = Workspace(workspace.root / "other")
    share_start(workspace, other)
    assert length_warnings(GULLIBLE, other)
    write_json(path, read_json(path) | {"rubric": "steps-gullible/0"})
    assert calibrations(GULLIBLE.score_prm, workspace) == {}
    share_start(workspace, other)
    assert not length_warnings(GULLIBLE, other), "the later calibration was not taken over"
    for damaged in ("{", "[]", '{"judge": "steps-gullible"}'):
        path.write_text(damaged)
        assert calibrations(GULLIBLE.score_prm, workspace) == {}


def test_a_run_warns_of_its_judge_once_at_the_start(workspace: Workspace, context: Context, warned: list[str]) -> None:
    calibrate(GULLIBLE, workspace, context, data="sums", limit=100)
    for params, lines in (
        (GULLIBLE, 1),
        (Params(), 0),
        (GULLIBLE.model_copy(update={"advantage": GULLIBLE.advantage.model_copy(update={"variant": "orm"})}), 0),
        (Params(score_prm=ScorePrmParams(judge="steps-gullible", max_length_bias=0.95)), 0),
    ):
        warned.clear()
        with Session(params, workspace, name="a run", tracker=NullTracker(), context=context):
            assert len(warned) == lines
            assert all("follows the length of a response" in line for line in warned)


def test_the_report_is_given_the_calibrations_of_the_runs_judge(
    workspace: Workspace, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = calibrate(GULLIBLE, workspace, context, data="sums", limit=50)
    given: list[dict[str, Path]] = []
    monkeypatch.setattr("papo.pipeline._there", lambda inputs, workspace: inputs)
    monkeypatch.setattr(
        "papo.stages.report.run", lambda params, inputs, out, context: given.append(inputs.calibrations)
    )
    for params in (GULLIBLE, Params()):
        run_step(Step("report"), params, workspace, context)
    assert given == [{"steps-gullible-sums": folder / "calibration.json"}, {}]


# ---- the command ----


def test_the_command_shows_tables_and_where_the_rows_are(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate-judge", "--set", "score_prm.judge=steps-gullible", "--max", "200", "--out", "found"]) == 0
    shown = capsys.readouterr().out
    found = read_json(checkout / "found/calibration.json")
    assert "steps-gullible (steps-gullible/1) on sums: 200 of 200 responses scored" in shown
    for part in (
        "length bias",
        f"{found['length_bias']['value']:.2f}",
        "padded",
        "scored 0.5",
        "rows and measures: found",
    ):
        assert part in shown
    assert "the length bias is above score_prm.max_length_bias" in shown


BAD = {
    "no file": (["--data", "none.jsonl"], "there is no such file"),
    "empty": (["--data", "empty.jsonl"], "there is no row in it"),
    "unknown label": (["--data", "good.jsonl", "--column", "label=problem"], "which is no label"),
    "no column": (["--data", "good.jsonl", "--column", "label=lable"], "there is no column lable"),
    "no role": (["--data", "good.jsonl", "--column", "lable=label"], "no role 'lable'"),
    "half a column": (["--data", "good.jsonl", "--column", "label"], "--column label"),
    "none": (["--max", "0"], "--max is 0"),
    "no judge": (["--set", "score_prm.judge=stepz"], "score_prm.judge"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_2_and_writes_nothing(
    checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (checkout / "empty.jsonl").write_text("")
    (checkout / "good.jsonl").write_text(json.dumps(labelled(1)[0]))
    assert main(["calibrate-judge", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "  where: " in shown
    assert "  to do: " in shown
    assert "Traceback" not in shown
    assert not (checkout / "artifacts").exists()


def test_every_error_is_one_of_papo(tmp_path: Path, context: Context) -> None:
    with pytest.raises(PapoError):
        calibrate(Params(), Workspace(tmp_path), context, data=str(tmp_path))
