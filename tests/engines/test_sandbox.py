"""The sandbox: verdicts, limits, and hostile programs, after which nothing is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from sandboxes import sandboxed

from papo.engines.sandbox import MAX_OUTPUT_BYTES, VERDICTS, Program, Ran, Sandbox, container_command
from papo.errors import SetupError, StageError
from papo.params import SandboxParams

ROOT = Path(__file__).parents[2]
PARAMS = SandboxParams(wall_s=2.0, cpu_s=5, memory_mb=256, processes=16, file_mb=4)
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n"
RIGHT = "def double(x):\n    return 2 * x\n"


def ran(code: str, tests: str = "", *, entry_point: str | None = None, stdin: str = "", **limits: float) -> Ran:
    params = SandboxParams.model_validate(PARAMS.model_dump() | limits)
    return Sandbox(params).run(code, tests=tests, entry_point=entry_point, stdin=stdin)


# ---- verdicts ----


@sandboxed
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (RIGHT, "passed"),
        ("def double(x):\n    return x\n", "failed"),
        ("def other(x):\n    return 2 * x\n", "failed"),
        ("double = lambda x: 1 / 0", "failed"),
        ("def double(x): return (", "failed"),
        ("nul = '\0'\n" + RIGHT, "failed"),
        ("lone = '\ud800'\n" + RIGHT, "failed"),
        ("raise SystemExit(0)", "failed"),
        ("double = lambda x: exec('raise SystemExit(0)')", "failed"),
        ("import os\ndouble = lambda x: os._exit(0)", "failed"),
        (RIGHT + "if __name__ == '__main__':\n    input()\n", "passed"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\ndef double(x): return 2 * A(x).x",
            "passed",
        ),
        (RIGHT + "import os\nos.fork()\n", "passed"),
        ("import os\nos.fork()\n", "failed"),
        (RIGHT + "import sys\nsys.stdout.close()\nsys.stderr.close()\n", "passed"),
        (RIGHT + "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n", "passed"),
        ("def double(x): return [x] * 10**10", "memory"),
        ("def double(x):\n    while True: pass", "timeout"),
        ("import os\ndef double(x): os.kill(os.getpid(), 9)", "killed"),
        ("def double(x): open('/usr/x', 'w')", "blocked"),
        ("def double(x): open('x', 'w').write('fine'); return int(open('/tmp/x').read() == 'fine') * 4", "passed"),
        ("def double(x): open('/tmp/missing')", "failed"),
        ("def double(x): open('/etc/hosts')", "blocked"),
    ],
)
def test_a_program_with_tests(code: str, verdict: str) -> None:
    assert ran(code, CHECK, entry_point="double").verdict == verdict


@sandboxed
def test_tests_without_an_entry_point_are_statements_after_the_program() -> None:
    assert ran(RIGHT, "assert double(2) == 4").verdict == "passed"
    assert ran(RIGHT, "assert double(2) == 5").verdict == "failed"
    assert ran("def abs(x): return 7", "assert abs(-1) == 7").verdict == "passed"


@sandboxed
@pytest.mark.parametrize(
    "trick",
    [
        "abs = lambda x: 0",
        "import builtins\nbuiltins.abs = lambda x: 0",
        "check = lambda candidate: None",
        "import builtins\nbuiltins.AssertionError = ZeroDivisionError",
        "import sys\nsys.settrace(lambda *args: None)",
        "import sys\nsys.excepthook = lambda *args: None",
        "import atexit, os\natexit.register(os._exit, 0)",
        "import sys\nsys.stdout.write('passed'); sys.stderr.write('{\"verdict\": \"passed\"}')",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass",
    ],
)
def test_tricks_do_not_pass(trick: str) -> None:
    tests = "def check(candidate):\n    assert abs(candidate(2) - 4) < 1e-6\n"
    assert ran(trick + "\ndef double(x): return 5\n", tests, entry_point="double").verdict == "failed"


@sandboxed
def test_a_script_reads_its_input_and_what_it_prints_is_kept() -> None:
    found = ran("import sys\nprint(input()[::-1])\nprint(__name__, file=sys.stderr)", stdin="Grüße\n")
    assert (found.verdict, found.stdout, found.stderr) == ("passed", "eßürG\n", "__main__\n")
    assert 0.0 < found.seconds < PARAMS.wall_s


@sandboxed
def test_a_traceback_shows_the_lines() -> None:
    found = ran(RIGHT, "assert double(2) == 5")
    assert 'File "<tests>", line 1' in found.stderr
    assert "assert double(2) == 5" in found.stderr


@sandboxed
def test_equal_programs_see_an_equal_order_of_sets() -> None:
    assert len({ran("print({'a', 'b', 'c', 'd', 'e'}, hash('x'))").stdout for _ in range(3)}) == 1


@sandboxed
def test_many_programs_in_order_and_in_parallel() -> None:
    programs = [Program(f"import time; time.sleep(0.3); print({number})") for number in range(6)]
    start = time.monotonic()
    found = list(Sandbox(PARAMS).run_many(programs, 3))
    assert [each.stdout if each else None for each in found] == [f"{number}\n" for number in range(6)]
    assert sum(each.seconds for each in found if each) > time.monotonic() - start  # one after another it would be less
    assert list(Sandbox(PARAMS).run_many([], 3)) == []


@sandboxed
def test_closing_early_runs_no_more_programs() -> None:
    running = Sandbox(PARAMS).run_many([Program("import time; time.sleep(0.5)")] * 50, 1)
    assert next(running)
    start = time.monotonic()
    running.close()
    assert time.monotonic() - start < 3.0


# ---- limits ----


@sandboxed
def test_output_beyond_the_limit_is_dropped() -> None:
    found = ran("import sys\nsys.stdout.write('a' * 5_000_000)\nsys.stderr.write('b' * 5_000_000)")
    assert found.verdict == "passed"
    assert found.stdout == "a" * MAX_OUTPUT_BYTES
    assert found.stderr == "b" * MAX_OUTPUT_BYTES


@sandboxed
def test_cpu_time_is_limited_even_where_the_signal_is_ignored() -> None:
    spin = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    for code in ("while True: pass", spin):
        start = time.monotonic()
        assert ran(code, wall_s=20.0, cpu_s=1).verdict == "timeout"
        assert time.monotonic() - start < 12.0


@sandboxed
def test_memory_is_limited_in_sum() -> None:
    fork = "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        held = b'x' * (100 * 2**20)\n        break\ntime.sleep(60)"
    assert ran(fork).verdict == "memory"
    shared = fork.replace(
        "held = b'x' * (100 * 2**20)", "held = mmap.mmap(-1, 100 * 2**20); held[:] = b'x' * len(held)"
    )
    assert ran("import mmap\n" + shared).verdict == "memory"


@sandboxed
def test_processes_are_limited_and_each_sandbox_has_its_own() -> None:
    count = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except BlockingIOError:
    pass
time.sleep(0.5)
print(made)
"""
    found = list(Sandbox(PARAMS).run_many([Program(count)] * 3, 3))
    numbers = [int(each.stdout) for each in found if each is not None]
    assert len(numbers) == 3
    assert all(PARAMS.processes - 4 <= number < PARAMS.processes for number in numbers)


