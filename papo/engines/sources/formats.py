"""A training set and benchmarks from files or the hub, each read in its format."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

from papo.engines.protocols import Drop, Problem
from papo.engines.sources import aime, columns, gpqa, gsm8k, humaneval, math, numina, olympiadbench, verl
from papo.engines.sources.rows import Row, read_rows, refuse_repeated_ids
from papo.params import ColumnsParams, PrepareParams

# In the order in which `auto` tries them: those with more columns of their own come first.
RECOGNISED: dict[str, ModuleType] = {
    "humaneval": humaneval,
    "gpqa": gpqa,
    "verl": verl,
    "numina": numina,
    "olympiadbench": olympiadbench,
    "math": math,
    "gsm8k": gsm8k,
}
# AIME has the columns of others.
FORMATS = RECOGNISED | {"aime": aime}
Item = Problem | Drop


class DatasetSource:
    """Problems of data sets; a problem that the training set repeats is dropped but for the first.

    Raises, when they are read:
        DataError: a source that cannot be read, a missing column, an id twice.
    """

    def __init__(self, params: PrepareParams) -> None:
        self._params = params

    def train(self) -> Iterator[Item]:
        """In an order that the seed alone decides."""
        p = self._params
        mapped = (p.columns.prompt, p.columns.answer) != (ColumnsParams().prompt, ColumnsParams().answer)
        name = "columns" if p.format == "auto" and mapped else p.format
        rows = read_rows(p.source, split=p.split, subset=p.subset, revision=p.revision)
        items = [self._rated(item, rows) for item in _without_repeats(self._read(rows, name))]
        random.Random(p.seed).shuffle(items)
        return iter(items)

    def benchmarks(self) -> Mapping[str, Iterator[Item]]:
        p = self._params
        found: dict[str, Iterator[Item]] = {}
        for name, s in p.eval_sources.items():
            rows = read_rows(s.source, split=s.split or p.eval_split, subset=s.subset, revision=s.revision)
            found[name] = iter(self._read(rows, s.format))
        return found

    def traces(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def _read(self, rows: Sequence[Row], name: str) -> list[Item]:
        name = recognised(rows[0].values) if name == "auto" else name
        if name == "columns":
            read = partial(columns.problem, columns=self._params.columns)
        else:
            refuse_repeated_ids(rows, FORMATS[name].ID)
            read = partial(FORMATS[name].problem, seed=self._params.seed)
        return [self._worded(read(row), name) for row in rows]

    def _worded(self, item: Item, name: str) -> Item:
        if isinstance(item, Drop):
            return item
        # Code is gone on with, to the last space.
        template = "{prompt}" if item.grading.kind == "code" else self._params.prompt_template
        return replace(item, prompt=template.format(prompt=item.prompt), format=name)

    def _rated(self, item: Item, rows: Sequence[Row]) -> Item:
        p = self._params
        if isinstance(item, Drop) or item.row is None:
            return item
        row = rows[item.row]
        tier = row.optional(p.columns.tier, str) or item.tier
        return replace(item, tier=tier, pass_rate=row.pass_rate(p.pass_rate_column))


def recognised(values: Mapping[str, object]) -> str:
    """The format whose columns a row has; `columns` if there is none, or only a question and an answer without GSM8K's mark."""
    name = next((name for name, adapter in RECOGNISED.items() if values.keys() >= adapter.COLUMNS), "columns")
    return "columns" if name == "gsm8k" and gsm8k.MARK not in str(values["answer"]) else name


def _without_repeats(items: Sequence[Item]) -> Iterator[Item]:
    first: dict[str, int | None] = {}
    for item in items:
        if isinstance(item, Problem) and item.prompt in first:
            yield Drop(item.source, item.row, "duplicate", f"of row {first[item.prompt]}", item.prompt)
            continue
        if isinstance(item, Problem):
            first[item.prompt] = item.row
        yield item
