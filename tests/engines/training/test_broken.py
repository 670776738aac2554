"""Steps whose loss or gradient is not finite: not applied, told by the rows that made them so, and after some of them the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from failures import failure
from train_tables import inputs_of, run_stage

from papo.engines.policy import load_policy
from papo.engines.protocols import TrainRow
from papo.engines.training import trainer
from papo.engines.training.state import STATE_FILE
from papo.errors import NotFiniteError
from papo.params import TrainParams
from papo.store.files import digest

Groups = Sequence[Sequence[TrainRow]]

ONE_BY_ONE = TrainParams(minibatch_prompts=1, learning_rate=1e-3, save_minutes=0)


def impossible(row: TrainRow) -> TrainRow:
    """The policy finds it e^150 times as likely as the log-probs say: the ratio is more than a float can be."""
    return replace(row, logprobs=[-200.0] * len(row.logprobs), advantage=-1.0)


def enormous(row: TrainRow) -> TrainRow:
    """Its loss is finite, its gradient's norm is not."""
    return replace(row, advantage=1e30)


def with_rows(groups: Groups, change: Callable[[TrainRow], TrainRow], *places: tuple[int, int]) -> list[list[TrainRow]]:
    return [
        [change(row) if (number, index) in places else row for index, row in enumerate(group)]
        for number, group in enumerate(groups)
    ]


def names(text: str) -> list[str]:
    return re.findall(r"p\d+/\d+", text)


@pytest.mark.parametrize("change", [impossible, enormous])
@pytest.mark.parametrize(
    "layout",
    [{}, {"share_prompts": False}, {"packing": "on"}, {"microbatch_tokens": 1}, {"entropy_bonus": 0.01}],
    ids=str,
)
def test_the_step_is_left_out_and_its_rows_are_named(
    policy: Path,
    groups: Groups,
    tmp_path: Path,
    change: Callable[[TrainRow], TrainRow],
    layout: Mapping[str, object],
) -> None:
    from safetensors.torch import load_file

    params = ONE_BY_ONE.model_copy(update=dict(layout))
    rows = with_rows(groups, change, (1, 1), (1, 3))
    warned: list[str] = []
    manifest = run_stage(params, inputs_of(tmp_path / "broken", policy, rows), tmp_path / "broken", warned.append)
    (warning,) = warned
    assert names(warning) == ["p1/1", "p1/3"]
    assert "step 2 of 4, which was not applied" in warning
    assert [row.get("broken") for row in manifest.history] == [None, 1.0, None, None]
    assert manifest.metrics["broken"] == 1.0
    # The same to the last bit, moments and their count of steps too, as if those rows had never been there.
    without = inputs_of(tmp_path / "without", policy, [groups[0], *groups[2:]])
    run_stage(params, without, tmp_path / "without")
    for name in ("policy", "trainer"):
        assert digest(tmp_path / "broken" / name) == digest(tmp_path / "without" / name)
    moments = load_file(tmp_path / "broken" / "trainer" / STATE_FILE)
    assert {value.item() for name, value in moments.items() if name.endswith("/step")} == {3.0}


