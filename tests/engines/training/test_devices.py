"""Several processes give the weights and moments of one, whichever way they share them; and none is left, however it goes."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from failures import failure
from updates import LIMIT, Groups, Tensors, furthest

from papo.engines.protocols import TrainJob, TrainRow
from papo.engines.training import checks, make_trainer, worker
from papo.engines.training.batches import Layout, plan
from papo.engines.training.jobs import Order, read_job, write_job
from papo.engines.training.launch import LaunchedTrainer, _error
from papo.engines.training.state import STATE_FILE
from papo.errors import DataError, MissingInputError, NotFiniteError, PapoError, ParamsError, SetupError, StageError
from papo.params import TrainParams, validate_params

NEAR = 1e-5
# Steps that move the weights by a hundredth, gradients that are clipped, and several micro-batches a step.
TRAIN = {"minibatch_prompts": 1, "learning_rate": 1e-2, "max_grad_norm": 0.5, "microbatch_tokens": 40}
ZERO = pytest.param(
    "deepspeed", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
)


@pytest.fixture(scope="module")
def uneven(groups: Groups) -> list[list[TrainRow]]:
    """Four steps; in the third a single response has an advantage, in the last none."""
    third = [replace(row, advantage=2.0 if index == 3 else 0.0) for index, row in enumerate(groups[2])]
    return [list(groups[0]), list(groups[1]), third, [replace(row, advantage=0.0) for row in groups[3]]]


class Trained:
    """What a trainer gave in a folder."""

    def __init__(
        self, policy: Path, groups: Groups, folder: Path, *, start: Trained | None = None, **change: Any
    ) -> None:
        from safetensors.torch import load_file

        self.folder, self.told, self.warnings = folder, list[int](), list[str]()
        trainer = make_trainer(
            TrainParams.model_validate(TRAIN | change), temperature=1.0, max_new_tokens=LIMIT, seed=0,
            warn=self.warnings.append,
        )  # fmt: skip
        self.metrics = trainer.train(
            TrainJob(
                round=1 if start else 0, groups=groups, policy=start.folder / "policy" if start else policy,
                state=start.folder / "trainer" if start else None, reference=policy, out=folder / "policy",
                out_state=folder / "trainer", work=folder / "work",
            ),
            self.told.append,
        )  # fmt: skip
        self.weights: Tensors = load_file(folder / "policy" / "model.safetensors")
        self.moments: Tensors = load_file(folder / "trainer" / STATE_FILE)

    def agrees(self, one: Trained) -> None:
        assert furthest(self.weights, one.weights) < NEAR
        assert furthest(self.moments, one.moments) < NEAR
        for name in ("grad_norm", "loss", "entropy"):
            mine, its = ([row[name] for row in rows if name in row] for rows in (self.metrics, one.metrics))
            assert mine == pytest.approx(its, rel=NEAR, abs=1e-6)
        assert self.told == one.told
        assert _files(self.folder / "policy") == _files(one.folder / "policy")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


def spread(processes: int, kind: str, **change: Any) -> dict[str, Any]:
    return {"devices": {"processes": processes, "kind": kind, "device": "cpu"} | change}


@pytest.fixture(scope="module")
def one(policy: Path, uneven: Groups, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(policy, uneven, tmp_path_factory.mktemp("one"))


def workers() -> list[psutil.Process]:
    """Processes below this one that train; not their watchdogs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "papo.engines.training.worker"]:
                found.append(process)
    return found


@pytest.fixture
def left() -> Callable[[], list[psutil.Process]]:
    """Processes below this one that were not there when the test began; tests before it may keep some."""
    before = psutil.Process().children(recursive=True)
    return lambda: [process for process in psutil.Process().children(recursive=True) if process not in before]


