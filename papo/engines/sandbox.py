"""Runs programs that nobody has read: bubblewrap, or a container where one is named, around `papo.engines.in_sandbox`.

No network, no home, no environment, a read-only root with Python and the system's libraries, a small /tmp in memory, user nobody without
privileges, namespaces of its own. Nothing is left behind: the processes end with process 1 of the sandbox, the files with its mounts.

    wall_s       of the whole run; then everything is killed, whatever it does with SIGTERM
    cpu_s        of each process
    memory_mb    address space of each process; also what all hold together, each page once a process, looked at every 50 ms
    processes    and threads, together
    file_mb      of a file, and of all files in /tmp together
    output       1 MB each of stdout and stderr is kept; the rest is read and dropped

Verdicts, of the program itself (what becomes of its own children shows only if it minds):

    passed       ran to its end, and so did its tests
    failed       an exception, a failed assertion, or an exit before the end, whatever its status
    timeout      wall or CPU time
    memory       a MemoryError, or more resident memory than allowed
    killed       by a signal
    blocked      an error that reached the top says that the sandbox forbids it: network, foreign files, sizes, processes
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from papo.errors import SetupError, StageError
from papo.params import SandboxParams

VERDICTS = ("passed", "failed", "timeout", "memory", "killed", "blocked")
MAX_OUTPUT_BYTES = 1_000_000
OPEN_FILES = 64

_NOBODY = "65534"
_GRACE_S = 1.5  # the sandbox keeps its own time; after this much more it is ended from outside
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_PYTHON = ("-s", "-S", "-B", "-c", Path(__file__).with_name("in_sandbox.py").read_text(encoding="utf-8"))
_FIX = "run `apt install bubblewrap` (0.8 or later), or name a container: score_orm.sandbox.runtime and .image"


class Program(NamedTuple):
    """A program and the tests that run after it in the same interpreter.

    `entry_point`: the function that the tests, which then define `check(candidate)`, are called with; without it they are plain statements.
    Without tests, the program is a script and has passed when it ends without an error.
    """

    code: str
    tests: str = ""
    entry_point: str | None = None
    stdin: str = ""


@dataclass(frozen=True)
class Ran:
    """What became of a program: one of VERDICTS, what it printed, and the wall time that it took."""

    verdict: str
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """Runs programs, each in a sandbox of its own; see the limits and verdicts of this module.

    Args:
        params: limits, and the container runtime with an image that has `python3`, if bubblewrap is not to be used.
    """

    def __init__(self, params: SandboxParams | None = None) -> None:
        self.params = params or SandboxParams()

    def check(self) -> None:
        """Runs a program that does nothing.

        Raises:
            SetupError: this machine cannot make the sandbox; programs are not run without one.
        """
        without_runtime = ["bwrap", "setpriv"] if os.geteuid() == 0 else ["bwrap"]
        for name in [self.params.runtime] if self.params.runtime else without_runtime:
            if shutil.which(name) is None:
                raise SetupError(f"{name} is not installed, and programs run only in a sandbox", where="PATH", fix=_FIX)
        try:
            ran = self.run("")
        except StageError as error:
            raise SetupError(
                f"programs run only in a sandbox, and none can be made here: {error.what}",
                where=error.where,
                fix=f"allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns); or {_FIX}",
            ) from error
        if ran.verdict != "passed":
            raise SetupError(
                f"a program that does nothing gives `{ran.verdict}` in the sandbox: {ran.stderr.strip()[-500:]}",
                where="score_orm.sandbox",
                fix="raise the limits",
            )

    def run(self, program: str, *, tests: str = "", entry_point: str | None = None, stdin: str = "") -> Ran:
        """What becomes of `Program(program, tests, entry_point, stdin)`.

        Raises:
            StageError: the sandbox itself failed; nothing is known about the program.
        """
        name = f"papo-{uuid.uuid4().hex}"
        job = Program(program, tests, entry_point, stdin)._asdict() | {"limits": self._limits()}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command(name), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(json.dumps(job).encode(), timeout=self.params.wall_s + _GRACE_S)
            except subprocess.TimeoutExpired:
                return Ran("timeout", "", "", self.params.wall_s)
            finally:
                self._end(process, name)
        return _report(process.returncode, out, err)

    def run_many(self, programs: Sequence[Program], workers: int) -> Generator[Ran | None, None, None]:
        """What becomes of each program, in order, `workers` at a time; None where the sandbox itself failed."""
        with ThreadPoolExecutor(workers) as pool:
            futures: list[Future[Ran | None]] = [pool.submit(self._run, program) for program in programs]
            try:
                for future in futures:
                    yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def versions(self) -> dict[str, str]:
        """The tool that makes the sandbox, and the Python that runs programs where it is this one."""
        tool = self.params.runtime or "bwrap"
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.split()
        if self.params.runtime:
            return {
                tool: next((word.rstrip(",") for word in said if word[:1].isdigit()), ""),
                "image": str(self.params.image),
            }
        return {"bubblewrap": said[-1], "python": sys.version.split()[0]}

    def _run(self, program: Program) -> Ran | None:
        """The boundary: a sandbox that fails costs one program its verdict."""
        try:
            return self.run(program.code, tests=program.tests, entry_point=program.entry_point, stdin=program.stdin)
        except (StageError, OSError):
            return None

    def _limits(self) -> dict[str, Any]:
        limits = self.params.model_dump(include={"wall_s", "cpu_s", "memory_mb", "file_mb"})
        # Among containers, RLIMIT_NPROC would count all processes of the user; they have a limit of their own.
        processes = None if self.params.runtime else self.params.processes
        return limits | {"processes": processes, "open_files": OPEN_FILES, "output_bytes": MAX_OUTPUT_BYTES}

    def _command(self, name: str) -> list[str]:
        if self.params.runtime:
            return container_command(self.params, name)
        python = str(Path(sys.executable).resolve())
        return [*_as_nobody(), *_wrapped(self.params.file_mb), python, *_PYTHON]

    def _end(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Ends what still runs: bubblewrap's children die with it, a container has to be told."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            if self.params.runtime:
                subprocess.run([self.params.runtime, "rm", "--force", name], capture_output=True, check=False)


def _report(code: int, out: bytes, err: bytes) -> Ran:
    if out.endswith(b"}\n"):
        return Ran(**json.loads(out))
    if code == 128 + 9:  # process 1 killed from outside: the machine ran out of memory
        return Ran("killed", "", "", 0.0)
    raise StageError(
        f"the sandbox ended with status {code}: {err.decode(errors='replace').strip()[-500:]}",
        where="score_orm.sandbox",
        fix="run the program again; if it is always so, check this machine's memory and process limits (ulimit -a)",
    )


def _view() -> list[str]:
    """What a program sees of this machine, all of it read-only: the system's libraries and this Python."""
    args = ["--ro-bind", "/usr", "/usr", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            args += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            args += ["--ro-bind", str(path), str(path)]
    prefix = Path(sys.base_prefix).resolve()
    if prefix.is_relative_to("/usr"):
        return args
    above = [word for folder in reversed(prefix.parents[:-1]) for word in ("--dir", str(folder))]
    return [*args, *above, "--ro-bind", str(prefix), str(prefix)]


def _as_nobody() -> list[str]:
    """For root, what comes before the sandbox; for others, nothing.

    The kernel does not hold root to a limit on processes, not even within a user namespace. So root becomes nobody first, in a view in
    which nobody can read this Python, wherever it lies.
    """
    if os.geteuid() != 0:
        return []
    user = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--inh-caps=-all"]
    mounts = [*_view(), "--bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev", "--dir", "/tmp"]
    return ["bwrap", "--die-with-parent", *mounts, *user]


def _wrapped(file_mb: int) -> list[str]:
    size = str(file_mb * 2**20)
    namespaces = ["--unshare-all", "--unshare-user", "--disable-userns", "--hostname", "sandbox"]
    user = ["--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL", "--new-session", "--die-with-parent", "--as-pid-1"]
    own = ["--proc", "/proc", "--dev", "/dev"]
    small = [word for path in ("/dev/shm", "/tmp") for word in ("--size", size, "--tmpfs", path)]
    sealed = ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    environment = [word for name, value in _ENVIRONMENT.items() for word in ("--setenv", name, value)]
    return ["bwrap", *namespaces, *user, *_view(), *own, *small, *sealed, "--clearenv", *environment]


def container_command(params: SandboxParams, name: str) -> list[str]:
    """The same sandbox by podman or docker; the image brings the Python."""
    size = f"{params.file_mb}m"
    # fmt: off
    limits = [
        "--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--ipc=private",
        f"--user={_NOBODY}:{_NOBODY}",
        f"--pids-limit={params.processes + 1}", f"--memory={2 * params.memory_mb}m", f"--memory-swap={2 * params.memory_mb}m",
        f"--shm-size={size}", f"--tmpfs=/tmp:size={size},mode=1777", "--workdir=/tmp", "--hostname=sandbox",
    ]
    # fmt: on
    environment = [f"--env={key}={value}" for key, value in _ENVIRONMENT.items() if key != "PATH"]
    start = [str(params.runtime), "run", "--rm", "--interactive", f"--name={name}", "--pull=never"]
    return [*start, *limits, *environment, "--entrypoint=python3", str(params.image), *_PYTHON]
