"""What tests/servers/vllm.py promises of any server, with one that takes no time to start; the real one is in tests/with_vllm/."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import vllm
from servers.vllm import ServerFailedError, vllm_python, vllm_server

STAND_IN = """\
#!{python}
import http.server, os, signal, subprocess, sys
from pathlib import Path

if sys.argv[1] == "-c":
    sys.exit({no_vllm})
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
print("started as", sys.argv[1:], flush=True)
{do}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

http.server.HTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""

# One that leaves the group and its parent and takes no SIGTERM, as its parent does not either.
STUBBORN = """\
signal.signal(signal.SIGTERM, signal.SIG_IGN)
away = "import os; os.fork() and os._exit(0); os.setsid(); open('{pids}', 'w').write(str(os.getpid())); import time; time.sleep(600)"
subprocess.run([sys.executable, "-c", away])
while not Path("{pids}").exists() or not Path("{pids}").read_text():
    pass
Path("{pids}").write_text(Path("{pids}").read_text() + f" {{os.getpid()}}")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a program in the place of the python with vLLM, which does as it is told before it serves."""

    def put(do: str = "", *, no_vllm: bool = False) -> None:
        path = tmp_path / "python"
        path.write_text(STAND_IN.format(python=sys.executable, do=do, no_vllm=int(no_vllm)))
        path.chmod(0o755)
        monkeypatch.setenv("PAPO_VLLM_PYTHON", str(path))
        monkeypatch.setattr(vllm, "GENTLY_S", 0.5)

    return put


def status(url: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url.removesuffix("/v1") + "/health", timeout=10) as response:
        found: int = response.status
        return found


def left(pids: Path) -> list[int]:
    """Those of the two processes that are there; of a process that ended and was not waited for, too."""
    named = [int(pid) for pid in pids.read_text().split()]
    assert len(named) == 2
    return [pid for pid in named if psutil.pid_exists(pid)]


def test_it_is_healthy_within_and_gone_after(model: Path, stand_in: Callable[..., None], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stand_in(STUBBORN.format(pids=pids))
    with vllm_server(model) as url:
        assert status(url) == 200
        assert len(left(pids)) == 2
    assert left(pids) == []


def test_it_is_gone_after_a_test_that_fails(model: Path, stand_in: Callable[..., None], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stand_in(STUBBORN.format(pids=pids))
    with pytest.raises(KeyboardInterrupt), vllm_server(model):
        raise KeyboardInterrupt
    assert left(pids) == []


def test_it_is_gone_after_a_test_that_was_killed(model: Path, stand_in: Callable[..., None], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stand_in(STUBBORN.format(pids=pids))
    killed = (
        "import os, signal, pathlib; from servers import vllm; vllm.GENTLY_S = 0.5\n"
        f"with vllm.vllm_server(pathlib.Path({str(model)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", killed], env=environment, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    until = time.monotonic() + 30
    while left(pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert left(pids) == []


def test_one_that_ends_at_once_is_told_with_its_last_words(model: Path, stand_in: Callable[..., None]) -> None:
    stand_in("print('no such option'); sys.exit(3)")
    with pytest.raises(ServerFailedError, match=r"(?s)ended with 3:.*no such option"), vllm_server(model):
        pass


def test_one_that_does_not_get_healthy_is_told_and_ended(
    model: Path, stand_in: Callable[..., None], tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    stand_in(STUBBORN.format(pids=pids) + "print('loading', flush=True); import time; time.sleep(600)")
    with pytest.raises(ServerFailedError, match=r"(?s)not healthy within 2 s:.*loading"), vllm_server(model, start_s=2):
        pass
    assert left(pids) == []


def test_what_it_is_told(model: Path, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    stand_in("print({name: os.environ.get(name) for name in ('PYTHONPATH', 'HF_HUB_OFFLINE', 'MINE')}); sys.exit(1)")
    options: dict[str, Any] = {"max_model_len": 64, "enforce_eager": True, "prefix_caching": False, "limits": {"a": 1}}
    with pytest.raises(ServerFailedError) as raised, vllm_server(model, environment={"MINE": "1"}, **options):
        pass
    told = str(raised.value)
    assert "'-m', 'vllm.entrypoints.openai.api_server'" in told
    assert f"'--model', '{model}', '--served-model-name', 'some-model', '--host', '127.0.0.1', '--port'" in told
    assert "'--max-model-len', '64', '--enforce-eager', '--no-prefix-caching', '--limits', '{\"a\": 1}'" in told
    assert "{'PYTHONPATH': None, 'HF_HUB_OFFLINE': '1', 'MINE': '1'}" in told


def test_there_is_no_model(tmp_path: Path, stand_in: Callable[..., None]) -> None:
    stand_in()
    with pytest.raises(FileNotFoundError, match="there is no model"), vllm_server(tmp_path):
        pass


def test_there_is_no_vllm(stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(no_vllm=True)
    with pytest.raises(FileNotFoundError, match=r"has no vllm \(PAPO_VLLM_PYTHON\)"):
        vllm_python()
    monkeypatch.setenv("PAPO_VLLM_PYTHON", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no python .* \(PAPO_VLLM_PYTHON\)"):
        vllm_python()
    monkeypatch.delenv("PAPO_VLLM_PYTHON")
    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="`make test-vllm` sets it up"):
        vllm_python()
