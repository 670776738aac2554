"""The guard beside a process that is no flow: what it ends, and when."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows import guard

RUN = """
import json, os, signal, subprocess, sys, time
nothing = subprocess.DEVNULL
before = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=nothing, stderr=nothing)
time.sleep(0.2)
os.environ["PAPO_GUARDED"] = "mark-of-a-test"
environment = {name: value for name, value in os.environ.items() if name != "PAPO_GUARDED"}
guard = subprocess.Popen(
    [sys.executable, sys.argv[1], "mark-of-a-test", "2"], stdin=subprocess.PIPE, env=environment, start_new_session=True
)
time.sleep(1.5)
away = subprocess.Popen(["sleep", "600"], start_new_session=True)
orphan = subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True).stdout
if (forked := os.fork()) == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
time.sleep(2.0)  # a process without the mark has to be seen while its parent lives
print(json.dumps({"before": before.pid, "guard": guard.pid, "left": [away.pid, forked, int(orphan)]}), flush=True)
if len(sys.argv) > 2:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    guard.stdin.write((sys.argv[2] + "\\n").encode())
    guard.stdin.flush()
time.sleep(600)
"""


def lives(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def run_with_guard(*line: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, int], list[int]]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(Path(guard.__file__)), *line],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    found: dict[str, int] = {}
    left: list[int] = []
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        found, left = {name: said[name] for name in ("before", "guard")}, said["left"]
        assert all(map(lives, [*found.values(), *left]))
        yield process, found, left
    finally:
        for number in (process.pid, *found.values(), *left):
            if lives(number):
                os.kill(number, signal.SIGKILL)
        process.communicate(timeout=30)


def wait(left: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(lives, left)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(lives, left))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_run_started_ends_with_it_however_that_went(number: signal.Signals) -> None:
    with run_with_guard() as (process, found, left):
        os.killpg(process.pid, number)
        wait([*left, found["guard"]], 30)
        assert lives(found["before"])  # which was there before the run had a guard


def test_a_stage_whose_time_is_up_is_killed_with_all_it_started_and_the_reason_is_said() -> None:
    with run_with_guard("1.5 train 3 did not end within 2 min (flow.timeouts)") as (process, found, left):
        assert process.wait(timeout=30) == -signal.SIGKILL
        wait([*left, found["guard"]], 30)
        assert process.stderr is not None
        assert "papo: train 3 did not end within 2 min (flow.timeouts)" in process.stderr.read()


def test_a_stage_that_is_done_in_time_is_left_alone() -> None:
    with run_with_guard("1.5 train 3 did not end\n0") as (process, _, left):
        time.sleep(4.0)
        assert process.poll() is None
        assert all(map(lives, left))
