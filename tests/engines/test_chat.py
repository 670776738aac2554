"""The chat client against a real server in a process of its own that misbehaves by plan."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from servers.chat import FAULTS, USAGE_FAULTS, ChatProcess, chat_process

from papo.engines.chat import ChatClient, ChatReply, ChatRequest, retry_after_s
from papo.errors import ServerDownError, SetupError, StageError
from papo.params import ChatParams

pytestmark = pytest.mark.usefixtures("keyless")
STATUSES = {"ok", "timeout", "refused", "too_long", "rate_limited", "error"}
SCHEMA = {"type": "object", "properties": {"verdict": {"enum": ["0", "0.5", "1"]}}}
ONE = ChatRequest("judge", "x" * 40)


@pytest.fixture(scope="module")
def one_server() -> Iterator[ChatProcess]:
    with chat_process() as server:
        yield server


@pytest.fixture
def server(one_server: ChatProcess) -> ChatProcess:
    one_server.set(fault="none", when="all", share=0.1, latency_s=0.0, retry_after_s=1.0, drip_s=0.05)
    return one_server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries that a test can afford; what they are is tested with the clock."""
    monkeypatch.setattr("papo.engines.chat.FIRST_WAIT_S", 0.01)


def client_of(server: ChatProcess | str, **change: Any) -> ChatClient:
    url = server if isinstance(server, str) else server.url
    given: dict[str, Any] = {"model": "m", "base_url": url, "timeout_s": 30.0, "tries": 3, "breaker": 1000}
    return ChatClient(ChatParams(**given | change))


def requests(count: int, **change: Any) -> list[ChatRequest]:
    return [ChatRequest("judge", f"response {number}", **change) for number in range(count)]


async def ask_all(client: ChatClient, asked: list[ChatRequest]) -> list[ChatReply | BaseException]:
    async with client:
        return await asyncio.gather(*map(client.ask, asked), return_exceptions=True)


def replies(server: ChatProcess | str, *asked: ChatRequest, **change: Any) -> list[ChatReply]:
    """What becomes of calls that are made at once; none of them may raise, and no socket is left."""
    found = asyncio.run(ask_all(client_of(server, **change), list(asked)))
    gc.collect()  # a socket that was left open would warn here
    kept = [reply for reply in found if isinstance(reply, ChatReply)]
    assert kept == found
    assert {reply.status for reply in kept} <= STATUSES
    assert all((reply.text is not None) == (reply.status == "ok") for reply in kept)
    if isinstance(server, ChatProcess):
        seen = server.seen
        assert seen.requests.total() == sum(reply.tries for reply in kept)
        billed, ended = sum(reply.billed_tries for reply in kept), all(reply.status != "timeout" for reply in kept)
        assert seen.billed.total() == billed if ended else seen.billed.total() <= billed
    return kept


def settled(server: ChatProcess) -> int:
    """Connections that the server still holds, once it has had the time to see that they were closed."""
    until = time.monotonic() + 10
    while server.seen.connections and time.monotonic() < until:
        time.sleep(0.02)
    return server.seen.connections


# ---- faults ----

# Status where the fault meets the first try, and where it meets all: (status, tries, billed tries).
MATRIX: dict[str, tuple[tuple[str, int, int], tuple[str, int, int]]] = {
    **dict.fromkeys(["429", "429-seconds", "429-date"], (("ok", 2, 1), ("rate_limited", 3, 0))),
    **dict.fromkeys(["500", "503"], (("ok", 2, 1), ("error", 3, 0))),
    **dict.fromkeys(["cut", "reset"], (("ok", 2, 2), ("error", 3, 3))),
    **dict.fromkeys(["hang", "drip"], (("timeout", 1, 1), ("timeout", 1, 1))),
    **dict.fromkeys(["empty", "html", "invalid-json"], (("error", 1, 1), ("error", 1, 1))),
    **dict.fromkeys(["two-verdicts", "outside", *USAGE_FAULTS], (("ok", 1, 1), ("ok", 1, 1))),
    "refusal": (("refused", 1, 1), ("refused", 1, 1)),
    "filtered": (("refused", 1, 0), ("refused", 1, 0)),
    "too-long": (("too_long", 1, 0), ("too_long", 1, 0)),
    "no-schema": (("ok", 2, 1), ("ok", 2, 1)),
    "401": (("error", 1, 0), ("error", 1, 0)),
}