# ---- the same weights ----


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_weights_of_one(
    policy: Path, uneven: Groups, one: Trained, tmp_path: Path, left: Callable[[], list[psutil.Process]], kind: str
) -> None:
    two = Trained(policy, uneven, tmp_path, **spread(2, kind))
    two.agrees(one)
    assert left() == []


def test_a_process_has_no_rows_left_in_the_third_step(uneven: Groups) -> None:
    def steps(rank: int) -> list[list[list[float]]]:
        found = plan(
            uneven, size=1, weigh=lambda lengths: [1.0] * len(lengths), skip_zero=True, mask_truncated=False,
            layout=Layout(40, shared=False), rank=rank, world=2,
        )  # fmt: skip
        return [[[item.weight for item in batch.items] for batch in step.batches] for step in found]

    first, second = steps(0), steps(1)
    assert list(map(len, first)) == list(map(len, second))
    assert sorted([first[2], second[2]]) == [[[0.0]], [[1.0]]]
    assert first[3] == second[3] == [[0.0]]
    assert len(first[0]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", ZERO])
def test_four_processes_give_the_weights_of_one(
    policy: Path, uneven: Groups, one: Trained, tmp_path: Path, kind: str
) -> None:
    Trained(policy, uneven, tmp_path, **spread(4, kind)).agrees(one)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "setting"), [("ddp", "importance"), ("fsdp", "kl"), ("ddp", "lora")])
def test_every_setting_gives_what_it_gives_in_one_process(
    policy: Path, uneven: Groups, tmp_path: Path, kind: str, setting: str
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "importance": {"importance": "token", "gradient_checkpointing": True},
        "kl": {"kl": {"coefficient": 0.1, "target": 0.05}, "entropy_bonus": 0.01, "packing": "on"},
        "lora": {"lora": {"rank": 4}},
    }
    alone = Trained(policy, uneven, tmp_path / "one", **settings[setting])
    Trained(policy, uneven, tmp_path / "two", **settings[setting], **spread(2, kind)).agrees(alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_each_stage_of_zero_gives_the_weights_of_one_process(
    policy: Path, uneven: Groups, one: Trained, tmp_path: Path, stage: int
) -> None:
    Trained(policy, uneven, tmp_path, **spread(2, "deepspeed", zero_stage=stage)).agrees(one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", ZERO])
def test_a_round_goes_on_with_another_number_of_processes(
    policy: Path, uneven: Groups, one: Trained, tmp_path: Path, kind: str
) -> None:
    two = Trained(policy, uneven, tmp_path / "two", **spread(2, kind))
    alone = Trained(policy, uneven, tmp_path / "one-one", start=one)
    Trained(policy, uneven, tmp_path / "one-two", start=one, **spread(2, kind)).agrees(alone)
    Trained(policy, uneven, tmp_path / "two-one", start=two).agrees(alone)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "after"), [("ddp", 2), ("fsdp", 1), pytest.param("deepspeed", 2, marks=ZERO.marks)])
