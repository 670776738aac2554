"""A chat endpoint as a process of its own, which answers at a given latency, misbehaves by plan and counts what it would bill.

    python tests/servers/chat.py '{"latency_s": 0.2}'    # prints its URL; ends when its standard input does

It takes some 0.4 ms of a core for a call and has no limit of width, so that it is no bottleneck of what is measured with it. A test has it
as `with chat_process(fault="503", when="first") as server`. A request that gets anything but an HTTP error is billed: also one that hangs
or is cut off, as the model has worked for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

LEVELS = ("1", "0.5", "0")
HTTP_FAULTS = ("429", "429-seconds", "429-date", "500", "503", "too-long", "filtered", "no-schema", "401")
LOST_FAULTS = ("hang", "drip", "cut", "reset")
BODY_FAULTS = ("empty", "html", "invalid-json")
TEXT_FAULTS = ("two-verdicts", "outside", "refusal")
USAGE_FAULTS = {
    "usage-missing": {},
    "usage-null": {"usage": None},
    "usage-negative": {"usage": {"prompt_tokens": -5, "completion_tokens": -1}},
    "usage-string": {"usage": {"prompt_tokens": "many", "completion_tokens": "17"}},
    "usage-huge": {"usage": {"prompt_tokens": 10**30, "completion_tokens": 1e18}},
    "usage-odd": {"usage": [1, 2]},
}
FAULTS = (*HTTP_FAULTS, *LOST_FAULTS, *BODY_FAULTS, *TEXT_FAULTS, *USAGE_FAULTS)


@dataclass(frozen=True)
class Plan:
    """What the server does. `when`: the `first` request of each content, `all`, or that `share` of requests which their content draws."""

    fault: str = "none"
    when: str = "all"
    share: float = 0.1
    latency_s: float = 0.0
    retry_after_s: float = 1.0
    drip_s: float = 0.05
    reply: str = "servers.chat:verdict"  # module:function of the request's JSON, which gives the text of the answer

    def __post_init__(self) -> None:
        assert self.fault in ("none", *FAULTS), self.fault
        assert self.when in ("first", "all", "share"), self.when


@dataclass
class Seen:
    """Requests and billed requests by content, the most requests held at a time, and open connections."""

    requests: Counter[str] = field(default_factory=Counter)
    billed: Counter[str] = field(default_factory=Counter)
    most: int = 0
    connections: int = 0


def verdict(body: dict[str, Any]) -> str:
    """A level that the content decides, in the form of a rubric's answer."""
    level = LEVELS[int(content_of(body), 16) % len(LEVELS)]
    return json.dumps({"reason": "because", "verdict": level})


def content_of(body: dict[str, Any]) -> str:
    """What makes two requests the same: model, seed and texts, the mark of the call apart."""
    texts = [str(message.get("content")) for message in body.get("messages", [])]
    key = json.dumps([body.get("model"), body.get("seed"), [re.sub(r"\b[0-9a-f]{16,}\b", "*", text) for text in texts]])
    return hashlib.sha256(key.encode()).hexdigest()


# ---- the process ----


class State:
    """What all connections share."""

    def __init__(self, plan: Plan) -> None:
        self.set_plan(plan)
        self.clear()

    def set_plan(self, plan: Plan) -> None:
        module, _, name = plan.reply.partition(":")
        self.plan = plan
        here = plan.reply == Plan.reply
        self.reply: Callable[[dict[str, Any]], str] = verdict if here else getattr(import_module(module), name)

    def clear(self) -> None:
        self.seen, self.asked, self.now = Seen(connections=getattr(self, "seen", Seen()).connections), [], 0

    def fault(self, body: dict[str, Any], content: str) -> str:
        plan, number = self.plan, self.seen.requests[content]
        if plan.fault == "no-schema" and "response_format" not in body:
            return "none"
        if plan.when == "first":
            return plan.fault if number == 1 else "none"
        if plan.when == "share":
            draw = hashlib.sha256(f"{content} {number}".encode()).digest()
            return plan.fault if int.from_bytes(draw[:4], "big") < plan.share * 2**32 else "none"
        return plan.fault


