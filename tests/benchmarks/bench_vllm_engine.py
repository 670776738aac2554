"""Tokens per second of the sampler vllm against LLM.generate of the same vLLM, with the same rows and settings.

    python tests/benchmarks/bench_vllm_engine.py PYTHON_WITH_VLLM                       # the embedded shape, on this machine
    python tests/benchmarks/bench_vllm_engine.py PYTHON_WITH_VLLM --policy FOLDER
    python tests/benchmarks/bench_vllm_engine.py PYTHON_WITH_VLLM --policy FOLDER --gpu --prompts 1024 --shard 48 --new 1024

The runs of a pair follow each other, in an order that changes from pair to pair; the ratio is the median over the pairs. Both engines are
loaded before the first, and each has 0.4 of a GPU's memory. The sampler gives shards of checked, detokenised rows; `generate` gets all
rows in one call and hands back what vLLM makes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.bench_sampling_server import PROMPTS, embedded

from papo.engines.protocols import SampleRequest
from papo.engines.samplers.rows import fold_seed
from papo.engines.samplers.vllm import VllmSampler
from papo.engines.watched import environment_of
from papo.params import VllmParams
from papo.schemas import row_seed

BARE = """\
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from vllm import LLM, SamplingParams, TokensPrompt
given = json.loads(sys.stdin.readline())
llm = LLM(**given["engine"])
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in given["prompts"]]
for line in sys.stdin:
    params = [SamplingParams(**given["sampling"], seed=seed, flat_logprobs=True) for seed in given["seeds"]]
    started = time.perf_counter()
    tokens = sum(len(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False))
    print(tokens, time.perf_counter() - started, file=answers, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of an environment with vLLM")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--shard", type=int, default=16, help="prompts of one")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    given = parser.parse_args()
    options: dict[str, Any] = {"gpu_memory_utilization": 0.4} if given.gpu else {"enforce_eager": True}
    if not given.gpu:
        options["enable_chunked_prefill"] = False  # a prompt that is read in parts ends vLLM 0.32.0 on the CPU
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    params = VllmParams(python=given.python, options=options, dtype="bfloat16" if given.gpu else "float32")
    # 3,000 prompts at most, some of them with a number of two digits.
    texts = [
        *PROMPTS,
        *(text.replace("=?", "+1=?") for text in PROMPTS),
        *(text.replace("=?", "-2=?") for text in PROMPTS),
    ]
    shards = [
        [
            SampleRequest(text, row_seed(0, 0, text, index))
            for text in texts[first : min(first + given.shard, given.prompts)]
            for index in range(given.group)
        ]
        for first in range(0, given.prompts, given.shard)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = given.policy or embedded(folder / "policy")
        with VllmSampler(
            policy, temperature=1.0, top_p=1.0, max_prompt_tokens=64, max_new_tokens=given.new, params=params,
            logs=folder / "logs", warn=print,
        ) as sampler:  # fmt: skip
            compare(sampler, shards, given)


def compare(sampler: VllmSampler, shards: list[list[SampleRequest]], given: argparse.Namespace) -> None:
    rows = [request for shard in shards for request in shard]
    told = sampler._settings | {
        "prompts": sampler._prompts.encode(rows),
        "seeds": [fold_seed(request.seed) for request in rows],
    }
    with subprocess.Popen(
        [given.python, "-c", BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment_of(None), cwd=os.sep,
    ) as bare:  # fmt: skip
        assert bare.stdin is not None
        assert bare.stdout is not None
        print(json.dumps(told), file=bare.stdin, flush=True)

        def generate() -> tuple[int, float]:
            assert bare.stdin is not None
            assert bare.stdout is not None
            print("again", file=bare.stdin, flush=True)
            tokens, seconds = bare.stdout.readline().split()
            return int(tokens), float(seconds)

        def sample() -> tuple[int, float]:
            started, tokens, first = time.perf_counter(), 0, 0.0
            for _, samples in sampler.sample_shards(shards, lambda _: None):
                first = first or time.perf_counter() - started
                tokens += sum(len(one.completion_ids) for one in samples)
            seconds = time.perf_counter() - started
            print(f"  the first of {len(shards)} shards after {first:.2f} of {seconds:.2f} s")
            return tokens, seconds

        print(f"{len(rows)} rows of up to {given.new} tokens in {len(shards)} shards")
        ways = {"vllm": sample, "generate": generate}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for pair in range(-1, given.pairs):
            for name in list(ways)[:: 1 if pair % 2 == 0 else -1]:
                tokens, seconds = ways[name]()
                print(f"{name:9} {tokens:8d} tokens in {seconds:7.2f} s: {tokens / seconds:8.0f} a second")
                if pair >= 0:  # before that, they warm up
                    found[name].append(tokens / seconds)
        bare.stdin.close()
    ratio = statistics.median(own / base for own, base in zip(found["vllm"], found["generate"], strict=True))
    print(f"vllm: {ratio:.3f} of the tokens per second of LLM.generate, {sampler.metrics()}")


if __name__ == "__main__":
    main()