# ---- hostile programs ----

CONNECT = "import socket\nsocket.create_connection(('{host}', {port}), timeout=1)"
CATCH_ALL = "try:\n    {}\nexcept BaseException as error:\n    print(type(error).__name__)\n    raise SystemExit(3)"

HOSTILE: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", {"blocked"}),
    "fork bomb that bears refusals": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"timeout"}),
    "endless loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time\ntime.sleep(3600)", {"timeout"}),
    "memory bomb": ("held = []\nwhile True: held.append(bytearray(10**7))", {"memory"}),
    "one large number": ("x = 9 ** 9 ** 9", {"timeout", "memory"}),
    "disk filler, one file": ("with open('/tmp/x', 'wb') as file:\n    while True: file.write(b'0' * 10**6)", {"blocked"}),
    "disk filler, many files": (
        "for n in range(10**6):\n    with open(f'/tmp/{n}', 'wb') as file: file.write(b'0' * 10**6)",
        {"blocked"},
    ),
    "disk filler, shared memory": (
        "for n in range(10**6):\n    with open(f'/dev/shm/{n}', 'wb') as file: file.write(b'0' * 10**6)",
        {"blocked"},
    ),
    "print 1 GB": ("import os\nfor _ in range(1000): os.write(1, b'0' * 2**20)", {"passed", "timeout"}),
    "connect by address": (CONNECT.format(host="1.1.1.1", port=53), {"blocked"}),
    "connect by name": ("import urllib.request\nurllib.request.urlopen('http://example.org', timeout=1)", {"blocked"}),
    "read a home": ("import os\nos.listdir('/root/.ssh')", {"blocked"}),
    "read the home folders": ("import os\nos.listdir('/home')", {"blocked"}),
    "read passwords": ("open('/etc/shadow').read()", {"blocked"}),
    "write to the system": ("open('/usr/lib/x', 'w')", {"blocked"}),
    "write at the root": ("open('/x', 'w')", {"blocked"}),
    "write beside devices": ("open('/dev/x', 'w')", {"blocked"}),
    "kill process 1": ("import os, signal\nos.kill(1, signal.SIGKILL)\nos.kill(1, signal.SIGSTOP)\nassert False", {"failed"}),
    "kill all": ("import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGTERM)\nassert False", {"failed"}),
    "kill by number": (
        "import os\nfor pid in range(3, 5000):\n    try: os.kill(pid, 9)\n    except ProcessLookupError: pass\nassert False",
        {"failed", "blocked"},
    ),
    "ignore SIGTERM": (
        "import signal, time\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(3600)",
        {"timeout"},
    ),
    "os._exit(0)": ("import os\nos._exit(0)", {"failed"}),
    "sys.exit(0)": ("import sys\nsys.exit(0)", {"failed"}),
    "deep recursion": ("def f(): f()\nf()", {"failed"}),
    "deep recursion without a limit": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", {"memory", "killed", "timeout"}),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", {"killed"}),
    "abort": ("import os\nos.abort()", {"killed"}),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(3600)\n    os._exit(0)\nassert False",
        {"failed"},
    ),
    "daemon of a program that passes": (
        "import subprocess\nsubprocess.Popen(['/bin/sleep', '3600'], start_new_session=True)",
        {"passed"},
    ),
    "new namespaces": ("import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.unshare(0x10000000) == 0", {"failed"}),
    "mount": ("import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0", {"failed"}),
    "become root": ("import os\nos.setuid(0)", {"failed", "blocked"}),
    "trace process 1": ("import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0", {"failed"}),
    "memory of process 1": ("open('/proc/1/mem', 'rb')", {"blocked"}),
    "files of process 1": ("import os\nprint(os.listdir('/proc/1/fd'))", {"blocked"}),
    "kernel settings": ("open('/proc/sys/kernel/hostname', 'w').write('x')", {"blocked"}),
    "dead locked pipe": ("import os\nos.read(os.pipe()[0], 1)", {"timeout"}),
}  # fmt: skip


