"""The plots of the page, as inline SVG that follows its colours, and some as PNG for the record."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from papo.engines.reporting.results import FloatArray, Run
from papo.store.faults import reached

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# One colour a meaning, in light and in dark; each has a contrast of at least 4.5 on its page, grid apart.
LIGHT = {
    "page": "#ffffff", "ink": "#1b1f25", "muted": "#59626d", "grid": "#dfe3e8",
    "outcome": "#2461c4", "process": "#b4540a", "easy": "#187a4f", "hard": "#8a3fb5", "other": "#6e7681",
    "sixth": "#b3263a", "seventh": "#0c6f78", "eighth": "#6d6400",
}  # fmt: skip
DARK = {
    "page": "#12161b", "ink": "#e8ebef", "muted": "#a3acb7", "grid": "#333b45",
    "outcome": "#78aefc", "process": "#f2a255", "easy": "#56c995", "hard": "#cf9bf5", "other": "#949da8",
    "sixth": "#ff8f9b", "seventh": "#5cc8d2", "eighth": "#cfc35a",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """`draw` fills the figure and says whether there was anything to draw; `absent` is what the page says if not."""

    name: str
    title: str
    caption: str
    draw: Callable[[Figure, Any], bool]
    absent: str = "No data."
    png: bool = False


def draw(plot: Plot, shown: Any, folder: Path) -> str | None:
    """The plot of what `plot.draw` takes, as inline SVG whose colours are the page's variables; for some also as PNG in `folder`."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": plot.name, "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9,
        "text.parse_math": False,  # a $ in a name is a $
        "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["muted"], "axes.edgecolor": LIGHT["grid"],
        "xtick.color": LIGHT["grid"], "ytick.color": LIGHT["grid"], "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"], "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LIGHT["grid"], "grid.linewidth": 0.6,
        "lines.linewidth": 1.6, "lines.markersize": 3.5, "legend.frameon": False, "legend.borderpad": 0.0,
        "legend.borderaxespad": 0.0, "legend.handlelength": 1.4, "savefig.facecolor": LIGHT["page"],
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of this machine must not change the bytes
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(4.6, 2.9))
        figure.subplots_adjust(left=0.115, right=0.975, bottom=0.15, top=0.84)
        if not plot.draw(figure, shown):
            return None
        if plot.png:
            reached("write", folder / f"{plot.name}.png")
            figure.savefig(folder / f"{plot.name}.png", dpi=160, metadata={"Software": None})
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), plot.title)


def _inline(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(
        r"<svg[^>]*>", f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(label)}">', svg, count=1
    )
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def standalone(svg: str) -> str:
    """An inline plot as a file of its own, which brings the colours and the page behind it."""

    def colours(scheme: dict[str, str]) -> str:
        return "svg{" + "".join(f"--{name}:{colour};" for name, colour in scheme.items()) + "}"

    style = f"<style>{colours(LIGHT)}@media (prefers-color-scheme:dark){{{colours(DARK)}}}</style>"
    page = '<rect width="100%" height="100%" style="fill: var(--page)"/>'
    opening = svg[: svg.index(">") + 1]
    names = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{opening[:-1]}{names}>{style}{page}{svg[len(opening) :]}\n"


def axes_of(figure: Figure, *, percent: bool = True, xlabel: str = "round") -> Axes:
    """The axes of a figure that has one plot."""
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.margins(x=0.03)
    _integers(axes)
    if percent:
        _percents(axes.yaxis)
    return axes


def _integers(axes: Axes) -> None:
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _percents(axis: Axis) -> None:
    """Ticks at round shares, labelled with what they are: 2.5 % is no step, and 0.5 % is not written as 0 or 1."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Above the axes, which make room for as many rows as it needs."""
    lines = -(-len(axes.get_legend_handles_labels()[1]) // columns)
    if not lines:
        return
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.03), ncols=columns, columnspacing=1.4)
    figure.subplots_adjust(top=0.965 - 0.068 * lines)


def _line(axes: Axes, values: FloatArray, colour: str, label: str, **style: Any) -> bool:
    """Draws one value a round; a gap where it is NaN, nothing where all are."""
    if np.isnan(values).all():
        return False
    marker = "o" if values.size <= 40 else None
    axes.plot(np.arange(values.size), values, color=LIGHT[colour], label=label, marker=marker, **style)
    return True


