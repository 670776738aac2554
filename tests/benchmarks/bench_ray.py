"""How long the verifier takes with a Ray cluster of one and of two workers on this machine, against this process alone.

    python tests/benchmarks/bench_ray.py COMPLETIONS.jsonl

COMPLETIONS: lines of {gold, completions: [{text}]}, as for bench_verifier.py; they are repeated to --count, each with its last number in a
box, and every tenth has an algebraic answer instead, so that there is work for child processes, too. In turns, so that what else the
machine does falls on all alike; the verdicts are compared. Two workers on two cores share them with Ray and the process that hands out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_verifier import good, rewritten
from prefect import flow

from flows.spread import open_spread
from papo.engines.fan_out import SpreadVerifier
from papo.engines.protocols import Verdict, Verifier, VerifyItem
from papo.engines.verifiers import make_verifier
from papo.params import RayParams, ScoreOrmParams


def timed(verifier: Verifier, items: Sequence[VerifyItem]) -> tuple[list[Verdict], float]:
    start = time.perf_counter()
    verdicts = verifier.verify(items, lambda done: None)
    return verdicts, time.perf_counter() - start


@flow(persist_result=False)
def by_ray(completions: Path, count: int, workers: int, chunk: int, runs: int) -> list[tuple[float, float]]:
    """Seconds by Ray and here, of each run."""
    import ray

    real, algebra = rewritten(completions), good(count)
    items = [algebra[n] if n % 10 == 0 else real[n % len(real)] for n in range(count)]
    ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    make = partial(make_verifier, ScoreOrmParams())
    found = []
    try:
        with open_spread(RayParams(chunk=chunk)) as spread:
            assert spread is not None
            there = SpreadVerifier(make, spread)
            there.verify(items[: 2 * workers * chunk], lambda done: None)  # its workers import what they need
            for _ in range(runs):
                verdicts, seconds = timed(there, items)
                here, alone = timed(make(), items)
                assert verdicts == here
                found.append((seconds, alone))
                print(f"{workers} workers: by Ray {seconds:.1f} s, here {alone:.1f} s")
    finally:
        ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("completions", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    for workers in (1, 2):
        found = by_ray(given.completions, given.count, workers, given.chunk, given.runs)
        ratios = [seconds / alone for seconds, alone in found]
        print(f"{workers} workers take {statistics.median(ratios):.2f} times as long as this process alone")


if __name__ == "__main__":
    main()