def _processes() -> set[int]:
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_nobody(entry)}


def _is_nobody(entry: Path) -> bool:
    """Whether a process that lives has the user of the sandbox or is a bubblewrap."""
    try:
        status = (entry / "status").read_text()
    except OSError:
        return False
    return ("Name:\tbwrap" in status or "Uid:\t65534" in status) and "State:\tZ" not in status


def _temporary() -> set[str]:
    return {entry.name for entry in Path("/tmp").iterdir()}


@sandboxed
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name: str) -> None:
    code, verdicts = HOSTILE[name]
    before = _processes(), _temporary()
    start = time.monotonic()
    found = ran(code)
    assert time.monotonic() - start < PARAMS.wall_s + 2.0
    assert found.verdict in verdicts, found
    assert found.verdict in VERDICTS
    assert len(found.stdout) + len(found.stderr) <= 2 * MAX_OUTPUT_BYTES
    _assert_nothing_new(*before)


def _assert_nothing_new(processes: set[int], files: set[str]) -> None:
    limit = time.monotonic() + 5.0  # processes of other sandboxes, of tests beside this one, may come and go
    while (left := _processes() - processes) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not left
    assert not [name for name in _temporary() - files if name.isdigit() or name == "x"]
    assert not any(Path(path).exists() for path in ("/usr/lib/x", "/x", "/dev/x"))


@sandboxed
def test_a_listener_inside_cannot_be_reached_from_outside() -> None:
    code = "import socket\nserver = socket.create_server(('0.0.0.0', 39471))\nprint('listening', flush=True)\nserver.accept()"
    found: list[Ran] = []
    thread = threading.Thread(target=lambda: found.append(ran(code)))
    thread.start()
    time.sleep(1.0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 39471), timeout=1).close()
    thread.join()
    assert (found[0].verdict, found[0].stdout) == ("timeout", "listening\n")


