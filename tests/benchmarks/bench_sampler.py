"""Tokens a second of the transformers sampler, against one `generate` a prompt group in order of arrival.

    python tests/benchmarks/bench_sampler.py
    python tests/benchmarks/bench_sampler.py --lengths ../shared/data/gsm8k_sampled_G4.jsonl

Both sides load the same random model and draw the same tokens from the same numbers: the baseline is transformers' own `generate` with a
logits processor that draws each row's token, as plain sampling would give other completions of other lengths. It is called once for the
eight rows of a prompt. Lengths are forced: a bias keeps the end-of-text token, the last of the vocabulary, from coming by itself, and
where a row is to end its number is above 1, which draws the last token of all. Lengths come from the questions and completions of FILE
(tokens are counted as words, digits and signs; a group of eight draws from the four completions of its question, which favours the
baseline, as the longest of four is shorter than that of eight) or, without it, from a lognormal fitted to it: log-mean 4.74, standard
deviation 0.33 between problems and 0.27 within one (mean 126 tokens, 99 % below 311); prompts 3.97 and 0.36 (mean 56).

Models: `embedded`, the shape of the embedded policy (0.3 M, vocabulary 20), and `qwen2`, of Qwen2's shape (25 M, vocabulary 32,000).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from papo.cli import quiet_environment
from papo.engines.policy import import_libraries, load_policy
from papo.engines.protocols import Sample, SampleRequest
from papo.engines.samplers.transformers import TransformersSampler

if TYPE_CHECKING:
    import torch

GROUP = 8
MOST = 512  # new tokens
PIECE = re.compile(r"\d|[^\W\d]+|[^\w\s]|\n")
NEVER = -30.0  # added to the logit of the end-of-text token


class Group(NamedTuple):
    """Tokens of a prompt and of its completions."""

    prompt: int
    completions: list[int]


def groups_of(path: Path | None, count: int, stream: random.Random) -> list[Group]:
    if path is None:
        found = []
        for _ in range(count):
            centre = stream.gauss(4.74, 0.33)
            lengths = [round(stream.lognormvariate(centre, 0.27)) for _ in range(GROUP)]
            found.append(Group(round(stream.lognormvariate(3.97, 0.36)), lengths))
    else:
        rows = stream.sample([json.loads(line) for line in path.read_text().splitlines()], count)
        found = [
            Group(
                len(PIECE.findall(row["question"])),
                stream.choices([len(PIECE.findall(each["text"])) for each in row["completions"]], k=GROUP),
            )
            for row in rows
        ]
    return [Group(max(prompt, 1), [min(max(n, 1), MOST) for n in lengths]) for prompt, lengths in found]


def write_policy(name: str, folder: Path) -> None:
    """A random model and a tokenizer of whose vocabulary the last word ends a completion."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    size = 20 if name == "embedded" else 32_000
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"w{size - 1}"
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last, pad_token="w0").save_pretrained(folder)
    common: dict[str, Any] = {"vocab_size": size, "eos_token_id": size - 1, "pad_token_id": 0, "bos_token_id": None}
    common |= {"tie_word_embeddings": True, "max_position_embeddings": 1024}
    hf.set_seed(0)
    if name == "embedded":
        shape = hf.LlamaConfig(
            hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, **common
        )
        hf.LlamaForCausalLM(shape).save_pretrained(folder)
    else:
        shape = hf.Qwen2Config(
            hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
            **common,
        )  # fmt: skip
        hf.Qwen2ForCausalLM(shape).save_pretrained(folder)


