"""Engines of vLLM in processes of papo's own: rows as they were asked for, each once, whatever dies; and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from failures import failure
from servers.completions import EOS, log_softmax, save_policy, table
from servers.engine import python_of, save_package

from papo.cli import main
from papo.engines.protocols import Sample, SampleRequest
from papo.engines.samplers import vllm
from papo.engines.samplers.vllm import VllmSampler
from papo.errors import CheckpointError, DataError, ParamsError, ServerDownError, SetupError
from papo.params import VllmParams
from papo.store.files import read_json

TESTS = Path(__file__).parents[1]
PROMPTS = ("3+5-2=?\n", "9-9=?\n", "1+2+3+4+5+6=?\n", "7+8=?\n", "4=?\n")
REQUESTS = [
    SampleRequest(prompt, 2**63 + 1000 * number + seed) for number, prompt in enumerate(PROMPTS) for seed in range(12)
]
Make = Callable[..., VllmSampler]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose vllm is the one of servers/engine.py."""
    folder = tmp_path_factory.mktemp("site")
    return python_of(save_package(folder / "packages"), TESTS, at=folder / "python")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("tables") / "0", 0)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "GENTLY_S", 2.0)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def make(python: str, policy: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A sampler, closed in the end; `plan`: of its engines."""
    with ExitStack() as stack:

        def sampler(plan: dict[str, Any] | None = None, **change: Any) -> VllmSampler:
            monkeypatch.setenv("PAPO_ENGINE_PLAN", json.dumps(plan or {}))
            settings = {"temperature": 1.0, "top_p": 1.0, "max_prompt_tokens": 32, "max_new_tokens": 16}
            given = {name: change.pop(name, value) for name, value in settings.items()}
            given["warn"] = change.pop("warn", lambda message: None)
            params = VllmParams(**{"python": python, "start_s": 60.0, "dtype": "float32"} | change)
            return stack.enter_context(VllmSampler(policy, **given, params=params, logs=logs))

        yield sampler


def sampled(sampler: VllmSampler, requests: Sequence[SampleRequest] = REQUESTS) -> list[Sample]:
    return sampler.sample(requests, lambda _: None)


def started(logs: Path) -> dict[int, dict[str, Any]]:
    """What each engine was started with, by process, in the order of the devices."""
    found = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in logs.glob("started-*.json")}
    return dict(sorted(found.items(), key=lambda item: str(item[1]["device"])))


def steps(logs: Path) -> list[int]:
    """Rows of each step of all engines."""
    return [int(line) for path in logs.glob("steps-*") for line in path.read_text().splitlines()]


# ---- rows ----


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_a_row_is_what_the_policy_gives_at_that_temperature(make: Make, temperature: float) -> None:
    from papo.engines.tokenizer import build_tokenizer

    tokenizer, told = build_tokenizer(), list[int]()
    samples = make(temperature=temperature).sample(REQUESTS, told.append)
    assert sum(told) == len(REQUESTS)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for request, sample in zip(REQUESTS, samples, strict=True):
        assert tokenizer.decode(sample.prompt_ids) == request.prompt
        before, expected = sample.prompt_ids[-1], []
        for token in sample.completion_ids:
            expected.append(log_softmax(table(0)[before], temperature)[token])
            before = token
        assert sample.logprobs == pytest.approx(expected, abs=1e-9)
        stopped = sample.finish_reason == "stop"
        assert (sample.completion_ids[-1] == EOS) == stopped
        assert sample.completion == tokenizer.decode(sample.completion_ids[: -1 if stopped else None])


def test_rows_depend_on_their_seed_alone_whichever_engine_they_come_from(make: Make, logs: Path) -> None:
    alone = sampled(make())
    two = make({"step_s": 0.002}, devices=["0", "2,3"])
    assert sampled(two) == alone
    assert sampled(two, REQUESTS[::-1]) == alone[::-1]
    assert len({tuple(sample.completion_ids) for sample in alone[:12]}) > 6
    devices = {pid: given["device"] for pid, given in started(logs).items() if given["device"] is not None}
    assert sorted(devices.values()) == ["0", "2,3"]
    assert all((logs / f"steps-{pid}").is_file() for pid in devices)  # both had rows


def test_engines_are_told_what_the_params_say_and_nothing_of_this_project(make: Make, logs: Path, policy: Path) -> None:
    sampler = make(options={"enforce-eager": True})
    assert not started(logs)  # none before the first row is needed
    assert sampler.fits(PROMPTS[0]) is None
    assert sampler.versions() == {"vllm": "0.32.0", "transformers": "9.9.9"}
    assert sampler.metrics() == {}
    sampled(sampler, REQUESTS[:3])
    (told,) = started(logs).values()
    assert told == {
        "dtype": "float32",
        "generation_config": "vllm",
        "options": {"enforce_eager": True, "max_model_len": 48},
        "model": str(policy.resolve()),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    assert sampler.metrics().keys() == {"engine_start_s"}
    assert "INFO loading" in (logs / "engine-0.log").read_text()


def test_shards_come_as_they_complete_and_the_engine_is_busy_across_them(make: Make, logs: Path) -> None:
    shards = [REQUESTS[:4], [], REQUESTS[4:8], REQUESTS[8:]]
    told: list[int] = []
    coming = make({"step_s": 0.01}).sample_shards(shards, told.append)
    found = dict([next(coming), next(coming)])
    assert sum(told) < len(REQUESTS)
    found |= dict(coming)
    assert {number: len(samples) for number, samples in found.items()} == {0: 4, 1: 0, 2: 4, 3: 52}
    assert [sample for number in range(4) for sample in found[number]] == sampled(make())
    assert max(steps(logs)) == 8  # as many as it computes at a time, and a shard has four


def test_rows_are_asked_of_the_same_engines_until_these_are_closed(make: Make, logs: Path) -> None:
    sampler = make()
    first = sampled(sampler)
    assert sampled(sampler) == first
    assert sampled(sampler, []) == []
    assert len(started(logs)) == 1
    sampler.close()
    assert sampled(sampler) == first
    assert len(started(logs)) == 2


# ---- engines that die ----


def test_an_engine_that_dies_is_started_once_more_and_no_row_is_lost_or_twice(make: Make, logs: Path) -> None:
    warned, told = list[str](), list[int]()
    sampler = make({"dies": 1, "after": 20, "step_s": 0.002}, warn=warned.append)
    assert sampler.sample(REQUESTS, told.append) == sampled(make())
    assert sum(told) == len(REQUESTS)
    assert len(warned) == 1
    assert "engine-0 ended with -9 and is started once more" in warned[0]
    assert sampler.metrics()["engine_ends"] == 1.0


def test_rows_of_an_engine_that_dies_for_good_go_to_another(make: Make) -> None:
    warned: list[str] = []
    sampler = make({"dies": 3, "after": 4, "step_s": 0.005}, devices=["0", "1"], warn=warned.append)
    assert sampled(sampler) == sampled(make())
    assert len(warned) == 3
    assert sum("is left out" in message for message in warned) == 1


def test_an_engine_that_somebody_kills_is_seen_at_once(make: Make, logs: Path) -> None:
    warned: list[str] = []
    sampler = make({"step_s": 0.02}, warn=warned.append)
    coming = sampler.sample_shards([REQUESTS[:10], REQUESTS[10:]], lambda _: None)
    found = dict([next(coming)])
    os.kill(next(iter(started(logs))), signal.SIGKILL)
    began = time.monotonic()
    found |= dict(coming)
    assert [*found[0], *found[1]] == sampled(make())
    assert len(warned) == 1
    assert time.monotonic() - began < 60.0


def test_an_engine_that_brings_no_row_for_too_long_is_taken_for_dead(make: Make) -> None:
    warned: list[str] = []
    sampler = make({"hangs": 1, "after": 4, "step_s": 0.005}, devices=["0", "1"], warn=warned.append, stall_s=6.0)
    assert sampled(sampler) == sampled(make())
    assert len(warned) == 1
    assert "is started once more" in warned[0]
    assert sampler.metrics()["engine_ends"] == 1.0


def test_without_an_engine_the_stage_ends_and_shards_stay(make: Make) -> None:
    sampler = make({"dies": 2, "after": 12})
    error = failure(ServerDownError, lambda: dict(sampler.sample_shards([REQUESTS], lambda _: None)))
    assert "about to die" in error.what
    assert "ended with -9, and none is left" in error.what


# ---- engines that do not start ----


def test_an_engine_that_cannot_load_says_why(make: Make) -> None:
    error = failure(SetupError, lambda: sampled(make({"load_error": "the weights are of no use"})))
    assert "cannot load the policy: ValueError: the weights are of no use" in error.what
    error = failure(SetupError, lambda: sampled(make(options={"enforce_eagerly": True})))
    assert "unexpected keyword argument 'enforce_eagerly'" in error.what
    assert "options" in error.fix
    error = failure(SetupError, lambda: sampled(make({"dies": 1, "after": 0})))
    assert "ended with -9 as it loaded the policy" in error.what
    assert "about to die" in error.what


def test_an_engine_that_takes_too_long_to_load_is_ended(make: Make, logs: Path) -> None:
    sampler = make({"load_s": 600.0}, start_s=1.5)
    began = time.monotonic()
    error = failure(ServerDownError, lambda: sampled(sampler))
    assert "has not loaded the policy within 1.5 s" in error.what
    assert time.monotonic() - began < 30.0
    assert not [pid for pid in started(logs) if psutil.pid_exists(pid)]


def test_an_interpreter_without_vllm_is_refused(make: Make, tmp_path: Path) -> None:
    error = failure(SetupError, make(python="no-such-python").check)
    assert "there is no interpreter no-such-python" in error.what
    error = failure(SetupError, make(python="/bin/false").check)
    assert error.where == "/bin/false"
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    error = failure(SetupError, make(python=str(bare)).check)
    assert "the interpreter has no vllm" in error.what
    assert "pip install vllm" in error.fix


def test_a_context_that_is_too_short_is_told(make: Make) -> None:
    error = failure(ParamsError, lambda: sampled(make(options={"max_model_len": 20})))
    assert "and 16 new ones do not fit into the context of 20 tokens" in error.what
    assert "set max_model_len to" in error.fix


@pytest.mark.parametrize("name", ["dtype", "model", "logprobs-mode", "generation_config"])
def test_what_decides_the_rows_is_no_option(make: Make, name: str) -> None:
    failure(ParamsError, lambda: make(options={name: "auto"}))


def test_a_temperature_that_vllm_changes_is_refused(make: Make) -> None:
    failure(ParamsError, lambda: make(temperature=0.001))


def test_a_prompt_that_does_not_fit_is_told_before_an_engine_starts(make: Make, logs: Path) -> None:
    sampler = make()
    prompt = "+".join("1" * 20) + "=?\n"
    assert "allowed are 1 to 32" in str(sampler.fits(prompt))
    failure(DataError, lambda: sampled(sampler, [SampleRequest(prompt, 1)]))
    assert "positions of the policy" in str(make(max_new_tokens=126).fits("3+5=?\n"))
    assert not started(logs)


# ---- rows that cannot be ----


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fewer", "fewer than the 16"), ("more", "more than the 16"), ("outside", "none of the 20"), ("positive", "log-prob 0.5"),
        ("never", "log-prob -9999"), ("abort", "finish reason 'abort'"), ("goes-on", "does not end as"),
    ],
)  # fmt: skip
def test_a_row_that_was_not_asked_for_is_refused(make: Make, fault: str, said: str, logs: Path) -> None:
    error = failure(DataError, lambda: sampled(make({"fault": fault})))
    assert said in error.what
    assert error.what.startswith("the engine gave")
    assert not [pid for pid in started(logs) if psutil.pid_exists(pid)]


def test_a_row_that_the_engine_refuses_is_told(make: Make) -> None:
    assert "no such row" in failure(DataError, lambda: sampled(make({"refuses": True}))).what


def test_log_probs_that_are_no_numbers_are_the_fault_of_the_policy(make: Make, policy: Path) -> None:
    assert failure(CheckpointError, lambda: sampled(make({"fault": "nan"}))).where == str(policy)


# ---- what is left ----


def test_no_process_is_left_when_it_is_closed(make: Make, logs: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    sampler = make(devices=["0", "1"])
    sampled(sampler)
    assert len(set(psutil.Process().children(recursive=True)) - before) >= 4
    sampler.close()
    assert not set(psutil.Process().children(recursive=True)) - before


def test_no_process_is_left_when_papo_is_killed(make: Make, python: str, policy: Path, logs: Path) -> None:
    make({"step_s": 0.02})  # sets the plan
    code = (
        "from pathlib import Path\n"
        "from papo.engines.protocols import SampleRequest\n"
        "from papo.engines.samplers.vllm import VllmSampler\n"
        "from papo.params import VllmParams\n"
        f"sampler = VllmSampler(Path({str(policy)!r}), temperature=1.0, top_p=1.0, max_prompt_tokens=32, max_new_tokens=16, "
        f"params=VllmParams(python={python!r}, dtype='float32'), logs=Path({str(logs)!r}))\n"
        "requests = [SampleRequest('3+5=?\\n', seed) for seed in range(10_000)]\n"
        "sampler.sample(requests, lambda _: print('row', flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as papo:
        assert papo.stdout is not None
        assert papo.stdout.readline() == "row\n"
        below = psutil.Process(papo.pid).children(recursive=True)
        assert len(below) >= 2
        papo.kill()
    _, left = psutil.wait_procs(below, timeout=30)
    assert [one for one in left if one.status() != psutil.STATUS_ZOMBIE] == []


# ---- the stages ----


def test_the_stages_sample_from_it_and_end_it(
    started_checkout: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAPO_ENGINE_PLAN", "{}")
    before = set(psutil.Process().children(recursive=True))
    values = ["--set", "rollout.engine=vllm", "--set", f"rollout.vllm.python={python}"]
    assert main(["rollout", "--round", "0", *values]) == 0
    manifest = read_json(started_checkout / "artifacts/rounds/0/rollouts.manifest.json")
    assert manifest["versions"]["vllm"] == "0.32.0"
    assert manifest["metrics"]["repeatable"] == 0.0
    assert manifest["metrics"]["engine_start_s"] > 0.0
    assert not set(psutil.Process().children(recursive=True)) - before
    found = started(started_checkout / ".papo/engines")
    assert [Path(one["model"]).name for one in found.values()] == ["warmstart"]
