"""Calls a second of the judge, and what they cost it: a server of 200 ms latency in another process, 64 calls at a time.

    python tests/benchmarks/bench_judge.py

Two things are measured: the chat client alone, and the whole stage score_prm from tables to table, with rubric, store of verdicts and
ledger, followed by a second pass over the same responses, which the store answers.

Ideal is concurrency / latency, with a client that takes no time. Prompts have the length of a rubric with a problem and a response; the CPU
is that of the client's process, by its own clock and by psutil's. Which other processes run tells on the rate, hardly on the CPU a call.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from judging import judging, run_stage, write_round
from servers.chat import ChatProcess, chat_process

from papo.engines.chat import ChatClient, ChatRequest
from papo.params import ChatParams
from papo.schemas import PRM, ROLLOUTS
from papo.store.layout import Workspace
from papo.store.tables import read_rows, write_rows

TASK = "You grade the reasoning of a response, step by step. " * 20
RESPONSE = "[step 1] We add the two numbers and see that the sum is even. " * 40
SOLUTION = "We add the two numbers and see that the sum is even.\n\n" * 20
SCHEMA = {"type": "object", "properties": {"reason": {"type": "string"}, "verdict": {"enum": ["1", "0.5", "0"]}}}


class Run(NamedTuple):
    """One run: calls a second, CPU seconds a call of client and server, and calls that gave an answer."""

    rate: float
    client_s: float
    server_s: float
    ok: int


async def ask_all(client: ChatClient, calls: int) -> tuple[int, float, float]:
    """Answered calls, wall and CPU seconds, once the connections are there."""
    async with client:
        await asyncio.gather(*(client.ask(ChatRequest(TASK, f"warm {n}")) for n in range(client.params.concurrency)))
        wall, cpu = time.perf_counter(), time.process_time()
        asked = [ChatRequest(TASK, f"{n} {RESPONSE}", SCHEMA) for n in range(calls)]
        replies = await asyncio.gather(*map(client.ask, asked))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return sum(reply.status == "ok" for reply in replies), wall, cpu


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def one_run(server: ChatProcess, calls: int, concurrency: int) -> Run:
    server.set()
    params = ChatParams(model="m", base_url=server.url, concurrency=concurrency)
    before = cpu_s(server.process.pid)
    ok, wall, cpu = asyncio.run(ask_all(ChatClient(params), calls))
    seen = server.seen
    assert seen.billed.total() == calls + concurrency, "not one try a call"
    assert seen.most <= concurrency
    return Run(calls / wall, cpu / calls, (cpu_s(server.process.pid) - before) / calls, ok)


class JudgeRun(NamedTuple):
    """Calls a second and CPU seconds a call of the first pass, rows a second of the second."""

    rate: float
    client_s: float
    again: float


def one_judge_run(server: ChatProcess, calls: int, concurrency: int, folder: Path) -> JudgeRun:
    server.set()
    params = judging(server, model={"concurrency": concurrency})
    judged, warm = Workspace(folder / "judged"), Workspace(folder / "warm")
    for workspace, count in ((judged, calls), (warm, concurrency)):
        write_round(workspace, ["1" * 8] * (count // 8))
        path = workspace.table(0, "rollouts")
        rows = read_rows(path, ROLLOUTS)
        write_rows(path, ROLLOUTS, [row | {"completion": f"{n}: {SOLUTION}"} for n, row in enumerate(rows)])
    run_stage(warm, params)  # imports of seconds, once a process
    server.set()
    times = []
    for out in ("first", "second"):
        wall, cpu = time.perf_counter(), time.process_time()
        manifest = run_stage(judged, params, out=out)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        assert manifest.counts == {"ok": calls}
    scores = [[row["prm_score"] for row in read_rows(judged.table(0, out), PRM)] for out in ("first", "second")]
    assert scores[0] == scores[1]
    assert server.seen.billed.total() == calls, "not one call a response in two passes"
    assert server.seen.most <= concurrency
    (once, cpu), (again, _) = times
    return JudgeRun(calls / once, cpu / calls, calls / again)


def main() -> None:
    parser = argparse.ArgumentParser(description="Calls a second of the judge.")
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    ideal = args.concurrency / args.latency_s
    with chat_process(latency_s=args.latency_s, reply="servers.replies:levels") as server:
        runs, judged = [], []
        for number in range(args.repeats):
            run = one_run(server, args.calls, args.concurrency)
            runs.append(run)
            print(
                f"run {number}: {run.rate:.0f} calls/s ({run.rate / ideal:.1%} of {ideal:.0f}), {run.ok} of {args.calls} answered; client "
                f"{1e3 * run.client_s:.2f} ms of CPU a call, {run.rate * run.client_s:.2f} cores; server {1e3 * run.server_s:.2f} ms; "
                f"load {os.getloadavg()[0]:.1f}"
            )
            with tempfile.TemporaryDirectory() as folder:
                judge = one_judge_run(server, args.calls, args.concurrency, Path(folder))
            judged.append(judge)
            print(
                f"       stage: {judge.rate:.0f} calls/s ({judge.rate / ideal:.1%}), {1e3 * judge.client_s:.2f} ms of CPU a call, "
                f"{judge.rate * judge.client_s:.2f} cores; again from the store: {judge.again:.0f} rows/s, no call"
            )
    rate, client_s = (statistics.median(column) for column in list(zip(*runs, strict=True))[:2])
    print(
        f"median, client: {rate:.0f} calls/s, {rate / ideal:.1%} of the ideal; {rate * client_s:.2f} cores, "
        f"and {ideal * client_s:.2f} at the ideal rate"
    )
    rate, client_s, again = (statistics.median(column) for column in zip(*judged, strict=True))
    print(
        f"stage: {rate:.0f} calls/s, {rate / ideal:.1%} of the ideal, {rate * client_s:.2f} cores; again {again:.0f} rows/s"
    )


if __name__ == "__main__":
    main()
