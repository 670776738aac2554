"""A job of training as files that all of its processes read: JSON, and the rows as an Arrow file. Numbers come back as they were."""

from __future__ import annotations

from array import array
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
from pydantic import BaseModel, ConfigDict

from papo.engines.protocols import TrainJob, TrainRow
from papo.params import TrainParams
from papo.store.files import read_json, write_json

_JOB, _ROWS = "job.json", "rows.arrow"
_TYPES = {
    "prompt_ids": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.int64()),
    "logprobs": pa.list_(pa.float64()),
    "advantage": pa.float64(),
    "token_advantages": pa.list_(pa.float64()),
    "truncated": pa.bool_(),
    "problem_id": pa.string(),
    "sample_index": pa.int64(),
}
_NAMES = [field.name for field in fields(TrainRow)]


class Order(BaseModel):
    """What a process is to do: where the processes meet, how long one waits for the others, and the job but for its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int
    timeout_s: float
    params: TrainParams
    temperature: float
    max_new_tokens: int
    seed: int
    round: int
    policy: Path
    state: Path | None
    reference: Path | None
    out: Path
    out_state: Path
    work: Path


def write_job(folder: Path, order: Order, job: TrainJob) -> None:
    """Into a folder that is there."""
    rows = [(number, row) for number, group in enumerate(job.groups) for row in group]
    columns = {name: pa.array([_plain(getattr(row, name)) for _, row in rows], _TYPES[name]) for name in _NAMES}
    numbers = pa.array([number for number, _ in rows], pa.int64())
    feather.write_feather(pa.table({"group": numbers} | columns), str(folder / _ROWS))
    write_json(folder / _JOB, order.model_dump(mode="json"))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, array) else value


def read_job(folder: Path) -> tuple[Order, TrainJob]:
    """
    Raises:
        MissingInputError, DataError: the files are not there, or not whole.
    """
    order = Order.model_validate(read_json(folder / _JOB))
    groups: dict[int, list[TrainRow]] = {}
    for row in feather.read_table(str(folder / _ROWS)).to_pylist():
        groups.setdefault(row.pop("group"), []).append(TrainRow(**row))
    paths = {name: getattr(order, name) for name in ("policy", "state", "reference", "out", "out_state", "work")}
    return order, TrainJob(round=order.round, groups=list(groups.values()), **paths)
