"""train: the rows of a round, group by group, to the trainer; policy and optimizer state out, whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.engines.protocols import Progress, TrainRow
from papo.errors import CheckpointError, DataError, StageError
from papo.params import TrainParams
from papo.stages import train
from papo.store.files import digest
from papo.store.manifest import Context, Manifest

VALUES = [1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -1.0, -1.0]


class FakeTrainer:
    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.calls: list[tuple[Path, Path | None, Sequence[Sequence[TrainRow]]]] = []
        self._stop = stop

    def train(
        self, policy: Path, state: Path | None, groups: Sequence[Sequence[TrainRow]], out: Path, out_state: Path,
        progress: Progress,
    ) -> list[dict[str, float]]:  # fmt: skip
        self.calls.append((policy, state, groups))
        for folder in (out, out_state):
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
        "policy": world.policy, "state": None, "temperature": 1.0,
    }  # fmt: skip
    return train.Inputs(**given | change)


def run(given: train.Inputs, folder: Path, engine: FakeTrainer, context: Context) -> Manifest:
    return train.run(TrainParams(), given, folder / "0" / "policy", engine=engine, context=context)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_policy_state_and_record(tmp_path: Path, small_round: Any, context: Context) -> None:
    engine, given = FakeTrainer(), inputs(small_round)
    manifest = run(given, tmp_path, engine, context)
    ((policy, state, groups),) = engine.calls
    assert (policy, state) == (given.policy, None)
    assert [[row.advantage for row in group] for group in groups] == [VALUES[:4], VALUES[4:]]
    assert groups[0][0] == TrainRow([1], [5, 6], pytest.approx([-0.1, -0.2]), 1.0, None)
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
    ((_, _, groups),) = engine.calls
    assert [row.token_advantages for group in groups for row in group] == tokens


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
