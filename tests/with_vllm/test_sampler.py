"""The sampler vllm with the real vLLM, on the embedded policy in float32: rows are those of the policy, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from papo.engines.policy import load_policy
from papo.engines.protocols import Sample, SampleRequest
from papo.engines.samplers.vllm import VllmSampler
from papo.errors import SetupError
from papo.params import VllmParams
from papo.schemas import row_seed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

OPTIONS: dict[str, Any] = {
    "enforce-eager": True,
    "enable-chunked-prefill": False,  # a prompt that is read in parts ends vLLM 0.32.0 on the CPU if its request has a seed
    "max_num_seqs": 64,
}
PROMPTS = [f"{a}+{b}-{a}=?\n" for a in range(2, 8) for b in range(1, 5)]
REQUESTS = [SampleRequest(prompt, row_seed(0, 0, prompt, index)) for prompt in PROMPTS for index in range(8)]
Make = Callable[..., VllmSampler]


@pytest.fixture(scope="module")
def make(with_vllm: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    def sampler(**change: Any) -> VllmSampler:
        given = {"temperature": 0.7, "top_p": 1.0, "max_prompt_tokens": 32, "max_new_tokens": 24} | change
        options = OPTIONS | given.pop("options", {})
        params = VllmParams(python=str(with_vllm), options=options, dtype="float32", start_s=300.0)
        return VllmSampler(policy, **given, params=params, logs=tmp_path_factory.mktemp("logs"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; half of the machine's memory otherwise
        yield sampler


@pytest.fixture(scope="module")
def sampler(make: Make) -> Iterator[VllmSampler]:
    with make() as made:
        yield made


def sampled(sampler: VllmSampler, requests: Sequence[SampleRequest] = REQUESTS) -> list[Sample]:
    return sampler.sample(requests, lambda _: None)


def below() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_stored_logprobs_are_those_of_the_sampled_distribution(sampler: VllmSampler, policy: Path) -> None:
    import torch

    model = load_policy(policy, device="cpu")[0].eval()
    largest = 0.0
    for sample in sampled(sampler):
        with torch.inference_mode():
            whole = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
            logits = model(whole).logits[0, len(sample.prompt_ids) - 1 : -1].double()
        expected = (logits / 0.7).log_softmax(-1).numpy()
        chosen = expected[np.arange(len(sample.completion_ids)), sample.completion_ids]
        largest = max(largest, float(np.abs(chosen - sample.logprobs).max()))
    assert largest < 1e-4
    assert sampler.versions()["vllm"] == "0.32.0"
    assert sampler.metrics()["engine_start_s"] > 0.0


def test_what_ends_a_completion_and_what_belongs_to_it(sampler: VllmSampler) -> None:
    samples = sampled(sampler)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        stopped = sample.finish_reason == "stop"
        assert len(sample.logprobs) == len(sample.completion_ids)
        assert (1 in sample.completion_ids) == stopped
        assert stopped or len(sample.completion_ids) == 24
    # The further ends of text in generation_config.json are tokens like any other.
    assert {7, 8} <= {token for sample in samples for token in sample.completion_ids[:-1]}


def test_a_seed_repeats_a_row_and_another_gives_another(sampler: VllmSampler) -> None:
    first, again = sampled(sampler), sampled(sampler, REQUESTS[::-1])[::-1]
    assert [one.completion_ids for one in first] == [one.completion_ids for one in again]
    assert len({tuple(one.completion_ids) for one in first}) > 0.9 * len(first)
    wide = [SampleRequest("3+5=?\n", seed) for seed in (0, 1, 2**63, 2**63 - 1, 2**64 - 1)]
    assert sampled(sampler, wide) == sampled(sampler, wide)


def test_shards_come_as_they_complete(sampler: VllmSampler) -> None:
    shards = [REQUESTS[first : first + 32] for first in range(0, len(REQUESTS), 32)]
    told: list[int] = []
    coming = sampler.sample_shards(shards, told.append)
    found = dict([next(coming)])
    assert sum(told) < len(REQUESTS)
    found |= dict(coming)
    assert sum(told) == len(REQUESTS)
    whole = [sample for number in range(len(shards)) for sample in found[number]]
    assert [one.completion_ids for one in whole] == [one.completion_ids for one in sampled(sampler)]


def test_an_argument_that_vllm_does_not_have_is_told_in_its_words(make: Make) -> None:
    with make(options={"enforce_eagerly": True}) as sampler, pytest.raises(SetupError, match="enforce_eagerly"):
        sampled(sampler)
    with (
        make(options={"tensor_parallel_size": 1000}) as sampler,
        pytest.raises(SetupError, match="cannot load the policy"),
    ):
        sampled(sampler)


def test_no_process_is_left(make: Make) -> None:
    before = set(below())
    with make() as sampler:
        assert len(sampled(sampler, REQUESTS[:8])) == 8
        started = set(below()) - before
        assert len(started) > 1
    assert not [one for one in started if one.is_running()]
