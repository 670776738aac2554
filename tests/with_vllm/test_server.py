"""What rollouts and judges need of a real vLLM server: completions with log-probabilities by token, several at a time, and seeds."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def completions(url: str, **change: Any) -> list[dict[str, Any]]:
    body = {"model": "smollm2-135m", "prompt": "Problem: 2+9\nSolution:", "max_tokens": 12, "temperature": 1.0} | change
    asked = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asked, timeout=120) as response:
        choices: list[dict[str, Any]] = json.loads(response.read())["choices"]
        return choices


def test_several_completions_with_the_log_probability_of_every_token(vllm_url: str) -> None:
    several = completions(vllm_url, n=3, logprobs=0, seed=5)
    assert [one["index"] for one in several] == [0, 1, 2]
    assert len({one["text"] for one in several}) > 1
    for one in several:
        tokens, logprobs = one["logprobs"]["tokens"], one["logprobs"]["token_logprobs"]
        assert len(tokens) == len(logprobs) == 12 or one["finish_reason"] == "stop"
        assert all(value <= 0.0 for value in logprobs)
        assert "".join(tokens).startswith(one["text"])


def test_a_seed_repeats_a_completion(vllm_url: str) -> None:
    texts = [completions(vllm_url, seed=seed)[0]["text"] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
