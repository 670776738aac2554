"""A vLLM server on the CPU as a process of its own: a real model behind OpenAI's protocol, for chat and completions.

    with vllm_server(Path("models/smollm2-135m"), max_model_len=2048) as url:    # http://127.0.0.1:PORT/v1; the model is smollm2-135m

Options are vLLM's flags: max_model_len=2048 is --max-model-len 2048, enforce_eager=True is --enforce-eager, False is --no-enforce-eager.

It runs in an environment of its own, .venv-vllm, which `make test-vllm` sets up, or that of the python which PAPO_VLLM_PYTHON names. vLLM
starts processes in turn. A watchdog ends them all when the `with` does, or when the process of the test is gone, however it went.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
START_S = 300.0
"""Some 35 s are usual, and several times that beside other tests."""

GENTLY_S, KILLED_S = 20.0, 10.0
"""For its processes to end after SIGTERM, and after SIGKILL."""

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; it takes half of the machine's memory otherwise
}


class ServerFailedError(Exception):
    """The server did not start; the message ends with the tail of its log."""


def vllm_python() -> Path:
    """The python of the environment with vLLM.

    Raises:
        FileNotFoundError: it is not there, or has no vLLM.
    """
    named = os.environ.get("PAPO_VLLM_PYTHON")
    python = Path(named) if named else ROOT / ".venv-vllm/bin/python"
    origin = "PAPO_VLLM_PYTHON" if named else "`make test-vllm` sets it up"
    if not os.access(python, os.X_OK) or python.is_dir():
        raise FileNotFoundError(f"there is no python {python} ({origin})")
    looked = [python, "-c", "import importlib.util; raise SystemExit(importlib.util.find_spec('vllm') is None)"]
    if subprocess.run(looked, cwd="/", env=_environment({}), capture_output=True, check=False).returncode:
        raise FileNotFoundError(f"{python} has no vllm ({origin})")
    return python


@contextmanager
def vllm_server(
    model: Path, *, start_s: float = START_S, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[str]:
    """The server's URL, with /v1, once it is healthy; when the `with` ends, so have all of its processes.

    Raises:
        FileNotFoundError: there is no vLLM, or no model.
        ServerFailedError: it ended, or was not healthy within `start_s`.
    """
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"there is no model {model}")
    port = free_port()
    given = {"model": model.resolve(), "served_model_name": model.name, "host": "127.0.0.1", "port": port} | options
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", *_flags(given)]
    with tempfile.TemporaryDirectory(prefix="papo-vllm-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            watchdog = subprocess.Popen(
                [sys.executable, __file__, str(GENTLY_S), *map(str, command)],
                cwd=folder,  # `python -m` imports from there first
                env=_environment(environment or {}),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the test
            )
        with watchdog:
            try:
                _wait_until_healthy(f"http://127.0.0.1:{port}/health", watchdog, log, start_s)
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                watchdog.terminate()  # standard input is for the case that nobody is left to do that
                watchdog.wait(GENTLY_S + KILLED_S + 10)


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """Without PYTHONPATH, which would have it import from this project's folders."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET | dict(given)


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        words = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{words}" if value else f"--no-{words}")
        else:
            flags += [f"--{words}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_until_healthy(url: str, watchdog: subprocess.Popen[bytes], log: Path, start_s: float) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + start_s
    while True:
        with suppress(OSError), direct.open(url, timeout=5):
            return
        if watchdog.poll() is not None:
            raise ServerFailedError(f"vLLM ended with {watchdog.returncode}:\n{_tail(log)}")
        if time.monotonic() > until:
            raise ServerFailedError(f"vLLM was not healthy within {start_s:g} s:\n{_tail(log)}")
        time.sleep(0.25)


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# ---- the watchdog ----


def watch(command: Sequence[str], gently_s: float) -> int:
    """Runs the command until it ends, standard input does, or SIGTERM comes; none of what it started is left then."""
    told = Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    # Who loses its parent becomes a child of this process, not of the first one: nobody gets away, and nobody stays as a zombie.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while server.poll() is None and not told.is_set() and not select.select([sys.stdin], [], [], 0.2)[0]:
            pass
    finally:
        end(server.pid, gently_s)
    return server.returncode or 0


def end(group: int, gently_s: float) -> None:
    """Ends a group, and every process below this one.

    Raises:
        TimeoutError: one of them outlived SIGKILL.
    """
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
    started = time.monotonic()
    while time.monotonic() < started + gently_s + KILLED_S:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > started + gently_s:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.1)
    raise TimeoutError(f"{psutil.Process().children(recursive=True)} outlived SIGKILL")


if __name__ == "__main__":
    sys.exit(watch(sys.argv[2:], float(sys.argv[1])))