def test_a_round_that_was_killed_goes_on_with_as_many_processes_as_there_are(
    policy: Path, uneven: Groups, tmp_path: Path, kind: str, after: int
) -> None:
    change, steps = {"save_minutes": 0.0}, list(uneven) * 8
    alone = Trained(policy, steps, tmp_path / "one")
    # Before the second step is told the first has been saved.
    killing = _signalled(signal.SIGKILL, 1, after=2)
    with pytest.raises(StageError):
        launched(**change, **spread(2, kind)).train(_job(policy, steps, tmp_path / "two"), killing)
    again = Trained(policy, steps, tmp_path / "two", **change, **(spread(2, kind) if after > 1 else {}))
    assert 1 <= again.told[0] < len(steps)
    assert sum(again.told) == len(steps)
    assert furthest(again.weights, alone.weights) < NEAR
    assert furthest(again.moments, alone.moments) < NEAR


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", ZERO])
def test_a_broken_step_is_left_out_by_all_processes(policy: Path, uneven: Groups, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    whole, broken = list(uneven[0]), [replace(row, advantage=math.nan, problem_id="p") for row in uneven[1][:2]]
    groups = [whole, [*uneven[1][2:], *broken], list(uneven[2]), whole]
    alone = Trained(policy, groups, tmp_path / "one")
    two = Trained(policy, groups, tmp_path / "two", **spread(2, kind))
    assert [row.get("broken", 0.0) for row in two.metrics] == [0.0, 1.0, 0.0, 0.0]
    two.agrees(alone)
    assert "p/0" in two.warnings[0]
    job = _job(policy, groups, tmp_path / "stopped")
    stopped = failure(
        NotFiniteError, lambda: launched(max_broken_steps=1, **spread(2, kind)).train(job, lambda steps: None)
    )
    assert "1 of 4 steps" in stopped.what
    first = Trained(policy, groups[:1], tmp_path / "first")
    assert furthest(load_file(job.work / "last_good" / "model.safetensors"), first.weights) < NEAR


# ---- ends ----


def _long(groups: Groups) -> list[list[TrainRow]]:
    return [list(group) for group in groups] * 50


def _signalled(sent: signal.Signals, wanted: int, after: int = 1) -> Callable[[int], None]:
    """A progress that sends the signal to process `wanted` once so many steps are done."""
    done: list[int] = []

    def progress(steps: int) -> None:
        done.append(steps)
        for process in workers() if len(done) == after else ():
            if process.cmdline()[-1] == str(wanted):
                process.send_signal(sent)

    return progress


def _job(policy: Path, groups: Groups, folder: Path) -> TrainJob:
    return TrainJob(
        round=0, groups=groups, policy=policy, state=None, reference=None, out=folder / "policy",
        out_state=folder / "trainer", work=folder / "work",
    )  # fmt: skip


def launched(timeout_s: float = 60.0, **change: Any) -> LaunchedTrainer:
    params = TrainParams.model_validate(TRAIN | spread(2, "ddp") | change)
    return LaunchedTrainer(params, temperature=1.0, max_new_tokens=LIMIT, seed=0, timeout_s=timeout_s)


def test_a_process_that_is_killed_is_named_and_none_is_left(
    policy: Path, groups: Groups, tmp_path: Path, left: Callable[[], list[psutil.Process]]
) -> None:
    job = _job(policy, _long(groups), tmp_path)
    ended = failure(StageError, lambda: launched().train(job, _signalled(signal.SIGKILL, 1)))
    assert ended.what.startswith("process 1 of the 2 that train together ended with -9")
    assert ended.where == str(tmp_path / "work" / "processes" / "process-1.log")
    assert left() == []
    assert not (tmp_path / "policy").exists()


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_after_the_timeout(
    policy: Path, groups: Groups, tmp_path: Path, left: Callable[[], list[psutil.Process]]
) -> None:
    job = _job(policy, _long(groups), tmp_path)
    ended = failure(StageError, lambda: launched(20.0).train(job, _signalled(signal.SIGSTOP, 1)))
    assert ended.what.startswith("process 0 of the 2 that train together ended with 1")
    assert "20000ms" in ended.what
    assert left() == []


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_here(
    policy: Path, groups: Groups, tmp_path: Path, left: Callable[[], list[psutil.Process]]
) -> None:
    bad = [[replace(row, problem_id="p", completion_ids=[10**6]) for row in groups[0]]]
    told = failure(DataError, lambda: launched().train(_job(policy, bad, tmp_path), lambda steps: None))
    assert "p/0" in told.where
    assert left() == []


_PARENT = """
import sys
from pathlib import Path
from papo.engines.training.jobs import read_job
from papo.engines.training.launch import LaunchedTrainer
order, job = read_job(Path(sys.argv[1]))
trainer = LaunchedTrainer(order.params, temperature=1.0, max_new_tokens=24, seed=0)
trainer.train(job, lambda steps: print(steps, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_papo(policy: Path, groups: Groups, tmp_path: Path, sent: signal.Signals) -> None:
    given = tmp_path / "given"
    given.mkdir()
    job = _job(policy, _long(groups), tmp_path)
    write_job(given, _order(job, TRAIN | spread(2, "ddp")), job)
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(given)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "1\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) == 4
        parent.send_signal(sent)
    gone, left = psutil.wait_procs(below, timeout=30)
    assert (len(gone), left) == (4, [])


# ---- files and words between the processes ----


def _order(job: TrainJob, params: dict[str, Any]) -> Order:
    paths = {name: getattr(job, name) for name in ("policy", "state", "reference", "out", "out_state", "work")}
    return Order(
        port=1, timeout_s=2.5, params=TrainParams.model_validate(params), temperature=0.7, max_new_tokens=9, seed=3,
        round=job.round, **paths,
    )  # fmt: skip


def test_a_job_is_read_as_it_was_written(groups: Groups, tmp_path: Path) -> None:
    odd = TrainRow([1], [2, 3], [-0.1, -1e-300], 1 / 3, [0.1 + 0.2, -0.0], True, "q", 7)
    job = _job(tmp_path / "before", [*groups, [odd]], tmp_path)
    order = _order(job, TRAIN | {"lora": {"targets": ["q_proj"]}, "optimizer": "adamw_8bit"})
    write_job(tmp_path, order, job)
    assert read_job(tmp_path) == (order, job)


def test_a_process_without_its_job_says_so(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    assert worker.main([str(theirs.detach()), str(tmp_path), "0"]) == 1
    with ours, ours.makefile() as lines:
        (line,) = lines
    error = _error(json.loads(line)["error"])
    assert (type(error), error.where) == (MissingInputError, str(tmp_path / "job.json"))
    assert error.fix


@pytest.mark.parametrize("kind", [DataError, StageError, SetupError])
def test_an_error_is_the_same_on_this_side(kind: type[PapoError]) -> None:
    error = kind("what", where="here", fix="do")
    same = _error([type(error).__name__, error.what, error.where, error.fix])
    assert (type(same), str(same)) == (kind, str(error))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("devices", "there", "what"),
    [
        ({"processes": 3}, 2, "3 GPUs, of which torch sees 2"),
        ({"processes": 2, "device": "cuda"}, 1, "2 GPUs, of which torch sees 1"),
        ({"processes": 2, "device": "cuda"}, 0, "a GPU that torch can use"),
        ({"processes": 2, "kind": "deepspeed", "device": "cpu"}, 0, "the package deepspeed"),
    ],
)
def test_what_the_machine_lacks_is_told_before_a_process_starts(
    policy: Path, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: Any, there: int, what: str
) -> None:
    monkeypatch.setattr(checks, "_gpu", lambda: there > 0)
    monkeypatch.setattr(checks, "_gpus", lambda: there)
    monkeypatch.setattr(checks, "_found", lambda module: False)
    job = _job(policy, groups, tmp_path)
    lacking = failure(SetupError, lambda: launched(devices=devices).train(job, lambda steps: None))
    assert what in lacking.what
    assert "train.devices." in lacking.where
    assert not job.work.exists()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("change", [{"optimizer": "adamw_8bit"}, {"lora": {}}])
def test_what_cannot_be_sharded_is_refused(kind: str, change: dict[str, Any]) -> None:
    train = change | {"devices": {"processes": 2, "kind": kind}}
    refused = failure(ParamsError, lambda: validate_params({"train": train}, origin="here"))
    assert "devices.kind ddp" in refused.what
    validate_params({"train": change | {"devices": {"processes": 1, "kind": kind}}}, origin="here")


def test_one_process_needs_no_other() -> None:
    assert not isinstance(
        make_trainer(TrainParams(), temperature=1.0, max_new_tokens=1, seed=0, warn=lambda text: None), LaunchedTrainer
    )