class Connection(asyncio.Protocol):
    """One client connection, kept alive; no pipelining."""

    def __init__(self, state: State) -> None:
        self.state, self.buffer, self.timers = state, b"", list[asyncio.TimerHandle]()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.held = 0
        self.state.seen.connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.state.seen.connections -= 1
        self.state.now -= self.held
        self.held = 0
        for timer in self.timers:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        found = re.search(rb"(?i)^content-length: *(\d+)", head, re.M)
        length = int(found[1]) if found else 0
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        method, path = head.decode("latin-1").split(" ", 2)[:2]
        headers = dict(re.findall(r"(?m)^([^:\r\n]+): *(.*?)\r?$", head.decode("latin-1").partition("\n")[2]))
        if method == "POST" and path.endswith("/chat/completions"):
            self.chat(json.loads(body), path, {name.lower(): value for name, value in headers.items()})
        else:
            self.control(method, path, body)

    def control(self, method: str, path: str, body: bytes) -> None:
        state = self.state
        if (method, path) == ("PUT", "/plan"):
            state.set_plan(type(state.plan)(**json.loads(body)))
            state.clear()
        answer = {"/seen": vars(state.seen), "/asked": state.asked}.get(path)
        self.send(200, json.dumps(answer).encode())

    def chat(self, body: dict[str, Any], path: str, headers: dict[str, str]) -> None:
        state, content = self.state, content_of(body)
        seen, plan = state.seen, state.plan
        seen.requests[content] += 1
        state.asked.append({"path": path, "headers": headers, "body": body})
        fault = state.fault(body, content)
        seen.billed[content] += fault not in HTTP_FAULTS
        state.now += 1
        self.held += 1
        seen.most = max(seen.most, state.now)
        if fault == "hang":
            return
        if plan.latency_s:
            self.later(plan.latency_s, self.answer, body, fault)
        else:
            self.answer(body, fault)

    def answer(self, body: dict[str, Any], fault: str) -> None:
        self.timers.clear()
        if not self.transport.is_closing():
            self.state.now -= self.held
            self.held = 0
        if fault in HTTP_FAULTS:
            self.send(*http_fault(fault, self.state.plan))
            return
        if fault == "reset":
            self.transport.abort()
            return
        data = {"empty": b"", "html": b"<html>verdict: 1</html>"}.get(fault)
        if data is None:
            data = self.write(body, fault)
        if fault == "invalid-json":
            data = data[: len(data) // 2]
        if fault == "cut":
            self.send(200, data[: len(data) // 2], length=len(data))
            self.transport.close()
        elif fault == "drip":
            self.send(200, b"", length=len(data))
            self.drip(data)
        else:
            self.send(200, data, kind="text/html" if fault == "html" else "application/json")

    def write(self, body: dict[str, Any], fault: str) -> bytes:
        return completion(body, self.state.reply(body), fault)

    def drip(self, data: bytes) -> None:
        self.timers.clear()
        self.transport.write(data[:1])
        if data[1:]:
            self.later(self.state.plan.drip_s, self.drip, data[1:])

    def later(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(seconds, call, *arguments))

    def send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        kind: str = "application/json",
        length: int | None = None,
    ) -> None:
        lines = {
            "content-type": kind,
            "content-length": str(len(body) if length is None else length),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.transport.write(f"HTTP/1.1 {status} -\r\n{head}\r\n".encode() + body)


def http_fault(fault: str, plan: Plan) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers, in the words of servers in use."""
    status = {"too-long": 400, "filtered": 400, "no-schema": 400}.get(fault) or int(fault[:3])
    headers = {}
    if fault == "429-seconds":
        headers["retry-after"] = str(ceil(plan.retry_after_s))
    if fault == "429-date":
        now = datetime.now(UTC)
        # A date has whole seconds.
        headers["retry-after"] = format_datetime(now + timedelta(seconds=ceil(plan.retry_after_s)), usegmt=True)
        headers["date"] = format_datetime(now, usegmt=True)
    error: dict[str, Any] = {"message": f"HTTP {status}", "type": "error", "code": None}
    if fault == "too-long":
        message = "This model's maximum context length is 4096 tokens. However, your messages resulted in 9000 tokens."
        error |= {"message": message, "code": "context_length_exceeded"}
    if fault == "filtered":
        error |= {"message": "The response was filtered.", "code": "content_filter"}
    if fault == "no-schema":
        error |= {
            "message": "Invalid value for 'response_format': json_schema is not supported",
            "param": "response_format",
        }
    return status, json.dumps({"error": error}).encode(), headers


def completion(body: dict[str, Any], text: str, fault: str) -> bytes:
    """A chat completion with the reasoning field that some servers add, and what `fault` makes of it."""
    content = {"two-verdicts": f"{text}\n{text}", "outside": json.dumps({"reason": "because", "verdict": "7"})}.get(
        fault, text
    )
    message = {"role": "assistant", "content": content, "reasoning_content": "verdict: 0"}
    if fault == "refusal":
        message |= {"content": None, "refusal": "I will not"}
    prompt = sum(len(str(item.get("content"))) for item in body["messages"]) // 4
    usage = {
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(text) // 4, "total_tokens": prompt + len(text) // 4}
    }
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": body.get("model"), "choices": [choice]}
    return json.dumps(whole | USAGE_FAULTS.get(fault, usage)).encode()


async def serve(plan: Plan, connection: type[Connection] = Connection, *, port: int = 0, forever: bool = False) -> None:
    """Serves on a free port, unless told which, until standard input ends, unless `forever`."""
    loop, state = asyncio.get_running_loop(), State(plan)
    server = await loop.create_server(lambda: connection(state), "127.0.0.1", port, backlog=4096)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1\n")
    sys.stdout.flush()
    if forever:
        await server.serve_forever()
    ended = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(ended), sys.stdin)
    await ended.read()


def arguments() -> tuple[dict[str, Any], int]:
    """Of a server's command line: the plan, {} if none is given, and the port."""
    plan, port = [*sys.argv[1:3], *("{}", "0")[len(sys.argv) - 1 :]]
    return json.loads(plan), int(port)


# ---- the test's side ----


class ChatProcess:
    """A running server: its URL, its process, and what it has seen."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, plan: Plan) -> None:
        self.process, self.url, self.plan = process, url, plan

    def set(self, **change: Any) -> None:
        """Another plan from now on; what was seen is forgotten."""
        self.plan = replace(self.plan, **change)
        self._call("PUT", "/plan", asdict(self.plan))

    @property
    def seen(self) -> Seen:
        given = self._call("GET", "/seen")
        return Seen(Counter(given["requests"]), Counter(given["billed"]), given["most"], given["connections"] - 1)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Every request in order: path, headers and body."""
        found: list[dict[str, Any]] = self._call("GET", "/asked")
        return found

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.removesuffix("/v1") + path, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            return json.loads(response.read())


def chat_process(**plan: Any) -> AbstractContextManager[ChatProcess]:
    """A server that runs until the end of the `with`; the reply's module is imported from tests/."""
    return process_of(__file__, Plan(**plan))


@contextmanager
def process_of(file: str, chosen: Plan, port: int = 0) -> Iterator[ChatProcess]:
    """The server that `file` makes of a plan, until the end of the `with`; it may be killed before."""
    command = [sys.executable, file, json.dumps(asdict(chosen)), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield ChatProcess(process, process.stdout.readline().decode().strip(), chosen)
        finally:
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    asked, at = arguments()
    asyncio.run(serve(Plan(**asked), port=at))
