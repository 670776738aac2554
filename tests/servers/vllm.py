"""A vLLM server on the CPU as a process of its own: a real model behind OpenAI's protocol, for chat and completions.

    with vllm_server(Path("models/smollm2-135m"), max_model_len=2048) as url:    # http://127.0.0.1:PORT/v1; the model is smollm2-135m

Options are vLLM's flags: max_model_len=2048 is --max-model-len 2048, enforce_eager=True is --enforce-eager, False is --no-enforce-eager.

It runs in an environment of its own, .venv-vllm, which `make test-vllm` sets up, or that of the python which PAPO_VLLM_PYTHON names. vLLM
starts processes in turn. A watchdog ends them all when the `with` does, or when the process of the test is gone, however it went.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from papo.engines import watchdog

ROOT = Path(__file__).parents[2]
START_S = 300.0
"""Some 35 s are usual, and several times that beside other tests."""

GENTLY_S = 20.0
"""For its processes to end after SIGTERM."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; it takes half of the machine's memory otherwise
}

UNBROKEN = {"enable_chunked_prefill": False}
"""A prompt that is read in parts ends vLLM 0.32.0 on the CPU if its request has a seed and a temperature."""


class ServerFailedError(Exception):
    """The server did not start, or ended too early; the message ends with the tail of its log."""


def vllm_python() -> Path:
    """The python of the environment with vLLM.

    Raises:
        FileNotFoundError: it is not there, or has no vLLM.
    """
    named = os.environ.get("PAPO_VLLM_PYTHON")
    python = Path(named).absolute() if named else ROOT / ".venv-vllm/bin/python"
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
        ServerFailedError: it ended by itself, or was not healthy within `start_s`.
    """
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"there is no model {model}")
    port = free_port()
    given = (
        {"model": model.resolve(), "served_model_name": model.name, "host": "127.0.0.1", "port": port}
        | UNBROKEN
        | options
    )
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", *_flags(given)]
    with tempfile.TemporaryDirectory(prefix="papo-vllm-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            watched = subprocess.Popen(
                [sys.executable, watchdog.__file__, str(GENTLY_S), *map(str, command)],
                cwd=folder,  # `python -m` imports from there first
                env=_environment({"TMPDIR": folder} | dict(environment or {})),  # vLLM leaves files there
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the test
            )
        with watched:
            try:
                _wait_until_healthy(f"http://127.0.0.1:{port}/health", watched, log, start_s)
                yield f"http://127.0.0.1:{port}/v1"
                if watched.poll() is not None:
                    raise ServerFailedError(f"vLLM ended with {watched.returncode} while it was in use:\n{_tail(log)}")
            finally:
                watched.terminate()  # standard input is for the case that nobody is left to do that
                watched.wait(GENTLY_S + watchdog.KILLED_S + 10)


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
    """One that nobody listens at just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_until_healthy(url: str, watched: subprocess.Popen[bytes], log: Path, start_s: float) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + start_s
    while True:
        with suppress(OSError), direct.open(url, timeout=5):
            return
        if watched.poll() is not None:
            raise ServerFailedError(f"vLLM ended with {watched.returncode}:\n{_tail(log)}")
        if time.monotonic() > until:
            raise ServerFailedError(f"vLLM was not healthy within {start_s:g} s:\n{_tail(log)}")
        time.sleep(0.25)


def _tail(log: Path, lines: int = 100) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
