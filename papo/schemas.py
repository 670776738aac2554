"""The tables: columns, types and a version for each. Rows are the contract between stages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

KEY = ("round", "problem_id", "sample_index")

# What can happen to a row. A status never stands for a number: where it is not `ok`, the score is null.
OK = "ok"
ORM_STATUSES = ("ok", "no_answer", "unparsable_gold", "timeout", "error")
PRM_STATUSES = ("ok", "not_asked", "timeout", "refused", "unparsable", "too_long", "rate_limited", "error")
OPINION_STATUSES = ("ok", "not_asked", "timeout", "refused", "unparsable", "error")
FAILED_STATUSES = frozenset(
    {"unparsable_gold", "timeout", "refused", "unparsable", "too_long", "rate_limited", "error"}
)


class Grading(BaseModel):
    """How the answer of a problem is read from a completion and compared with the gold answer; JSON in the table `problems`.

    math     the last boxed answer, as mathematics
    choice   a letter, boxed or, with `extraction` answer_is, after "answer is"; the gold answer is a letter
    code     the last fenced block of Python, run with the tests that are the gold answer
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["math", "choice", "code"] = "math"
    extraction: Literal["boxed", "answer_is"] = "boxed"
    several: bool = Field(
        False, description="The gold answer lists several answers, which all have to be given, in any order."
    )
    ordered: bool = Field(False, description="The order of several answers, or within a tuple, counts.")
    unit: str | None = Field(None, description="A unit that the answer may bear or leave out.")
    tolerance: float | None = Field(
        None, gt=0.0, description="Largest absolute difference of two numbers that are equal."
    )
    entry_point: str | None = Field(None, description="code: the function that the tests call.")
    prefix: str | None = Field(None, description="code: what stands before a completion that only goes on with it.")


@dataclass(frozen=True)
class Table:
    """Name, version and columns of a table; `nullable` columns may hold nulls, the others may not."""

    name: str
    version: int
    columns: tuple[tuple[str, pa.DataType], ...]
    nullable: frozenset[str] = frozenset()

    @property
    def schema(self) -> pa.Schema:
        fields = [pa.field(name, kind, nullable=name in self.nullable) for name, kind in self.columns]
        return pa.schema(fields, metadata={"papo.table": self.name, "papo.version": str(self.version)})


_KEY_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("round", pa.int32()),
    ("problem_id", pa.string()),
    ("sample_index", pa.int32()),
)
_JUDGED_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("prm_score", pa.float64()),
    ("status", pa.string()),
    ("reason", pa.string()),
    ("votes", pa.list_(pa.float64())),
    ("wrong_steps", pa.list_(pa.float32())),
    ("judge", pa.string()),
    ("rubric", pa.string()),
    ("prompt_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("cached", pa.bool_()),
)

