"""Servers that are started, handed the next policy and ended: nothing old is sampled from, and nothing is left behind."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from failures import failure
from servers.completions import __file__ as stand_in
from servers.completions import completions_process, save_policy

from papo.engines import serving
from papo.engines.protocols import SampleRequest
from papo.engines.samplers.completions import served_name
from papo.engines.samplers.vllm_server import VllmServerSampler
from papo.engines.serving import Server, Servers, free_port, serve_policy
from papo.errors import CheckpointError, PapoError, ServerDownError, SetupError
from papo.params import ServerParams

pytestmark = pytest.mark.usefixtures("keyless")
COMMAND = f"{sys.executable} {stand_in} serve"
REQUESTS = [SampleRequest(prompt, seed) for prompt in ("3+5=?\n", "9-9=?\n") for seed in range(6)]

# One that leaves the group and its parent and takes no SIGTERM, as its parent does not either; then it serves.
STUBBORN = """\
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = pathlib.Path({pids!r})
away = "import os, time; os.fork() and os._exit(0); os.setsid(); "
away += f"open({{str(pids)!r}}, 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.run([sys.executable, "-c", away])
while not pids.exists() or not pids.read_text():
    time.sleep(0.01)
pids.write_text(pids.read_text() + f" {{os.getpid()}}")
sys.argv = [{stand_in!r}, *sys.argv[1:]]
sys.path.insert(0, {tests!r})
from servers.completions import serve_folder
serve_folder(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies."""
    root = tmp_path_factory.mktemp("tables")
    return [save_policy(root / str(number), number) for number in range(2)]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "GENTLY_S", 0.5)


@pytest.fixture
def stubborn(tmp_path: Path) -> tuple[str, Path]:
    """A command, and the file in which it notes its processes."""
    program, pids = tmp_path / "stubborn.py", tmp_path / "pids"
    program.write_text(STUBBORN.format(pids=str(pids), stand_in=stand_in, tests=str(Path(stand_in).parents[1])))
    return f"{sys.executable} {program}", pids


def params_of(**change: Any) -> ServerParams:
    return ServerParams(**{"command": COMMAND, "start_s": 60.0, "timeout_s": 20.0, "tries": 1} | change)


def sampled(params: ServerParams, policy: Path, urls: list[str]) -> list[list[int]]:
    sampler = VllmServerSampler(
        policy, temperature=1.0, top_p=1.0, max_prompt_tokens=16, max_new_tokens=8, params=params, urls=lambda: urls
    )
    return [sample.completion_ids for sample in sampler.sample(REQUESTS, lambda _: None)]


def left(pids: Path) -> list[int]:
    """Those of the two processes that are there; of a process that ended and was not waited for, too."""
    named = [int(pid) for pid in pids.read_text().split()]
    assert len(named) == 2
    return [pid for pid in named if psutil.pid_exists(pid)]


def test_each_policy_gets_servers_that_serve_it_and_the_old_ones_are_gone(tables: list[Path], tmp_path: Path) -> None:
    params, said = params_of(servers=2, devices=["0,1", "2,3"]), list[str]()
    with Servers(params, tmp_path / "logs", say=said.append) as servers:
        first = servers.serve(tables[0])
        rows = sampled(params, tables[0], first)
        assert servers.serve(tables[0]) == first
        second = servers.serve(tables[1])
        assert len(set(first)) == len(set(second)) == 2
        assert sampled(params, tables[1], second) != rows
        error = failure(SetupError, lambda: sampled(params, tables[0], second))
        names = [served_name(table) for table in tables]
        assert error.what == f"the server was started for another policy: its name is {names[1]}, not {names[0]}"
    assert len(said) == 2
    assert not [url for url in first + second if serving.answers(url)]
    logs = [(tmp_path / f"logs/server-{number}.log").read_text() for number in range(2)]
    for log, device in zip(logs, ("0,1", "2,3"), strict=True):
        assert log.startswith(f"{tables[1].resolve()} ")  # of the last start
        assert log.splitlines()[0].endswith(f" {device}")


def test_a_server_that_died_is_started_again(tables: list[Path], tmp_path: Path) -> None:
    params = params_of()
    with Servers(params, tmp_path) as servers:
        first = servers.serve(tables[0])
        process = servers._started[0]._process
        assert process is not None
        psutil.Process(process.pid).children()[0].kill()
        process.wait(10)
        assert servers.serve(tables[0]) != first
        assert len(sampled(params, tables[0], servers.serve(tables[0]))) == len(REQUESTS)


def test_none_of_its_processes_is_left(tables: list[Path], tmp_path: Path, stubborn: tuple[str, Path]) -> None:
    command, pids = stubborn
    with Servers(params_of(command=command), tmp_path) as servers:
        servers.serve(tables[0])
        assert len(left(pids)) == 2
    assert left(pids) == []


def test_none_of_its_processes_is_left_when_the_run_is_killed(
    tables: list[Path], tmp_path: Path, stubborn: tuple[str, Path]
) -> None:
    command, pids = stubborn
    code = (
        "import os, signal; from pathlib import Path\n"
        "from papo.engines import serving; from papo.params import ServerParams\n"
        "serving.GENTLY_S = 0.5\n"
        f"serving.Servers(ServerParams(command={command!r}), Path({str(tmp_path)!r})).serve(Path({str(tables[0])!r}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    until = time.monotonic() + 30
    while left(pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert left(pids) == []


def test_the_name_says_which_policy_and_not_where_it_lies(tables: list[Path], tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(tables[0], tmp_path / "elsewhere"))
    names = [Server(params_of(), folder, tmp_path / "log").name for folder in (*tables, elsewhere)]
    assert names[2] == names[0] != names[1]
    assert re.fullmatch("policy-[0-9a-f]{12}", names[0])
    command = Server(params_of(), tables[0], tmp_path / "log").command()
    assert command[command.index("--served-model-name") + 1] == names[0]


@pytest.mark.parametrize("given", [{"model": "mine"}, {"options": {"served_model_name": "mine"}}])
def test_a_name_that_is_given_leaves_it_to_the_log_probs(
    tables: list[Path], tmp_path: Path, given: dict[str, Any]
) -> None:
    params = params_of(**given)
    with Servers(params, tmp_path) as servers:
        urls = servers.serve(tables[1])
        assert "another policy" in failure(SetupError, lambda: sampled(params, tables[0], urls)).what
        assert len(sampled(params, tables[1], urls)) == len(REQUESTS)


def test_what_it_is_told(tables: list[Path], tmp_path: Path) -> None:
    params = params_of(
        model="mine", dtype="bfloat16", options={"max-model-len": 64, "enforce_eager": True, "prefix-caching": False}
    )
    program, *rest = Server(params, tables[0], tmp_path / "log", port=8123).command()
    assert [program, *rest[:3]] == [*shlex.split(COMMAND), str(tables[0].resolve())]
    assert rest[3:] == [
        "--served-model-name", "mine", "--host", "127.0.0.1", "--port", "8123", "--dtype", "bfloat16",
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--max-model-len", "64", "--enforce-eager", "--no-prefix-caching",
    ]  # fmt: skip
    older = params_of(command=f"{sys.executable} -m vllm.entrypoints.openai.api_server")
    assert Server(older, tables[0], tmp_path / "log").command()[3:5] == ["--model", str(tables[0].resolve())]


# ---- what cannot be started ----


def test_one_that_ends_as_it_starts_is_told_with_its_last_words(tables: list[Path], tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text("import sys; print('no such option'); sys.exit(3)")
    servers = Servers(params_of(command=f"{sys.executable} {program}"), tmp_path / "logs")
    error = failure(SetupError, lambda: servers.serve(tables[0]))
    assert error.what == "the server ended with 3 as it started:\nno such option"
    assert error.where == str(tmp_path / "logs/server-0.log")


def test_one_that_does_not_answer_in_time_is_told_and_ended(tables: list[Path], tmp_path: Path) -> None:
    program, pid = tmp_path / "slow.py", tmp_path / "pid"
    program.write_text(
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); print('loading', flush=True); time.sleep(600)"
    )
    servers = Servers(params_of(command=f"{sys.executable} {program}", start_s=2.0), tmp_path)
    error = failure(ServerDownError, lambda: servers.serve(tables[0]))
    assert error.what == "the server does not answer within 2 s:\nloading"
    assert not psutil.pid_exists(int(pid.read_text()))


@pytest.mark.parametrize("command", ["no-such-program serve", "/no/such/program"])
def test_there_is_no_program(tables: list[Path], tmp_path: Path, command: str) -> None:
    error = failure(SetupError, lambda: Servers(params_of(command=command), tmp_path).serve(tables[0]))
    assert command.split()[0] in error.what
    assert "pip install vllm" in error.fix


def test_there_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    failure(CheckpointError, lambda: Servers(params_of(), tmp_path).serve(tmp_path / "policy"))


# ---- servers that are there ----


def test_a_server_that_is_there_and_serves_the_old_policy_is_caught(tables: list[Path], tmp_path: Path) -> None:
    with completions_process() as server:
        params = params_of(base_urls=[server.url])
        servers = Servers(params, tmp_path)
        assert len(sampled(params, tables[0], servers.serve(tables[0]))) == len(REQUESTS)
        rows = server.seen.requests.total()
        error = failure(SetupError, lambda: sampled(params, tables[1], servers.serve(tables[1])))
        assert "another policy" in error.what
        assert "reload" in error.fix
        assert server.seen.requests.total() == rows


def reloading(url: str, tmp_path: Path) -> str:
    """A command that has the stand-in serve the folder that it is given."""
    program = tmp_path / "reload.py"
    program.write_text(
        "import json, pathlib, sys, urllib.request\n"
        "number = int((pathlib.Path(sys.argv[1]) / 'table').read_text())\n"
        f"to = urllib.request.Request({url.removesuffix('/v1') + '/plan'!r}, json.dumps({{'policy': number}}).encode(), method='PUT')\n"
        "urllib.request.build_opener(urllib.request.ProxyHandler({})).open(to)\n"
        f"open({str(tmp_path / 'reloads')!r}, 'a').write('x')\n"
    )
    return f"{sys.executable} {program} {{policy}}"


def test_a_reload_hands_the_policy_over_once(tables: list[Path], tmp_path: Path) -> None:
    with completions_process(policy=5) as server:
        params = params_of(base_urls=[server.url], reload=reloading(server.url, tmp_path))
        servers = Servers(params, tmp_path)
        for number in (0, 0, 1, 0):
            assert len(sampled(params, tables[number], servers.serve(tables[number]))) == len(REQUESTS)
    assert (tmp_path / "reloads").read_text() == "xxx"


def test_a_reload_that_fails_is_told_with_its_last_words(tables: list[Path], tmp_path: Path) -> None:
    with completions_process() as server:
        servers = Servers(params_of(base_urls=[server.url], reload="echo cannot load {policy}; exit 4"), tmp_path)
        error = failure(SetupError, lambda: servers.serve(tables[1]))
    assert error.what == f"the reload command ended with 4:\ncannot load {tables[1].resolve()}"


def test_a_reload_that_does_not_end_is_ended(tables: list[Path], tmp_path: Path) -> None:
    with completions_process() as server:
        command = f"echo $$ > {tmp_path}/pid; sleep 600; true"
        servers = Servers(params_of(base_urls=[server.url], reload=command, start_s=1.0), tmp_path)
        error = failure(SetupError, lambda: servers.serve(tables[1]))
    assert "did not end within 1 s" in error.what
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_server_that_is_gone_after_the_reload_is_told(tables: list[Path], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    servers = Servers(params_of(base_urls=[url], reload="true", start_s=1.0), tmp_path)
    error = failure(ServerDownError, lambda: servers.serve(tables[1]))
    assert error.where == url


# ---- papo serve-policy ----


def test_a_policy_is_served_until_ctrl_c(tables: list[Path], tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import sys; from pathlib import Path\n"
        "from papo.engines import serving; from papo.params import ServerParams\n"
        f"serving.serve_policy(ServerParams(command={COMMAND!r}), Path({str(tables[0])!r}), Path({str(tmp_path / 'log')!r}),\n"
        f"         host='127.0.0.1', port={port}, say=lambda text: print(text, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("starting vLLM")
        said = process.stdout.readline()
        name = served_name(tables[0])
        assert said == f'{tables[0]} answers: base_urls: ["http://127.0.0.1:{port}/v1"], model: {name}\n'
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{port}/v1/models"
        ) as got:
            assert f'"{name}"'.encode() in got.read()
        os.kill(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "ending the server\n"
        assert process.wait(30) == 0
    assert not serving.answers(f"http://127.0.0.1:{port}/v1")


def refusal(policy: Path, log: Path, *, host: str = "127.0.0.1", port: int, **params: Any) -> PapoError:
    return failure(
        SetupError, lambda: serve_policy(params_of(**params), policy, log, host=host, port=port, say=lambda _: None)
    )


def test_a_port_that_is_taken_is_told(tables: list[Path], tmp_path: Path) -> None:
    with completions_process() as server:
        port = int(server.url.split(":")[2].split("/")[0])
        assert refusal(tables[0], tmp_path / "log", port=port).what == f"port {port} is taken"


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", "::1"])
def test_a_host_at_which_nothing_can_listen_is_told(
    tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    error = refusal(tables[0], tmp_path / "log", host=host, port=free_port())
    assert error.what.startswith("no server can listen there: ")
    assert "--host" in error.fix


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.1", "myhost"])
def test_without_a_key_no_server_is_open_to_others(
    tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("MINE", " ")
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    error = refusal(tables[0], tmp_path / "log", host=host, port=free_port(), api_key_env="MINE")
    assert "others could reach the server" in error.what
    assert "MINE" in error.fix
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_what_only_this_machine_reaches(host: str) -> None:
    assert serving.is_loopback(host)


def test_with_a_key_a_server_is_open_to_others(
    tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    said = list[str]()

    def say(text: str) -> None:
        said.append(text)
        if "answers" in text:
            raise KeyboardInterrupt

    port = free_port()
    serve_policy(params_of(), tables[0], tmp_path / "log", host="0.0.0.0", port=port, say=say)
    assert f'base_urls: ["http://127.0.0.1:{port}/v1"]' in said[1]
    assert '"--host": "0.0.0.0"' in (tmp_path / "log").read_text()
    assert "a-secret" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("status", [0, 5])
def test_a_server_that_ends_by_itself_is_told(tables: list[Path], tmp_path: Path, status: int) -> None:
    program, signed = tmp_path / "dies.py", tmp_path / "signed"
    program.write_text(
        "import os, pathlib, sys, threading, time\n"
        f"sys.path.insert(0, {str(Path(stand_in).parents[1])!r})\n"
        "from servers.completions import serve_folder\n"
        "def die():\n"
        f"    while not pathlib.Path({str(signed)!r}).exists(): time.sleep(0.05)\n"
        f"    print('the engine died', flush=True); os._exit({status})\n"
        "threading.Thread(target=die, daemon=True).start()\n"
        "serve_folder(*sys.argv[1:])"
    )
    params, port = params_of(command=f"{sys.executable} {program}"), free_port()

    def say(text: str) -> None:
        if "answers" in text:
            signed.touch()

    error = failure(
        ServerDownError,
        lambda: serve_policy(params, tables[0], tmp_path / "log", host="127.0.0.1", port=port, say=say),
    )
    assert error.what.startswith(f"the server ended by itself, with {status}:")
    assert error.what.endswith("the engine died")
