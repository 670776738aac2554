"""Rows of a local file or of a data set of the Hugging Face hub, and the values in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.engines.protocols import Drop, Problem
from papo.errors import DataError
from papo.schemas import Grading

# File ending -> the loader of datasets.
LOADERS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
MAX_GOLD_CHARS = 1_000
"""A longer gold answer holds a text, and nothing could be found equal to it."""


@dataclass(frozen=True)
class Row:
    """One row of a source, by column."""

    values: Mapping[str, Any]
    number: int
    source: str

    def get(self, column: str) -> Any:
        """The value at `column`; dots reach into nested mappings, numbers into lists (`prompt.0.content`).

        Raises:
            DataError: there is no such column; it says which there are.
        """
        value: Any = self.values
        parts = column.split(".")
        while parts:
            if isinstance(value, list) and parts[0].isdigit() and int(parts[0]) < len(value):
                value, parts = value[int(parts[0])], parts[1:]
                continue
            # A name may have dots of its own (`qwen2.5_pass_rate`), so the longest that is there counts.
            length = next((n for n in range(len(parts), 0, -1) if _has(value, ".".join(parts[:n]))), 0)
            if not length:
                have = ", ".join(value) if isinstance(value, Mapping) else type(value).__name__
                raise DataError(
                    f"there is no column {column}",
                    where=self.where,
                    fix=f"set prepare.format or prepare.columns; there are: {have}",
                )
            value, parts = value[".".join(parts[:length])], parts[length:]
        return value

    def text(self, *columns: str) -> str:
        """The value of the first of `columns` that there is, stripped; empty for null.

        Raises:
            DataError: there is none of them.
        """
        column = next((name for name in columns if name in self.values), columns[0])
        value = self.get(column)
        return "" if value is None else str(value).strip()

    def maybe(self, column: str) -> str:
        """As `text`; empty, too, where there is no such column."""
        return self.text(column) if column in self.values else ""

    def optional(self, column: str | None, kind: type) -> Any:
        """The value as a `kind`; None without a column or a value.

        Raises:
            DataError: there is no such column, or it holds something else.
        """
        if column is None or (value := self.get(column)) is None:
            return None
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise DataError(f"column {column} holds {value!r}, not a {kind.__name__}", where=self.where) from None

    def pass_rate(self, column: str | None) -> float | None:
        """As `optional`.

        Raises:
            DataError: the value is not within 0 and 1.
        """
        rate: float | None = self.optional(column, float)
        if rate is None or 0.0 <= rate <= 1.0:
            return rate
        raise DataError(
            f"column {column} holds {rate:g}, no share", where=self.where, fix="name a column of pass rates"
        )

    @property
    def where(self) -> str:
        return f"{self.source}, row {self.number}"

    def drop(self, reason: str, detail: str = "", prompt: str = "") -> Drop:
        return Drop(self.source, self.number, reason, detail, prompt)

    def problem(
        self,
        prompt: str,
        answer: str,
        solution: str | None = None,
        *,
        grading: Grading = Grading(),
        source: str | None = None,
        tier: str | None = None,
    ) -> Problem | Drop:
        """The problem, or a drop where prompt or answer is empty, or the answer too long to be one."""
        if not prompt.strip():
            return self.drop("no_prompt")
        if not answer.strip():
            return self.drop("no_answer", prompt=prompt)
        if grading.kind != "code" and len(answer) > MAX_GOLD_CHARS:
            return self.drop("unparsable_gold", f"a gold answer of {len(answer)} characters", prompt)
        return Problem(prompt, answer, solution or None, source or self.source, tier, None, grading, self.number)


def _has(value: Any, name: str) -> bool:
    return isinstance(value, Mapping) and name in value


def read_rows(source: str, *, split: str, subset: str | None = None, revision: str | None = None) -> list[Row]:
    """Every row of a local file, or of one split of a data set of the hub.

    Raises:
        DataError: it is not there, cannot be read, or is empty.
    """
    values = _load(source, split, subset, revision)
    if not values:
        raise DataError("there are no problems in it", where=source, fix="name another source or split")
    return [Row(row, number, source) for number, row in enumerate(values)]


def refuse_repeated_ids(rows: Sequence[Row], column: str) -> None:
    """Raises a DataError where an id that is there stands in two rows."""
    seen: dict[str, int] = {}
    for row in rows:
        if (name := row.values.get(column)) is None:
            continue
        if (first := seen.setdefault(str(name), row.number)) != row.number:
            raise DataError(
                f"{column} {name} is there twice, in rows {first} and {row.number}",
                where=row.source,
                fix="remove one of them, or correct the ids",
            )


def _load(source: str, split: str, subset: str | None, revision: str | None) -> list[dict[str, Any]]:
    import datasets

    path = Path(source)
    loader = LOADERS.get("".join(path.suffixes[-2:]).lower()) or LOADERS.get(path.suffix.lower())
    if loader and not path.is_file():
        raise DataError("there is no such file", where=source, fix="correct the source in prepare")
    if loader == "json" and path.suffix != ".gz" and not path.read_bytes().strip():
        return []  # datasets ends with a bare StopIteration
    try:
        if path.is_file():
            return list(datasets.load_dataset(loader or "json", data_files=str(path), split="train"))
        return list(datasets.load_dataset(source, subset, split=split, revision=revision))
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise DataError(
            "the data set needs Python code of its own, which papo does not run",
            where=source,
            fix="name a revision without it (the hub converts many to Parquet: refs/convert/parquet), or a file",
        ) from None
    except (OSError, ValueError, EOFError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(
            f"the data set cannot be loaded: {error.__cause__ or error}",
            where=source,
            fix=f"name a file ({', '.join(LOADERS)}), or a data set of the hub and one of its splits",
        ) from None