PROBLEMS = Table(
    "problems",
    2,
    (
        ("problem_id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("grading", pa.string()),  # JSON of a Grading
        ("reference_solution", pa.string()),
        ("source", pa.string()),
        ("tier", pa.string()),
        ("pass_rate", pa.float64()),
        ("split", pa.string()),
    ),
    frozenset({"reference_solution", "tier", "pass_rate"}),
)

DROPPED = Table(
    "dropped",
    1,
    (
        ("set", pa.string()),  # train, or the benchmark's name
        ("source", pa.string()),
        ("row", pa.int64()),  # of the source
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("prompt", pa.string()),
        ("benchmark", pa.string()),
        ("match_id", pa.string()),
        ("score", pa.float64()),
    ),
    frozenset({"row", "benchmark", "match_id", "score"}),
)

TRACES = Table("traces", 1, (("prompt", pa.string()), ("completion", pa.string())))

ROLLOUTS = Table(
    "rollouts",
    2,
    (
        *_KEY_COLUMNS,
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),  # stop | length
        ("policy_digest", pa.string()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_new_tokens", pa.int32()),
        ("seed", pa.uint64()),
        ("engine", pa.string()),  # rollout.engine
        ("engine_version", pa.string()),
        # Of the log-probs and those that the trainer's model gives; null where they were not computed anew.
        ("logprob_difference_mean", pa.float32()),
        ("logprob_difference_max", pa.float32()),
    ),
    frozenset({"logprob_difference_mean", "logprob_difference_max"}),
)

# What became of each prompt of a round.
TRIED = Table(
    "tried",
    1,
    (
        ("round", pa.int32()),
        ("problem_id", pa.string()),
        ("place", pa.int32()),  # in the order drawn; null: too long to be drawn
        ("status", pa.string()),  # kept | no_advantage | surplus | too_long
        ("reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("accuracy", pa.float64()),
        ("length_mean", pa.float64()),
        ("truncated_share", pa.float64()),
    ),
    frozenset({"place", "prompt_tokens", "accuracy", "length_mean", "truncated_share"}),
)

ORM = Table(
    "orm",
    2,
    (
        *_KEY_COLUMNS,
        ("orm_score", pa.float64()),
        ("extracted", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),  # of a program: passed | failed | timeout | memory | killed | blocked
        # What a model says of an answer that the verifier calls wrong: 1 equivalent to the gold answer, 0 not. Changes no outcome.
        ("second_opinion", pa.float64()),
        ("second_opinion_status", pa.string()),  # one of OPINION_STATUSES
    ),
    frozenset({"orm_score", "extracted", "detail", "second_opinion", "second_opinion_status"}),
)

PRM = Table(
    "prm",
    2,
    (
        *_KEY_COLUMNS,
        *_JUDGED_COLUMNS,
    ),
    frozenset({"prm_score", "wrong_steps"}),
)

ADVANTAGES = Table(
    "advantages",
    1,
    (
        *_KEY_COLUMNS,
        ("outcome_advantage", pa.float32()),
        ("process_advantage", pa.float32()),
        ("advantage", pa.float32()),
        ("token_advantages", pa.list_(pa.float32())),
    ),
    frozenset({"token_advantages"}),
)

SAMPLES = Table(
    "samples",
    1,
    (("completion", pa.string()), ("completion_tokens", pa.int32()), ("finish_reason", pa.string())),
)

EVALUATION = Table(
    "evaluation",
    1,
    (
        ("policy", pa.string()),  # warmstart | final | round-<k>
        ("policy_digest", pa.string()),
        ("problem_id", pa.string()),
        ("sample_index", pa.int32()),
        ("tier", pa.string()),
        ("completion", pa.string()),
        ("completion_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("orm_score", pa.float64()),
        ("extracted", pa.string()),
        ("status", pa.string()),
        ("seed", pa.uint64()),
    ),
    frozenset({"tier", "orm_score", "extracted"}),
)

# The export of the store of verdicts.
VERDICTS = Table(
    "verdicts",
    1,
    (
        ("key", pa.string()),
        ("model", pa.string()),
        ("rubric", pa.string()),
        ("answer", pa.string()),  # raw, as the model sent it
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("created", pa.float64()),  # Unix time
        ("parts", pa.string()),  # JSON that the key is the SHA-256 of; empty if it was not kept
    ),
    frozenset({"finish_reason"}),
)

CALIBRATION = Table(
    "calibration",
    1,
    (
        ("row", pa.int64()),  # of the data
        ("kind", pa.string()),
        ("problem", pa.string()),
        ("reference_solution", pa.string()),
        ("response", pa.string()),
        ("label", pa.float64()),
        ("first_error", pa.int32()),  # labelled, from 1; 0: no step is wrong
        ("answer_correct", pa.bool_()),
        *_JUDGED_COLUMNS,
    ),
    frozenset({"reference_solution", "first_error", "answer_correct", "prm_score", "wrong_steps"}),
)

TABLES = {
    table.name: table
    for table in (
        PROBLEMS,
        DROPPED,
        TRACES,
        ROLLOUTS,
        TRIED,
        ORM,
        PRM,
        ADVANTAGES,
        SAMPLES,
        EVALUATION,
        VERDICTS,
        CALIBRATION,
    )
}


def problem_id(prompt: str, answer: str) -> str:
    """Sixteen hex digits of the SHA-256 of the problem's content: the same problem has the same id in every data set."""
    return hashlib.sha256(f"{prompt}\0{answer}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def row_seed(seed: int, round_: int, problem: str, sample_index: int) -> int:
    """Seed of one sample: 64 bits of the SHA-256 of (run seed, round, problem_id, sample_index).

    Neither the order of the rows, nor the batch they are sampled in, nor a restart changes it.
    """
    text = f"{seed}\0{round_}\0{problem}\0{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
