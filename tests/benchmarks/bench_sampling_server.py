"""Tokens per second of the sampler vllm-server against a bare asynchronous client that sends the same requests to the same server.

    python tests/benchmarks/bench_sampling_server.py                                 # a stand-in server: what a row costs a client
    python tests/benchmarks/bench_sampling_server.py --python PYTHON_WITH_VLLM       # vLLM on this machine, the embedded shape
    python tests/benchmarks/bench_sampling_server.py --url URL --policy FOLDER       # one that is there

The runs of a pair follow each other, in an order that changes from pair to pair; the ratio is the median over the pairs. `bare` keeps as
many requests under way and reads the token ids of each answer, and checks nothing; it proves nothing of the server, either. `stage` is all
of papo rollout but the start of its process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as papo sets it

import aiohttp
from servers.completions import MODEL, completions_process, save_policy

from papo.engines.protocols import SampleRequest
from papo.engines.recompute import PolicyRecomputer
from papo.engines.samplers import make_sampler
from papo.engines.samplers.completions import served_name
from papo.engines.samplers.vllm_server import VllmServerSampler
from papo.engines.serving import Servers
from papo.params import RolloutParams, ServerParams
from papo.schemas import PROBLEMS, ROLLOUTS, problem_id, row_seed
from papo.stages import rollout
from papo.store.manifest import Context
from papo.store.tables import read_rows, write_rows

PROMPTS = [f"{a}+{b}-{c}=?\n" for a in range(10) for b in range(10) for c in range(10)]


async def bare(url: str, bodies: Sequence[bytes], width: int) -> int:
    """Tokens that were given."""
    turn, total = asyncio.Semaphore(width), 0
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(body: bytes) -> None:
            nonlocal total
            async with (
                turn,
                session.post(f"{url}/completions", data=body, headers={"content-type": "application/json"}) as response,
            ):
                total += len(json.loads(await response.read())["choices"][0]["token_ids"])

        await asyncio.gather(*map(one, bodies))
    return total


async def with_openai(url: str, bodies: Sequence[dict[str, Any]], width: int, *, typed: bool) -> int:
    """The same by openai's client: its typed completions, or as papo/engines/chat.py uses it."""
    import httpx2
    from openai import AsyncOpenAI, DefaultAioHttpClient

    limits = httpx2.Limits(max_connections=width, max_keepalive_connections=width)
    http = DefaultAioHttpClient(limits=limits, timeout=None)
    turn, total = asyncio.Semaphore(width), 0
    own = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logprobs")
    async with AsyncOpenAI(api_key="none", base_url=url, max_retries=0, http_client=http) as client:

        async def one(body: dict[str, Any]) -> None:
            nonlocal total
            async with turn:
                if typed:
                    given = {name: body[name] for name in own}
                    rest = {name: value for name, value in body.items() if name not in own}
                    found = await client.completions.create(**given, extra_body=rest)
                    total += len(found.choices[0].token_ids)  # type: ignore[attr-defined]  # vLLM's own field
                else:
                    response = await client.post("/completions", cast_to=httpx2.Response, body=body)
                    total += len(json.loads(response.content)["choices"][0]["token_ids"])

        await asyncio.gather(*map(one, bodies))
    return total


def measure(name: str, run: Callable[[], int]) -> tuple[float, float]:
    """Tokens per second, and ms of this process's CPU a run."""
    cpu, started = time.process_time(), time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - started
    spent = time.process_time() - cpu
    print(
        f"  {name:14} {tokens:7d} tokens in {seconds:7.2f} s: {tokens / seconds:8.0f} a second, {spent:6.2f} s of CPU here"
    )
    return tokens / seconds, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--python", help="with vLLM, which is started")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients", action="store_true", help="openai's client, too")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        params = ServerParams(concurrency=given.concurrency)
        if given.python is not None:
            policy = given.policy or embedded(folder / "policy")
            options: dict[str, Any] = {"enforce-eager": True, "enable-chunked-prefill": False}
            command = f"{given.python} -m vllm.entrypoints.openai.api_server"
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            own = ServerParams(command=command, options=options)
            url = stack.enter_context(Servers(own, folder / "logs", say=print)).serve(policy)[0]
            model = served_name(policy)
        elif given.url is not None:
            policy, url, model = given.policy, given.url, None
        else:
            policy = save_policy(folder / "policy", 0)
            url = stack.enter_context(completions_process(latency_s=0.01, context=128)).url
            model = MODEL
        params = params.model_copy(update={"base_urls": [url], "model": model})
        compare(policy, params, given)


