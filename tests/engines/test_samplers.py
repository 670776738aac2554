"""Sampling: the log-probs are the policy's, the tokens follow them, and a row depends on its seed and nothing else."""

from __future__ import annotations

import functools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from papo.engines.protocols import Sample, Sampler, SampleRequest
from papo.engines.samplers.transformers import TransformersSampler
from papo.errors import CheckpointError, DataError, StageError

Logprobs = Callable[..., np.ndarray]
EOS = 1
PROMPTS = ("3+5-2=?\n", "9-9=?\n", "1+2+3+4+5+6=?\n", "7+8=?\n", "4=?\n")
REQUESTS = [SampleRequest(prompt, 1000 * number + seed) for number, prompt in enumerate(PROMPTS) for seed in range(6)]


def sampler_of(
    policy: Path, temperature: float = 1.0, top_p: float = 1.0, new: int = 16, prompt: int = 32, **more: Any
) -> TransformersSampler:
    return TransformersSampler(
        policy,
        temperature=temperature,
        top_p=top_p,
        max_prompt_tokens=prompt,
        max_new_tokens=new,
        **more,
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


def shaped(policy: Path, folder: Path, family: str) -> Path:
    """The policy with a random model of another family behind its tokenizer."""
    import transformers as hf

    plain: dict[str, Any] = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain |= {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": 0, "initializer_range": 0.2}
    grouped = plain | {"intermediate_size": 64, "num_key_value_heads": 2}
    hf.set_seed(1)
    model = {
        "llama": lambda: None,
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**plain)),  # learned positions
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**grouped, head_dim=8, sliding_window=6)),
    }[family]()
    shutil.copytree(policy, folder)
    if model is not None:
        model.save_pretrained(folder)
    return folder


def only_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    from papo.engines.samplers import decoding

    monkeypatch.setattr(decoding, "has_plain_cache", lambda model: False)


def equal_but_for_rounding(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    return [replace(one, logprobs=[]) for one in some] == [replace(one, logprobs=[]) for one in others]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.0, 1.0)])
def test_own_decoding_gives_what_generate_gives(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, temperature: float, top_p: float
) -> None:
    folder = shaped(policy, tmp_path / "policy", family)
    sampler = sampler_of(folder, temperature, top_p, new=100)  # beyond the room that a cache begins with
    own = sampled(sampler, REQUESTS)
    only_generate(monkeypatch)
    assert equal_but_for_rounding(own, sampled(sampler, REQUESTS))
    lengths = [len(sample.completion_ids) for sample in own]
    assert temperature == 0.0 or max(lengths) > min(lengths)


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("qwen2", True), ("gpt2", True), ("mistral", False)])
def test_a_model_that_forgets_tokens_is_left_to_generate(
    policy: Path, tmp_path: Path, family: str, plain: bool
) -> None:
    from papo.engines.policy import load_policy
    from papo.engines.samplers.decoding import has_plain_cache

    folder = shaped(policy, tmp_path / "policy", family)
    assert has_plain_cache(load_policy(folder)[0]) is plain
    sampler = sampler_of(folder)
    together, alone = sampled(sampler, REQUESTS), [sampled(sampler, [request])[0] for request in REQUESTS]
    assert equal_but_for_rounding(together, alone)