def test_every_fault_is_in_the_matrix() -> None:
    assert set(MATRIX) == set(FAULTS)


def of_fault(fault: str) -> tuple[ChatRequest, dict[str, Any]]:
    schema = SCHEMA if fault == "no-schema" else None
    return ChatRequest("judge", "x" * 40, schema), {"timeout_s": 1.0 if fault in ("hang", "drip") else 30.0}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("when", ["first", "all"])
def test_a_fault(server: ChatProcess, fault: str, when: str) -> None:
    server.set(fault=fault, when=when)
    request, change = of_fault(fault)
    (reply,) = replies(server, request, **change)
    assert (reply.status, reply.tries, reply.billed_tries) == MATRIX[fault][when == "all"]
    assert (reply.cause == "") == (reply.status == "ok")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_tenth_of_the_calls(server: ChatProcess, fault: str) -> None:
    """Those that it does not meet are not touched by it."""
    server.set(fault=fault, when="share")
    request, change = of_fault(fault)
    found = replies(server, *requests(60, schema=request.schema), concurrency=16, tries=6, **change)
    first, _ = MATRIX[fault]
    met = {"ok"} if first[0] == "ok" else {"ok", first[0]}
    assert {reply.status for reply in found} == met
    tries = Counter(reply.tries for reply in found)
    assert (max(tries) > 1) == (first[1] > 1)
    assert tries[1] > 30 or fault == "no-schema"
    if fault == "no-schema":
        assert sum(reply.tries for reply in found) <= 60 + 16  # only those that were under way when it was found out


@pytest.mark.parametrize(("fault", "cause"), [("429", "HTTP 429"), ("503", "HTTP 503"), ("cut", "connection lost"),
                                              ("reset", "connection lost"), ("hang", "no reply within 0.5 s"),
                                              ("html", "no chat completion"), ("refusal", "refused"), ("401", "HTTP 401")])  # fmt: skip
def test_the_cause_is_brief(server: ChatProcess, fault: str, cause: str) -> None:
    server.set(fault=fault)
    assert replies(server, ONE, timeout_s=0.5)[0].cause == cause


def test_no_server_is_no_connection_and_costs_nothing() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (reply,) = replies(f"http://127.0.0.1:{free.getsockname()[1]}/v1", ONE)
    assert (reply.status, reply.cause, reply.tries, reply.billed_tries) == ("error", "no connection", 3, 0)


