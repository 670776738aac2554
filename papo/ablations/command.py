"""`papo ablate`: does what is left of a plan, writes what it shows, and tells it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from papo.ablations.evidence import Compared
from papo.ablations.plan import Plan, Run, expand, read_plan
from papo.ablations.results import Results, gather, write
from papo.ablations.words import difference
from papo.ablations.work import Begin, Budget, Outcome, Place, Processes, Say, cores, work
from papo.console import log, show_tables, warn
from papo.engines.tracking import ABLATION
from papo.errors import StageError, UserError
from papo.store.files import read_json, write_json
from papo.store.layout import Workspace
from papo.store.lock import exclusive


@dataclass(frozen=True)
class Ablation:
    """A plan with its runs and where they lie. `overrides`: params of every run beside those of the plan."""

    name: str
    given: str
    plan: Plan
    runs: list[Run]
    place: Place
    overrides: tuple[str, ...] = ()
    seeds: int | None = None

    @property
    def id(self) -> str:
        """The tag `papo.ablation` of its runs in MLflow."""
        return f"{self.name}-{self.plan.digest}"

    @property
    def command(self) -> str:
        """How a person starts it."""
        words = ["papo", "ablate", self.given]
        words += ["--seeds", str(self.seeds)] if self.seeds is not None else []
        return " ".join([*words, *(f"--set {override}" for override in self.overrides)])


def open_ablation(
    name: str, *, seeds: int | None = None, overrides: Sequence[str] = (), root: Path | None = None
) -> Ablation:
    """Reads a plan.

    Args:
        name: its file, or the name of one under infra/ablations.
        seeds: so many of them, from 0, instead of the plan's.
        root: folder of the workspaces; None: runs/ablations/<name>.

    Raises:
        ParamsError: the plan, or the params of an arm, are not valid.
        UserError: no seeds.
    """
    if seeds is not None and seeds < 1:
        raise UserError(
            f"--seeds is {seeds}", where="papo ablate", fix="run at least one; verdicts need two, better five"
        )
    plan = read_plan(name)
    if seeds is not None:
        plan = plan.model_copy(update={"seeds": list(range(seeds))})
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    place = Place(root if root is not None else Path("runs/ablations") / stem)
    return Ablation(stem, name, plan, expand(plan, overrides=overrides), place, tuple(overrides), seeds)


def ablate(options: argparse.Namespace) -> int:
    """
    Returns:
        0 all runs are done; 1 some failed, or an alarm stopped them; 5 some are left for the next start.
    """
    ablation = open_ablation(options.plan, seeds=options.seeds, overrides=options.overrides, root=options.root)
    jobs = options.jobs if options.jobs is not None else cores()
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}", where="papo ablate", fix="at least one run at a time")
    outcome = Outcome()
    with exclusive(Workspace(ablation.place.root)):
        if not options.results:
            budget = Budget(options.minutes, options.money)
            tags, preset = tags_of(ablation), ablation.plan.preset
            with Processes(ablation.place, preset=preset, options=tags, say=log.info) as processes:
                outcome = do(ablation, budget, jobs, processes.begin, say=log.info)
        results = finish(ablation)
    show(results, ablation.place)
    if results.failed:
        return 1
    return 5 if outcome.stopped or results.done < len(results.found) else 0


def tags_of(ablation: Ablation) -> tuple[str, ...]:
    """Options of `papo run` by which MLflow knows the runs of the ablation."""
    return ("--tag", f"{ABLATION}={ablation.id}")


def do(ablation: Ablation, budget: Budget, jobs: int, begin: Begin, *, say: Say) -> Outcome:
    """The runs that are left, within the budget; the history of the ablation is written however it ends."""
    began = datetime.now(UTC)
    try:
        return work(ablation.runs, ablation.place, jobs=jobs, budget=budget, begin=begin, say=say)
    finally:
        note_night(ablation.place, began, budget.seconds)


def note_night(place: Place, began: datetime, seconds: float) -> None:
    """Adds a start to the history."""
    history = read_json(place.history) if place.history.is_file() else []
    write_json(place.history, [*history, {"began": began.isoformat(timespec="seconds"), "seconds": round(seconds, 1)}])


def finish(ablation: Ablation) -> Results:
    """Writes what the runs that are done show, and records it in MLflow.

    Raises:
        StageError: no run is done, and what the first one that failed said.
    """
    results = gather(ablation.name, ablation.plan, ablation.runs, ablation.place)
    if not results.done:
        why = f"; {results.failed[0].run.name} failed: {results.failed[0].why}" if results.failed else ""
        raise StageError(
            f"no run of {ablation.name} is done{why}",
            where=str(ablation.place.root),
            fix="see the logs in the workspaces",
        )
    write(results, ablation.place, command=ablation.command)
    record(ablation, results)
    return results


def record(ablation: Ablation, results: Results) -> None:
    """The ablation as a parent run in MLflow; a server that is away is a warning, as `papo ablate --results` does it again."""
    tracking = ablation.runs[0].params.tracking
    if not tracking.enabled:
        return
    from papo.engines.tracking.ablation import record_ablation

    plan = ablation.plan
    facts = {"plan": ablation.name, "plan_digest": plan.digest, "seeds": len(plan.seeds), "command": ablation.command}
    try:
        link = record_ablation(
            tracking,
            ablation.id,
            name=ablation.name,
            description=description(ablation, results),
            metrics=metrics_of(results),
            facts=facts,
            report=ablation.place.report,
            whole=results.done == len(results.found),
        )
    except Exception as error:  # whatever MLflow raises: the results are on disk
        warn(
            f"MLflow does not have the ablation ({type(error).__name__}); `papo ablate {ablation.name} --results` tries again"
        )
    else:
        log.info("MLflow: %s", link)


def show(results: Results, place: Place) -> None:
    """Claims, comparisons and what failed, on standard output."""
    claims = [
        {
            "claim": one.claim.name,
            "says": one.claim.says,
            "verdict": one.answer,
            "evidence": "; ".join(map(told, one.compared)),
        }
        for one in results.answered
    ]
    compared = [
        {
            "arm": one.arm,
            "against": one.against or "",
            "measure": one.measure,
            "difference": told(one),
            "verdict": one.words,
        }
        for one in results.compared
    ]
    failed = [{"run": one.run.name, "evidence": one.why} for one in results.failed]
    saved = results.saved
    lines = [
        results.verdict,
        f"work     {saved.worked / 60:.0f} min in {saved.wall / 60:.0f} min by the clock; "
        f"{saved.runs} runs and {saved.starts} warm start{'s' if saved.starts != 1 else ''} stand for {saved.wanted}, "
        f"{100 * saved.share:.0f} % saved",
        f"report   {place.report / 'index.html'}",
    ]
    show_tables([("Claims", claims), ("Comparisons", compared), ("Runs that failed", failed)], lines)


def told(one: Compared) -> str:
    """A difference with its interval."""
    if one.difference is None:
        return "-"
    value, low, high = (difference(each, one.measure) for each in one.difference[:3])
    return f"{value} [{low}, {high}]"


def metrics_of(results: Results) -> dict[str, float]:
    """Differences with their intervals, and how many claims came out how."""
    found: dict[str, float] = {"runs_done": float(results.done), "runs": float(len(results.found))}
    for one in results.compared:
        if one.difference is not None:
            key = f"{one.measure}/{one.arm} - {one.against}"
            found |= {key: one.difference.value, f"{key}/low": one.difference.low, f"{key}/high": one.difference.high}
    for word in ("holds", "does not hold", "undecided"):
        if results.answered:
            found[f"claims/{word}"] = float(sum(one.answer == word for one in results.answered))
    return {
        "".join(char if char.isalnum() or char in "_-./: " else " " for char in key): value
        for key, value in found.items()
    }


def description(ablation: Ablation, results: Results) -> str:
    """What MLflow shows on the page of the parent run: the verdict, and which charts to open."""
    lines = [f"## {ablation.plan.title}", "", results.verdict, "", ablation.plan.about, ""]
    lines += [f"- **{one.claim.name}. {one.claim.says}**: {one.answer}" for one in results.answered]
    benchmarks = ", ".join(f"`{name}/final/avg_at_k`" for name in ablation.runs[0].params.evaluate.benchmarks)
    lines += [
        "",
        "The page with every plot is the artifact `report/index.html`. To compare runs here: in the list of runs, the filter "
        f"`tags.\\`{ABLATION}\\` = '{ablation.id}'`, the view of charts, and `+` beside this run for those below it; the charts to look "
        f"for are `^accuracy$|zero_advantage_share$|groups_process_active_share|length_mean$` by round, and {benchmarks}. Group the runs "
        f"by the params {', '.join(f'`{key}`' for key in _varied(ablation))} to have means over seeds.",
    ]
    return "\n".join(lines)


def _varied(ablation: Ablation) -> list[str]:
    keys = [key for axis in ablation.plan.axes.values() for overrides in axis.values() for key in overrides]
    return list(dict.fromkeys(keys))
