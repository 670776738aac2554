"""Each format by a row of its own, the real data sets by their counts, and what is refused or dropped."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.engines.protocols import Drop, Problem
from papo.engines.sources import make_source
from papo.engines.sources.formats import FORMATS, RECOGNISED, DatasetSource, recognised
from papo.engines.sources.rows import Row
from papo.errors import DataError, ParamsError
from papo.params import ColumnsParams, PrepareParams, TiersParams, load_params
from papo.schemas import Grading

DATA = Path(__file__).parents[3] / "shared/data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside this checkout")

VERL = {
    "data_source": "some",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    "reward_model": {"ground_truth": "4", "style": "rule"},
}
NUMINA = {
    "problem": "2+2?", "solution": "It is 4.", "answer": "4", "problem_type": "Algebra", "question_type": "math-word-problem",
    "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "olympiads", "synthetic": False,
}  # fmt: skip
OLYMPIAD = {
    "id": 1, "context": None, "question": "How far?", "solution": ["Far.", "Or not."], "final_answer": ["$3$"],
    "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": None, "subfield": "Algebra",
}  # fmt: skip
GPQA = {
    "Question": "Which?", "Correct Answer": "this", "Incorrect Answer 1": "that", "Incorrect Answer 2": "those",
    "Incorrect Answer 3": "these", "Explanation": "It is.", "High-level domain": "Physics", "Record ID": "rec1",
}  # fmt: skip
HUMANEVAL = {
    "task_id": "H/0", "prompt": "def f(x):\n    ", "canonical_solution": "return x\n", "test": "\ndef check(f):\n    assert f(1)\n",
    "entry_point": "f",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached by their file's path: nothing of a test may be left for the next one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(name: str, values: dict[str, Any], seed: int = 0) -> Problem | Drop:
    item: Problem | Drop = FORMATS[name].problem(Row(values, 7, "file"), seed)
    return item


def problem(name: str, values: dict[str, Any], seed: int = 0) -> Problem:
    item = read(name, values, seed)
    assert isinstance(item, Problem), item
    assert item.row == 7
    return item


def test_verl() -> None:
    assert problem("verl", VERL) == Problem("Be brief.\n\n2+2?", "4", None, "some")
    assert problem("verl", {"prompt": "2+2?", "reward_model": {"ground_truth": 4}}) == Problem(
        "2+2?", "4", None, "file"
    )


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\\frac{11}{13}", r"\frac{11}{13}"),
        (r"-2\\sqrt{3}", r"-2\sqrt{3}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\begin{pmatrix} a \\b \end{pmatrix}", r"\begin{pmatrix} a \\b \end{pmatrix}"),
    ],
)
def test_a_backslash_escaped_once_too_often_is_put_right(gold: str, answer: str) -> None:
    assert problem("verl", VERL | {"reward_model": {"ground_truth": gold}}).answer == answer


def test_numina() -> None:
    assert problem("numina", NUMINA) == Problem("2+2?", "4", "It is 4.", "olympiads")
    assert problem("numina", NUMINA | {"question_type": "MCQ", "answer": "B"}).grading == Grading(kind="choice")


def test_gsm8k() -> None:
    answer = "He has 2 * 500 = <<2*500=1000>>1000.\n#### 1,000"
    made = problem("gsm8k", {"question": "How many?", "answer": answer})
    assert made == Problem("How many?", "1000", "He has 2 * 500 = 1000.", "file")


def test_math_with_and_without_an_answer_of_its_own() -> None:
    row = {"problem": "2+2?", "solution": r"So \boxed{\frac{8}{2}}.", "level": "Level 5"}
    assert problem("math", row) == Problem("2+2?", r"\frac{8}{2}", row["solution"], "file", "level 5")
    assert problem("math", row | {"answer": "4", "level": 2}) == Problem(
        "2+2?", "4", row["solution"], "file", "level 2"
    )
    assert problem("math", {"problem": "2+2?", "answer": 4}) == Problem("2+2?", "4", None, "file")


@pytest.mark.parametrize(
    ("more", "prompt", "answer", "grading"),
    [
        ({}, "How far?", "$3$", Grading()),
        ({"context": "Go."}, "Go.\n\nHow far?", "$3$", Grading()),
        ({"final_answer": ["$1$,$2$"], "is_multiple_answer": True}, "How far?", "$1$,$2$", Grading(several=True)),
        ({"final_answer": ["(1,2)"], "answer_type": "Tuple"}, "How far?", "(1,2)", Grading(ordered=True)),
        ({"unit": "$cm^2$"}, "How far?", "$3$", Grading(unit="cm^2")),
    ],
)
def test_olympiadbench(more: dict[str, Any], prompt: str, answer: str, grading: Grading) -> None:
    assert problem("olympiadbench", OLYMPIAD | more) == Problem(
        prompt, answer, "Far.", "file", "Algebra", grading=grading
    )


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "2+2?", "answer": "025", "solution": "So."},
        {"Problem": "2+2?", "Answer": 25, "Solution": "So."},
        {"problem": "2+2?", "answer": 25, "solution": "So."},
    ],
)
def test_aime_of_its_own_columns(row: dict[str, Any]) -> None:
    assert problem("aime", row) == Problem("2+2?", "25", "So.", "file")


def test_aime_in_the_schema_of_verl() -> None:
    assert problem("aime", VERL | {"reward_model": {"ground_truth": "025"}}).answer == "25"


def test_gpqa_shuffles_by_the_seed_and_the_question_alone() -> None:
    made = problem("gpqa", GPQA)
    choices = made.prompt.removeprefix("Which?\n\n").split("\n")
    assert [choice[:3] for choice in choices] == ["A) ", "B) ", "C) ", "D) "]
    assert {choice[3:] for choice in choices} == {"this", "that", "those", "these"}
    assert f"{made.answer}) this" in choices
    assert (made.grading, made.tier) == (Grading(kind="choice", extraction="answer_is"), "Physics")
    assert read("gpqa", GPQA) == made
    letters = Counter(
        problem("gpqa", GPQA | {"Question": f"Which {n}?"}, seed).answer for n in range(40) for seed in (0, 1)
    )
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 35


def test_humaneval_keeps_every_space_and_takes_no_template(tmp_path: Path) -> None:
    grading = Grading(kind="code", entry_point="f", prefix=HUMANEVAL["prompt"])
    expected = Problem(HUMANEVAL["prompt"], HUMANEVAL["test"], HUMANEVAL["canonical_solution"], "file", grading=grading)
    assert problem("humaneval", HUMANEVAL) == expected
    path = written(tmp_path / "h.jsonl", [HUMANEVAL])
    (item,) = DatasetSource(PrepareParams(source=path, prompt_template="Solve: {prompt}")).train()
    assert item == Problem(*(HUMANEVAL[key] for key in ("prompt", "test", "canonical_solution")), path, grading=grading)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("numina", NUMINA | {"question_type": "proof"}, "proof_only"),
        ("numina", NUMINA | {"answer": "proof"}, "proof_only"),
        ("numina", NUMINA | {"answer": "notfound"}, "no_answer"),
        ("numina", NUMINA | {"answer": None}, "no_answer"),
        ("numina", NUMINA | {"problem_is_valid": "Incomplete"}, "marked_error"),
        ("numina", NUMINA | {"problem": " "}, "no_prompt"),
        ("verl", VERL | {"reward_model": {"ground_truth": None}}, "no_answer"),
        ("verl", VERL | {"reward_model": {"ground_truth": "1" * 10_000_000}}, "unparsable_gold"),
        ("verl", VERL | {"prompt": []}, "no_prompt"),
        ("gsm8k", {"question": "How many?", "answer": "some"}, "no_answer"),
        ("math", {"problem": "2+2?", "solution": "It follows."}, "no_answer"),
        ("olympiadbench", OLYMPIAD | {"error": "1e-1"}, "marked_error"),
        ("olympiadbench", OLYMPIAD | {"final_answer": None}, "proof_only"),
        ("aime", {"problem": "2+2?", "answer": "1000"}, "unparsable_gold"),
        ("aime", {"problem": "2+2?", "answer": "4.5"}, "unparsable_gold"),
        ("gpqa", GPQA | {"Incorrect Answer 2": None}, "no_answer"),
        ("gpqa", GPQA | {"Incorrect Answer 2": "this"}, "unparsable_gold"),
        ("humaneval", HUMANEVAL | {"test": ""}, "no_answer"),
        ("humaneval", HUMANEVAL | {"entry_point": None}, "no_answer"),
    ],
)
def test_a_row_that_gives_no_problem_is_a_drop(name: str, row: dict[str, Any], reason: str) -> None:
    item = read(name, row)
    assert isinstance(item, Drop)
    assert (item.reason, item.row, item.source) == (reason, 7, "file")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (VERL, "verl"), (NUMINA, "numina"), (OLYMPIAD, "olympiadbench"), (GPQA, "gpqa"), (HUMANEVAL, "humaneval"),
        ({"question": "q", "answer": "#### 1"}, "gsm8k"), ({"question": "q", "answer": "1"}, "columns"),
        ({"problem": "p", "answer": "1"}, "math"), ({"problem": "p", "solution": "s"}, "math"),
        ({"prompt": "p", "answer": "1"}, "columns"),
    ],
)  # fmt: skip
def test_a_format_is_recognised_by_its_columns(row: dict[str, Any], name: str) -> None:
    assert recognised(row) == name


@pytest.mark.parametrize("name", list(RECOGNISED))
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "source.jsonl", [{"other": 1, "one": "x"}])
    with pytest.raises(DataError, match="there is no column") as caught:
        list(DatasetSource(PrepareParams(source=path, format=name)).train())  # type: ignore[arg-type]  # a str, of those there are
    assert caught.value.where == f"{path}, row 0"
    assert caught.value.fix.endswith("there are: other, one")


def test_messages_that_are_none_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "source.jsonl", [VERL | {"prompt": [1, 2]}])
    with pytest.raises(DataError, match=r"there is no column prompt\.0\.content"):
        list(DatasetSource(PrepareParams(source=path)).train())


def written(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = [{"problem": "2+2?", "answer": "four"}, {"problem": "2+3?", "answer": "five"}]
    path = tmp_path / name
    written(path, rows)
    if name == "a.json":
        path.write_text(json.dumps(rows))
    if name == "a.csv":
        path.write_text("problem,answer\n2+2?,four\n2+3?,five\n")
    items = DatasetSource(PrepareParams(source=str(path))).train()
    assert {item.answer for item in items if isinstance(item, Problem)} == {"four", "five"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08 no more", b"[1, 2"], ids=["empty", "cut", "no rows"])
def test_a_file_without_rows_is_a_data_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith("gz") and not content else content)
    with pytest.raises(DataError) as caught:
        list(DatasetSource(PrepareParams(source=str(path), format="math")).train())
    assert str(path) in caught.value.where


def test_an_id_twice_is_refused_in_training_and_in_a_benchmark(tmp_path: Path) -> None:
    rows = [OLYMPIAD, OLYMPIAD | {"id": 2, "question": "How wide?"}, OLYMPIAD | {"question": "How deep?"}]
    path = written(tmp_path / "o.jsonl", rows)
    for source in (PrepareParams(source=path), PrepareParams(source="sums", eval_sources={"o": {"source": path}})):
        with pytest.raises(DataError, match="id 1 is there twice, in rows 0 and 2") as caught:
            list(DatasetSource(source).train() if source.source == path else DatasetSource(source).benchmarks())
        assert caught.value.where == path


def test_benchmarks_are_each_read_in_their_format(tmp_path: Path) -> None:
    plain = written(tmp_path / "p.jsonl", [{"problem": "2+2?", "answer": "004"}])
    params = PrepareParams(
        source="sums",
        eval_sources={"one": plain, "two": {"source": plain, "format": "aime"}},  # type: ignore[dict-item]  # as params.yaml has them
        columns=ColumnsParams(pass_rate="rate"),
    )
    items = {name: next(items) for name, items in DatasetSource(params).benchmarks().items()}
    assert [(item.answer, item.format) for item in items.values() if isinstance(item, Problem)] == [
        ("004", "math"), ("4", "aime"),
    ]  # fmt: skip


def test_benchmarks_from_files_are_added_to_the_generated_ones(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [{"problem": "2+2?", "answer": "4"}])
    overrides = [
        f"prepare.eval_sources={{mine: {path}}}",
        "prepare.prompt_template='Work out {prompt}'",
        "evaluate.benchmarks=[sums-hard, mine]",
    ]
    params = load_params(None, overrides=overrides).prepare
    source, alone = make_source(params), make_source(params.model_copy(update={"eval_sources": {}}))
    found = {name: list(items) for name, items in source.benchmarks().items()}
    assert list(found) == ["sums-in-range", "sums-hard", "mine"]
    assert [(item.prompt, item.source) for item in found["mine"]] == [("Work out 2+2?", path)]
    assert {name: found[name] for name in alone.benchmarks()} == {n: list(i) for n, i in alone.benchmarks().items()}
    assert list(source.train()) == list(alone.train())
    assert list(source.traces()) == list(alone.traces())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prepare.format=excel", "prepare.format: input should be 'auto'"),
        ("prepare.eval_sources={a: {path: x}}", "prepare.eval_sources.a"),
        ("prepare.eval_sources={train: x}", "train is the name of another set"),
        ("prepare.eval_sources={sums-hard: x}", "sums-hard is the name of another set"),
        ("evaluate.benchmarks=[gsm8k]", "gsm8k is not made by prepare, which makes sums-in-range, sums-hard"),
        ("prepare.tiers={per_tier: 4}", "tiers need a column of pass rates"),
        ("prepare.near_match=0", "prepare.near_match: input should be greater than 0"),
    ],
)
def test_params_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(None, overrides=[override])
    assert message in caught.value.what


@real
@pytest.mark.parametrize(
    ("name", "form", "read_as", "count"),
    [
        ("gsm8k_test.jsonl", "auto", "gsm8k", 1319),
        ("math500.jsonl", "auto", "math", 500),
        ("olympiadbench_675.jsonl", "auto", "olympiadbench", 674),
        ("humaneval.jsonl.gz", "auto", "humaneval", 164),
        ("math_2560_with_pass_rates.parquet", "auto", "verl", 2560),
        ("papo_release_amc2023.parquet", "auto", "verl", 40),
        ("papo_release_math__math_500.parquet", "auto", "verl", 500),
        ("papo_release_aime2024.parquet", "aime", "aime", 30),
        ("papo_release_aime2025.parquet", "aime", "aime", 30),
        ("papo_release_aime2026.parquet", "aime", "aime", 30),
    ],
)
def test_real_data_sets_by_their_counts(name: str, form: Any, read_as: str, count: int) -> None:
    items = list(DatasetSource(PrepareParams(source=str(DATA / name), format=form)).train())
    problems = [item for item in items if isinstance(item, Problem)]
    assert (len(problems), {item.format for item in problems}) == (count, {read_as})
    drops = [item.reason for item in items if isinstance(item, Drop)]
    assert drops == (["marked_error"] if count == 674 else [])


@real
@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [
        (
            "gsm8k_sampled_G4.jsonl",
            ColumnsParams(prompt="question", answer="gold", reference_solution="reference"),
            1319,
        ),
        ("step_labels.jsonl", ColumnsParams(prompt="question", answer="gold", tier="source"), 649),
    ],
)
def test_real_rows_by_a_column_mapping(name: str, columns: ColumnsParams, count: int) -> None:
    items = list(DatasetSource(PrepareParams(source=str(DATA / name), columns=columns)).train())
    assert len(items) == count
    assert {item.reason for item in items if isinstance(item, Drop)} <= {"duplicate"}


def test_a_pass_rate_of_the_tiers_is_read_with_a_column_mapping_too(tmp_path: Path) -> None:
    path = written(tmp_path / "source.jsonl", [{"q": "2+2?", "a": "4", "rate": 0.5}])
    columns = ColumnsParams(prompt="q", answer="a")
    params = PrepareParams(source=path, columns=columns, tiers=TiersParams(per_tier=1, pass_rate="rate"))
    assert list(DatasetSource(params).train()) == [Problem("2+2?", "4", None, path, None, 0.5)]


@real
def test_real_pass_rates_by_a_name_with_a_dot() -> None:
    params = PrepareParams(
        source=str(DATA / "math_2560_with_pass_rates.parquet"),
        columns=ColumnsParams(pass_rate="extra_info.qwen2.5_7b_pass_rate"),
    )
    rates = Counter(item.pass_rate for item in DatasetSource(params).train() if isinstance(item, Problem))
    assert (rates[0.0], rates[0.125], rates[0.6875]) == (1035, 237, 1)


@real
def test_no_real_gold_answer_is_left_with_an_escaped_backslash() -> None:
    params = PrepareParams(source=str(DATA / "math_2560_with_pass_rates.parquet"))
    answers = [item.answer for item in DatasetSource(params).train() if isinstance(item, Problem)]
    assert sum(r"\\" in answer and r"\begin" not in answer for answer in answers) == 0
