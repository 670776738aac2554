"""Sampling: the log-probs are the policy's, the tokens follow them, and a row depends on its seed and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from papo.engines.protocols import Sample, Sampler, SampleRequest
from papo.engines.samplers import make_sampler
from papo.errors import DataError

Logprobs = Callable[..., np.ndarray]
EOS = 1
PROMPTS = ("3+5-2=?\n", "9-9=?\n", "1+2+3+4+5+6=?\n", "7+8=?\n", "4=?\n")
REQUESTS = [SampleRequest(prompt, 1000 * number + seed) for number, prompt in enumerate(PROMPTS) for seed in range(6)]


def sampler_of(policy: Path, temperature: float = 1.0, top_p: float = 1.0, new: int = 16, prompt: int = 32) -> Sampler:
    return make_sampler(
        "transformers",
        policy,
        temperature=temperature,
        top_p=top_p,
        max_prompt_tokens=prompt,
        max_new_tokens=new,
    )


def sampled(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[Sample]:
    return sampler.sample(requests, lambda _: None)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_stored_logprobs_are_those_of_a_forward_pass(
    policy: Path, forward_logprobs: Logprobs, temperature: float
) -> None:
    samples = sampled(sampler_of(policy, temperature), REQUESTS)
    differences = []
    for sample in samples:
        everyone = forward_logprobs(policy, sample.prompt_ids, sample.completion_ids, temperature)
        chosen = everyone[range(len(sample.completion_ids)), sample.completion_ids]
        differences.append(np.abs(chosen - sample.logprobs))
    worst = np.concatenate(differences).max()
    assert sum(map(len, differences)) > 150
    assert worst < 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_come_as_often_as_the_softmax_says(policy: Path, forward_logprobs: Logprobs, temperature: float) -> None:
    from scipy.stats import chisquare

    count = 4000
    samples = sampled(sampler_of(policy, temperature, new=1), [SampleRequest("3+5=?\n", seed) for seed in range(count)])
    expected = count * np.exp(forward_logprobs(policy, samples[0].prompt_ids, [], temperature)[0])
    observed = np.bincount([sample.completion_ids[0] for sample in samples], minlength=20).astype(float)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_later_tokens_of_neighbouring_seeds_are_independent(policy: Path) -> None:
    # A row's stream is one long Philox stream: were its numbers used twice or shared, step 1 would foretell step 2.
    from papo.engines.samplers.transformers import TransformersSampler

    sampler = TransformersSampler(policy, temperature=1.0, top_p=1.0, max_prompt_tokens=32, max_new_tokens=8)
    numbers = sampler._uniforms([SampleRequest("1=?\n", seed) for seed in range(2000)]).cpu().numpy()
    correlations = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlations).max() < 0.1
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.1
    assert np.unique(numbers).size == numbers.size


def test_a_row_does_not_depend_on_the_others_nor_on_their_order(policy: Path) -> None:
    sampler = sampler_of(policy)
    together = dict(zip(REQUESTS, sampled(sampler, REQUESTS), strict=True))
    backwards = dict(zip(REQUESTS[::-1], sampled(sampler, REQUESTS[::-1]), strict=True))
    alone = {request: sampled(sampler, [request])[0] for request in REQUESTS}
    thirds = {r: s for at in range(3) for r, s in zip(REQUESTS[at::3], sampled(sampler, REQUESTS[at::3]), strict=True)}
    for request, sample in together.items():
        for other in (backwards[request], alone[request], thirds[request]):
            assert other.completion_ids == sample.completion_ids
            assert other.prompt_ids == sample.prompt_ids
            assert (other.completion, other.finish_reason) == (sample.completion, sample.finish_reason)
            np.testing.assert_allclose(other.logprobs, sample.logprobs, rtol=0, atol=1e-5)


def test_the_same_batch_gives_the_same_bits(policy: Path) -> None:
    assert sampled(sampler_of(policy), REQUESTS) == sampled(sampler_of(policy), REQUESTS)


def test_seeds_differ_and_a_seed_may_have_64_bits(policy: Path) -> None:
    sampler = sampler_of(policy)
    seeds = [0, 1, 2**63, 2**64 - 1]
    samples = sampled(sampler, [SampleRequest("3+5=?\n", seed) for seed in seeds])
    assert len({tuple(sample.completion_ids) for sample in samples}) == 4


def test_temperature_zero_takes_the_likeliest_token(policy: Path, forward_logprobs: Logprobs) -> None:
    samples = sampled(sampler_of(policy, temperature=0.0, new=6), REQUESTS[::3])
    for sample in samples:
        everyone = forward_logprobs(policy, sample.prompt_ids, sample.completion_ids)[:-1]
        assert sample.completion_ids == everyone.argmax(-1).tolist()
        assert sample.logprobs == pytest.approx(everyone.max(-1).tolist(), abs=1e-4)
    assert samples[0].completion_ids == samples[1].completion_ids  # another seed, the same prompt


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_only_the_nucleus_is_sampled_and_its_logprobs_add_up_to_one(
    policy: Path, forward_logprobs: Logprobs, top_p: float
) -> None:
    samples = sampled(sampler_of(policy, top_p=top_p, new=1), [SampleRequest("3+5=?\n", seed) for seed in range(1000)])
    everyone = np.exp(forward_logprobs(policy, samples[0].prompt_ids, [])[0])
    order = np.argsort(-everyone)
    size = int(np.searchsorted(np.cumsum(everyone[order]), top_p)) + 1
    nucleus = set(order[:size].tolist())
    assert {sample.completion_ids[0] for sample in samples} == nucleus
    mass = sum(everyone[token] for token in nucleus)
    for sample in samples:
        assert sample.logprobs[0] == pytest.approx(np.log(everyone[sample.completion_ids[0]] / mass), abs=1e-4)


def test_what_ends_a_completion_and_what_belongs_to_it(policy: Path) -> None:
    from papo.engines.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    samples = sampled(sampler_of(policy, new=16), REQUESTS)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for request, sample in zip(REQUESTS, samples, strict=True):
        assert tokenizer.decode(sample.prompt_ids) == request.prompt
        assert len(sample.logprobs) == len(sample.completion_ids)
        if sample.finish_reason == "stop":
            assert sample.completion_ids.index(EOS) == len(sample.completion_ids) - 1
            assert sample.completion == tokenizer.decode(sample.completion_ids[:-1])
        else:
            assert EOS not in sample.completion_ids
            assert len(sample.completion_ids) == 16
            assert sample.completion == tokenizer.decode(sample.completion_ids)


def test_a_completion_may_stop_on_its_last_allowed_token(policy: Path) -> None:
    for sample in sampled(sampler_of(policy, new=1), [SampleRequest("4=?\n", seed) for seed in range(100)]):
        assert (sample.completion_ids == [EOS]) == (sample.finish_reason == "stop")
        assert (sample.finish_reason == "stop") <= (sample.completion == "")


def test_a_shorter_limit_cuts_the_same_completion(policy: Path) -> None:
    long, short = sampled(sampler_of(policy, new=16), REQUESTS), sampled(sampler_of(policy, new=4), REQUESTS)
    assert [sample.completion_ids[:4] for sample in long] == [sample.completion_ids for sample in short]


def test_settings_that_lie_with_the_checkpoint_change_nothing(policy: Path, tmp_path: Path) -> None:
    # Public checkpoints bring a generation_config with penalties, which transformers applies unasked.
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    settings = {"repetition_penalty": 1.5, "temperature": 0.6, "top_k": 2, "do_sample": True, "min_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert sampled(sampler_of(folder), REQUESTS) == sampled(sampler_of(policy), REQUESTS)


def test_a_chat_template_words_the_prompt(policy: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}?{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}0{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    sample = sampled(sampler_of(folder), [SampleRequest("3+5", 0)])[0]
    assert tokenizer.decode(sample.prompt_ids) == "?3+50"


@pytest.mark.parametrize(("prompt", "tokens"), [("1+1+1+1+1=?\n", 12), ("", 0)])
def test_a_prompt_that_does_not_fit_is_a_data_error(policy: Path, prompt: str, tokens: int) -> None:
    requests = [SampleRequest("1=?\n", 0), SampleRequest(prompt, 1)]
    with pytest.raises(DataError, match=f"a prompt has {tokens} tokens, allowed are 1 to 11") as caught:
        sampled(sampler_of(policy, prompt=11), requests)
    assert repr(prompt) in caught.value.where
    if tokens:
        assert len(sampled(sampler_of(policy, prompt=12), requests)) == 2


@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_a_prompt_and_its_answer_have_to_fit_into_the_positions_of_the_policy(
    policy: Path, tmp_path: Path, family: str
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    positions, folder = 1024, policy
    if family == "learned":  # whose table of positions ends, so that torch would raise an IndexError
        positions, folder = 24, Path(shutil.copytree(policy, tmp_path / "policy"))
        shape = GPT2Config(
            vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=24, bos_token_id=None, eos_token_id=EOS
        )
        GPT2LMHeadModel(shape).save_pretrained(folder)
    longest = "1" * (positions - 16)
    sampler = sampler_of(folder, new=16, prompt=2048)
    samples = sampled(sampler, [SampleRequest(longest, seed) for seed in range(20)])
    assert max(len(sample.completion_ids) for sample in samples) == 16
    message = rf"a prompt of {positions - 15} tokens and 16 new ones do not fit into the {positions} positions"
    with pytest.raises(DataError, match=message) as caught:
        sampled(sampler, [SampleRequest("1=?\n", 0), SampleRequest(longest + "2", 0)])
    assert caught.value.where.startswith("prompt '111")
    assert "max_new_tokens" in caught.value.fix


def test_no_requests_give_no_samples_and_no_progress(policy: Path) -> None:
    told: list[int] = []
    assert sampler_of(policy).sample([], told.append) == []
    assert told == []


def test_progress_counts_every_completion(policy: Path) -> None:
    told: list[int] = []
    sampler_of(policy, new=2).sample(REQUESTS, told.append)
    assert sum(told) == len(REQUESTS)


def test_versions_name_the_libraries(policy: Path) -> None:
    assert set(sampler_of(policy).versions()) == {"torch", "transformers"}
