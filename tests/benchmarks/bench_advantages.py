"""Compare compute_advantages with a loop over the groups, in one process: python tests/benchmarks/bench_advantages.py.

Prints the median seconds of five runs of each, their ratio, and the peak of memory that numpy and Python asked for.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from papo.core.advantages import compute_advantages

Array = npt.NDArray[np.float64]
EPS = 1e-6


def normalise(scores: Array) -> Array:
    if scores.size < 2 or (std := scores.std(ddof=1)) <= EPS:
        return np.zeros_like(scores)
    normalised: Array = (scores - scores.mean()) / (std + EPS)
    return normalised


def loop(orm: Array, prm: Array, ids: npt.NDArray[np.int64]) -> Array:
    """The same advantages, one group at a time."""
    total = np.zeros(orm.size)
    order = np.argsort(ids, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(ids[order])) + 1):
        total[rows] = normalise(orm[rows])
        right = rows[orm[rows] == 1]
        total[right] += normalise(prm[right])
    return total


def median_seconds(call: Callable[[], object], runs: int = 5) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=1_000_000)
    parser.add_argument("--group-size", type=int, default=8)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(options.responses) // options.group_size)
    orm = rng.integers(0, 2, ids.size).astype(float)
    prm = np.where(orm == 1, rng.choice([0.0, 0.5, 1.0], ids.size), np.nan)
    shuffled = [f"problem-{i:08d}" for i in ids]
    ordered = sorted(shuffled)  # as tables have them: the responses of a problem one after another
    np.testing.assert_allclose(compute_advantages(orm, prm, ids).total, loop(orm, prm, ids), atol=1e-9)

    slow = median_seconds(lambda: loop(orm, prm, ids))
    fast = median_seconds(lambda: compute_advantages(orm, prm, ids))
    text = median_seconds(lambda: compute_advantages(orm, prm, ordered))
    mixed = median_seconds(lambda: compute_advantages(orm, prm, shuffled))
    tracemalloc.start()
    compute_advantages(orm, prm, ids)
    peak = tracemalloc.get_traced_memory()[1] / 2**20

    print(f"{ids.size:,} responses in groups of {options.group_size}, medians of 5 runs")
    print(f"loop over groups                    {slow:8.3f} s")
    print(f"vectorised, ids ints, any order     {fast:8.3f} s   ratio {slow / fast:.1f}")
    print(f"vectorised, strings, in groups      {text:8.3f} s   ratio {slow / text:.1f}")
    print(f"vectorised, strings, any order      {mixed:8.3f} s   ratio {slow / mixed:.1f}")
    print(f"peak memory                         {peak:8.0f} MiB")


if __name__ == "__main__":
    main()
