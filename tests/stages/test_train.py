"""train: the rows of a round, group by group, to the trainer; policy and optimizer state out, whole or not there."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failures import failure

from papo.engines.protocols import Progress, TrainJob, TrainRow
from papo.errors import CheckpointError, DataError, StageError
from papo.params import TrainParams
from papo.schemas import ADVANTAGES
from papo.stages import train
from papo.store.files import digest
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows, write_rows

VALUES = [1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -1.0, -1.0]


class FakeTrainer:
    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.calls: list[TrainJob] = []
        self._stop = stop

    def train(self, job: TrainJob, progress: Progress) -> list[dict[str, float]]:
        self.calls.append(job)
        for folder in (job.out, job.out_state):
            folder.mkdir()
            (folder / "half").write_text("half")
            self._stop()
            (folder / "half").rename(folder / "whole")
        return [{"step": 1.0, "loss": 1.0, "ratio_min": 0.9, "ratio_max": 1.1},
                {"step": 2.0, "loss": 2.0, "ratio_min": 0.5, "ratio_max": 1.5}]  # fmt: skip

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


def inputs(world: Any, values: list[float] = VALUES, **change: Any) -> train.Inputs:
    given = {
        "round": 0, "seed": 0, "rollouts": world.rollouts(), "advantages": world.advantages(values),
        "policy": world.policy, "state": None, "reference": None, "temperature": 1.0, "max_new_tokens": 8,
    }  # fmt: skip
    return train.Inputs(**given | change)


def run(given: train.Inputs, folder: Path, engine: FakeTrainer, context: Context) -> Manifest:
    return train.run(TrainParams(), given, folder / "0" / "policy", engine=engine, context=context)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_policy_state_and_record(tmp_path: Path, small_round: Any, context: Context) -> None:
    engine, given = FakeTrainer(), inputs(small_round)
    manifest = run(given, tmp_path, engine, context)
    (job,) = engine.calls
    assert (job.round, job.policy, job.state, job.reference) == (0, given.policy, None, None)
    assert [[row.advantage for row in group] for group in job.groups] == [VALUES[:4], VALUES[4:]]
    problem = small_round.keys[0][1]
    tokens = array("i", [1]), array("i", [5, 6])
    first = TrainRow(*tokens, pytest.approx([-0.1, -0.2]), 1.0, None, problem_id=problem, sample_index=0)
    assert job.groups[0][0] == first
    assert job.work.is_relative_to(context.work)
    assert tree(tmp_path / "0") == ["policy", "policy.manifest.json", "policy/whole", "trainer", "trainer/whole"]
    assert manifest.metrics == {
        "loss": 1.5, "ratio_min": 0.7, "ratio_max": 1.3, "first_step_ratio_min": 0.9, "first_step_ratio_max": 1.1,
    }  # fmt: skip
    assert (manifest.rows, len(manifest.history), set(manifest.outputs)) == (8, 2, {"policy", "trainer"})


def test_one_advantage_a_token_reaches_the_trainer(tmp_path: Path, small_round: Any, context: Context) -> None:
    tokens = [[0.5, -0.5], *[None] * 7]
    given, engine = inputs(small_round), FakeTrainer()
    small_round.advantages(VALUES, token_advantages=tokens)
    run(given, tmp_path, engine, context)
    (job,) = engine.calls
    found = [row.token_advantages for group in job.groups for row in group]
    assert [None if values is None else list(values) for values in found] == tokens


def test_a_second_run_does_nothing_and_another_state_does(tmp_path: Path, small_round: Any, context: Context) -> None:
    run(inputs(small_round), tmp_path, FakeTrainer(), context)
    engine = FakeTrainer()
    assert run(inputs(small_round), tmp_path, engine, context).skipped
    assert engine.calls == []
    state = tmp_path / "state"
    state.mkdir()
    assert not run(inputs(small_round, state=state), tmp_path, engine, context).skipped


@pytest.mark.parametrize("lost", ["policy/whole", "trainer/whole"])
def test_a_lost_output_is_made_again(tmp_path: Path, small_round: Any, context: Context, lost: str) -> None:
    run(inputs(small_round), tmp_path, FakeTrainer(), context)
    (tmp_path / "0" / lost).unlink()
    assert not run(inputs(small_round), tmp_path, FakeTrainer(), context).skipped
    assert (tmp_path / "0" / lost).exists()


def test_rollouts_of_another_policy_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    given = inputs(small_round)
    (given.policy / "weights").write_text("trained since")
    engine = FakeTrainer()
    with pytest.raises(CheckpointError, match="the rollouts were sampled from policy") as caught:
        run(given, tmp_path, engine, context)
    assert caught.value.where == str(given.policy)
    assert "run rollout of this round again" in caught.value.fix
    assert engine.calls == []


def test_rollouts_of_two_policies_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    given = inputs(small_round)
    small_round.rollouts(policy_digest=[digest(given.policy)] * 4 + ["f" * 64] * 4)
    with pytest.raises(CheckpointError):
        run(given, tmp_path, FakeTrainer(), context)


def test_advantages_of_other_rollouts_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    given = inputs(small_round)
    small_round.answers = dict(reversed(small_round.answers.items()))
    small_round.rollouts()
    with pytest.raises(DataError, match="8 rows are not the 8 rows of the rollouts") as caught:
        run(given, tmp_path, FakeTrainer(), context)
    assert caught.value.where == str(given.advantages)


NAN, INF = float("nan"), float("inf")
THIRD: list[Any] = [None] * 8
BAD_ADVANTAGES: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "NaN": ([*VALUES[:2], NAN, *VALUES[3:]], {}, "advantage holds nan"),
    "inf": ([*VALUES[:2], INF, *VALUES[3:]], {}, "advantage holds inf"),
    "fewer tokens": (VALUES, {"token_advantages": [None, None, [0.5], *THIRD[3:]]}, "1 token_advantages for 2 tokens"),
    "more tokens": (VALUES, {"token_advantages": [None, None, [1, 2, 3], *THIRD[3:]]}, "3 token_advantages for 2 tokens"),
    "a NaN token": (VALUES, {"token_advantages": [None, None, [1, NAN], *THIRD[3:]]}, "token_advantages holds nan"),
    "a null token": (VALUES, {"token_advantages": [None, None, [1, None], *THIRD[3:]]}, "token_advantages holds None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ADVANTAGES)
def test_advantages_that_cannot_be_trained_on_are_refused_by_their_row(
    tmp_path: Path, small_round: Any, context: Context, name: str
) -> None:
    values, columns, what = BAD_ADVANTAGES[name]
    given, engine = inputs(small_round), FakeTrainer()
    small_round.advantages(values, **columns)
    error = failure(DataError, lambda: run(given, tmp_path, engine, context))
    assert what in error.what
    _, problem, index = small_round.keys[2]
    assert error.what.startswith(f"row {problem}/{index}: ")
    assert error.where == str(given.advantages)
    assert error.fix == "run advantage of this round again"
    assert engine.calls == []
    assert tree(tmp_path / "0") == []


def test_a_null_advantage_is_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    given, engine = inputs(small_round), FakeTrainer()
    table = pq.read_table(given.advantages)
    at = table.schema.get_field_index("advantage")
    pq.write_table(
        table.set_column(at, "advantage", pa.array([1.0, None, *VALUES[2:]], pa.float32())), given.advantages
    )
    error = failure(DataError, lambda: run(given, tmp_path, engine, context))
    assert error.what == "column advantage of the table advantages is null in 1 rows"
    assert error.where == f"{given.advantages}, row 1"
    assert engine.calls == []


TWO = [[-0.1, -0.2]] * 2
BAD_ROLLOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer log-probs": ({"logprobs": [*TWO, [-0.1], *TWO, *TWO, [-0.1, -0.2]]}, "1 logprobs for 2 tokens"),
    "no log-probs": ({"logprobs": [*TWO, [], *TWO, *TWO, [-0.1, -0.2]]}, "0 logprobs for 2 tokens"),
    "a NaN": ({"logprobs": [*TWO, [NAN, -0.1], *TWO, *TWO, [-0.1, -0.2]]}, "logprobs holds nan"),
    "an infinite one": ({"logprobs": [*TWO, [-INF, -0.1], *TWO, *TWO, [-0.1, -0.2]]}, "logprobs holds -inf"),
    "more tokens": ({"completion_ids": [[5, 6], [5, 6], [5, 6, 7], *[[5, 6]] * 5]}, "2 logprobs for 3 tokens"),
    "no prompt": ({"prompt_ids": [[1], [1], [], *[[1]] * 5]}, "no prompt_ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_rollouts_that_cannot_be_trained_on_are_refused_by_their_row(
    tmp_path: Path, small_round: Any, context: Context, name: str
) -> None:
    columns, what = BAD_ROLLOUTS[name]
    given, engine = inputs(small_round), FakeTrainer()
    small_round.rollouts(**columns)
    error = failure(DataError, lambda: run(given, tmp_path, engine, context))
    _, problem, index = small_round.keys[2]
    assert error.what == f"row {problem}/{index}: {what}"
    assert error.where == str(given.rollouts)
    assert error.fix == "run rollout of this round again"
    assert engine.calls == []


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 7], []], ids=str
)
def test_advantages_of_missing_moved_or_doubled_rows_are_refused(
    tmp_path: Path, small_round: Any, context: Context, order: list[int]
) -> None:
    given, engine = inputs(small_round), FakeTrainer()
    rows = read_rows(given.advantages, ADVANTAGES)
    write_rows(given.advantages, ADVANTAGES, [rows[at] for at in order])
    error = failure(DataError, lambda: run(given, tmp_path, engine, context))
    assert error.what == f"its {len(order)} rows are not the 8 rows of the rollouts"
    assert error.where == str(given.advantages)
    assert engine.calls == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StageError("the loss is not finite")])
def test_an_end_half_way_keeps_what_there_was(
    tmp_path: Path, small_round: Any, context: Context, error: BaseException
) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(type(error)):
        run(inputs(small_round), tmp_path, FakeTrainer(stop), context)
    assert tree(tmp_path / "0") == []
    run(inputs(small_round), tmp_path, FakeTrainer(), context)
    before = tree(tmp_path / "0")
    with pytest.raises(type(error)):
        run(inputs(small_round, values=VALUES[::-1]), tmp_path, FakeTrainer(stop), context)
    assert tree(tmp_path / "0") == before
