"""The plots of an ablation: curves with bands over seeds, arms along an axis, length against accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from papo.core.groups import FloatArray
from papo.engines.reporting.plots import LIGHT, Plot, axes_of, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("other", "outcome", "process", "easy", "hard", "sixth", "seventh", "eighth")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.2, 1.5, 1.2)))
MARKERS = "osD^vP*X"

TITLES = {
    "accuracy": "Training accuracy",
    "zero_advantage_share": "Responses with zero advantage",
    "groups_process_active_share": "Groups where A_proc is active",
    "prm_mean": "Judge's score, all responses",
    "prm_mean_correct": "Judge's score, correct responses",
    "length_mean": "Mean length, tokens",
    "verification_share": "Responses that verify",
    "inversions": "Correct responses below a wrong one",
}


@dataclass(frozen=True)
class Line:
    """One arm: (S, X) values by seed, at x."""

    label: str
    style: int
    x: FloatArray
    values: FloatArray


@dataclass(frozen=True)
class Panel:
    """Arms that are drawn together; `ticks` names the places along x where those are labels."""

    lines: list[Line]
    percent: bool
    xlabel: str = "round"
    ylabel: str = ""
    ticks: Sequence[str] = ()


def panel(name: str, title: str, caption: str, kind: str, shown: Panel) -> tuple[Plot, Panel]:
    """A plot of a kind: `curves`, `levels` or `scatter`."""
    draw = {"curves": _curves, "levels": _levels, "scatter": _scatter}[kind]
    return Plot(name, title, caption, draw, "No run of these arms is done.", png=True), shown


def _curves(figure: Figure, shown: Panel) -> bool:
    """The mean over seeds, within a band from the lowest to the highest seed."""
    axes = axes_of(figure, percent=shown.percent, xlabel=shown.xlabel)
    drawn = False
    for line in shown.lines:
        if not line.values.size or np.isnan(line.values).all():
            continue
        drawn = True
        known = ~np.isnan(line.values).all(axis=0)
        values, x = line.values[:, known], line.x[known]
        colour = LIGHT[COLOURS[line.style % len(COLOURS)]]
        if values.shape[0] > 1:
            axes.fill_between(
                x, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=colour, alpha=0.15, linewidth=0
            )
        axes.plot(
            x, np.nanmean(values, axis=0), color=colour, label=line.label, linestyle=DASHES[line.style % len(DASHES)]
        )
    if drawn:
        _room(axes, shown)
        legend(figure, axes, columns=3)
    return drawn


def _levels(figure: Figure, shown: Panel) -> bool:
    """A mark an arm, with its interval; along a numeric axis joined by lines."""
    axes = axes_of(figure, percent=shown.percent, xlabel=shown.xlabel)
    drawn = [line for line in shown.lines if line.values.size and not np.isnan(line.values[0]).all()]
    for number, line in enumerate(drawn):
        value, low, high = line.values
        reach = np.nan_to_num(np.maximum([value - low, high - value], 0.0))
        style = line.style % len(COLOURS)
        axes.errorbar(
            line.x + 0.05 * (number - (len(drawn) - 1) / 2),  # side by side: intervals at one place would hide one another
            value, yerr=reach, color=LIGHT[COLOURS[style]], label=line.label, linewidth=1.2, capsize=2.5,
            marker=MARKERS[style], markersize=4.5, linestyle=DASHES[line.style % len(DASHES)] if line.x.size > 1 else "none",
        )  # fmt: skip
    if drawn:
        if shown.ticks:
            axes.set_xticks(range(len(shown.ticks)), list(shown.ticks))
            axes.margins(x=0.08)
        legend(figure, axes, columns=2)
    return bool(drawn)


def _scatter(figure: Figure, shown: Panel) -> bool:
    """A dot a seed of an arm."""
    axes = axes_of(figure, percent=shown.percent, xlabel=shown.xlabel)
    figure.subplots_adjust(left=0.14)
    axes.set_ylabel(shown.ylabel)
    axes.locator_params(axis="x", integer=False)
    axes.margins(x=0.1, y=0.1)
    drawn = False
    for line in shown.lines:
        known = ~np.isnan(line.values) & ~np.isnan(line.x)
        if not known.any():
            continue
        drawn = True
        style = line.style % len(COLOURS)
        axes.plot(
            line.x[known], line.values[known], MARKERS[style], color=LIGHT[COLOURS[style]], label=line.label, markersize=5,
            alpha=0.85,
        )  # fmt: skip
    if drawn:
        legend(figure, axes, columns=3)
    return drawn


def _room(axes: Axes, shown: Panel) -> None:
    if shown.percent:
        low, high = axes.get_ylim()
        if not any((np.nan_to_num(line.values) < 0).any() for line in shown.lines):
            low = 0.0 if high > 0.3 * (low + high) and low < 0.2 else max(low, 0.0)
        axes.set_ylim(low, max(min(high, 1.0), low + 0.05))
    elif not any((np.nan_to_num(line.values) < 0).any() for line in shown.lines):
        axes.set_ylim(bottom=0.0)


def stacked(rows: Sequence[FloatArray]) -> FloatArray:
    """(S, X) of series that may differ in length; NaN where one has ended."""
    if not rows:
        return np.empty((0, 0))
    table = np.full((len(rows), max(row.size for row in rows)), math.nan)
    for number, row in enumerate(rows):
        table[number, : row.size] = row
    return table
