"""A round from two real servers, one of which is killed under it: the other one samples what is missing, from the same policy."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from papo.engines.recompute import PolicyRecomputer
from papo.engines.samplers import make_sampler
from papo.engines.serving import Servers
from papo.params import RolloutParams
from papo.schemas import PROBLEMS, ROLLOUTS, problem_id
from papo.stages import rollout
from papo.store.manifest import Context
from papo.store.tables import read_rows, write_rows

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

PROMPTS, GROUP = 40, 8


@pytest.fixture
def inputs(started: Path, tmp_path: Path) -> rollout.Inputs:
    problems = tmp_path / "train.parquet"
    sums = [(10 + number, 1 + number % 7) for number in range(PROMPTS)]
    rows = [
        {"problem_id": problem_id(f"{a}+{b}=?\n", str(a + b)), "prompt": f"{a}+{b}=?\n", "answer": str(a + b), "grading": "{}",
         "source": "test", "reference_solution": "", "split": "train"}
        for a, b in sums
    ]  # fmt: skip
    write_rows(problems, PROBLEMS, rows)
    return rollout.Inputs(round=0, seed=0, problems=problems, policy=started / "artifacts/warmstart")


def test_one_of_two_servers_is_killed(
    with_vllm: Path, inputs: rollout.Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; half of the machine's memory otherwise
    params = RolloutParams.model_validate({
        "engine": "vllm-server", "prompts_per_round": PROMPTS, "group_size": GROUP, "prompts_per_shard": 4, "max_new_tokens": 24,
        "max_prompt_tokens": 32, "checked_rows": PROMPTS * GROUP,
        "server": {
            "command": f"{with_vllm} -m vllm.entrypoints.openai.api_server", "servers": 2, "dtype": "float32", "concurrency": 8,
            "tries": 1, "start_s": 600.0,
            # A prompt that is read in parts ends vLLM 0.32.0 on the CPU if its request has a seed.
            "options": {"max-model-len": 64, "enforce-eager": True, "enable-chunked-prefill": False},
        },
    })  # fmt: skip
    told, warned, killed, out = list[int](), list[str](), list[str](), tmp_path / "rollouts.parquet"
    children = psutil.Process().children

    def tick(rows: int) -> None:
        told.append(rows)
        if len(told) == PROMPTS * GROUP // 4:
            (server,) = psutil.Process(first).children()
            killed.extend(server.cmdline())
            server.send_signal(signal.SIGKILL)

    context = Context(tmp_path / ".papo", progress=lambda what, total: nullcontext(tick), warn=warned.append)
    with Servers(params.server, tmp_path / "logs") as servers:
        urls = servers.serve(inputs.policy)
        first = min(child.pid for child in children() if child.is_running())
        sampler = make_sampler(
            params, inputs.policy, temperature=1.0, top_p=1.0, max_new_tokens=24, logs=tmp_path / "logs",
            urls=lambda: urls, warn=warned.append,
        )  # fmt: skip
        recomputer = PolicyRecomputer(inputs.policy, temperature=1.0)
        manifest = rollout.run(params, inputs, out, engine=rollout.Engine(sampler, recomputer), context=context)
    rows = read_rows(out, ROLLOUTS)
    names = [row["problem_id"] for row in read_rows(inputs.problems, PROBLEMS)]
    expected = Counter((name, index) for name in names for index in range(GROUP))
    assert Counter((row["problem_id"], row["sample_index"]) for row in rows) == expected
    assert sum(told) == len(rows)
    (named,) = [url for url in urls if url.split(":")[2].removesuffix("/v1") in killed]
    assert [line.split(" is left out")[0] for line in warned] == [named]
    # Of every row, whichever server it is from.
    assert all(row["logprob_difference_max"] is not None for row in rows)
    assert manifest.metrics["logprob_difference_max"] < 1e-4
    assert children() == []
