"""Problems from local files by a column mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo.engines.protocols import Problem
from papo.engines.sources import make_source
from papo.engines.sources.columns import ColumnsSource
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
    problems = {problem.answer: problem for problem in ColumnsSource(params).train()}
    first = Problem("1+{x}=\\frac{1}{2}? Box it: \\boxed{}.", "2", "one and one", source, "3", 0.5)
    assert problems == {"2": first, "4": Problem("2+2? Box it: \\boxed{}.", "4", None, source)}


def test_held_out_problems_are_the_rest_and_the_seed_decides_which(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", rows_of(20))

    def split(seed: int, **more: Any) -> tuple[list[Problem], list[Problem]]:
        engine = ColumnsSource(PrepareParams(source=source, holdout=5, seed=seed, **more))
        return list(engine.train()), list(engine.benchmarks()["holdout"])

    train, held_out = split(0)
    assert (len(train), len(held_out)) == (15, 5)
    assert len({problem.prompt for problem in train + held_out}) == 20
    assert split(0) == (train, held_out)
    assert split(1)[1] != held_out
    assert split(0, max_problems=3) == (train[:3], held_out)


def test_benchmarks_may_be_data_sets_of_their_own(tmp_path: Path) -> None:
    source, other = (written(tmp_path / f"{name}.jsonl", rows_of(size)) for name, size in (("a", 9), ("b", 4)))
    engine = make_source(PrepareParams(source=source, eval_sources={"other": other}))
    assert isinstance(engine, ColumnsSource)
    assert {name: len(list(problems)) for name, problems in engine.benchmarks().items()} == {"other": 4}
    assert len(list(engine.train())) == 9
    assert list(engine.traces()) == []


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"question": "1?", "answer": "1"}, {}, "there is no column prompt"),
        ({"prompt": "1?", "answer": None}, {}, "column answer is empty"),
        ({"prompt": " \n", "answer": "1"}, {}, "column prompt is empty"),
        ({"prompt": "1?", "answer": "1"}, {"answer": "answer.value"}, "there is no column answer.value"),
        ({"prompt": ["1?"], "answer": "1"}, {"prompt": "prompt.1"}, "there is no column prompt.1"),
        ({"prompt": "1?", "answer": "1", "rate": "often"}, {"pass_rate": "rate"}, "'often', not a float"),
        ({"prompt": "1?", "answer": "1"}, {"tier": "level"}, "there is no column level"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    source = written(tmp_path / "source.jsonl", [row])
    with pytest.raises(DataError, match=message) as caught:
        ColumnsSource(PrepareParams(source=source, columns=ColumnsParams(**columns))).train()
    assert caught.value.where == f"{source}, row 0"


def test_a_missing_column_says_which_there_are(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", [{"question": "1?", "answer": "1"}])
    with pytest.raises(DataError) as caught:
        ColumnsSource(PrepareParams(source=source)).train()
    assert "question, answer" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("source.jsonl", b"{not json}\n", "cannot be loaded"),
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
        ColumnsSource(PrepareParams(source=str(path))).train()
    assert caught.value.where == str(path)


def test_an_empty_parquet_file_holds_no_problems(tmp_path: Path) -> None:
    path = tmp_path / "source.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match=r"no problems|cannot be loaded"):
        ColumnsSource(PrepareParams(source=str(path))).train()


def test_a_data_set_of_the_hub_that_is_not_there_is_a_data_error() -> None:
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        ColumnsSource(PrepareParams(source="papo-tests/no-such-data-set")).train()
    assert caught.value.where == "papo-tests/no-such-data-set"


def test_nothing_can_be_held_out_of_too_few(tmp_path: Path) -> None:
    source = written(tmp_path / "source.jsonl", rows_of(5))
    with pytest.raises(DataError, match="5 problems to hold out of 5"):
        ColumnsSource(PrepareParams(source=source, holdout=5)).train()


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "source.jsonl"
    written(path, rows_of(3))
    assert len(list(ColumnsSource(PrepareParams(source=str(path))).train())) == 3
    written(path, rows_of(7))
    assert len(list(ColumnsSource(PrepareParams(source=str(path))).train())) == 7