def _accuracy(figure: Figure, shown: Run) -> bool:
    axes = axes_of(figure)
    values = shown.signal("accuracy")
    _line(axes, values, "outcome", "training problems")
    colours, checkpoint = ("easy", "process", "hard", "other"), shown.params.get("evaluate.checkpoint")
    rounds = checkpoint + 1 if isinstance(checkpoint, int) else values.size
    for index, (name, benchmark) in enumerate(shown.evaluation.items()):
        x, points = zip(*benchmark.trained(rounds), strict=True)
        value, low, high = np.array([(p.value, p.low, p.high) for p in points]).T
        reach = np.maximum([value - low, high - value], 0.0)
        axes.errorbar(
            x, value, yerr=reach, color=LIGHT[colours[index % 4]], label=_short(name), linestyle=":", linewidth=1.0,
            elinewidth=1.2, capsize=2.5, marker="Ds^v"[index // 4 % 4], markersize=4.5,
        )  # fmt: skip
    axes.set_ylim(bottom=0.0)
    legend(figure, axes)
    return True


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _rewards(figure: Figure, shown: Run) -> bool:
    axes = axes_of(figure, percent=False)
    every, correct = shown.signal("prm_mean"), shown.signal("prm_mean_correct")
    drawn = _line(axes, shown.signal("accuracy"), "outcome", "outcome (accuracy)")
    if np.array_equal(every, correct, equal_nan=True):
        drawn |= _line(axes, correct, "process", "judge's score (correct only)")
    else:
        drawn |= _line(axes, every, "process", "judge's score, all")
        drawn |= _line(axes, correct, "hard", "judge's score, among correct", linestyle="--")
    axes.set_ylim(-0.02, 1.02)
    legend(figure, axes)
    return drawn


def _stacked(figure: Figure, axes: Axes, parts: Iterable[tuple[str, FloatArray, str]]) -> bool:
    """Areas on top of one another, a step a round, so that a single round shows as well."""
    base: FloatArray | float = 0.0
    drawn = False
    for label, values, colour in parts:
        if np.isnan(values).all():
            continue
        edges = np.arange(values.size + 1) - 0.5
        axes.stairs(base + values, edges, baseline=base, fill=True, color=LIGHT[colour], alpha=0.85, label=label,
                    linewidth=0)  # fmt: skip
        base, drawn = base + values, True
    axes.margins(x=0.0)
    if drawn:
        legend(figure, axes, columns=3)
    return drawn


def _zero_advantage(figure: Figure, shown: Run) -> bool:
    axes = axes_of(figure)
    causes = (("all_correct", "easy"), ("all_wrong", "hard"), ("other", "other"))
    parts = [(name.replace("_", " "), shown.signal(f"zero_advantage_share_{name}"), colour) for name, colour in causes]
    drawn = _stacked(figure, axes, parts)
    peak = float(np.nan_to_num(shown.signal("zero_advantage_share")).max(initial=0.0))
    axes.set_ylim(0.0, next(top for top in (0.25, 0.5, 1.0) if peak <= top))
    return drawn


def _components(figure: Figure, shown: Run) -> bool:
    axes = axes_of(figure)
    parts = (("outcome", "from A_out"), ("process", "from A_proc"))
    drawn = _stacked(figure, axes, [(text, shown.signal(f"{name}_advantage_share"), name) for name, text in parts])
    axes.set_ylim(0.0, 1.0)
    return drawn


def _activity(figure: Figure, shown: Run) -> bool:
    axes = axes_of(figure)
    drawn = _line(axes, shown.signal("groups_two_correct_share"), "easy", "two or more correct")
    drawn |= _line(axes, shown.signal("groups_process_active_share"), "process", "A_proc active")
    axes.set_ylim(-0.02, 1.02)
    legend(figure, axes)
    return drawn


def _length(figure: Figure, shown: Run) -> bool:
    axes = axes_of(figure, percent=False)
    drawn = _line(axes, shown.signal("length_p95"), "other", "95th percentile", linestyle="--")
    drawn |= _line(axes, shown.signal("length_mean"), "outcome", "mean")
    axes.set_ylim(bottom=0.0)
    legend(figure, axes)
    return drawn


def _judge_vs_accuracy(figure: Figure, shown: Run) -> bool:
    x, y = shown.signal("accuracy"), shown.signal("prm_mean")
    rounds = np.flatnonzero(~np.isnan(x) & ~np.isnan(y))
    if not rounds.size:
        return False
    axes = axes_of(figure, percent=False, xlabel="accuracy")
    axes.set_ylabel("judge's score")
    figure.subplots_adjust(left=0.15, top=0.96)
    axes.locator_params(axis="x", nbins=6, steps=[1, 2, 2.5, 5, 10], integer=False)
    _percents(axes.xaxis)
    axes.margins(x=0.12, y=0.15)
    axes.plot(x[rounds], y[rounds], color=LIGHT["other"], linewidth=0.8, alpha=0.7)
    age = np.linspace(0.35, 1.0, rounds.size) if rounds.size > 1 else np.ones(1)
    axes.scatter(x[rounds], y[rounds], s=30, color=LIGHT["process"], alpha=age.tolist(), linewidths=0, zorder=3)
    ends = sorted({rounds[0], rounds[-1]}, key=lambda at: (y[at], at))
    for at, place, offset in zip(ends, ("top", "bottom") if len(ends) > 1 else ("top",), (-6, 6), strict=False):
        axes.annotate(
            f"round {at}", (x[at], y[at]), xytext=(0, offset), textcoords="offset points", ha="center", va=place
        )
    return True


def _updates(figure: Figure, shown: Run) -> bool:
    if not shown.steps:
        return False
    figure.set_size_inches(4.6, 3.9)
    figure.subplots_adjust(top=0.95, bottom=0.11, left=0.16, hspace=0.45)
    panels = (
        ("clipped share", (("clipped_low_share", "outcome", "low"), ("clipped_high_share", "process", "high"))),
        ("gradient norm", (("grad_norm", "easy", ""),)),
        ("approximate KL", (("approx_kl", "hard", ""),)),
    )
    x = [row["step"] for row in shown.steps]
    for axes, (title, lines) in zip(figure.subplots(3, sharex=True), panels, strict=True):
        for name, colour, label in lines:
            values = [row.get(name, math.nan) for row in shown.steps]
            axes.plot(x, values, color=LIGHT[colour], label=label, linewidth=1.1, marker="o" if len(x) == 1 else None)
        axes.set_title(title, loc="left", fontsize=9, pad=3)
        axes.locator_params(axis="y", nbins=3)
        _integers(axes)
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0.0)
        if len(lines) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.03), ncols=2)
    axes.set_xlabel("optimizer step")
    return True


