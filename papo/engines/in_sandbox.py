"""What runs inside a sandbox, as its process 1: starts the program in a child, watches it, and reports.

`papo.engines.sandbox` hands the text of this file to a Python in the sandbox, a job (JSON) on its stdin, and reads the report (JSON) from
its stdout; so this needs nothing but the standard library. That process 1 ends is what ends every other process of the sandbox.

The child runs program and tests in one interpreter, as tests have to call what they test. So what says that the tests ended is kept from
it as far as that goes: a random token, made after the fork, waits in a pipe that the child reads only then, and is written to another.
Reading one unnamed descriptor and writing to another is deliberate forgery; no output, exit status or early exit does it by chance.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import json
import linecache
import os
import resource
import selectors
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from signal import SIGXCPU
from typing import Any, NoReturn

_FORBIDDEN = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EAGAIN, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENOSPC),
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    -3,  # EAI_AGAIN: no name server can be reached
}
_LOOK_S = 0.05
_REPORT = 1
_PR_SET_DUMPABLE = 4
_LONGEST_WORD = 64


def main() -> None:
    """Reads the job, runs it, writes the report."""
    if os.getpid() != 1:
        raise SystemExit("this has to be process 1, at whose end every other process of the sandbox ends")
    sys.stdout.write(json.dumps(supervise(json.load(sys.stdin))) + "\n")


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the program of a job in a child; gives verdict, stdout, stderr, seconds."""
    # Not dumpable: the child, which has the same user, can neither trace this process nor open its memory.
    _set_dumpable(False)
    stdin = os.memfd_create("stdin")
    with open(stdin, "w", encoding="utf-8", errors="surrogatepass", closefd=False) as file:
        file.write(job["stdin"])
    os.lseek(stdin, 0, os.SEEK_SET)
    stdout, stderr, token_pipe, word_pipe = (os.pipe() for _ in range(4))
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_program(job, [stdin, stdout[1], stderr[1]], token_pipe[0], word_pipe[1])
    token = os.urandom(16).hex().encode()
    os.write(token_pipe[1], token)
    for unused in (stdin, stdout[1], stderr[1], *token_pipe, word_pipe[1]):
        os.close(unused)
    watch = Watch(child, stdout[0], stderr[0], limits=job["limits"])
    stopped = watch.until_end(started)
    seconds = time.monotonic() - started
    word = _now(word_pipe[0], _LONGEST_WORD)
    verdict = stopped or _verdict(watch.status, watch.cpu_s >= job["limits"]["cpu_s"], word, token)
    texts = {
        name: kept.decode(errors="replace")
        for name, kept in zip(("stdout", "stderr"), watch.kept.values(), strict=True)
    }
    return {"verdict": verdict, **texts, "seconds": seconds}


class Watch:
    """Reads what a child prints, keeps the first of it, and ends with the child or with a limit."""

    def __init__(self, child: int, stdout: int, stderr: int, *, limits: dict[str, Any]) -> None:
        self.kept = {stdout: bytearray(), stderr: bytearray()}
        self.status, self.cpu_s = 0, 0.0
        self._child, self._limits = child, limits

    def until_end(self, started: float) -> str | None:
        """None when the child has ended, or why it has to end: timeout, memory, or killed as nobody waits for the report."""
        deadline, next_look = started + self._limits["wall_s"], started
        with selectors.DefaultSelector() as selector:
            for fd in (*self.kept, os.pidfd_open(self._child), _REPORT):
                selector.register(fd, selectors.EVENT_READ)
            while (now := time.monotonic()) < deadline:
                if now >= next_look:
                    next_look = now + _LOOK_S
                    if _resident_bytes() > self._limits["memory_mb"] * 2**20:
                        return "memory"
                    if self._reap():
                        return None
                for key, _ in selector.select(max(0.0, min(next_look, deadline) - now)):
                    if key.fd == _REPORT:
                        return "killed"  # a pipe to write to says something only when its reader has gone
                    if key.fd not in self.kept:
                        next_look = now  # the child has ended
                    elif not self._read(key.fd):
                        selector.unregister(key.fd)
        return "timeout"

    def _reap(self) -> bool:
        """Waits for what has ended, orphans too; True when the child has. What it left in the pipes is read then."""
        while True:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == self._child:
                self.status, self.cpu_s = status, usage.ru_utime + usage.ru_stime
                for fd in self.kept:
                    self._keep(fd, _now(fd, self._limits["output_bytes"]))
                return True
            if pid == 0:
                return False

    def _read(self, fd: int) -> bool:
        data = os.read(fd, 65536)
        self._keep(fd, data)
        return bool(data)

    def _keep(self, fd: int, data: bytes) -> None:
        self.kept[fd] += data[: max(0, self._limits["output_bytes"] - len(self.kept[fd]))]