def test_rows_that_are_too_much_only_together_are_told_as_that(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = ONE_BY_ONE.model_copy(update={"max_grad_norm": 1e30})
    row = next(row for row in groups[0] if row.advantage)

    def norm(folder: str, *advantages: float) -> tuple[float | None, list[str]]:
        warned: list[str] = []
        rows = [[replace(row, advantage=advantage) for advantage in advantages], groups[1]]
        inputs = inputs_of(tmp_path / folder, policy, rows)
        return run_stage(params, inputs, tmp_path / folder, warned.append).history[0].get("grad_norm"), warned

    one, _ = norm("one", 1.0, 0.0)
    assert one is not None
    half = 1.5e19 / one  # its square can be had, four times that cannot
    assert norm("half", half, 0.0)[0] == pytest.approx(1.5e19, rel=1e-3)
    both, (warning,) = norm("both", half, half)
    assert both is None
    assert warning.endswith("by no single response, but their sum")


def test_a_round_of_which_no_step_was_applied_stops(policy: Path, groups: Groups, tmp_path: Path) -> None:
    broken = with_rows(groups[:1], impossible, (0, 1))
    with pytest.raises(NotFiniteError, match="not finite in 1 of 1 steps"):
        run_stage(ONE_BY_ONE, inputs_of(tmp_path, policy, broken), tmp_path)
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("what", [{"dual_clip": 3.0}, {"importance": "token"}, {"importance": "sequence"}], ids=str)
def test_what_holds_ratios_back_keeps_such_a_step_whole(
    policy: Path, groups: Groups, tmp_path: Path, what: Mapping[str, object]
) -> None:
    params = ONE_BY_ONE.model_copy(update=dict(what))
    inputs = inputs_of(tmp_path, policy, with_rows(groups, impossible, (1, 1)))
    warned: list[str] = []
    assert "broken" not in run_stage(params, inputs, tmp_path, warned.append).metrics
    assert warned == []


def test_rows_that_do_not_count_break_no_step(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = ONE_BY_ONE.model_copy(update={"mask_truncated": True})
    cut = [[replace(impossible(row), truncated=True) for row in groups[0]], *groups[1:]]
    warned: list[str] = []
    manifest = run_stage(params, inputs_of(tmp_path, policy, cut), tmp_path, warned.append)
    assert (manifest.history[0]["loss"], manifest.history[0]["grad_norm"]) == (0.0, 0.0)
    assert warned == []


def test_after_some_such_steps_the_stage_stops_with_the_last_good_weights(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    run_stage(ONE_BY_ONE, inputs_of(tmp_path, policy, groups), tmp_path)
    before = [digest(tmp_path / name) for name in ("policy", "trainer", "policy.manifest.json")]
    params = ONE_BY_ONE.model_copy(update={"max_broken_steps": 2})
    inputs = inputs_of(tmp_path, policy, with_rows(groups, impossible, (1, 2), (2, 0)))
    done: list[int] = []
    warned: list[str] = []
    stopped = failure(NotFiniteError, lambda: run_stage(params, inputs, tmp_path, warned.append, told=done.append))
    assert stopped.what == ("loss or gradient are not finite in 2 of 4 steps: step 2 by p1/2; step 3 by p2/0")
    assert [names(warning) for warning in warned] == [["p1/2"], ["p2/0"]]
    assert done == [1, 1, 1]
    assert [digest(tmp_path / name) for name in ("policy", "trainer", "policy.manifest.json")] == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [".papo"]
    # A policy like any other: that of the one step that was applied.
    (work,) = (tmp_path / ".papo" / "work").iterdir()
    assert stopped.where.startswith(f"{work};")
    load_policy(work / "last_good")
    run_stage(params, inputs_of(tmp_path / "first", policy, groups[:1]), tmp_path / "first")
    assert digest(work / "last_good") == digest(tmp_path / "first" / "policy")


def test_a_rerun_stops_at_once_and_one_with_another_learning_rate_starts_anew(
    policy: Path, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = ONE_BY_ONE.model_copy(update={"max_broken_steps": 1})
    inputs = inputs_of(tmp_path, policy, with_rows(groups, impossible, (2, 3)))
    first = failure(NotFiniteError, lambda: run_stage(params, inputs, tmp_path))
    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Round, "_step", lambda *_: pytest.fail("a step was done again"))
        again = failure(NotFiniteError, lambda: run_stage(params, inputs, tmp_path, told=done.append))
    assert str(again) == str(first)
    assert done == [3]
    other = params.model_copy(update={"learning_rate": 1e-4})
    done.clear()
    failure(NotFiniteError, lambda: run_stage(other, inputs, tmp_path, told=done.append))
    assert done == [1, 1, 1]


def test_a_restart_knows_the_broken_steps_there_were(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = ONE_BY_ONE.model_copy(update={"max_broken_steps": 2})
    inputs = inputs_of(tmp_path, policy, with_rows(groups, impossible, (0, 2), (3, 0)))
    done: list[int] = []

    def interrupt(steps: int) -> None:
        done.append(steps)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(params, inputs, tmp_path, told=interrupt)
    done.clear()
    stopped = failure(NotFiniteError, lambda: run_stage(params, inputs, tmp_path, told=done.append))
    assert names(stopped.what) == ["p0/2", "p3/0"]
    assert done == [2, 1, 1]
