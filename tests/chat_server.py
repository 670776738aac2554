"""A chat endpoint on a free port of this machine, a real server that answers as a test says and can misbehave."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A request: its headers, its JSON, and the texts of the user's message by the words of their fence."""

    path: str
    key: str
    body: dict[str, Any]

    @property
    def task(self) -> str:
        text: str = self.body["messages"][0]["content"]
        return text

    @property
    def user(self) -> str:
        text: str = self.body["messages"][1]["content"]
        return text

    @property
    def mark(self) -> str:
        found = re.match(r"\[problem ([0-9a-f]{16})\]\n", self.user)
        assert found, self.user
        return found[1]

    def between(self, name: str) -> str:
        """What stands between the lines of `name` that bear the mark; they must be there once."""
        found = re.findall(rf"^\[{name} {self.mark}\]\n(.*?)\n\[end of {name} {self.mark}\]$", self.user, re.S | re.M)
        assert len(found) == 1, self.user
        text: str = found[0]
        return text

    @property
    def answer(self) -> str:
        return self.between("given answer")

    @property
    def outside(self) -> str:
        """The user's message without the fenced texts and the mark."""
        mark = self.mark
        return re.sub(rf"^\[([a-z ]+) {mark}\]\n.*?\n\[end of \1 {mark}\]$", r"[\1]", self.user, flags=re.S | re.M)


class Raw(NamedTuple):
    """A response as it goes over the wire; no `body`: none is sent until the server closes."""

    body: bytes | None
    status: int = 200
    kind: str = "application/json"
    headers: Mapping[str, str] = MappingProxyType({})


HANG = Raw(None)
AGAIN_AT_ONCE = {"retry-after-ms": "1"}
"""The client waits no longer than this before it tries again."""


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> Raw:
    """A chat completion with one choice."""
    message |= {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return Raw(
        json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}).encode()
    )


Reply = Callable[[Asked], Raw | str]


class ChatServer:
    """What it was asked, how many requests it held at most at a time, and where to it was asked to be a proxy, which it refuses."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[Asked] = []
        self.tunnels: list[str] = []
        self.most = 0
        self.closing = threading.Event()
        self._reply, self._now, self._lock = reply, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server._answer(self, Asked(self.path, self.headers["authorization"], body))

            def do_CONNECT(self) -> None:
                server.tunnels.append(self.path)
                self.send_error(403)

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # closing waits for them, so that no socket outlives a test
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)
            self._now += 1
            self.most = max(self.most, self._now)
        reply = self._reply(asked)
        raw = completion(reply) if isinstance(reply, str) else reply
        if raw.body is None:
            self.closing.wait(60)
        with self._lock:
            self._now -= 1
        if raw.body is None:
            return
        handler.send_response(raw.status)
        for name, value in {"content-type": raw.kind, "content-length": str(len(raw.body)), **raw.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw.body)


@contextmanager
def chat_server(reply: Reply) -> Iterator[ChatServer]:
    """A server that runs until the end of the `with`."""
    server = ChatServer(reply)
    thread = threading.Thread(target=server._server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server._server.shutdown()
        thread.join()
        server._server.server_close()