def _verdict(status: int, cpu_spent: bool, word: bytes, token: bytes) -> str:
    if os.WIFSIGNALED(status):
        return "timeout" if cpu_spent or os.WTERMSIG(status) == SIGXCPU else "killed"
    if os.WEXITSTATUS(status) == 0:
        return "passed" if word == token else "failed"
    return word.decode() if word in (b"memory", b"blocked") else "failed"


def _now(fd: int, size: int) -> bytes:
    """What can be read at once, up to `size` bytes; a living grandchild may hold the other end open."""
    os.set_blocking(fd, False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
    return data


def _resident_bytes() -> int:
    """Memory that all other processes of the sandbox hold: a limit of the kernel's would be for each alone."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != "1":
            with contextlib.suppress(OSError):  # it has just ended
                lines = map(str.split, (entry / "status").read_text().splitlines())
                total += sum(int(words[1]) for words in lines if words and words[0] in ("RssAnon:", "RssShmem:"))
    return total * 1024


def _set_dumpable(dumpable: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


# ---- what runs in the child ----


def _become_program(job: dict[str, Any], streams: list[int], token_fd: int, word_fd: int) -> NoReturn:
    """Runs program and tests, says how they ended, and leaves; the program may have replaced any function by then."""
    leave, read, write, who, flush = os._exit, os.read, os.write, os.getpid, _flusher()
    word, code, me = b"failed", 1, os.getpid()
    try:
        _prepare(job["limits"], streams, {token_fd, word_fd})
        try:
            _execute(job["code"], job["tests"], job["entry_point"])
            flush()
            if who() == me:  # else the program has forked, and this is not the process that is asked
                word, code = read(token_fd, _LONGEST_WORD), 0
        except BaseException as error:  # whatever a program raises, SystemExit included, is its verdict
            word = _cause(error)
            with contextlib.suppress(BaseException):  # no memory is left, or the error cannot be printed
                traceback.print_exc()
                flush()
        if who() == me:
            write(word_fd, word)
    finally:
        leave(code)


def _prepare(limits: dict[str, Any], streams: list[int], keep: set[int]) -> None:
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in {int(entry.name) for entry in Path("/proc/self/fd").iterdir()} - {0, 1, 2} - keep:
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            os.close(fd)
    _set_dumpable(True)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the machine runs out of memory, this goes first
    megabyte = 2**20
    bounds = {
        resource.RLIMIT_CPU: (limits["cpu_s"], limits["cpu_s"] + 1),
        resource.RLIMIT_AS: limits["memory_mb"] * megabyte,
        resource.RLIMIT_FSIZE: limits["file_mb"] * megabyte,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if limits["processes"] is not None:
        bounds[resource.RLIMIT_NPROC] = limits["processes"]
    for kind, bound in bounds.items():
        resource.setrlimit(kind, bound if isinstance(bound, tuple) else (bound, bound))
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115  # stays open for the program


def _flusher() -> Callable[[], None]:
    streams = (sys.stdout, sys.stderr)

    def flush() -> None:
        for stream in streams:
            with contextlib.suppress(OSError, ValueError):  # closed by the program
                stream.flush()

    return flush


def _execute(code: str, tests: str, entry_point: str | None) -> None:
    """Runs the program as a script; or, with tests, as a module, and the tests after it.

    With an entry point the tests define `check(candidate)`. They then see the program's names, but for those that hide a builtin.
    """
    untrace, unprofile, originals = sys.settrace, sys.setprofile, dict(vars(builtins))
    module = types.ModuleType("program" if tests else "__main__")
    sys.modules[module.__name__] = module
    exec(_compiled(code, "<program>"), vars(module))
    if not tests:
        return
    untrace(None)
    unprofile(None)
    vars(builtins).update(originals)
    names = dict(vars(module))
    if entry_point is not None:
        names = {key: value for key, value in names.items() if key.startswith("__") or key not in originals}
    exec(_compiled(tests, "<tests>"), names)
    if entry_point is not None:
        names["check"](vars(module)[entry_point])


def _compiled(text: str, name: str) -> types.CodeType:
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # tracebacks then show the lines
    return compile(text, name, "exec", dont_inherit=True)


def _cause(error: BaseException | None) -> bytes:
    """Whether an error that reached the top came from a limit of the sandbox, as far as it tells."""
    while error is not None:
        if isinstance(error, MemoryError):
            return b"memory"
        if isinstance(error, OSError) and (error.errno in _FORBIDDEN or _outside(error)):
            return b"blocked"
        error = error.__context__
    return b"failed"


def _outside(error: OSError) -> bool:
    """A file is not there because the sandbox does not show it: it was sought outside the work folder."""
    path = str(error.filename)
    return error.errno == errno.ENOENT and path.startswith("/") and not path.startswith(("/tmp/", "/dev/shm/"))


if __name__ == "__main__":
    main()