@sandboxed
def test_a_listener_outside_cannot_be_reached_from_inside() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = CATCH_ALL.format(CONNECT.format(host="127.0.0.1", port=server.getsockname()[1]).replace("\n", "\n    "))
        assert ran(code).stdout == "ConnectionRefusedError\n"


@sandboxed
def test_no_secret_is_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPO_SECRET", "hunter2hunter2")
    code = """
import os
print(os.environ)
for pid in filter(str.isdigit, os.listdir('/proc')):
    for name in ('environ', 'cmdline', 'maps'):
        try:
            print(open(f'/proc/{pid}/{name}', errors='replace').read())
        except OSError:
            pass
print('pids', sorted(filter(str.isdigit, os.listdir('/proc')), key=int))
print('root', sorted(os.listdir('/')), os.listdir('/tmp'), os.listdir('/etc'), os.uname().nodename, os.getuid())
"""
    found = ran(code)
    assert found.verdict == "passed"
    assert "hunter2" not in found.stdout
    assert "pids ['1', '2']" in found.stdout
    assert " [] ['ld.so.cache'] sandbox 65534" in found.stdout
    assert "'home'" not in found.stdout
    assert str(ROOT) not in found.stdout


@sandboxed
def test_what_one_program_writes_the_next_does_not_find() -> None:
    assert ran("open('/tmp/x', 'w').write('x'); open('/dev/shm/x', 'w').write('x')").verdict == "passed"
    assert ran("import os\nassert os.listdir('/tmp') == os.listdir('/dev/shm') == []").verdict == "passed"


@sandboxed
def test_a_program_does_not_outlive_this_process(tmp_path: Path) -> None:
    before = _processes()
    code = "from papo.engines.sandbox import Sandbox\nprint('up', flush=True)\nSandbox().run('import time; time.sleep(3600)')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(1.0)
        assert _processes() - before
        process.kill()
    _assert_nothing_new(before, _temporary())


# ---- bad setups ----


def test_without_bubblewrap_programs_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="bwrap is not installed") as caught:
        Sandbox().check()
    assert "apt install bubblewrap" in caught.value.fix
    assert "score_orm.sandbox.runtime" in caught.value.fix


def _tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_where_namespaces_are_forbidden_programs_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("bwrap", "setpriv"):
        _tool(tmp_path, name, "echo 'No permissions to create a new namespace' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SetupError, match="No permissions to create a new namespace") as caught:
        Sandbox().check()
    assert "user namespaces" in caught.value.fix
    with pytest.raises(StageError, match="ended with status 1"):
        Sandbox().run("")
    assert list(Sandbox().run_many([Program(""), Program("")], 2)) == [None, None]


@sandboxed
def test_limits_too_low_for_python_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = '{"verdict": "memory", "stdout": "", "stderr": "no memory", "seconds": 0.0}'
    for name in ("bwrap", "setpriv"):
        _tool(tmp_path, name, f"cat > /dev/null; echo '{report}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SetupError, match="gives `memory` in the sandbox: no memory"):
        Sandbox().check()


def test_a_named_container_runtime_has_to_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="podman is not installed"):
        Sandbox(SandboxParams(runtime="podman", image="python:3.11")).check()


def test_a_container_is_closed_and_ends_with_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    _tool(tmp_path, "podman", f'echo "$1 $3 $4" >> {calls}; [ "$1" = rm ] || exec sleep 60')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    params = SandboxParams(runtime="podman", image="python:3.11", wall_s=0.2)
    assert Sandbox(params).run("").verdict == "timeout"
    run, remove = (line.split() for line in calls.read_text().splitlines())
    assert (run[0], remove[0]) == ("run", "rm")
    assert run[2] == f"--name={remove[1]}"
    command = container_command(params, "name")
    assert {"--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"} < set(command)
    assert {"--user=65534:65534", "--pids-limit=33", "python:3.11", "--entrypoint=python3"} < set(command)


@pytest.mark.parametrize(
    "values",
    [{"runtime": "docker"}, {"image": "python"}, {"wall_s": 0}, {"processes": 1}, {"memory_mb": 1}, {"cpu": 3}],
)
def test_bad_params(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SandboxParams.model_validate(values)