def embedded(folder: Path) -> Path:
    """The embedded policy's shape, of random weights."""
    from papo.engines.tokenizer import build_tokenizer
    from papo.engines.warmstart import _build_model
    from papo.params import WarmstartParams

    tokenizer = build_tokenizer()
    _build_model(WarmstartParams(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stage(policy: Path, server: ServerParams, given: argparse.Namespace) -> int:
    """Tokens of a whole stage, from its policy to its table; as many prompts and rows as the others have."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"problem_id": problem_id(prompt, "1"), "prompt": prompt, "answer": "1", "grading": "{}", "source": "made",
             "split": "train"}
            for prompt in PROMPTS[: given.prompts]
        ]  # fmt: skip
        write_rows(folder / "train.parquet", PROBLEMS, rows)
        params = RolloutParams(
            engine="vllm-server", prompts_per_round=given.prompts, group_size=given.group, max_prompt_tokens=64,
            max_new_tokens=given.new, server=server,
        )  # fmt: skip
        sampler = make_sampler(params, policy, temperature=1.0, top_p=1.0, max_new_tokens=given.new, logs=folder)
        engine = rollout.Engine(sampler, PolicyRecomputer(policy, temperature=1.0))
        inputs = rollout.Inputs(0, 0, folder / "train.parquet", policy)
        rollout.run(
            params, inputs, folder / "out/rollouts.parquet", engine=engine, context=Context(work=folder / "work")
        )
        return sum(len(row["completion_ids"]) for row in read_rows(folder / "out/rollouts.parquet", ROLLOUTS))


def compare(policy: Path, params: ServerParams, given: argparse.Namespace) -> None:
    requests = [
        SampleRequest(prompt, row_seed(0, 0, prompt, index))
        for prompt in PROMPTS[: given.prompts]
        for index in range(given.group)
    ]
    sampler = VllmServerSampler(
        policy, temperature=1.0, top_p=1.0, max_prompt_tokens=64, max_new_tokens=given.new, params=params
    )
    url, width = params.base_urls[0], params.concurrency
    prompts = sampler._known.prompts.encode(requests)  # as the bare client has them, too
    sampler.versions()
    model = params.model or "policy"
    bodies = [sampler._sampling.body(model, prompt, one.seed) for prompt, one in zip(prompts, requests, strict=True)]
    encoded = [json.dumps(body).encode() for body in bodies]
    ways: dict[str, Callable[[], int]] = {
        "bare": lambda: asyncio.run(bare(url, encoded, width)),
        "vllm-server": lambda: sum(len(one.completion_ids) for one in sampler.sample(requests, lambda _: None)),
        "stage": lambda: stage(policy, params, given),
    }
    if given.clients:
        ways["openai"] = lambda: asyncio.run(with_openai(url, bodies, width, typed=True))
        ways["openai, raw"] = lambda: asyncio.run(with_openai(url, bodies, width, typed=False))
    print(f"{len(requests)} rows of up to {given.new} tokens, {width} at a time")
    measure("(first)", ways["bare"])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for pair in range(given.pairs):
        for name in list(ways)[:: 1 if pair % 2 == 0 else -1]:
            found[name].append(measure(name, ways[name]))
    for name, values in found.items():
        ratio = statistics.median(own[0] / base[0] for own, base in zip(values, found["bare"], strict=True))
        cpu = statistics.median(spent for _, spent in values) / len(requests) * 1000
        print(f"{name}: {ratio:.3f} of the tokens per second of bare, {cpu:.2f} ms of CPU a row")


if __name__ == "__main__":
    main()
