"""Which stage made other bytes first and why; what that came to in data and metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from papo.core.statistics import paired_bootstrap
from papo.lineage.difference import compare_steps, difference
from papo.lineage.find import find
from papo.lineage.record import JudgeRecord, RunRecord, StepRecord
from papo.schemas import EVALUATION, PROBLEMS, problem_id
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.tables import write_rows

Make = Callable[..., StepRecord]
Put = Callable[..., RunRecord]


def test_equal_digests_are_byte_equal_whatever_time_they_took(step: Make) -> None:
    ours = [step("prepare"), step("train", 0), step("report", outputs={"report": "4" * 64})]
    theirs = [step("prepare", seconds=99.0, made=False), step("train", 0), step("report", outputs={"report": "5" * 64})]
    found = compare_steps(ours, theirs)
    assert (found["byte_equal"], found["first"], found["compared"]) == (True, None, 2)
    assert list(found["not_compared"]) == ["report"]  # it shows times


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"params": {"lam": 0.5}}, ["param lam: 1.0 -> 0.5"]),
        ({"params": {"lam": 1.0, "new": {"key": 1}}}, ["param new.key: None -> 1"]),
        ({"inputs": {"seed": 1}}, ["input seed: 0 -> 1"]),
        ({"code": "a" * 64}, ["code: 222222222222 -> aaaaaaaaaaaa"]),
        ({"versions": {"torch": "2"}}, ["version of torch: 1 -> 2"]),
        ({}, ["params, inputs, code and libraries are the same: the machine, its threads or a server answered otherwise"]),
    ],
    ids=["param", "further param", "input", "code", "library", "nothing"],
)  # fmt: skip
def test_the_first_step_that_differs_is_named_with_what_of_it_changed(
    step: Make, change: dict[str, Any], why: list[str]
) -> None:
    given: dict[str, Any] = {"params": {"lam": 1.0}, "inputs": {"seed": 0}, "versions": {"torch": "1"}}
    ours = [step("prepare"), step("rollout", 0, **given), step("train", 0)]
    theirs = [
        step("prepare"),
        step("rollout", 0, outputs={"out": "9" * 64}, **(given | change)),
        step("train", 0, outputs={"out": "9" * 64}),
    ]
    found = compare_steps(ours, theirs)
    assert found["first"] == {"step": "rollout 0", "outputs": ["out"], "why": why}
    assert found["differing"] == ["rollout 0", "train 0"]
    assert not found["byte_equal"]


def test_a_verdict_from_the_store_is_the_verdict_that_was_paid_for(step: Make) -> None:
    paid = step("score_prm", 0, outputs={"prm.parquet": "4" * 64}, content={"prm.parquet": "7" * 64})
    kept = step("score_prm", 0, outputs={"prm.parquet": "5" * 64}, content={"prm.parquet": "7" * 64})
    other = step("score_prm", 0, outputs={"prm.parquet": "5" * 64}, content={"prm.parquet": "8" * 64})
    assert compare_steps([paid], [kept])["byte_equal"]
    assert compare_steps([paid], [other])["differing"] == ["score_prm 0"]


def test_a_run_with_more_rounds_is_not_byte_equal(step: Make) -> None:
    found = compare_steps([step("train", 0)], [step("train", 0), step("train", 1)])
    assert (found["byte_equal"], found["first"], found["only_a"], found["only_b"]) == (False, None, [], ["train 1"])
    assert not compare_steps([], [])["byte_equal"]


def problems(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"problem_id": problem_id(prompt, answer), "prompt": prompt, "answer": answer, "grading": "{}", "source": "test",
         "split": "train"}
        for prompt, answer in pairs
    ]  # fmt: skip


def samples(solved: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    given = {
        "policy_digest": "0",
        "completion": "",
        "completion_tokens": 1,
        "finish_reason": "stop",
        "status": "ok",
        "seed": 0,
    }
    return [
        {"policy": policy, "problem_id": name, "sample_index": index, "orm_score": score if policy == "final" else 0.0} | given
        for policy in ("warmstart", "final")
        for name, scores in solved.items()
        for index, score in enumerate(scores)
    ]  # fmt: skip


def put_run(
    put: Put, step: Make, folder: str, name: str, sets: list[dict[str, Any]], solved: dict[str, Any], **more: Any
) -> None:
    workspace = Workspace(Path(folder))
    write_rows(workspace.train_problems, PROBLEMS, sets)
    table = workspace.evaluation / "sums.parquet"
    write_rows(table, EVALUATION, samples(solved))
    final = {"avg_at_k": {"value": 0.5, "low": 0.4, "high": 0.6}, "length_mean": 7.0}
    put(
        folder, name,
        data={"data/problems/train.parquet": digest(workspace.train_problems)},
        steps=[step("evaluate", outputs={"sums.parquet": digest(table)})],
        evaluation={"sums": {"final": final, "gain": {"metric": "avg_at_k"}}},
        **more,
    )  # fmt: skip


def test_two_runs_side_by_side(put: Put, step: Make) -> None:
    ours: dict[str, list[float | None]] = {"p": [0.0, 1.0], "q": [0.0, 0.0], "only a": [1.0, 1.0]}
    theirs: dict[str, list[float | None]] = {"p": [1.0, 1.0], "q": [None, 1.0], "only b": [0.0, 0.0]}
    rubric = JudgeRecord(name="model", model="m", rubric="r/1", digest="d", text="name: r\nsystem: be kind\n")
    strict = rubric.model_copy(update={"digest": "e", "text": "name: r\nsystem: be strict\n"})
    put_run(put, step, "a", "aaaaaaaaaaaa-1", problems(("1+1", "2"), ("2+2", "4"), ("3+3", "6")), ours, judge=rubric)
    alarm = {"name": "collapse", "round": 3, "evidence": "e"}
    put_run(
        put, step, "b", "bbbbbbbbbbbb-1", problems(("1+1", "2"), ("2+2", "5")), theirs, judge=strict, alarms=[alarm]
    )
    found = difference(find("a"), find("b"))
    (table,) = found["data"]
    assert (table["rows"], table["only_a"], table["only_b"], table["changed"]) == ((3, 2), 1, 0, 1)
    (row,) = found["metrics"]
    expected = paired_bootstrap(
        [1, 1, float("nan"), 1], ["p", "p", "q", "q"], [0, 1, 0, 0], ["p", "p", "q", "q"], seed=0
    )
    assert row["difference"] == expected._asdict()
    assert (row["difference"]["value"], row["difference"]["problems"]) == (0.75, 2)
    assert row["note"] == "2 problems that only one of them has are left out"
    assert found["judge"]["digest"] == ("d", "e")
    assert found["judge"]["rubric_text"][-2:] == ["-system: be kind", "+system: be strict"]
    assert found["alarms"] == {"only_a": [], "only_b": ["collapse from round 3"], "both": []}
    # The files are made anew by another run: what the record says of them is all there is.
    write_rows(Path("b/data/problems/train.parquet"), PROBLEMS, problems(("7+7", "14")))
    write_rows(Path("b/artifacts/evaluation/sums.parquet"), EVALUATION, samples({"p": [1.0]}))
    later = difference(find("a"), find("b"))
    assert later["data"][0]["changed"] is None
    assert later["data"][0]["digests"] == table["digests"]
    assert later["metrics"][0]["difference"] is None
    assert later["metrics"][0]["note"] == "the samples are not at hand in b"
    assert later["metrics"][0]["value"] == row["value"]


def test_no_problem_in_common_is_said(put: Put, step: Make) -> None:
    for folder, name in (("a", "p"), ("b", "q")):
        put_run(put, step, folder, f"{folder * 12}-1", problems(("1+1", "2")), {name: [1.0]})
    (row,) = difference(find("a"), find("b"))["metrics"]
    assert row["difference"] is None
    assert row["note"]