NO_JUDGE = "The judge was asked nothing in this run."
PLOTS = (
    Plot(
        "accuracy", "Accuracy",
        "Line: the responses sampled in each round. Marks with an interval: benchmarks, after that many rounds.",
        _accuracy,
    ),
    Plot(
        "accuracy_rewards", "Outcome and process reward",
        "Both should rise. A judge's score that climbs while the outcome falls is a judge being gamed.",
        _rewards, png=True,
    ),
    Plot(
        "zero_advantage", "Responses with zero advantage, by their group",
        "What teaches nothing. All correct grows as problems become too easy, all wrong where they are too hard.",
        _zero_advantage, png=True,
    ),
    Plot(
        "activity", "Groups where A_proc can act, and does",
        "The gap between the lines is groups whose correct responses the judge scored alike, or not at all.",
        _activity,
    ),
    Plot(
        "length", "Response length in tokens",
        "Length that climbs without accuracy is padding; a high percentile far from the mean is a few runaways.",
        _length, png=True,
    ),
    Plot(
        "judge_vs_accuracy", "Judge's score against accuracy",
        "A dot is a round, stronger is later. Up and right is progress; up and left is a judge being gamed.",
        _judge_vs_accuracy, NO_JUDGE, png=True,
    ),
    Plot(
        "updates", "Policy updates",
        "Spikes in the gradient norm or the KL, or a clipped share of many percent, mean that steps are too large.",
        _updates, "No optimizer step was recorded.",
    ),
    Plot(
        "components", "What moves the policy",
        "Share of the summed |A| that comes from the outcome and from the process. An even split weighs both alike.",
        _components, "No response had an advantage.",
    ),
)  # fmt: skip
