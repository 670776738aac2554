"""Sampling the embedded policy from the real vLLM: tokens and log-probs are those of the policy, and no other is taken for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from papo.engines.policy import load_policy
from papo.engines.protocols import Sample, SampleRequest
from papo.engines.samplers.vllm_server import VllmServerSampler
from papo.engines.serving import Servers
from papo.errors import ParamsError, SetupError
from papo.params import ServerParams
from papo.schemas import row_seed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

OPTIONS: dict[str, Any] = {
    "max-model-len": 64,
    "enforce-eager": True,
    "enable-chunked-prefill": False,  # a prompt that is read in parts ends vLLM 0.32.0 on the CPU if its request has a seed
}
PROMPTS = [f"{a}+{b}-{a}=?\n" for a in range(2, 8) for b in range(1, 5)]
REQUESTS = [SampleRequest(prompt, row_seed(0, 0, prompt, index)) for prompt in PROMPTS for index in range(8)]


@pytest.fixture(scope="module")
def next_policy(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy after a step: every weight a thousandth of its size away."""
    return moved(policy, tmp_path_factory.mktemp("next") / "policy", 1e-3)


def moved(policy: Path, folder: Path, share: float) -> Path:
    """The policy with every weight that share of its size away."""
    import torch

    model, tokenizer = load_policy(policy, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + share * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def params_of(python: Path, **change: Any) -> ServerParams:
    options = OPTIONS | change.pop("options", {})
    return ServerParams(
        command=f"{python} -m vllm.entrypoints.openai.api_server", options=options, start_s=300.0, **change
    )


@pytest.fixture(scope="module")
def served(
    with_vllm: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerParams, Servers]]:
    """Servers that serve the policy."""
    params = params_of(with_vllm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; half of the machine's memory otherwise
        with Servers(params, tmp_path_factory.mktemp("logs")) as servers:
            servers.serve(policy)
            yield params, servers


def sampler_of(
    served: tuple[ServerParams, Servers], policy: Path, *, serve: Path | None = None, **change: Any
) -> VllmServerSampler:
    """Of a server that serves `serve`, or the policy."""
    params, servers = served
    given = {"temperature": 1.0, "top_p": 1.0, "max_prompt_tokens": 32, "max_new_tokens": 24} | change
    urls = servers.serve(serve or policy)
    return VllmServerSampler(policy, **given, params=params, urls=lambda: urls)


def sampled(sampler: VllmServerSampler, requests: Sequence[SampleRequest] = REQUESTS) -> list[Sample]:
    return sampler.sample(requests, lambda _: None)


def forward(policy: Path, samples: Sequence[Sample], temperature: float) -> list[np.ndarray]:
    """Log-probs of every token at each place of each completion, by transformers."""
    import torch

    model = load_policy(policy, device="cpu")[0].eval()
    found = []
    with torch.inference_mode():
        for sample in samples:
            logits = model(torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])).logits[
                0, len(sample.prompt_ids) - 1 :
            ]
            found.append((logits.double() / temperature).log_softmax(-1).numpy())
    return found


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_stored_logprobs_are_those_of_the_sampled_distribution(
    served: tuple[ServerParams, Servers], policy: Path, temperature: float
) -> None:
    sampler = sampler_of(served, policy, temperature=temperature)
    samples = sampled(sampler)
    expected = forward(policy, samples, temperature)
    differences = [
        np.abs(one[range(len(sample.completion_ids)), sample.completion_ids] - sample.logprobs).max()
        for one, sample in zip(expected, samples, strict=True)
    ]
    assert max(differences) < 1e-4
    assert sampler.metrics()["proof_difference"] < 1e-4
    assert sampler.versions()["vllm"] == "0.32.0"


def test_what_ends_a_completion_and_what_belongs_to_it(served: tuple[ServerParams, Servers], policy: Path) -> None:
    samples = sampled(sampler_of(served, policy))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        stopped = sample.finish_reason == "stop"
        assert len(sample.logprobs) == len(sample.completion_ids)
        assert (1 in sample.completion_ids) == stopped
        assert stopped or len(sample.completion_ids) == 24
    # The further ends of text in generation_config.json are tokens like any other.
    assert {7, 8} <= {token for sample in samples for token in sample.completion_ids[:-1]}


