"""One paid verdict: what it is, its key, its row in the store and in an export."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from papo.schemas import VERDICTS

# What a server says of an answer that it cut off or withheld.
NO_ANSWER = ("length", "content_filter")

_BATCH = 10_000


@dataclass(frozen=True)
class StoredVerdict:
    """What a model answered, raw. `seconds` is how long it took, `created` when it came (Unix time), `parts` what `key` is the digest of.

    Raises:
        ValueError: no verdict: without an answer, cut off or withheld; or a field that cannot be.
    """

    key: str
    model: str
    rubric: str
    answer: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    created: float = field(default_factory=time.time)
    parts: str = ""

    def __post_init__(self) -> None:
        if not self.answer.strip() or self.finish_reason in NO_ANSWER:
            raise ValueError("a call that brought no whole answer is no verdict")
        check_key(self.key)
        if self.parts and _sha256(self.parts) != self.key:
            raise ValueError("the key is not that of its parts")
        if min(self.prompt_tokens, self.completion_tokens) < 0:
            raise ValueError("a number of tokens below 0")
        if not (math.isfinite(self.seconds) and self.seconds >= 0 and math.isfinite(self.created)):
            raise ValueError("times that cannot be")


def check_key(key: str) -> None:
    """
    Raises:
        ValueError: not made by `verdict_key`.
    """
    if not (len(key) == 64 and set(key) <= set("0123456789abcdef")):
        raise ValueError(f"no key of a verdict: {key!r}")


def verdict_parts(model: str, rubric: str, prompt: str, sampling: Mapping[str, Any], vote: int) -> str:
    """All that decides a verdict, as JSON with the digest of the prompt in its place.

    Args:
        rubric: its name and version.
        prompt: all that decides it but the mark that is drawn for each call.
        sampling: temperature and the like, as JSON has them.
        vote: number of the vote, from 0.
    """
    parts = {"model": model, "rubric": rubric, "prompt": _sha256(prompt), "sampling": dict(sampling), "vote": vote}
    return json.dumps(parts, sort_keys=True, allow_nan=False)


def verdict_key(parts: str) -> str:
    """SHA-256 of `verdict_parts`, in hex."""
    return _sha256(parts)


NAMES = tuple(item.name for item in fields(StoredVerdict))
_ANSWER = NAMES.index("answer")
_values = attrgetter(*NAMES)
COLUMNS = ", ".join((*NAMES, "digest"))
INSERT = f"INTO verdicts ({COLUMNS}) VALUES ({', '.join('?' * (len(NAMES) + 1))})"


def encode(verdict: StoredVerdict) -> tuple[Any, ...]:
    values = list(_values(verdict))
    # As bytes: a model may send half a surrogate pair, which SQLite takes for no text.
    values[_ANSWER] = verdict.answer.encode("utf-8", "surrogatepass")
    return (*values, _digest(verdict))


def decode(row: Sequence[Any]) -> StoredVerdict | str:
    """The verdict of a row, or what is wrong with the row."""
    *values, digest = row
    try:
        values[_ANSWER] = values[_ANSWER].decode("utf-8", "surrogatepass")
        verdict = StoredVerdict(*values)
        return verdict if _digest(verdict) == digest else "its digest is not that of its content"
    except (ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"


def whole_ones(rows: Iterable[Sequence[Any]]) -> Iterator[StoredVerdict]:
    """The whole ones."""
    for row in rows:
        if not isinstance(verdict := decode(row), str):
            yield verdict


def _digest(verdict: StoredVerdict) -> str:
    return _sha256(json.dumps(_values(verdict)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_parquet(path: Path, verdicts: Iterator[StoredVerdict]) -> int:
    count = 0
    with pq.ParquetWriter(path, VERDICTS.schema, compression="zstd") as writer:
        while batch := list(islice(verdicts, _BATCH)):
            # Half a surrogate pair is no text for Parquet: it becomes its escape.
            rows = [
                _fields(verdict) | {"answer": verdict.answer.encode("utf-8", "backslashreplace").decode()}
                for verdict in batch
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=VERDICTS.schema))
            count += len(batch)
    return count


def to_jsonl(path: Path, verdicts: Iterator[StoredVerdict]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for verdict in verdicts:
            stream.write(json.dumps(_fields(verdict)) + "\n")
            count += 1
    return count


def _fields(verdict: StoredVerdict) -> dict[str, Any]:
    return dict(zip(NAMES, _values(verdict), strict=True))
