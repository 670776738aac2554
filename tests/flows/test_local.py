"""`python -m flows.pipeline` with no server to be had: Prefect starts one for it, and takes it away."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from .conftest import write_tiny

pytestmark = pytest.mark.slow


def environment(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return inherited | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}


def states(home: Path) -> list[tuple[str, str]]:
    database = sqlite3.connect(home / "prefect.db")
    try:
        return database.execute("select name, state_type from flow_run").fetchall()
    finally:
        database.close()


def test_it_shows_the_result_as_papo_run_does(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    command = [sys.executable, "-m", "flows.pipeline", "--no-dvc"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path / "home"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "9 steps ran, 0 had been done before" in done.stdout
    assert "Task run" not in done.stderr
    assert states(tmp_path / "home") == [("papo seed0 1 rounds", "COMPLETED")]


@contextmanager
def training(folder: Path) -> Iterator[list[psutil.Process]]:
    """A run that trains its warm start for long, and the processes that it has started; none is left."""
    write_tiny(folder)
    process = psutil.Popen(
        [sys.executable, "-u", "-m", "flows.pipeline", "--no-dvc", "--set", "warmstart.steps=100000"],
        cwd=folder,
        env=environment(folder / "home"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    family = [process]
    try:
        assert any("Beginning flow run" in line for line in process.stderr)
        family += process.children(recursive=True)
        yield family
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(timeout=10)
        process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_leaves_nothing_running(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with training(tmp_path) as family:
        process = family[0]
        # Ctrl-C reaches the whole group, as in a terminal; SIGTERM, as by a supervisor, only the process.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said = process.stderr.read()
        assert process.wait(timeout=60) == code, said
        assert "Traceback" not in said
        _, left = psutil.wait_procs(family, timeout=10)
        assert left == []
        assert states(tmp_path / "home") == [("papo seed0 1 rounds", "CRASHED")]


def test_a_run_that_is_killed_leaves_nothing_running(tmp_path: Path) -> None:
    """Not even Prefect's server, which is nobody's child then."""
    with training(tmp_path) as family:
        assert any("uvicorn" in " ".join(member.cmdline()) for member in family)
        family[0].kill()
        _, left = psutil.wait_procs(family, timeout=60)
        assert left == []
        assert states(tmp_path / "home") == [("papo seed0 1 rounds", "RUNNING")]  # there was nobody to say so
