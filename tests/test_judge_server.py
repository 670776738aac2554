"""infra/judge/serve with a stand-in for vLLM; the real one is in tests/with_vllm/test_serve.py."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from servers.vllm import free_port

from papo.params import load_params

ROOT = Path(__file__).parents[1]
STAND_IN = """\
#!{python}
import http.server, json, os, sys
from pathlib import Path

names = ("VLLM_SYSTEM_START_DATE", "HF_HUB_OFFLINE", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS")
told = {{"pid": os.getpid(), "flags": sys.argv[1:], "env": {{name: os.environ.get(name) for name in names}}}}
Path({told!r}).write_text(json.dumps(told))
{do}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_): ...

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


@pytest.fixture
def start(tmp_path: Path, told: Path) -> Iterator[Start]:
    """Starts the script in a group of its own, which ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, do: str = "", **environment: str) -> subprocess.Popen[str]:
        vllm = tmp_path / "vllm"
        vllm.write_text(STAND_IN.format(python=sys.executable, told=str(told), do=do))
        vllm.chmod(0o755)
        process = subprocess.Popen(
            [ROOT / "infra/judge/serve", *arguments],
            env=os.environ | {"VLLM": str(vllm)} | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_default_judge_is_started_by_its_revision_and_ends_with_the_script(start: Start, told: Path) -> None:
    port = free_port()
    script = start("gpt-oss-20b", PORT=str(port))
    assert script.stdout is not None
    base_url = f"http://127.0.0.1:{port}/v1"
    assert script.stdout.readline() == (
        f'gpt-oss-20b answers: score_prm.model: {{model: gpt-oss-20b, base_url: "{base_url}"}}\n'
    )
    given = json.loads(told.read_text())
    flags = given["flags"]
    assert flags[0] == "openai/gpt-oss-20b"
    after = dict(itertools.pairwise(flags))
    assert after["--served-model-name"] == "gpt-oss-20b"
    assert len(after["--revision"]) == 40
    assert after["--revision"] == after["--tokenizer-revision"]
    assert (after["--max-model-len"], after["--gpu-memory-utilization"]) == ("16384", "0.90")
    assert "--enable-prefix-caching" in flags
    assert given["env"]["VLLM_SYSTEM_START_DATE"] == "2026-01-01"
    assert given["env"]["DO_NOT_TRACK"] == given["env"]["VLLM_NO_USAGE_STATS"] == "1"
    script.terminate()
    assert script.wait(30) == 143
    assert not psutil.pid_exists(given["pid"])


def test_the_preset_asks_the_server_that_the_script_starts() -> None:
    params = load_params(ROOT / "params.yaml", preset=ROOT / "infra/presets/judge-gpt-oss-20b.yaml").score_prm
    assert params.model is not None
    assert (params.judge, params.model.model) == ("model", "gpt-oss-20b")
    assert params.model.base_url == "http://localhost:8000/v1"
    assert "port=${PORT:-8000}" in (ROOT / "infra/judge/serve").read_text()
    assert params.model.max_tokens < 16384


def test_variables_change_what_is_started(start: Start, told: Path, tmp_path: Path) -> None:
    settings = {
        "MODEL": str(tmp_path),
        "MAX_MODEL_LEN": "9",
        "GPU_SHARE": "0.5",
        "VLLM_SYSTEM_START_DATE": "2020-02-02",
    }
    script = start("gpt-oss-20b", "--tensor-parallel-size", "2", PORT=str(free_port()), **settings)
    assert script.stdout is not None
    assert script.stdout.readline()
    given = json.loads(told.read_text())
    assert given["flags"][0] == str(tmp_path)
    assert "--revision" not in given["flags"]  # a folder has none
    after = dict(itertools.pairwise(given["flags"]))
    assert (after["--max-model-len"], after["--gpu-memory-utilization"]) == ("9", "0.5")
    assert given["flags"][-2:] == ["--tensor-parallel-size", "2"]
    assert given["env"]["VLLM_SYSTEM_START_DATE"] == "2020-02-02"


def test_the_try_on_the_cpu_asks_no_hub(start: Start, told: Path) -> None:
    script = start("smollm2-135m", PORT=str(free_port()))
    assert script.stdout is not None
    assert script.stdout.readline().startswith("smollm2-135m answers: ")
    given = json.loads(told.read_text())
    assert given["flags"][0] == "models/smollm2-135m"
    assert "--revision" not in given["flags"]
    assert given["env"]["HF_HUB_OFFLINE"] == "1"


def test_a_server_that_ends_is_told(start: Start) -> None:
    script = start("gpt-oss-20b", do="sys.exit('no GPU')", PORT=str(free_port()))
    _, said = script.communicate(timeout=30)
    assert script.returncode == 1
    assert said.splitlines() == ["no GPU", "gpt-oss-20b: the server ended"]


def test_a_server_that_does_not_get_healthy_is_told_and_ended(start: Start, told: Path) -> None:
    script = start("gpt-oss-20b", do="import time; time.sleep(600)", PORT=str(free_port()), START_S="2")
    _, said = script.communicate(timeout=60)
    assert script.returncode == 1
    assert said == "gpt-oss-20b: not healthy within 2 s\n"
    assert not psutil.pid_exists(json.loads(told.read_text())["pid"])


@pytest.mark.parametrize("arguments", [(), ("gpt-5",)])
def test_an_unknown_judge_is_refused(start: Start, told: Path, arguments: tuple[str, ...]) -> None:
    script = start(*arguments)
    _, said = script.communicate(timeout=30)
    assert script.returncode == 2
    assert said.startswith("usage: ")
    assert said.endswith("gpt-oss-20b|smollm2-135m [FLAG...]\n")
    assert not told.exists()
