"""Differences between two arms of an ablation, and what can be said of them.

Each seed trains both arms, and each is evaluated on the same problems, so d[s, p] is the difference of the two arms by seed s and problem
p. Both are samples: of the seeds that training might have had, and of the problems that the benchmark might have had. With the means
m_s of a seed, m_p of a problem and m of all,

    MSA = P sum_s (m_s - m)^2 / (S - 1)                      between seeds
    MSB = S sum_p (m_p - m)^2 / (P - 1)                      between problems
    MSE = sum_sp (d[s,p] - m_s - m_p + m)^2 / ((S-1)(P-1))   what is left
    variance(m) = (MSA + MSB - MSE) / (S P), at least max(MSA, MSB) / (S P)

which is the two-way random effects model (a crossed design; Cornfield and Tukey 1956). Its degrees of freedom are Satterthwaite's

    (MSA + MSB - MSE)^2 / (MSA^2 / (S-1) + MSB^2 / (P-1) + MSE^2 / ((S-1)(P-1))), at least S - 1; 1 for two seeds,

and the interval is m +- t * sqrt(variance(m)). An interval over problems alone says how sure one is of these S policies, not of the
method; one over seeds alone takes the benchmark for the world. `resampled` is the bootstrap over both, which needs no model and is too
narrow for few seeds (tests/benchmarks/table_of_coverage.py measures both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from papo.core.groups import FloatArray
from papo.errors import DataError, ParamsError

Word = Literal["higher", "lower", "same", "undecided"]

POWER = 0.8
"""Chance of a verdict that the number of further seeds aims at."""
MOST_SEEDS = 200
"""More than so many are no advice."""


class Difference(NamedTuple):
    """The mean of d with its interval, and the mean squares it comes from.

    `problems` is 1 where there is one value a seed; `left_out`: problems that had no value in some seed. `effect`: the mean over the
    standard deviation between seeds, with Hedges' correction for few of them; NaN where seeds do not differ, and of two seeds.
    """

    value: float
    low: float
    high: float
    standard_error: float
    freedom: float
    seeds: int
    problems: int
    left_out: int
    effect: float
    between_seeds: float
    between_problems: float
    residual: float

    def p_zero(self) -> float:
        """Two-sided p of a mean of 0."""
        if self.standard_error == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        return 2.0 * _t_tail(abs(self.value) / self.standard_error, self.freedom)

    def p_outside(self, margin: float) -> float:
        """p of a mean of at least `margin` in size: the larger of two one-sided tests (Schuirmann 1987)."""
        room = margin - abs(self.value)
        if self.standard_error == 0.0:
            return 0.0 if room > 0.0 else 1.0
        return _t_tail(room / self.standard_error, self.freedom)

    def variance_with(self, seeds: int) -> float:
        """What the variance of the mean would be with so many seeds and the same problems."""
        if self.problems == 1:
            return self.between_seeds / seeds
        of_seeds = max(self.between_seeds - self.residual, 0.0) / self.problems
        of_problems = max(self.between_problems - self.residual, 0.0) / self.seeds
        return of_seeds / seeds + of_problems / self.problems + self.residual / (seeds * self.problems)


class Verdict(NamedTuple):
    """`p` and `p_same` are corrected for all tests that were made together. `seeds`: about so many more would decide; None: not by seeds.

    `within`: the difference is smaller than the margin, whatever its sign.
    """

    word: Word
    p: float
    p_same: float
    within: bool
    seeds: int | None = None


def by_seed_and_problem(differences: npt.ArrayLike, *, confidence: float = 0.95) -> Difference:
    """The mean difference with an interval over seeds and problems, by the equations above.

    Args:
        differences: (S, P) by seed and problem; a problem with a NaN in any seed is left out.
        confidence: coverage of the interval.

    Raises:
        DataError: fewer than two seeds, or fewer than two problems with a value in every seed.
        ParamsError: confidence outside (0, 1).
    """
    every = _checked(differences, 2)
    known = every[:, ~np.isnan(every).any(axis=0)]
    seeds, problems = known.shape
    if seeds < 2 or problems < 2:
        raise DataError(
            f"{seeds} seeds and {problems} problems that all of them have values of: too few for an interval",
            where="differences",
            fix="Run at least two seeds of both arms on the same problems.",
        )
    mean, of_seed, of_problem = float(known.mean()), known.mean(axis=1), known.mean(axis=0)
    left = known - of_seed[:, None] - of_problem[None, :] + mean
    msa = problems * float(np.sum((of_seed - mean) ** 2)) / (seeds - 1)
    msb = seeds * float(np.sum((of_problem - mean) ** 2)) / (problems - 1)
    mse = float(np.sum(left**2)) / ((seeds - 1) * (problems - 1))
    total = max(msa + msb - mse, msa, msb)
    spread = msa**2 / (seeds - 1) + msb**2 / (problems - 1) + mse**2 / ((seeds - 1) * (problems - 1))
    # Two seeds that happen to agree look like seeds that do not matter: with more freedom the interval would be too narrow.
    freedom = max(total**2 / spread, seeds - 1.0) if spread > 0.0 and seeds > 2 else seeds - 1.0
    error = math.sqrt(total / (seeds * problems))
    return _difference(mean, error, freedom, of_seed, confidence, problems, every.shape[1] - problems, (msa, msb, mse))


def by_seed(differences: npt.ArrayLike, *, confidence: float = 0.95) -> Difference:
    """The mean of one difference a seed, with Student's interval of S - 1 degrees of freedom.

    Args:
        differences: (S,) by seed; a seed with a NaN is left out.

    Raises:
        DataError: fewer than two seeds.
        ParamsError: confidence outside (0, 1).
    """
    every = _checked(differences, 1)
    known = every[~np.isnan(every)]
    if known.size < 2:
        fix = "Run at least two seeds of both arms."
        raise DataError(f"{known.size} seeds with a value: too few for an interval", where="differences", fix=fix)
    variance = float(known.var(ddof=1))
    error = math.sqrt(variance / known.size)
    return _difference(float(known.mean()), error, known.size - 1.0, known, confidence, 1, 0, (variance, 0.0, 0.0))


def resampled(
    differences: npt.ArrayLike, *, seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of (S, P) differences, seeds and problems drawn with replacement, each by itself.

    The same problems are drawn for all seeds of a resample, as each seed had the same ones (the pigeonhole bootstrap, Owen 2007).
    (S,) differences are those of one problem, of which only seeds are drawn.

    Raises:
        DataError, ParamsError: as `by_seed_and_problem`; resamples < 2.
    """
    if resamples < 2:
        raise ParamsError(f"resamples is {resamples} and must be at least 2", where="resampled")
    array = np.asarray(differences, dtype=np.float64)
    known = _checked(array[:, None] if array.ndim == 1 else array, 2)
    known = known[:, ~np.isnan(known).any(axis=0)] if array.ndim == 2 else known[~np.isnan(known[:, 0])]
    seeds, problems = known.shape
    if seeds < 1 or problems < 1:
        raise DataError("no value in every seed", where="differences", fix="Evaluate both arms on the same problems.")
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples) / seeds
    of_problems = rng.multinomial(problems, np.full(problems, 1.0 / problems), size=resamples) / problems
    means = np.einsum("rs,rs->r", of_seeds, of_problems @ known.T)
    tail = (1.0 - _confident(confidence)) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail]).tolist()
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for all of them (Holm 1979): the chance of any wrong rejection stays below the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min((len(p_values) - rank) * p_values[index], 1.0))
        corrected[index] = highest
    return corrected