def forwards(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes that the model will be asked for."""
    shapes: list[tuple[int, int]] = []
    model = sampler._model
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return shapes


def test_a_prompt_is_computed_once_and_rows_that_ended_leave_the_batch(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(policy, new=100)
    shapes = forwards(sampler, monkeypatch)
    requests = [
        SampleRequest(prompt, 100 * number + seed) for number, prompt in enumerate(PROMPTS) for seed in range(40)
    ]
    samples = sampled(sampler, requests)
    lengths = [len(sample.completion_ids) for sample in samples]
    assert shapes[0] == (len(PROMPTS), len("1+2+3+4+5+6=?\n"))
    rows = [rows for rows, _ in shapes[1:]]
    assert all(tokens == 1 for _, tokens in shapes[1:])
    assert rows == sorted(rows, reverse=True)
    assert len(rows) == max(lengths) - 1
    needed = sum(length - 1 for length in lengths)
    assert needed <= sum(rows) < 1.15 * needed
    assert len(rows) * len(requests) > 1.5 * needed  # what one `generate` computes


def test_batches_are_sorted_by_length_and_samples_come_in_the_order_of_the_requests(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(policy, batch_rows=8)
    shapes = forwards(sampler, monkeypatch)
    told: list[int] = []
    samples = sampler.sample(REQUESTS, told.append)
    assert equal_but_for_rounding(samples, sampled(sampler_of(policy), REQUESTS))
    assert sum(told) == len(REQUESTS)
    assert [tokens for _, tokens in shapes if tokens > 1] == [14, 8, 6, 4]
    assert sampler.metrics() == {"batches": 4.0, "batch_rows": 8.0, "batch_halvings": 0.0}


def test_the_same_requests_give_the_same_bits_in_any_order(policy: Path) -> None:
    sampler = sampler_of(policy, batch_rows=8)
    shuffled = random.Random(0).sample(REQUESTS, len(REQUESTS))
    assert dict(zip(REQUESTS, sampled(sampler, REQUESTS), strict=True)) == dict(
        zip(shuffled, sampled(sampler, shuffled), strict=True)
    )


@pytest.mark.parametrize("rows", [1, 3, 30, 1000])
def test_any_number_of_rows_a_batch_gives_the_same_tokens(policy: Path, rows: int) -> None:
    assert equal_but_for_rounding(
        sampled(sampler_of(policy, batch_rows=rows), REQUESTS), sampled(sampler_of(policy), REQUESTS)
    )


def test_the_rows_of_a_batch_come_from_all_memory_and_what_a_row_takes(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from papo.engines.samplers import transformers

    sampler = sampler_of(shaped(policy, tmp_path / "policy", "qwen2"), new=100)
    # 2 layers x keys and values x 2 heads x 8 numbers of 4 bytes
    row = 2 * 2 * 2 * 8 * 4 * (28 + 100) + transformers.LOGIT_BYTES * 20
    for memory, rows in ((1, 1), (4 * row, 1), (8 * row, 2), (4 * 100 * row, 64), (10**15, 512)):
        monkeypatch.setattr(transformers, "memory_bytes", lambda device, memory=memory: memory)
        assert sampler._rows(28) == rows
    monkeypatch.setattr(transformers, "memory_bytes", lambda device: 4 * 15 * row)
    assert sampler._rows(28) == 8
    samples = sampled(sampler, REQUESTS)
    assert sampler.metrics()["batch_rows"] == 16.0  # shorter prompts, so more of them
    assert len(samples) == len(REQUESTS)


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil
    import torch

    from papo.engines.samplers import transformers

    limits = [tmp_path / "max", tmp_path / "bytes", tmp_path / "absent"]
    monkeypatch.setattr(transformers, "CGROUP_LIMITS", tuple(map(str, limits)))
    device = torch.device("cpu")
    assert transformers.memory_bytes(device) == psutil.virtual_memory().total
    limits[0].write_text("max\n")
    limits[1].write_text("9223372036854771712\n")  # how version 1 says that there is none
    assert transformers.memory_bytes(device) == psutil.virtual_memory().total
    limits[0].write_text("1073741824\n")
    assert transformers.memory_bytes(device) == 2**30


def runs_out(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception, after: int = 0) -> None:
    """Decoding of more than `most` rows fails, once `after` of them have ended."""
    from papo.engines.samplers import decoding

    original = decoding.decode

    def decode(model: Any, prompts: Any, uniforms: Any, *, ended: Any, **kwargs: Any) -> None:
        count = 0

        def one_ended(*row: Any) -> None:
            nonlocal count
            if len(prompts) > most and count == after:
                raise error
            count += 1
            ended(*row)

        original(model, prompts, uniforms, ended=one_ended, **kwargs)

    monkeypatch.setattr(decoding, "decode", decode)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("kind", ["gpu", "cpu", "python"])
def test_where_memory_runs_out_batches_are_halved_and_it_is_said_once(
    policy: Path, monkeypatch: pytest.MonkeyPatch, kind: str, after: int
) -> None:
    import torch

    expected = sampled(sampler_of(policy), REQUESTS)
    errors: dict[str, Exception] = {
        "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        "python": MemoryError(),
    }
    runs_out(monkeypatch, 4, errors[kind], after)
    said: list[str] = []
    told: list[int] = []
    sampler = sampler_of(policy, batch_rows=16, warn=said.append)
    samples = sampler.sample(REQUESTS, told.append)
    assert equal_but_for_rounding(samples, expected)
    assert sum(told) == len(REQUESTS)
    assert len(said) == 1
    assert said[0].startswith("out of memory with 16 rows at a time")
    assert sampler.metrics()["batch_rows"] <= 4
    assert sampler.metrics()["batch_halvings"] == 2


def test_memory_for_not_even_one_row_ends_the_stage_with_what_to_do(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_out(monkeypatch, 0, MemoryError())
    with pytest.raises(StageError, match="does not suffice to sample one row") as caught:
        sampled(sampler_of(policy), REQUESTS)
    assert "max_new_tokens" in caught.value.fix


def test_any_other_error_of_torch_is_not_taken_for_want_of_memory(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_out(monkeypatch, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        sampled(sampler_of(policy), REQUESTS)


STARVED = """
import resource, sys
from pathlib import Path
import psutil
from papo.engines.protocols import SampleRequest
from papo.engines.samplers.transformers import TransformersSampler

requests = [SampleRequest("1" * 1000, seed) for seed in range(512)]

def sampled():
    said = []
    sampler = TransformersSampler(Path(sys.argv[1]), temperature=1.0, top_p=1.0, max_prompt_tokens=1000, max_new_tokens=8, warn=said.append
    )
    return [sample.completion_ids for sample in sampler.sample(requests, lambda done: None)], len(said)

freely, silent = sampled()
limit = psutil.Process().memory_info().vms + 90 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
starved, said = sampled()
print(silent, said, starved == freely)
"""


def test_a_process_that_really_has_too_little_memory_gets_through(policy: Path) -> None:
    # 512 rows of 1,000 tokens, each of which keeps 256 bytes, twice while they are copied.
    code = [sys.executable, "-c", STARVED, str(policy)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.split() == ["0", "1", "True"], done.stderr


@pytest.mark.parametrize("size", [1, 7, 20, 256, 257, 5000])
def test_the_token_of_a_number_is_the_first_whose_cumulated_probability_reaches_it(size: int) -> None:
    import torch

    from papo.engines.samplers.decoding import draw

    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(400, size, generator=generator)
    numbers = torch.rand(400, generator=generator, dtype=torch.double)
    chosen, logprobs = draw(logits, numbers, 0.8, 1.0)
    expected = torch.log_softmax(logits.double() / 0.8, -1)
    cumulated = expected.exp().cumsum(-1)
    plain = torch.searchsorted(cumulated, numbers[:, None]).squeeze(-1).clamp(max=size - 1)
    assert (chosen == plain).float().mean() > 0.99  # a number may lie within the rounding of a boundary
    rows = torch.arange(400)
    gap = numbers - (cumulated[rows, chosen] - expected.exp()[rows, chosen])
    assert bool(((gap > -1e-6) & (gap < expected.exp()[rows, chosen] + 1e-6)).all())
    np.testing.assert_allclose(logprobs, expected[rows, chosen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [20, 1000])
def test_no_number_draws_a_token_that_cannot_come(size: int) -> None:
    import torch

    from papo.engines.samplers.decoding import draw

    possible = [3, 9, 17] if size == 20 else [3, 255, 256, 700]
    logits = torch.full((1, size), -torch.inf)
    logits[0, possible] = torch.tensor([0.1, -0.3, 0.2, 0.05][: len(possible)])
    numbers = torch.cat([torch.tensor([0.0, 2**-53, 1 - 2**-53, 1.0]), torch.linspace(0, 1, 2000)]).double()
    chosen, logprobs = draw(logits.expand(len(numbers), -1), numbers, 1.0, 1.0)
    assert set(chosen.tolist()) == set(possible)
    assert (chosen[0], chosen[3]) == (possible[0], possible[-1])
    assert bool(logprobs.isfinite().all())


def test_a_policy_that_gives_no_numbers_is_named(policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(policy, tmp_path / "policy"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no finite numbers") as caught:
        sampled(sampler_of(folder), REQUESTS)
    assert caught.value.where == str(folder)


def test_a_prompt_that_does_not_fit_can_be_told_before(policy: Path) -> None:
    sampler: Any = sampler_of(policy, prompt=11)
    assert sampler.fits("1=?\n") is None
    assert sampler.fits("1+1+1+1+1=?\n") == "a prompt has 12 tokens, allowed are 1 to 11"
    assert sampler.fits("") == "a prompt has 0 tokens, allowed are 1 to 11"
    long: Any = sampler_of(policy, new=1020)
    assert long.fits("1=?\n") is None
    assert "do not fit into the 1024 positions" in long.fits("11=?\n")
