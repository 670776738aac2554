"""How often the intervals of ablations cover the truth, and how often a table holds a wrong verdict, on simulated runs.

    OMP_NUM_THREADS=1 python tests/benchmarks/table_of_coverage.py

Six arms with planted differences in log-odds, 200 problems, four answers each; `of seeds` and `of problems` say which of the two varies.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special  # type: ignore[import-untyped]  # scipy has no types

from papo.core.comparison import by_seed_and_problem, resampled, verdicts

GAINS = (0.0, 0.0, 0.3, -0.3, 0.8, -0.8)
SETTINGS = {"both": (0.3, 0.3), "of problems": (0.05, 0.6), "of seeds": (0.6, 0.05)}
PROBLEMS, SAMPLES, SIMULATIONS, BOOTSTRAPS, MARGIN = 200, 4, 300, 60, 0.03


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(1)
    print(
        "| seeds | what varies | coverage of the interval | of the bootstrap | tables with a wrong sign | with a wrong `no difference` |"
    )
    print("|---|---|---|---|---|---|")
    for seeds in (3, 5):
        for name, spread in SETTINGS.items():
            print(f"| {seeds} | {name} | {' | '.join(measured(rng, seeds, *spread))} |")


def measured(rng: np.random.Generator, seeds: int, of_seed: float, of_problem: float) -> list[str]:
    """The figures of one row."""
    hardness, noise = rng.normal(0.3, 1.5, 400_000), math.hypot(of_seed, of_problem) * rng.normal(size=400_000)
    levels = [float(special.expit(hardness + gain + noise).mean()) for gain in GAINS]
    truth = [0.0, *(level - levels[0] for level in levels[2:])]
    covered = drawn = signs = sames = 0
    for number in range(SIMULATIONS):
        hard = rng.normal(0.3, 1.5, PROBLEMS)
        arms = [
            rng.binomial(SAMPLES, special.expit(
                hard + gain + rng.normal(0, of_seed, seeds)[:, None] + rng.normal(0, of_problem, PROBLEMS)
            )) / SAMPLES
            for gain in GAINS
        ]  # fmt: skip
        tables = [arm - arms[0] for arm in arms[1:]]
        found = [by_seed_and_problem(table) for table in tables]
        told = verdicts(found, [MARGIN] * len(found))
        covered += sum(one.low <= true <= one.high for one, true in zip(found, truth, strict=True))
        signs += any(
            (v.word == "higher" and t <= 0) or (v.word == "lower" and t >= 0) for v, t in zip(told, truth, strict=True)
        )
        sames += any(v.within and abs(t) >= MARGIN for v, t in zip(told, truth, strict=True))
        if number < BOOTSTRAPS:
            ends = [resampled(table, seed=number, resamples=1000) for table in tables]
            drawn += sum(low <= true <= high for (low, high), true in zip(ends, truth, strict=True))
    of = SIMULATIONS * len(truth)
    return [
        f"{covered / of:.3f}",
        f"{drawn / (BOOTSTRAPS * len(truth)):.3f}",
        f"{signs / SIMULATIONS:.3f}",
        f"{sames / SIMULATIONS:.3f}",
    ]


if __name__ == "__main__":
    main()