class ForcedSampler(TransformersSampler):
    """Row n ends after `lengths[n]` tokens, n being its seed."""

    lengths: list[int]

    def _uniforms(self, requests: Sequence[SampleRequest]) -> torch.Tensor:
        numbers = super()._uniforms(requests)
        for row, request in enumerate(requests):
            numbers[row, self.lengths[request.seed] - 1] = 2.0  # above all
        return numbers

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import PreTrainedTokenizerFast

        model, _ = load_policy(self._policy)
        # Asked for the tokenizer of a Qwen2, AutoTokenizer makes one of Qwen2's class, which knows no words.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self._policy)
        bias = torch.zeros(model.config.vocab_size)
        bias[tokenizer.eos_token_id] = NEVER
        model.lm_head.bias = torch.nn.Parameter(bias)
        return model, tokenizer

    def by_group(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One `generate` for each eight requests, in their order."""
        import torch

        from papo.engines.samplers.decoding import generate

        found: list[Sample] = []
        for start in range(0, len(requests), GROUP):
            group = requests[start : start + GROUP]
            prompts = [self._encode(request.prompt) for request in group]

            def ended(row: int, ids: list[int], logprobs: list[float], prompts: list[list[int]] = prompts) -> None:
                found.append(self._sample(prompts[row], ids, logprobs))

            with torch.inference_mode():
                generate(
                    self._model,
                    prompts,
                    self._uniforms(group),
                    temperature=1.0,
                    top_p=1.0,
                    eos=self._tokenizer.eos_token_id,
                    pad_token=self._tokenizer.pad_token_id,
                    ended=ended,
                )
        return found


def compare(name: str, groups: Sequence[Group], pairs: int, batch_rows: int | None) -> None:
    stream = random.Random(1)
    size = 20 if name == "embedded" else 32_000
    prompts = [" ".join(f"w{stream.randrange(size - 1)}" for _ in range(group.prompt)) for group in groups]
    requests = [SampleRequest(prompt, GROUP * n + each) for n, prompt in enumerate(prompts) for each in range(GROUP)]
    with tempfile.TemporaryDirectory() as folder:
        write_policy(name, Path(folder))
        sampler = ForcedSampler(
            Path(folder), temperature=1.0, top_p=1.0, max_prompt_tokens=512, max_new_tokens=MOST, batch_rows=batch_rows
        )
        sampler.lengths = [length for group in groups for length in group.completions]
        sampler.sample(requests[:GROUP], lambda done: None)
        sampler.by_group(requests[:GROUP])
        tokens = sum(sampler.lengths)
        fast, slow, ratios, by_cpu = [], [], [], []
        for number in range(pairs):
            (ours, wall, cpu) = timed(lambda: sampler.sample(requests, lambda done: None))
            (theirs, their_wall, their_cpu) = timed(lambda: sampler.by_group(requests))
            assert [len(sample.completion_ids) for sample in ours] == sampler.lengths
            same = sum(a.completion_ids == b.completion_ids for a, b in zip(ours, theirs, strict=True))
            # Where thousands of tokens are about as likely, rounding draws a neighbour now and then, and all that follows differs.
            assert same >= 0.9 * len(ours), f"only {same} rows are the same"
            fast.append(tokens / wall)
            slow.append(tokens / their_wall)
            ratios.append(their_wall / wall)
            by_cpu.append(their_cpu / cpu)
            print(
                f"  pair {number}: {fast[-1]:.0f} against {slow[-1]:.0f} tokens/s, ratio {ratios[-1]:.2f}, of CPU time {by_cpu[-1]:.2f}; "
                f"{same} of {len(ours)} rows the same; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        rows = sampler.metrics()["batch_rows"]
    print(
        f"{name}: medians {statistics.median(fast):.0f} against {statistics.median(slow):.0f} tokens/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), of CPU time {statistics.median(by_cpu):.2f}; "
        f"{len(requests)} rows, {tokens} tokens, up to {rows:.0f} rows a batch"
    )


def timed(call: Callable[[], list[Sample]]) -> tuple[list[Sample], float, float]:
    """What it gives, and the seconds of wall and CPU that it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of the transformers sampler.")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="gsm8k_sampled_G4.jsonl; without it, a lognormal")
    parser.add_argument("--model", choices=["embedded", "qwen2"], help="one of them only")
    parser.add_argument("--prompts", type=int, help="48 for the embedded model, 8 for the other")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-rows", type=int, help="instead of what memory gives")
    args = parser.parse_args()
    quiet_environment()
    import_libraries("rollout")
    print(
        f"lengths: {args.lengths.name if args.lengths else 'lognormal'}; {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
    for name, count in (("embedded", 48), ("qwen2", 8)):
        if args.model in (None, name):
            compare(name, groups_of(args.lengths, args.prompts or count, random.Random(0)), args.pairs, args.batch_rows)


if __name__ == "__main__":
    main()