def test_a_seed_repeats_a_row_and_another_gives_another(served: tuple[ServerParams, Servers], policy: Path) -> None:
    sampler = sampler_of(served, policy)
    first, again = sampled(sampler), sampled(sampler, REQUESTS[::-1])[::-1]
    assert [one.completion_ids for one in first] == [one.completion_ids for one in again]
    assert (
        np.abs(np.concatenate([one.logprobs for one in first]) - np.concatenate([one.logprobs for one in again])).max()
        < 1e-5
    )
    assert len({tuple(one.completion_ids) for one in first}) > 0.9 * len(first)
    wide = [SampleRequest("3+5=?\n", seed) for seed in (0, 1, 2**63, 2**63 - 1, 2**64 - 1)]
    assert len(sampled(sampler, wide)) == 5
    assert sampled(sampler, wide) == sampled(sampler, wide)


def test_tokens_come_as_often_as_the_softmax_says(served: tuple[ServerParams, Servers], policy: Path) -> None:
    count = 2000
    requests = [SampleRequest("3+5=?\n", row_seed(0, 0, "problem", index)) for index in range(count)]
    samples = sampled(sampler_of(served, policy, max_new_tokens=1), requests)
    expected = count * np.exp(forward(policy, samples[:1], 1.0)[0][0])
    observed = np.bincount([sample.completion_ids[0] for sample in samples], minlength=len(expected)).astype(float)
    common = expected >= 5
    if not common.all():
        expected = np.append(expected[common], expected[~common].sum())
        observed = np.append(observed[common], observed[~common].sum())
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_another_policy_is_not_taken_for_this_one(
    served: tuple[ServerParams, Servers], policy: Path, next_policy: Path
) -> None:
    params, servers = served
    urls = servers.serve(policy)
    with pytest.raises(SetupError, match="was started for another policy: its name is policy-"):
        sampled(sampler_of(served, next_policy, serve=policy))
    # As one that papo did not start, which may have any name.
    there = params.model_copy(update={"base_urls": urls})
    with pytest.raises(SetupError, match="another policy than the checkpoint: their log-probs differ"):
        sampled(sampler_of((there, servers), next_policy, serve=policy))
    with pytest.raises(SetupError, match=f"still serves the policy in {re.escape(str(policy))}: "):
        sampled(sampler_of((there, servers), next_policy, serve=policy, others=[policy]))
    assert len(sampled(sampler_of((there, servers), policy, others=[next_policy]))) == len(REQUESTS)


def test_in_bfloat16_the_policy_of_the_round_before_is_not_taken_for_this_one(
    with_vllm: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    after = moved(policy, tmp_path / "after", 0.03)  # by less than the limit of bfloat16
    started = params_of(with_vllm, dtype="bfloat16")
    with Servers(started, tmp_path / "logs") as servers:
        there = started.model_copy(update={"base_urls": servers.serve(policy)})
        unseen = sampler_of((there, servers), after, serve=policy)  # by the limit alone
        assert len(sampled(unseen)) == len(REQUESTS)
        with pytest.raises(SetupError, match=f"still serves the policy in {re.escape(str(policy))}: "):
            sampled(sampler_of((there, servers), after, serve=policy, others=[policy]))
        right = sampler_of((there, servers), policy, others=[after])
        assert len(sampled(right)) == len(REQUESTS)
        assert right.metrics()["proof_margin"] > 5


def test_a_context_that_is_too_short_is_told(served: tuple[ServerParams, Servers], policy: Path) -> None:
    with pytest.raises(ParamsError, match="do not fit into the context of 64 tokens"):
        sampled(sampler_of(served, policy, max_new_tokens=60))


def test_log_probs_at_temperature_1_are_refused(
    with_vllm: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    params = params_of(with_vllm, options={"logprobs-mode": "raw_logprobs"})
    with Servers(params, tmp_path) as servers:
        with pytest.raises(SetupError, match="at temperature 1 for tokens that are sampled at temperature"):
            sampled(sampler_of((params, servers), policy, temperature=0.6))
        assert len(sampled(sampler_of((params, servers), policy))) == len(REQUESTS)


def test_the_next_policy_is_handed_over(served: tuple[ServerParams, Servers], policy: Path, next_policy: Path) -> None:
    before = sampled(sampler_of(served, policy))
    after = sampled(sampler_of(served, next_policy))
    assert before != after