def test_a_redirect_is_not_followed(server: ChatProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the texts nor the key go where the params do not say."""
    from chat_server import Raw, chat_server

    there = {"location": f"{server.url}/chat/completions"}
    with chat_server(lambda asked: Raw(b"", status=307, headers=there)) as elsewhere:
        (reply,) = replies(elsewhere.url, ONE)
    assert (reply.status, reply.cause, reply.tries) == ("error", "HTTP 307", 1)
    assert server.asked == []


# ---- what is read ----


def test_the_text_is_that_of_the_message_and_not_its_reasoning(server: ChatProcess) -> None:
    (reply,) = replies(server, ONE)
    assert reply.text is not None
    assert set(json.loads(reply.text)) == {"reason", "verdict"}
    assert (reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == ("stop", 11, len(reply.text) // 4)
    assert 0 < reply.seconds < 30


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3}, (7, 3)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0)),
        ({"prompt_tokens": "7", "completion_tokens": "3"}, (7, 3)),
        ({"prompt_tokens": -7, "completion_tokens": -3}, (12, 2)),
        ({"prompt_tokens": None}, (12, 2)),
        ({"prompt_tokens": "seven", "completion_tokens": "٣"}, (12, 2)),
        ({"prompt_tokens": 7.5, "completion_tokens": True}, (12, 2)),
        ({"prompt_tokens": 10**40, "completion_tokens": 10**9}, (12, 2)),
        ({"prompt_tokens": 10_100, "completion_tokens": 2_000}, (10_100, 2_000)),  # a long template, long thoughts
        (None, (12, 2)),
        ([], (12, 2)),
        ("7", (12, 2)),
    ],
)
def test_tokens_that_cannot_be_are_estimated(usage: Any, tokens: tuple[int, int]) -> None:
    from chat_server import Raw, chat_server

    body = {"choices": [{"message": {"content": "12345"}, "finish_reason": "stop"}], "usage": usage}
    with chat_server(lambda asked: Raw(json.dumps(body).encode())) as odd:
        (reply,) = replies(odd.url, ONE)
    assert (reply.prompt_tokens, reply.completion_tokens) == tokens


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (400, "This model's maximum context length is 4096 tokens.", "too_long"),
        (400, "The decoder prompt (length 5000) is longer than the maximum model length of 4096.", "too_long"),
        (400, "the request exceeds the available context size", "too_long"),
        (413, "Payload Too Large", "too_long"),
        (400, "max_tokens is too large: 99999", "error"),
        (400, "The response was filtered due to the prompt triggering the content management policy.", "refused"),
        (404, "The model m does not exist", "error"),
        (500, "maximum context length", "error"),
    ],
)
def test_http_errors_are_told_apart_by_what_servers_say(status: int, said: str, expected: str) -> None:
    from chat_server import AGAIN_AT_ONCE, Raw, chat_server

    body = json.dumps({"error": {"message": said}}).encode()
    with chat_server(lambda asked: Raw(body, status=status, headers=AGAIN_AT_ONCE)) as server:
        (reply,) = replies(server.url, ONE)
    assert reply.status == expected
    assert said not in repr(reply)


def test_a_quota_that_is_used_up_is_not_waited_for() -> None:
    from chat_server import Raw, chat_server

    with chat_server(lambda asked: Raw(b'{"error": {"code": "insufficient_quota"}}', status=429)) as server:
        (reply,) = replies(server.url, ONE)
    assert (reply.status, reply.tries) == ("rate_limited", 1)


# ---- what is sent ----


def test_the_request(server: ChatProcess) -> None:
    replies(server, ChatRequest("task", "texts", SCHEMA, seed=5), model="org/model:7b", temperature=0.5, max_tokens=9)
    (asked,) = server.asked
    assert (asked["path"], asked["headers"]["authorization"]) == ("/v1/chat/completions", "Bearer none")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    assert asked["body"] == {
        "model": "org/model:7b", "temperature": 0.5, "max_tokens": 9, "seed": 5, "response_format": form,
        "messages": [{"role": "system", "content": "task"}, {"role": "user", "content": "texts"}],
    }  # fmt: skip


def test_nothing_is_sent_that_was_not_asked_for(server: ChatProcess) -> None:
    replies(server, ONE)
    assert set(server.asked[0]["body"]) == {"model", "messages", "temperature", "max_tokens"}


def test_half_a_character_does_not_stop_a_call(server: ChatProcess) -> None:
    (reply,) = replies(server, ChatRequest("task", "a\ud800b\x00é\u2028"))
    assert reply.status == "ok"
    assert server.asked[0]["body"]["messages"][1]["content"] == "a?b\x00é\u2028"


def test_what_the_environment_says_of_another_server_stays_here(
    server: ChatProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of one's own gets the key that the params name, or none."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"of-{name}")
    replies(server, ONE, api_key_env="NO_KEY")
    (asked,) = server.asked
    assert asked["headers"]["authorization"] == "Bearer none"
    assert "of-OPENAI" not in json.dumps(asked)


# ---- the JSON schema ----


def test_a_server_without_schemas_is_found_out_once(server: ChatProcess) -> None:
    server.set(fault="no-schema")
    client = client_of(server, concurrency=1)
    found = asyncio.run(ask_all(client, requests(5, schema=SCHEMA)))
    assert [reply.status for reply in found if isinstance(reply, ChatReply)] == ["ok"] * 5
    assert server.seen.requests.total() == 6
    assert ["response_format" in asked["body"] for asked in server.asked] == [True, *[False] * 5]
    assert client.plain
    asyncio.run(ask_all(client, requests(1, schema=SCHEMA)))
    assert "response_format" not in server.asked[-1]["body"]  # for the rest of the run


def test_another_error_is_no_reason_to_go_without_a_schema(server: ChatProcess) -> None:
    server.set(fault="too-long")
    client = client_of(server)
    asyncio.run(ask_all(client, requests(1, schema=SCHEMA)))
    assert not client.plain
    assert server.seen.requests.total() == 1


# ---- waiting ----


@pytest.mark.parametrize("fault", ["429-seconds", "429-date"])
def test_it_waits_as_long_as_the_server_asks(server: ChatProcess, fault: str) -> None:
    server.set(fault=fault, when="first", retry_after_s=2)
    (reply,) = replies(server, ONE)
    assert (reply.status, reply.tries) == ("ok", 2)
    assert reply.seconds >= (2.0 if fault == "429-seconds" else 1.0)  # a date has whole seconds
    assert reply.seconds < 20


def test_without_a_word_it_waits_longer_and_longer_at_random(
    server: ChatProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papo.engines.chat.FIRST_WAIT_S", 0.5)
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    monkeypatch.setattr("random.uniform", uniform)
    server.set(fault="500")
    replies(server, ONE, tries=9)
    assert drawn[:8] == [(0, high) for high in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)]


def test_what_would_outlast_the_deadline_is_not_waited_for(server: ChatProcess) -> None:
    server.set(fault="429-seconds", retry_after_s=20)
    (reply,) = replies(server, ONE, timeout_s=5.0)
    assert (reply.status, reply.cause, reply.tries) == ("rate_limited", "HTTP 429", 1)
    assert reply.seconds < 4


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_the_deadline_holds_whatever_the_server_does(server: ChatProcess, fault: str) -> None:
    """A byte now and then is no reply; and the server sees that nobody listens any more."""
    server.set(fault=fault)
    found = replies(server, *requests(4), timeout_s=0.5)
    assert [reply.status for reply in found] == ["timeout"] * 4
    assert all(0.5 <= reply.seconds < 5 for reply in found)
    assert settled(server) == 0


def test_the_deadline_is_for_all_tries_together(server: ChatProcess) -> None:
    server.set(fault="503", latency_s=0.4)
    (reply,) = replies(server, ONE, timeout_s=1.0, tries=50)
    assert (reply.status, reply.tries) == ("timeout", 3)
    assert 0.9 <= reply.seconds < 3


DATE = datetime(2030, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after-ms": "20", "retry-after": "7"}, 0.02),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": format_datetime(DATE + timedelta(seconds=9), usegmt=True), "date": format_datetime(DATE)}, 9.0),
        ({"retry-after": format_datetime(DATE - timedelta(seconds=9), usegmt=True), "date": format_datetime(DATE)}, 0.0),
        ({"retry-after": "Tue, 99 Foo 2030 12:00:00 GMT"}, None),
        ({"retry-after": format_datetime(DATE, usegmt=True), "date": "never"}, None),
    ],
)  # fmt: skip
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_a_date_without_the_servers_clock_goes_by_ours() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (retry_after_s({"retry-after": then}) or 0) <= 100


# ---- limits ----


def test_no_more_calls_at_a_time_than_allowed(server: ChatProcess) -> None:
    server.set(latency_s=0.1)
    replies(server, *requests(24), concurrency=6)
    assert server.seen.most == 6


def test_requests_are_spread_over_the_minute(server: ChatProcess) -> None:
    started = time.monotonic()
    replies(server, *requests(11), requests_per_minute=600)
    assert 1.0 <= time.monotonic() - started < 10


def test_calls_go_out_apart_and_not_in_a_bunch(server: ChatProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papo.engines.chat.SPACING_S", 0.1)
    started = time.monotonic()
    replies(server, *requests(6), concurrency=6)
    assert 0.5 <= time.monotonic() - started < 10


def test_tries_count_among_the_requests_and_own_waiting_is_not_the_servers(server: ChatProcess) -> None:
    """Three tries, half a second apart, in a call whose deadline is 0.4 s."""
    server.set(fault="500")
    (reply,) = replies(server, ONE, requests_per_minute=120, timeout_s=0.4, tries=3)
    assert (reply.status, reply.tries) == ("error", 3)
    assert reply.seconds >= 1.0


def test_tokens_are_spread_over_the_minute_as_they_turn_out(server: ChatProcess) -> None:
    """The last of six calls starts when prompts and replies of five have been paid for, at 20 tokens a second."""
    started = time.monotonic()
    found = replies(server, *[ONE] * 6, tokens_per_minute=1200, concurrency=1)
    paid = sum(reply.prompt_tokens + reply.completion_tokens for reply in found[:-1])
    assert paid > 80
    assert paid / 20 <= time.monotonic() - started < 30


# ---- the breaker ----


def outcomes(client: ChatClient, count: int) -> tuple[list[ChatReply], list[BaseException]]:
    found = asyncio.run(ask_all(client, requests(count)))
    return [x for x in found if isinstance(x, ChatReply)], [x for x in found if isinstance(x, BaseException)]


@pytest.mark.parametrize("fault", ["500", "503", "reset", "hang"])
def test_a_server_that_is_down_is_left_alone(server: ChatProcess, fault: str) -> None:
    server.set(fault=fault)
    made, refused = outcomes(client_of(server, breaker=4, concurrency=2, timeout_s=1.0), 30)
    assert len(made) in (4, 5)  # one more may have been under way
    assert len(refused) == 30 - len(made)
    assert {type(error) for error in refused} == {ServerDownError}
    assert server.seen.requests.total() == sum(reply.tries for reply in made)


def test_no_connection_opens_the_breaker_and_the_error_says_what_to_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        _, refused = outcomes(client_of(url, breaker=3, concurrency=1), 5)
    (error, _) = refused
    assert isinstance(error, StageError)
    assert isinstance(error, ServerDownError)
    assert error.what == "the server of the model m is down: the last 3 calls failed: 3 no connection"
    assert error.where == f"score_prm.model, {url}"
    assert "start the stage again" in error.fix
    assert error.exit_code == 1


def test_a_server_that_refuses_the_key_is_asked_no_more_and_the_error_says_what_may_be_wrong(
    server: ChatProcess,
) -> None:
    server.set(fault="401")
    made, refused = outcomes(client_of(server, breaker=3, concurrency=1), 9)
    assert [(reply.status, reply.cause) for reply in made] == [("error", "HTTP 401")] * 3
    assert len(refused) == 6
    error = refused[0]
    assert isinstance(error, SetupError)
    assert error.what == "the server refuses to be asked for the model m: the last 3 calls: 3 HTTP 401"
    assert error.where == f"score_prm.model, {server.url}"
    assert "OPENAI_API_KEY, the name of the model or base_url" in error.fix
    assert server.seen.requests.total() == 3


@pytest.mark.parametrize("fault", ["429", "html", "too-long", "refusal"])
def test_a_server_that_answers_is_not_down(server: ChatProcess, fault: str) -> None:
    server.set(fault=fault)
    made, refused = outcomes(client_of(server, breaker=2, concurrency=2), 8)
    assert (len(made), refused) == (8, [])


def test_a_call_that_succeeds_ends_the_row(server: ChatProcess) -> None:
    server.set(fault="503", when="share", share=0.5)
    made, refused = outcomes(client_of(server, breaker=12, concurrency=1, tries=1), 60)
    assert refused == []
    assert sum(reply.status == "error" for reply in made) > 12


def test_calls_under_way_end_before_the_error(server: ChatProcess) -> None:
    """One is slow and succeeds while others fail: whoever pays for it gets it."""
    server.set(latency_s=0.8)

    async def together() -> tuple[ChatReply, float, float]:
        client = client_of(server, breaker=2, concurrency=4, tries=1)
        async with client:
            slow = asyncio.create_task(client.ask(ONE))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.set, fault="503", latency_s=0.0)
            await asyncio.gather(*map(client.ask, requests(2)))
            opened = time.monotonic()
            with pytest.raises(ServerDownError):
                await client.ask(ONE)
            assert slow.done()
            with pytest.raises(ServerDownError):
                client.raise_if_down()
            return slow.result(), opened, time.monotonic()

    reply, opened, raised = asyncio.run(together())
    assert reply.status == "ok"
    assert raised - opened > 0.1


def test_a_call_that_waits_for_its_next_try_makes_none_after_the_breaker_is_open(server: ChatProcess) -> None:
    server.set(fault="429-seconds", retry_after_s=20)

    async def together() -> ChatReply:
        client = client_of(server, breaker=2, concurrency=4)
        async with client:
            waiting = asyncio.create_task(client.ask(ONE))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.set, fault="503")
            await asyncio.gather(*map(client.ask, requests(2)))
            return await waiting

    started = time.monotonic()
    reply = asyncio.run(together())
    assert (reply.status, reply.tries) == ("rate_limited", 1)
    assert time.monotonic() - started < 15
    assert server.seen.requests.total() == 6  # of the two that failed


def test_while_the_breaker_is_closed_nothing_is_said(server: ChatProcess) -> None:
    async def once() -> None:
        async with client_of(server) as client:
            await client.ask(ONE)
            client.raise_if_down()

    asyncio.run(once())


# ---- the key ----


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: ChatProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from chat_server import Raw, chat_server

    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", " sk-Secret123\n")
    echo = json.dumps({"error": {"message": "wrong key: sk-Secret123", "code": "sk-Secret123"}}).encode()
    with chat_server(lambda asked: Raw(echo, status=401)) as echoing:
        found = replies(echoing.url, ONE, api_key_env="MY_KEY")
        assert {asked.key for asked in echoing.asked} == {"Bearer sk-Secret123"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        _, refused = outcomes(client_of(url, api_key_env="MY_KEY", breaker=1, concurrency=1), 2)
    assert caplog.records
    assert "Secret123" not in repr(found) + repr(refused) + str(refused[0]) + caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("package", ["aiohttp", "openai", "tenacity"])
def test_without_the_packages_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SetupError, match="needs the packages openai, aiohttp and tenacity") as caught:
        client_of("http://127.0.0.1:1/v1").check()
    assert "pip install openai aiohttp tenacity" in caught.value.fix


def test_a_missing_key_is_said_with_the_place_of_the_param() -> None:
    client = ChatClient(ChatParams(model="m"), where="score_prm.model")
    with pytest.raises(SetupError, match="OPENAI_API_KEY holds no key") as caught:
        client.check()
    assert caught.value.where == "score_prm.model.api_key_env"
    with pytest.raises(SetupError, match="OPENAI_API_KEY holds no key"):
        asyncio.run(ask_all(client, [ONE]))


# ---- many ----


def test_sixty_four_at_a_time_leave_no_socket(server: ChatProcess) -> None:
    server.set(latency_s=0.05, fault="503", when="share")
    found = replies(server, *requests(300), concurrency=64, tries=6)
    assert Counter(reply.status for reply in found) == {"ok": 300}
    seen = server.seen
    assert 1 < seen.most <= 64
    assert set(seen.billed.values()) == {1}  # every verdict was paid for once
    assert settled(server) == 0
