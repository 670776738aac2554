"""Problems from local files by a column mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo.engines.protocols import Drop, Problem
from papo.engines.sources import make_source
from papo.engines.sources.formats import DatasetSource
from papo.errors import DataError
from papo.params import ColumnsParams, PrepareParams


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached by their file's path: nothing of a test may be left for the next one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}+1?", "answer": number + 1} for number in range(count)]


@pytest.mark.parametrize("name", ["source.jsonl", "source.parquet"])
def test_every_column_is_mapped(tmp_path: Path, name: str) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": "1+{x}=\\frac{1}{2}?"}],
            "reward_model": {"ground_truth": 2},
            "solution": "one and one",
            "level": 3,
            "rate": 0.5,
        },
        {
            "messages": [{"role": "user", "content": "2+2?"}],
            "reward_model": {"ground_truth": 4},
            "solution": None,
            "level": None,
            "rate": None,
        },
    ]
    source = written(tmp_path / name, rows)
    columns = ColumnsParams(
        prompt="messages.0.content",
        answer="reward_model.ground_truth",
        reference_solution="solution",
        tier="level",
        pass_rate="rate",
    )
    params = PrepareParams(source=source, columns=columns, prompt_template="{prompt} Box it: \\boxed{{}}.")
    problems = {item.answer: item for item in DatasetSource(params).train() if isinstance(item, Problem)}
    first = Problem("1+{x}=\\frac{1}{2}? Box it: \\boxed{}.", "2", "one and one", source, "3", 0.5)
    assert problems == {"2": first, "4": Problem("2+2? Box it: \\boxed{}.", "4", None, source)}


def test_the_seed_alone_decides_the_order(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", rows_of(20))

    def order(seed: int) -> list[int]:
        items = DatasetSource(PrepareParams(source=source, seed=seed)).train()
        return [item.row for item in items if item.row is not None]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(20))


def test_benchmarks_may_be_data_sets_of_their_own(tmp_path: Path) -> None:
    source, other = (written(tmp_path / f"{name}.jsonl", rows_of(size)) for name, size in (("a", 9), ("b", 4)))
    engine = make_source(PrepareParams(source=source, eval_sources={"other": other}))
    assert isinstance(engine, DatasetSource)
    assert {name: len(list(problems)) for name, problems in engine.benchmarks().items()} == {"other": 4}
    assert len(list(engine.train())) == 9
    assert list(engine.traces()) == []


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"question": "1?", "answer": "1"}, {}, "there is no column prompt"),
        ({"prompt": "1?", "answer": "1"}, {"answer": "answer.value"}, "there is no column answer.value"),
        ({"prompt": ["1?"], "answer": "1"}, {"prompt": "prompt.1"}, "there is no column prompt.1"),
        ({"prompt": "1?", "answer": "1", "rate": "often"}, {"pass_rate": "rate"}, "'often', not a float"),
        ({"prompt": "1?", "answer": "1", "rate": 8}, {"pass_rate": "rate"}, "holds 8, no share"),
        ({"prompt": "1?", "answer": "1"}, {"tier": "level"}, "there is no column level"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    source = written(tmp_path / "source.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        DatasetSource(PrepareParams(source=source, columns=ColumnsParams(**columns))).train()
    assert caught.value.where == f"{source}, row 0"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "1?", "answer": None}, "no_answer"),
        ({"prompt": "1?", "answer": " "}, "no_answer"),
        ({"prompt": " \n", "answer": "1"}, "no_prompt"),
        ({"prompt": "1?", "answer": "1" * 1_001}, "unparsable_gold"),
    ],
)
def test_a_row_without_a_problem_is_a_drop_with_its_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    source = written(tmp_path / "source.jsonl", [{"prompt": "2?", "answer": "2"}, row])
    (dropped,) = (item for item in DatasetSource(PrepareParams(source=source)).train() if isinstance(item, Drop))
    assert (dropped.reason, dropped.row, dropped.source) == (reason, 1, source)


def test_a_name_with_dots_of_its_own_is_found(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", [{"prompt": "1?", "answer": "1", "info": {"v2.5_rate": 0.5}}])
    params = PrepareParams(source=source, columns=ColumnsParams(pass_rate="info.v2.5_rate"))
    (problem,) = DatasetSource(params).train()
    assert isinstance(problem, Problem)
    assert problem.pass_rate == 0.5


def test_a_missing_column_says_which_there_are(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", [{"question": "1?", "answer": "1"}])
    with pytest.raises(DataError) as caught:
        DatasetSource(PrepareParams(source=source)).train()
    assert caught.value.fix.endswith("there are: question, answer")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("source.jsonl", b"{not json}\n", "cannot be loaded"),
        ("source.jsonl", b'{"prompt": "\xe9", "answer": "1"}', "cannot be loaded"),
        ("source.jsonl", b'{"prompt": "\\ud800", "answer": "1"}', "cannot be loaded"),
        ("source.jsonl", b"", "no problems"),
        ("source.jsonl", b"\n \n", "no problems"),
        ("source.parquet", b"PAR1 and no more", "cannot be loaded"),
        ("source.jsonl", None, "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_data_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        DatasetSource(PrepareParams(source=str(path))).train()
    assert caught.value.where == str(path)


def test_an_empty_parquet_file_holds_no_problems(tmp_path: Path) -> None:
    path = tmp_path / "source.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=r"no problems|cannot be loaded"):
        DatasetSource(PrepareParams(source=str(path))).train()


def test_a_data_set_of_the_hub_that_is_not_there_is_a_data_error() -> None:
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        DatasetSource(PrepareParams(source="papo-tests/no-such-data-set")).train()
    assert caught.value.where == "papo-tests/no-such-data-set"


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "source.jsonl"
    written(path, rows_of(3))
    assert len(list(DatasetSource(PrepareParams(source=str(path))).train())) == 3
    written(path, rows_of(7))
    assert len(list(DatasetSource(PrepareParams(source=str(path))).train())) == 7
