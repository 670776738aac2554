"""Saved steps of a round: the last one that is whole, whatever a kill or a disk has left."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from train_tables import inputs_of, run_stage

from papo.engines.protocols import TrainRow
from papo.engines.training.state import RECORD, STATE_FILE, WEIGHTS_FILE, Reached, Saved
from papo.params import TrainParams


def write(work: Path, steps: int) -> None:
    import torch

    history = [{"step": float(number + 1)} for number in range(steps)]
    reached = Reached(steps=steps, history=history, kl_coefficient=0.5, broken=["step 1 by p0/0"])
    Saved(work).write({"w": torch.full((3,), float(steps))}, {"w/exp_avg": torch.ones(3)}, reached)


def read(work: Path) -> Any:
    """The number that the weights hold, and where the run was; None; the names of damaged folders."""
    found, damaged = Saved(work).read()
    whole = None if found is None else (found[0]["w"].unique().item(), found[2].steps)
    return whole, [folder.name for folder, _ in damaged]


def test_nothing_is_read_where_nothing_was_written(tmp_path: Path) -> None:
    assert read(tmp_path / "work") == (None, [])


def test_the_last_step_takes_the_place_of_the_one_before_and_of_what_a_kill_left(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / ".step-000003.1.tmp").mkdir()
    (tmp_path / ".step-000003.1.tmp" / WEIGHTS_FILE).write_bytes(b"half")
    write(tmp_path, 11)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000011"]
    (weights, moments, reached), _ = Saved(tmp_path).read()  # type: ignore[misc]  # it is there
    assert (weights["w"].tolist(), moments["w/exp_avg"].tolist()) == ([11.0] * 3, [1.0] * 3)
    assert (reached.steps, len(reached.history), reached.kl_coefficient) == (11, 11, 0.5)
    assert reached.broken == ["step 1 by p0/0"]
    assert set(reached.files) == {WEIGHTS_FILE, STATE_FILE}


@pytest.mark.parametrize("name", [WEIGHTS_FILE, STATE_FILE, RECORD])
def test_of_two_steps_the_older_is_taken_if_the_newer_is_damaged(tmp_path: Path, name: str) -> None:
    # As after a kill between the rename of the new one and the removal of the old one.
    write(tmp_path / "other", 2)
    write(tmp_path / "work", 3)
    shutil.copytree(tmp_path / "other/step-000002", tmp_path / "work/step-000002")
    assert read(tmp_path / "work") == ((3.0, 3), [])
    path = tmp_path / "work/step-000003" / name
    path.write_bytes(path.read_bytes()[:-2])  # the last byte of JSON is a newline
    assert read(tmp_path / "work") == ((2.0, 2), ["step-000003"])


def test_a_step_whose_record_has_another_number_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = tmp_path / "step-000003" / RECORD
    text = path.read_text()
    path.write_text(text.replace('"kl_coefficient": 0.5', '"kl_coefficient": 0.6'))
    assert path.read_text() != text
    assert read(tmp_path) == (None, ["step-000003"])


def test_what_is_damaged_is_set_aside_and_not_read_again(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path, 3)
        (tmp_path / "step-000003" / STATE_FILE).unlink()
        saved = Saved(tmp_path)
        _, ((folder, why),) = saved.read()
        assert STATE_FILE in why or "no such file" in why
        assert saved.set_aside(folder) == tmp_path / "damaged-step-000003"
        assert read(tmp_path) == (None, [])


@pytest.mark.parametrize(("minutes", "saved"), [(0.0, ["step-000001"]), (10.0, [])])
def test_a_round_is_saved_as_often_as_asked(
    policy: Path, groups: Sequence[Sequence[TrainRow]], tmp_path: Path, minutes: float, saved: list[str]
) -> None:
    params = TrainParams(minibatch_prompts=1, save_minutes=minutes)
    done: list[int] = []

    def interrupt(steps: int) -> None:
        done.append(steps)
        if len(done) == 2:
            raise KeyboardInterrupt

    inputs = inputs_of(tmp_path, policy, groups)
    with pytest.raises(KeyboardInterrupt):
        run_stage(params, inputs, tmp_path, told=interrupt)
    assert [path.name for path in tmp_path.glob(".papo/work/*/*")] == saved
    assert not (tmp_path / "policy").exists()
    done.clear()
    run_stage(params, inputs, tmp_path, told=done.append)
    assert done == [1] * 4  # of those, the one that was saved is not done again
    assert list(tmp_path.glob(".papo/work/*")) == []
