"""The results of an ablation as Markdown, from results.json alone: for the docs, a pull request, an appendix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from papo.ablations.words import difference, level, unit

MACHINE = ("cpu", "cpus", "python", "torch", "transformers")


def as_markdown(content: Mapping[str, Any], plots: str = "plots") -> str:
    """The tables and plots of results.json.

    Args:
        plots: folder of the plots, as seen from the page.
    """
    seeds, confidence = _listed(content["seeds"]), f"{100 * content['confidence']:.0f} %"
    parts = [f"# {content['title']}", content["about"].strip()]
    parts += [f"**{content['verdict']}** Seeds {seeds}; {confidence} intervals over seeds and problems."]
    if content["claims"]:
        parts += ["## Claims", _table(("claim", "paper", "measured", "verdict"), map(_claim, content["claims"]))]
        parts += ["\n".join(f"- {one['name']}: {one['note']}" for one in content["claims"] if one["note"])]
    if content["comparisons"]:
        columns = ("arm", "against", "measure", "difference", "effect", "seeds", "verdict")
        parts += [
            "## Comparisons",
            "Final policies, paired by seed and problem; accuracy in points, length in tokens. Verdicts are corrected for all "
            f"{len(content['comparisons'])} rows. The effect is the mean over the standard deviation between seeds.",
            _table(columns, map(_comparison, content["comparisons"])),
        ]
    parts += ["## Arms", "Final policies, means over seeds; `verdicts`: responses a run asked its judge about."]
    parts += [_arms(content["arms"])]
    if content["plots"]:
        parts += ["## Plots"]
        for one in content["plots"]:
            parts += [f"![{one['title']}]({plots}/{one['name']}.svg)", f"{one['title']}. {one['caption']}"]
    runs = _table(("run", "state", "work, s", "alarms", "lineage", "final policy"), map(_run, content["runs"]))
    parts += ["## How it was made", f"    {content['command']}", _made(content), runs]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_of_claims(claims: Sequence[tuple[Mapping[str, Any], str]]) -> str:
    """One line a claim: what is said, what was measured for each of its needs, the verdict, and where it comes from."""
    rows = []
    for one, source in claims:
        figures = "; ".join(dict.fromkeys(f"{_figure(need)}{unit(need['measure'])}" for need in one["needs"]))
        rows.append([_said(one), one["paper"], figures, f"**{one['answer']}**", source])
    return _table(("claim", "paper", "measured here", "verdict", "plan"), rows)


def _said(claim: Mapping[str, Any]) -> str:
    return f"{claim['name']}. {claim['says']}" if claim["name"].isdigit() else claim["says"]


def _claim(one: Mapping[str, Any]) -> list[str]:
    told = []
    for need in one["needs"]:
        against = f" against {need['against']}" if need["against"] else ""
        told.append(f"`{need['measure']}`, {need['arm']}{against}: {_figure(need)}, {need['verdict']}")
    return [_said(one), one["paper"], "<br>".join(told), f"**{one['answer']}**"]


def _comparison(one: Mapping[str, Any]) -> list[str]:
    effect = "" if one["effect"] is None else f"{one['effect']:.1f}"
    measured = [f"`{one['measure']}`", _figure(one), effect, str(one["seeds"]), one["verdict"]]
    return [one["arm"], one["against"] or "", *measured]


def _figure(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "-"
    value, low, high = (difference(one[key], one["measure"]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _arms(levels: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(one["measure"] for one in levels))
    by_arm: dict[str, dict[str, str]] = {}
    for one in levels:
        text = level(one["value"], one["measure"])
        if one["low"] is not None and one["measure"] != "verdicts":
            text += f" [{level(one['low'], one['measure'])}, {level(one['high'], one['measure'])}]"
        by_arm.setdefault(one["arm"], {})[one["measure"]] = text
    rows = ([arm, *(found.get(column, "") for column in columns)] for arm, found in by_arm.items())
    return _table(("arm", *(f"`{column}`" for column in columns)), rows)


def _made(content: Mapping[str, Any]) -> str:
    saved, machine = content["saved"], content["environment"]
    commits = ", ".join(f"`{commit}`" for commit in content["commits_of_runs"])
    wall = f" in {saved['wall'] / 3600:.2f} h by the clock" if saved["nights"] else ""
    starts = f"{saved['starts']} warm start{'s' if saved['starts'] != 1 else ''}"
    return (
        f"Plan `{content['plan']}`, digest `{content['plan_digest']}`; commit of the runs {commits}. {saved['worked'] / 3600:.2f} h "
        f"of work{wall}: {saved['runs']} runs and {starts} stand for {saved['wanted']} runs of arms, each with its own; "
        f"{100 * saved['share']:.0f} % saved. {_listed([f'{key} {machine[key]}' for key in MACHINE if machine.get(key)])}."
    )


def _run(one: Mapping[str, Any]) -> list[str]:
    seconds, policy = f"{one['seconds']:.0f}", (one["policy"] or "")[:16]
    return [one["run"], one["state"], seconds, _listed(one["alarms"]), f"`{one['lineage']}`", policy and f"`{policy}`"]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(str(item) for item in items)
