"""prepare: content ids, no problem twice, none in training that is in a benchmark, local files by a column mapping."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo.engines.protocols import Problem
from papo.engines.sources import make_source
from papo.errors import DataError
from papo.params import ColumnsParams, PrepareParams
from papo.schemas import PROBLEMS, TRACES, problem_id
from papo.stages import prepare
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows


def problem(prompt: str, answer: str = "1", **more: Any) -> Problem:
    return Problem(prompt=prompt, answer=answer, reference_solution=None, source="test", **more)


class FakeSource:
    def __init__(
        self,
        train: Sequence[Problem],
        benchmarks: Mapping[str, Sequence[Problem]] | None = None,
        traces: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._train, self._benchmarks, self._traces = train, benchmarks or {}, traces
        self.calls = 0

    def train(self) -> Iterator[Problem]:
        self.calls += 1
        return iter(self._train)

    def benchmarks(self) -> Mapping[str, Iterator[Problem]]:
        return {name: iter(problems) for name, problems in self._benchmarks.items()}

    def traces(self) -> Iterator[tuple[str, str]]:
        return iter(self._traces)


def run(out: Path, source: FakeSource, context: Context) -> Manifest:
    return prepare.run(PrepareParams(), prepare.Inputs(files={}), out, engine=source, context=context)


def test_the_tables(tmp_path: Path, context: Context) -> None:
    source = FakeSource(
        [problem("a", tier="t", pass_rate=0.5), problem("b", "2")], {"bench": [problem("c")]}, [("a", "x")]
    )
    manifest = run(tmp_path / "problems", source, context)
    first, second = read_rows(tmp_path / "problems/train.parquet", PROBLEMS)
    assert first == {
        "problem_id": problem_id("a", "1"), "prompt": "a", "answer": "1", "reference_solution": None, "source": "test",
        "tier": "t", "pass_rate": 0.5, "split": "train", "grading": "{}",
    }  # fmt: skip
    assert (second["prompt"], second["tier"], second["pass_rate"]) == ("b", None, None)
    (held_out,) = read_rows(tmp_path / "problems/eval/bench.parquet", PROBLEMS)
    assert (held_out["prompt"], held_out["split"]) == ("c", "eval")
    assert read_rows(tmp_path / "problems/traces.parquet", TRACES) == [{"prompt": "a", "completion": "x"}]
    assert manifest.counts == {"train": 2, "contaminated": 0, "traces": 1, "bench": 1}


def test_a_second_run_does_nothing(tmp_path: Path, context: Context) -> None:
    source = FakeSource([problem("a")])
    assert not run(tmp_path / "problems", source, context).skipped
    assert run(tmp_path / "problems", source, context).skipped
    assert source.calls == 1


def test_a_training_problem_of_a_benchmark_is_left_out_and_counted(tmp_path: Path, context: Context) -> None:
    source = FakeSource(
        [problem("a", "1"), problem("b", "2"), problem("c", "3")],
        {"one": [problem("b", "2")], "two": [problem("c", "3.0"), problem("d")]},
    )
    manifest = run(tmp_path / "problems", source, context)
    assert [row["prompt"] for row in read_rows(tmp_path / "problems/train.parquet", PROBLEMS)] == ["a"]
    assert manifest.counts["contaminated"] == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FakeSource([]), "the training set holds no problems"),
        (FakeSource([problem("a")], {"bench": []}), "the benchmark bench holds no problems"),
        (
            FakeSource([problem("a"), problem("b"), problem("a", "2")]),
            "the training set holds 1 problems more than once",
        ),
        (FakeSource([problem("a")], {"bench": [problem("b"), problem("b")]}), "benchmark bench holds 1 problems more"),
        (FakeSource([problem("a")], {"bench": [problem("a")]}), "every training problem is also in a benchmark"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_written(
    tmp_path: Path, context: Context, source: FakeSource, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path / "problems", source, context)
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


# Local files, by the real source.

VERL = [
    {"prompt": [{"role": "user", "content": f"What is {n}?"}], "reward_model": {"ground_truth": str(n), "style": "rule"},
     "extra": {"level": "easy", "rate": 0.25}}
    for n in range(4)
]  # fmt: skip
NESTED = ColumnsParams(
    prompt="prompt.0.content", answer="reward_model.ground_truth", tier="extra.level", pass_rate="extra.rate"
)


def write(path: Path, rows: Sequence[Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def from_file(params: PrepareParams, out: Path, context: Context) -> Manifest:
    inputs = prepare.Inputs(files=prepare.local_files(params))
    return prepare.run(params, inputs, out, engine=make_source(params), context=context)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_file_with_nested_columns(tmp_path: Path, context: Context, kind: str) -> None:
    source = write(tmp_path / f"verl.{kind}", VERL)
    params = PrepareParams(source=source, columns=NESTED, holdout=1, prompt_template="Q: {prompt}")
    manifest = from_file(params, tmp_path / "problems", context)
    train = read_rows(tmp_path / "problems/train.parquet", PROBLEMS)
    held_out = read_rows(tmp_path / "problems/eval/holdout.parquet", PROBLEMS)
    assert {(row["prompt"], row["answer"]) for row in train + held_out} == {
        (f"Q: What is {n}?", str(n)) for n in range(4)
    }
    assert {(row["tier"], row["pass_rate"], row["source"]) for row in train} == {("easy", 0.25, source)}
    assert manifest.counts == {"train": 3, "contaminated": 0, "traces": 0, "holdout": 1}


def test_a_benchmark_of_its_own_file(tmp_path: Path, context: Context) -> None:
    rows = [{"prompt": str(n), "answer": str(n)} for n in range(5)]
    params = PrepareParams(
        source=write(tmp_path / "train.jsonl", rows), eval_sources={"mine": write(tmp_path / "eval.jsonl", rows[3:])}
    )
    assert from_file(params, tmp_path / "problems", context).counts == {
        "train": 3, "contaminated": 2, "traces": 0, "mine": 2,
    }  # fmt: skip


def test_a_changed_file_is_a_new_data_set(tmp_path: Path, context: Context) -> None:
    params = PrepareParams(source=write(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "1"}]))
    assert not from_file(params, tmp_path / "problems", context).skipped
    assert from_file(params, tmp_path / "problems", context).skipped
    write(tmp_path / "train.jsonl", [{"prompt": "b", "answer": "22"}])
    assert not from_file(params, tmp_path / "problems", context).skipped
    assert [row["prompt"] for row in read_rows(tmp_path / "problems/train.parquet", PROBLEMS)] == ["b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "columns", "message", "where"),
    [
        ([{"question": "a", "answer": "1"}], {}, "there is no column prompt", "row 0"),
        (
            VERL,
            {"prompt": "prompt.1.content", "answer": "reward_model.ground_truth"},
            "no column prompt.1.content",
            "row 0",
        ),
        (VERL, {"prompt": "prompt.0.content", "answer": "reward_model.truth"}, "no column reward_model.truth", "row 0"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": " ", "answer": "1"}], {}, "column prompt is empty", "row 1"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}], {}, "column answer is empty", "row 1"),
        ([{"prompt": "a", "answer": "1", "rate": "high"}], {"pass_rate": "rate"}, "column rate holds 'high'", "row 0"),
    ],
    ids=["missing", "missing in a list", "missing in a mapping", "blank", "null", "no number"],
)
def test_a_row_that_cannot_be_read_is_named(
    tmp_path: Path, context: Context, kind: str, rows: list[Any], columns: dict[str, str], message: str, where: str
) -> None:
    source = write(tmp_path / f"data.{kind}", rows)
    with pytest.raises(DataError, match=message) as caught:
        from_file(PrepareParams(source=source, columns=ColumnsParams(**columns)), tmp_path / "problems", context)
    assert caught.value.where == f"{source}, {where}"
    assert not (tmp_path / "problems").exists()


def test_the_columns_there_are_named_too(tmp_path: Path, context: Context) -> None:
    source = write(tmp_path / "data.jsonl", [{"question": "a", "gold": "1"}])
    with pytest.raises(DataError) as caught:
        from_file(PrepareParams(source=source), tmp_path / "problems", context)
    assert "question, gold" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no such file"),
        ("none.parquet", None, "there is no such file"),
        ("text.jsonl", b"no json at all\n", "the data set cannot be loaded"),
        ("text.parquet", b"no parquet at all\n", "the data set cannot be loaded"),
        ("empty.jsonl", b"", None),
        ("empty.parquet", b"", None),
    ],
)
def test_a_file_that_is_no_data_set_is_named(
    tmp_path: Path, context: Context, name: str, content: bytes | None, message: str | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        from_file(PrepareParams(source=str(path)), tmp_path / "problems", context)
    assert str(path) in caught.value.where


def test_more_held_out_than_there_is(tmp_path: Path, context: Context) -> None:
    source = write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(DataError, match="1 problems to hold out of 1"):
        from_file(PrepareParams(source=source, holdout=1), tmp_path / "problems", context)
