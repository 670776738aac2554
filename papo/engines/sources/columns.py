"""Any data set whose columns can be named: a local .jsonl or .parquet file, or one of the Hugging Face hub."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from papo.engines.protocols import Problem
from papo.errors import DataError
from papo.params import PrepareParams


class ColumnsSource:
    """Problems by a column mapping; the benchmarks are data sets of their own, or problems held out of the one there is."""

    def __init__(self, params: PrepareParams) -> None:
        self._params = params

    def train(self) -> Iterator[Problem]:
        return iter(self._split()[0])

    def benchmarks(self) -> Mapping[str, Iterator[Problem]]:
        p = self._params
        loaded = {name: iter(self._load(source, p.eval_split)) for name, source in p.eval_sources.items()}
        held_out = self._split()[1]
        return loaded | ({"holdout": iter(held_out)} if held_out else {})

    def traces(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def _split(self) -> tuple[list[Problem], list[Problem]]:
        """Training and held-out problems; which are which depends on the seed only."""
        p = self._params
        problems = self._load(p.source, p.split)
        if p.holdout >= len(problems) > 0:
            raise DataError(
                f"{p.holdout} problems to hold out of {len(problems)}", where=p.source, fix="lower prepare.holdout"
            )
        random.Random(p.seed).shuffle(problems)
        return problems[p.holdout :][: p.max_problems], problems[: p.holdout]

    def _load(self, source: str, split: str) -> list[Problem]:
        columns, template = self._params.columns, self._params.prompt_template
        rows = _rows(source, split, self._params.revision)
        problems = []
        for number, row in enumerate(rows):
            prompt, answer = (_text(row, name, source, number) for name in (columns.prompt, columns.answer))
            problems.append(
                Problem(
                    prompt=template.format(prompt=prompt),
                    answer=answer,
                    reference_solution=_optional(row, columns.reference_solution, source, number, str),
                    source=source,
                    tier=_optional(row, columns.tier, source, number, str),
                    pass_rate=_optional(row, columns.pass_rate, source, number, float),
                )
            )
        if not problems:
            raise DataError("there are no problems in it", where=source, fix="name another source or split")
        return problems


def _rows(source: str, split: str, revision: str | None) -> list[dict[str, Any]]:
    import datasets

    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise DataError("there is no such file", where=source, fix="correct prepare.source")
    if path.suffix != ".parquet" and path.is_file() and not path.read_bytes().strip():
        return []  # datasets ends with a bare StopIteration
    try:
        if path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            data = datasets.load_dataset(source, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(
            f"the data set cannot be loaded: {error.__cause__ or error}",
            where=source,
            fix="name a .jsonl or .parquet file, or a data set of the hub and one of its splits",
        ) from None
    return list(data)


def _text(row: Mapping[str, Any], column: str, source: str, number: int) -> str:
    value = _get(row, column, source, number)
    if value is None or not str(value).strip():
        raise DataError(
            f"column {column} is empty", where=f"{source}, row {number}", fix="remove the row or map another column"
        )
    return str(value)


def _optional(row: Mapping[str, Any], column: str | None, source: str, number: int, kind: type) -> Any:
    if column is None or (value := _get(row, column, source, number)) is None:
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise DataError(
            f"column {column} holds {value!r}, not a {kind.__name__}", where=f"{source}, row {number}"
        ) from None


def _get(row: Mapping[str, Any], column: str, source: str, number: int) -> Any:
    """The value at `column`; dots reach into nested mappings, numbers into lists (`prompt.0.content`)."""
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            have = ", ".join(value) if isinstance(value, Mapping) else type(value).__name__
            raise DataError(
                f"there is no column {column}",
                where=f"{source}, row {number}",
                fix=f"set prepare.columns; there are: {have}",
            )
    return value