def verdicts(differences: Sequence[Difference], margins: Sequence[float], *, level: float = 0.05) -> list[Verdict]:
    """What can be said of differences that are looked at together.

        higher, lower   a mean of 0 is rejected
        same            a mean of at least the margin, in size, is rejected, and one of 0 is not
        undecided       neither

    Each of the two tests is corrected for all differences by `holm`, so that the chance that any `higher` or `lower` has the wrong sign
    (or stands where there is no difference) is at most `level`, and likewise the chance that any difference called smaller than its
    margin is not.

    Args:
        margins: the smallest size that matters, of each; 0 where none is named, which `same` is never said of.

    Raises:
        DataError: not one margin a difference, or a negative one.
        ParamsError: level outside (0, 0.5).
    """
    if len(margins) != len(differences) or any(not margin >= 0.0 for margin in margins):
        raise DataError("needs one margin of at least 0 a difference", where="margins")
    if not 0.0 < level < 0.5:
        raise ParamsError(f"level is {level} and must lie between 0 and 0.5", where="level")
    zero = [one.p_zero() for one in differences]
    outside = [one.p_outside(margin) for one, margin in zip(differences, margins, strict=True)]
    found = []
    for one, margin, p, p_corrected, q, q_corrected in zip(
        differences, margins, zero, holm(zero), outside, holm(outside), strict=True
    ):
        within = q_corrected <= level and margin > 0.0
        if p_corrected <= level:
            word: Word = "higher" if one.value > 0.0 else "lower"
        else:
            word = "same" if within else "undecided"
        seeds = None
        if word == "undecided":
            # A correction that p saw is one that its level would see with more seeds.
            of_zero = level * p / p_corrected if p_corrected < 1.0 and p > 0.0 else level / len(differences)
            of_margin = level * q / q_corrected if q_corrected < 1.0 and q > 0.0 else level / len(differences)
            seeds = _more_seeds(one, margin, of_zero, of_margin)
        found.append(Verdict(word, p_corrected, q_corrected, within, seeds))
    return found


