"""The chat client and the built-in rubrics against a real vLLM server with SmolLM2-135M-Instruct, which is no judge, but answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any, NamedTuple

import jsonschema
import pytest

from papo.core.credit import split_steps
from papo.engines.chat import ChatClient, ChatReply, ChatRequest
from papo.engines.judges.rubrics import Reading, load_rubric, rubric_names
from papo.params import ChatParams

MAX_MODEL_LEN = 2048  # of conftest.py's server
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("keyless"), pytest.mark.timeout(1800)]

PROBLEM, REFERENCE = "What is 12-5+9?", "12-5=7\n7+9=16\n\\boxed{16}"
RESPONSES = (
    "12-5=7\n\n7+9=16\n\n\\boxed{16}",
    "12-5=8\n\n8+9=17\n\n\\boxed{17}",
    "12+9=21\n\n21-5=16\n\n\\boxed{16}",
    "It is clear that the result is 16.\n\n\\boxed{16}",
    "\\boxed{16}",
    "",
)


class Judged(NamedTuple):
    request: ChatRequest
    reply: ChatReply
    reading: Reading


def replies(url: str, *asked: ChatRequest, **change: Any) -> tuple[list[ChatReply], bool]:
    """What becomes of calls that are made at once, and whether the client gave up on schemas."""
    given: dict[str, Any] = {
        "model": "smollm2-135m",
        "base_url": url,
        "max_tokens": 128,
        "timeout_s": 600.0,
        "tries": 1,
    }

    async def ask() -> tuple[list[ChatReply], bool]:
        async with ChatClient(ChatParams(**given | change)) as client:
            return await asyncio.gather(*map(client.ask, asked)), client.plain

    return asyncio.run(ask())


def request_of(name: str, response: str, *, with_schema: bool = True, seed: int | None = None) -> ChatRequest:
    """As a judge asks, but with the same mark each time."""
    rubric = load_rubric(name)
    mark = hashlib.sha256(response.encode()).hexdigest()[:16]
    rendered = rubric.render(PROBLEM, REFERENCE, response, mark=mark)
    return ChatRequest(rendered.system, rendered.user, rubric.schema() if with_schema else None, seed)


def judge(url: str, name: str, *, with_schema: bool) -> list[Judged]:
    rubric = load_rubric(name)
    asked = [request_of(name, response, with_schema=with_schema) for response in RESPONSES]
    found, plain = replies(url, *asked, max_tokens=128 if with_schema else 64)
    assert not plain
    assert {reply.status for reply in found} == {"ok"}
    readings = [
        rubric.read(reply.text or "", steps=len(split_steps(response)), finish_reason=reply.finish_reason)
        for reply, response in zip(found, RESPONSES, strict=True)
    ]
    return [Judged(*one) for one in zip(asked, found, readings, strict=True)]


@pytest.fixture(scope="module")
def judged(vllm_url: str) -> dict[str, dict[bool, list[Judged]]]:
    """By rubric, and whether the model was held to its schema."""
    return {name: {held: judge(vllm_url, name, with_schema=held) for held in (True, False)} for name in rubric_names()}


@pytest.mark.parametrize("name", rubric_names())
def test_a_reply_that_is_held_to_a_schema_is_a_verdict(judged: dict[str, dict[bool, list[Judged]]], name: str) -> None:
    assert any(one.reply.finish_reason == "stop" for one in judged[name][True])
    for request, reply, reading in judged[name][True]:
        if reply.finish_reason == "length":
            assert (reading.status, reading.reason) == ("unparsable", "cut off")
            continue
        assert request.schema is not None
        assert reply.text is not None
        jsonschema.validate(json.loads(reply.text), request.schema)
        if name == "wrong-steps" and reading.status != "ok":  # no schema says how many steps a response has
            assert reading.reason in ("the verdict is no list of numbers of steps", "the verdict names a step twice")
            continue
        assert reading.status == "ok", reply.text
        assert reading.score is not None
        assert 0.0 <= reading.score <= 1.0


@pytest.mark.parametrize("name", rubric_names())
def test_a_reply_without_a_schema_is_a_verdict_or_missing(
    judged: dict[str, dict[bool, list[Judged]]], name: str
) -> None:
    for _, reply, reading in judged[name][False]:
        assert reply.finish_reason in ("stop", "length")
        assert (reading.score is None) == (reading.status == "unparsable")


def test_a_schema_is_what_makes_a_small_model_give_verdicts(judged: dict[str, dict[bool, list[Judged]]]) -> None:
    shares = {
        held: {
            name: sum(one.reading.status == "ok" for one in found[held]) / len(RESPONSES)
            for name, found in judged.items()
        }
        for held in (True, False)
    }
    assert sum(shares[True].values()) / len(judged) > 0.4, shares
    assert sum(shares[False].values()) / len(judged) < 0.2, shares


def test_the_server_counts_what_is_used(vllm_url: str) -> None:
    [short, long], _ = replies(
        vllm_url, request_of("levels", RESPONSES[0]), request_of("levels", RESPONSES[0] + "\n\n1+1=2" * 50)
    )
    assert short.prompt_tokens + 200 < long.prompt_tokens < 2048
    [cut], _ = replies(vllm_url, request_of("levels", RESPONSES[0]), max_tokens=5)
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 5)
    assert cut.prompt_tokens == short.prompt_tokens
    assert (cut.tries, cut.billed_tries) == (1, 1)


def test_a_seed_repeats_a_reply_at_temperature_1(vllm_url: str) -> None:
    texts = []
    for seed in (1, 1, 2, 3):
        request = request_of("levels", RESPONSES[0], with_schema=False, seed=seed)
        [reply], _ = replies(vllm_url, request, temperature=1.0, max_tokens=24)
        texts.append(reply.text)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_what_does_not_fit_into_the_context_is_too_long(vllm_url: str) -> None:
    [reply], plain = replies(vllm_url, request_of("levels", "1+1=2\n\n" * 600), tries=3)
    assert (reply.status, reply.tries, reply.billed_tries) == ("too_long", 1, 0)
    assert not plain


def test_a_reply_gets_what_the_context_has_left(vllm_url: str) -> None:
    request = request_of("levels", "1+1=2\n\n" * 80, with_schema=False)
    [reply], _ = replies(vllm_url, request, max_tokens=MAX_MODEL_LEN - 1)
    assert reply.status == "ok"
    assert reply.finish_reason == "stop" or reply.prompt_tokens + reply.completion_tokens == MAX_MODEL_LEN


def test_more_tokens_than_the_context_has_are_an_error(vllm_url: str) -> None:
    [reply], plain = replies(vllm_url, request_of("levels", RESPONSES[0]), max_tokens=MAX_MODEL_LEN + 1, tries=3)
    assert (reply.status, reply.tries, reply.cause) == ("error", 1, "HTTP 400")
    assert not plain


def test_a_model_that_the_server_has_not_is_an_error(vllm_url: str) -> None:
    [reply], _ = replies(vllm_url, request_of("levels", RESPONSES[0]), model="gpt-oss-20b", tries=3)
    assert (reply.status, reply.tries, reply.cause) == ("error", 1, "HTTP 404")
