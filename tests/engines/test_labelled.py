"""Labelled solutions: those that are made, and those that are read, with what is wrong about a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from papo.core.credit import split_steps
from papo.core.steps import operations, parse_problem, parse_steps, stray_lines
from papo.engines.labelled import KINDS, LEVELS, Labelled, labelled_set
from papo.errors import DataError, ParamsError

SHARED = Path(__file__).parents[3] / "shared/data/step_labels.jsonl"
GOOD = {"problem": "1+2=?", "response": "1+2=3", "label": True}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "mine.v2.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder: Path, *rows: dict[str, Any], **columns: str) -> list[Labelled]:
    return labelled_set(write(folder, *rows), columns=columns).responses


# ---- made here ----


def test_every_kind_is_what_its_label_says() -> None:
    made = labelled_set("sums", limit=1500, seed=4)
    assert (made.name, made.levels, made.skipped) == ("sums", LEVELS, {})
    assert Counter(one.kind for one in made.responses) == dict.fromkeys(KINDS, 300)
    for one in made.responses:
        terms = parse_problem(one.problem)
        assert terms is not None
        needed, steps = operations(terms), parse_steps(one.response)
        done = [operation for step in steps for operation in step.operations]
        assert one.label == KINDS[one.kind]
        assert stray_lines(one.response) == 0
        assert one.answer_correct is one.response.endswith(f"\n\\boxed{{{sum(terms)}}}"[one.kind == "bare" :])
        true, false = all(step.true for step in steps), sum(not step.true for step in steps)
        if one.kind == "full":
            assert true
            assert done == needed
        elif one.kind == "merged":
            assert true
            assert done == needed
            assert len(steps) < len(needed)
        elif one.kind == "padded":
            assert true
            assert not Counter(needed) - Counter(done)
            assert len(done) > len(needed)
        elif one.kind == "wrong":
            assert false == 1
            assert one.first_error == 1 + [step.true for step in steps].index(False)
        else:
            assert not steps


def test_the_answer_says_nothing_of_the_kind_where_steps_do_not_force_it() -> None:
    made = labelled_set("sums", limit=4000).responses
    right = {kind: [one.answer_correct for one in made if one.kind == kind] for kind in KINDS}
    for kind in ("full", "merged", "padded", "bare"):
        assert sum(map(bool, right[kind])) / len(right[kind]) == pytest.approx(0.75, abs=0.06)
    assert 0.25 < sum(map(bool, right["wrong"])) / len(right["wrong"]) < 0.5


def test_a_problem_has_one_response_of_each_kind_and_the_seed_decides() -> None:
    first, again, other = (labelled_set("sums", limit=50, seed=seed).responses for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert labelled_set("sums", limit=20, seed=1).responses == first[:20]
    assert set(Counter(one.problem for one in first).values()) == {5}
    assert [len(labelled_set("sums", limit=limit).responses) for limit in (1, 7)] == [1, 7]


# ---- read ----


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_real_solutions_with_steps() -> None:
    found = labelled_set(str(SHARED))
    assert (found.name, len(found.responses), found.levels, found.skipped) == ("step_labels", 649, (0.0, 1.0), {})
    one = found.responses[0]
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    assert (one.first_error, one.label, one.answer_correct) == (2, 0.0, False)
    assert sum(one.answer_correct is True for one in found.responses) == 17
    for row, one in zip(rows, found.responses, strict=True):
        assert one.starts is not None
        ends = [*one.starts[1:], len(one.response)]
        parts = [one.response[start:end].strip() for start, end in zip(one.starts, ends, strict=True)]
        assert parts == [step.strip() for step in row["steps"]]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_the_steps_of_real_solutions_are_those_that_a_judge_is_asked_about() -> None:
    for one in labelled_set(str(SHARED)).responses:
        assert one.starts == tuple(step.start for step in split_steps(one.response))


def test_labels_in_words_numbers_and_truth_values(tmp_path: Path) -> None:
    for label, level in [(True, 1.0), ("wrong", 0.0), ("Correct", 1.0), (0.5, 0.5), ("0", 0.0), (1, 1.0)]:
        assert read(tmp_path, GOOD | {"label": label})[0].label == level
    found = labelled_set(write(tmp_path, GOOD, GOOD | {"label": False}))
    assert (found.name, found.levels) == ("mine", (0.0, 1.0))
    assert labelled_set(write(tmp_path, GOOD | {"label": 1.0}, GOOD | {"label": 0.5})).levels == LEVELS


def test_the_first_wrong_step_may_be_the_label(tmp_path: Path) -> None:
    row = {"problem": "p", "steps": ["a", "b", "c"]}
    found = read(tmp_path, *(row | {"first_error_step": step} for step in (0, 3)))
    assert [(one.label, one.first_error, one.response, one.starts) for one in found] == [
        (1.0, 0, "a\nb\nc", (0, 2, 4)),
        (0.0, 3, "a\nb\nc", (0, 2, 4)),
    ]


def test_the_form_of_processbench(tmp_path: Path) -> None:
    row = {"problem": "p", "steps": ["a", "b\nb"], "final_answer_correct": True, "generator": "m"}
    right, wrong = read(tmp_path, row | {"label": -1}, row | {"label": 1})
    assert (right.label, right.first_error, right.kind, right.answer_correct) == (1.0, 0, "m", True)
    assert (wrong.label, wrong.first_error, wrong.response, wrong.starts) == (0.0, 2, "a\n\nb\nb", (0, 3))


def test_the_form_of_mr_gsm8k(tmp_path: Path) -> None:
    row = {
        "question": "q", "ground_truth_solution": "g", "model_output_steps": ["a", "b"],
        "model_output_answer_correctness": "correct",
    }  # fmt: skip
    right, wrong = read(
        tmp_path,
        row | {"model_output_solution_correctness": "correct", "model_output_solution_first_error_step": "N/A"},
        row | {"model_output_solution_correctness": "wrong", "model_output_solution_first_error_step": "2"},
    )
    assert (right.label, right.first_error, right.reference) == (1.0, 0, "g")
    assert (wrong.label, wrong.first_error, wrong.answer_correct) == (0.0, 2, True)


def test_columns_by_name_and_nested(tmp_path: Path) -> None:
    row = {"in": {"q": "1+2=?"}, "out": "1+2=3", "human": {"ok": "no"}, "where": 0}
    (one,) = read(tmp_path, row, problem="in.q", response="out", label="human.ok", first_error_index="where")
    assert (one.problem, one.response, one.label, one.first_error, one.row) == ("1+2=?", "1+2=3", 0.0, 1, 0)
    (one,) = read(tmp_path, GOOD | {"label": 3}, first_error_index="label")
    assert (one.label, one.first_error) == (0.0, 4)


def test_rows_that_are_no_labelled_response_are_counted(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"label": None}, GOOD | {"response": " "}, GOOD | {"problem": None}]
    rows = [row | {"first_error_step": None} for row in rows] + [GOOD | {"first_error_step": 2}]
    found = labelled_set(write(tmp_path, *rows))
    assert [one.row for one in found.responses] == [0]
    assert found.skipped == {"no label": 1, "no response": 1, "no problem": 1, "label against first wrong step": 1}


def test_some_of_them_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, *(GOOD | {"problem": str(number)} for number in range(30)))
    drawn = [[one.row for one in labelled_set(path, limit=5, seed=seed).responses] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(sorted(set(rows)) == rows and len(rows) == 5 for rows in drawn)
    assert len(labelled_set(path, limit=99).responses) == 30


BAD: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no problem column": ({"q": "x", "response": "y", "label": 1}, {}, "no column for the problem"),
    "no response column": ({"problem": "x", "label": 1}, {}, "no column for the response"),
    "no label column": ({"problem": "x", "response": "y"}, {}, "no column for the label"),
    "named column": (GOOD, {"label": "human"}, "there is no column human"),
    "unknown label": (GOOD | {"label": "so so"}, {}, "holds 'so so', which is no label"),
    "label out of range": (GOOD | {"label": 0.7}, {}, "holds 0.7, which is no label"),
    "half an answer": (GOOD | {"answer_correct": 0.5}, {}, "holds 0.5, which is no answer_correct"),
    "response of numbers": (GOOD | {"response": [1, 2]}, {}, "holds neither a text nor a list"),
    "step below 0": (GOOD | {"first_error_step": -1}, {}, "holds -1, which is the number of no step"),
    "half a step": (GOOD | {"first_error_step": 1.5}, {}, "which is the number of no step"),
    "step beyond": (
        {"problem": "x", "steps": ["a", "b"], "first_error_step": 3}, {}, "the first wrong step is number 3 of 2",
    ),
    "nothing labelled": (GOOD | {"label": None}, {}, "no row is a labelled response: no label 1"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_where_and_what_to_do(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, row, **columns)
    assert "mine.v2.jsonl" in caught.value.where
    assert caught.value.fix


def test_no_file_an_empty_one_and_one_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file") as caught:
        labelled_set(str(tmp_path / "none.jsonl"))
    assert "--data" in caught.value.fix
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there is no row in it"):
        labelled_set(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"problem": ')
    with pytest.raises(DataError, match="cannot be loaded"):
        labelled_set(str(tmp_path / "broken.jsonl"))


def test_bad_arguments() -> None:
    with pytest.raises(ParamsError, match="no role 'lable'"):
        labelled_set("sums", columns={"lable": "x"})
    with pytest.raises(ParamsError, match="has no columns to name"):
        labelled_set("sums", columns={"label": "x"})
    with pytest.raises(ParamsError, match="--max is 0"):
        labelled_set("sums", limit=0)