def _more_seeds(one: Difference, margin: float, of_zero: float, of_margin: float) -> int | None:
    """Seeds beyond those there are, after which one of the tests rejects with chance POWER if the difference is what it seems."""
    for seeds in range(one.seeds + 1, MOST_SEEDS + 1):
        error = math.sqrt(one.variance_with(seeds))
        freedom = max(one.freedom, seeds - 1.0)
        by_chance = _t_point(1.0 - POWER, freedom)
        if abs(one.value) >= (_t_point(of_zero / 2.0, freedom) + by_chance) * error > 0.0:
            return seeds - one.seeds
        # Both bounds have to be excluded; near the middle of the margin either may fail.
        near = 1.0 if abs(one.value) > margin / 4.0 else 2.0
        if margin - abs(one.value) >= (_t_point(of_margin, freedom) + _t_point((1.0 - POWER) / near, freedom)) * error:
            return seeds - one.seeds
    return None


def _difference(
    value: float, error: float, freedom: float, of_seed: FloatArray, confidence: float, problems: int, left_out: int,
    squares: tuple[float, float, float],
) -> Difference:  # fmt: skip
    reach = _t_point((1.0 - _confident(confidence)) / 2.0, freedom) * error
    spread = float(of_seed.std(ddof=1))
    # Hedges and Olkin (1985): a standardised mean of few is too large by about 3 / (4 n - 5), of two by no bound.
    effect = (
        value / spread * (1.0 - 3.0 / (4.0 * of_seed.size - 5.0)) if spread > 0.0 and of_seed.size > 2 else math.nan
    )
    return Difference(
        value, value - reach, value + reach, error, freedom, of_seed.size, problems, left_out, effect, *squares
    )


def _checked(differences: npt.ArrayLike, dimensions: int) -> FloatArray:
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != dimensions:
        raise DataError(f"{array.ndim} dimensions, and not {dimensions}", where="differences")
    if np.isinf(array).any():
        raise DataError("an infinite difference", where="differences")
    return array


def _confident(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ParamsError(f"confidence is {confidence} and must lie between 0 and 1", where="confidence")
    return confidence


def _t_tail(value: float, freedom: float) -> float:
    """Chance that Student's t is above `value`."""
    from scipy import special  # late: it takes a third of a second

    return float(special.stdtr(freedom, -value))


def _t_point(tail: float, freedom: float) -> float:
    """Above which Student's t lies with chance `tail`."""
    from scipy import special

    return -float(special.stdtrit(freedom, tail))
