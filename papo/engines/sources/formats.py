"""A training set and benchmarks from files or the hub, each read in its format."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

from papo.engines.protocols import Drop, Problem
from papo.engines.sources import aime, columns, gpqa, gsm8k, humaneval, math, numina, olympiadbench, papo, verl
from papo.engines.sources.rows import Row, read_rows, refuse_repeated_ids
from papo.params import ColumnsParams, EvalSource, PrepareParams

# In the order in which `auto` tries them: those with more columns of their own come first.
RECOGNISED: dict[str, ModuleType] = {
    "papo": papo,
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

ANSWER_MARK = r"\boxed"
"""A prompt that holds it says itself how it is to be answered, and is not told so twice."""


class DatasetSource:
    """Problems of data sets; a problem that the training set repeats is dropped but for the first.

    Args:
        warn: is told when a benchmark has not the number of problems that it should have.

    Raises, when they are read:
        DataError: a source that cannot be read, a missing column, an id twice.
    """

    def __init__(self, params: PrepareParams, *, warn: Callable[[str], None] = lambda text: None) -> None:
        self._params, self._warn = params, warn

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
        return {name: self._benchmark(name, source) for name, source in self._params.eval_sources.items()}

    def _benchmark(self, name: str, source: EvalSource) -> Iterator[Item]:
        split = source.split or self._params.eval_split
        rows = read_rows(source.source, split=split, subset=source.subset, revision=source.revision)
        items = self._read(rows, source.format, source)
        problems = [place for place, item in enumerate(items) if isinstance(item, Problem)]
        if source.problems is not None and len(problems) != source.problems:
            self._warn(f"{name} has {len(problems)} problems, {source.problems} are in a whole copy: {source.source}")
        if source.max_problems is None or source.max_problems >= len(problems):
            return iter(items)
        drawn = set(random.Random(f"{self._params.seed}/{name}").sample(problems, source.max_problems))
        return (item for place, item in enumerate(items) if isinstance(item, Drop) or place in drawn)

    def traces(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def _read(self, rows: Sequence[Row], name: str, asked: EvalSource | None = None) -> list[Item]:
        name = recognised(rows[0].values) if name == "auto" else name
        if name == "columns":
            read = partial(columns.problem, columns=self._params.columns)
        else:
            refuse_repeated_ids(rows, FORMATS[name].ID)
            read = partial(FORMATS[name].problem, seed=self._params.seed)
        return [self._worded(read(row), name, asked) for row in rows]

    def _worded(self, item: Item, name: str, asked: EvalSource | None) -> Item:
        """With the format's name, the prompt that a benchmark or else the params give, and the benchmark's extraction."""
        if isinstance(item, Drop):
            return item
        grading = item.grading
        if asked is not None and asked.extraction is not None and grading.kind != "code":
            grading = grading.model_copy(update={"extraction": asked.extraction})
        template = "{prompt}" if name == "papo" else self._template(item, asked.prompt if asked is not None else None)
        return replace(item, prompt=template.format(prompt=item.prompt), grading=grading, format=name)

    def _template(self, item: Problem, own: str | None) -> str:
        # Code is gone on with, to the last space, unless the benchmark asks in words.
        general = "{prompt}" if item.grading.kind == "code" else self._params.prompt_template
        template = general if own is None else own
        return "{prompt}" if ANSWER_MARK in template and ANSWER_MARK in item.prompt else template

    def _rated(self, item: Item, rows: Sequence[Row]) -> Item:
        p = self._params
        if isinstance(item, Drop) or item.row is None:
            return item
        row = rows[item.row]
        tier = row.optional(p.columns.tier, str) or item.tier
        rate = row.pass_rate(p.pass_rate_column) if p.pass_rate_column else item.pass_rate
        return replace(item, tier=tier, pass_rate=rate)


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
