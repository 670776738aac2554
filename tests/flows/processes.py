"""Services of a test, in sessions of their own, and waiting for what they do."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started(
    command: list[str], *, cwd: Path, environment: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A service; whatever it started ends with it."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            _, left = psutil.wait_procs(family, timeout=30)
            for member in left:
                member.kill()
        process.wait(timeout=30)


def until(read: Callable[[], Any], *, seconds: float, what: str, seen: Callable[[], str] = str) -> Any:
    """The first answer that is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := read():
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds:.0f} s\n{seen()}")


@contextmanager
def webhook() -> Iterator[tuple[str, list[str]]]:
    """An address, and the messages that were posted to it."""
    messages: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", messages
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
