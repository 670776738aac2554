"""An ablation as a flow: the runs of a plan within the budget of a night, each a task; the next night goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.guarded import guard_own_process
from flows.pipeline import HOOKS
from flows.restarts import look_after_others, restarts
from papo.ablations.command import Ablation, description, do, finish, open_ablation, tags_of
from papo.ablations.plan import Run
from papo.ablations.results import Results
from papo.ablations.work import LOOK_S, Budget, Outcome, Processes, cores, look
from papo.console import configure_logging, log
from papo.errors import StageError
from papo.store.layout import Workspace
from papo.store.lock import exclusive

Row = dict[str, str]

MOST_JOBS = 64


def _run_name() -> str:
    return f"{flow_run.get_parameters().get('plan', 'ablation')} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


@task(task_run_name="{run.name}", cache_policy=NO_CACHE, persist_result=False)
def run_arm(processes: Processes, ablation: Ablation, run: Run) -> str:
    """One run in a process of its own; how it ended.

    Raises:
        StageError: it failed, and what it said.
    """
    ended = processes.begin(run)
    while not ended():
        time.sleep(LOOK_S)
    found = look(run, ablation.place)
    if found.state != "done":
        where = str(ablation.place.workspace(run).root)
        raise StageError(f"{run.name} {found.state}: {found.why}", where=where, fix="see its log, ablation.log")
    return f"{found.seconds:.0f} s of work"


@flow(
    name="papo",
    flow_run_name=_run_name,
    persist_result=False,
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_JOBS),  # type: ignore[arg-type]  # Prefect's own runner is none by its types
    **HOOKS,
)
def nightly_ablations(
    plan: str = "claims",
    minutes: float | None = 480.0,
    money: float | None = None,
    jobs: int | None = None,
    seeds: int | None = None,
    overrides: tuple[str, ...] = (),
    root: str | None = None,
) -> State[list[Row]]:
    """Does the runs of a plan that are not done yet, and says what those that are done show; a run that fails is a row.

    Args:
        plan: A YAML file, or the name of one under infra/ablations.
        minutes: No run is begun that should not end by then.
        money: Likewise of what judges are paid, in the currency of score_prm.prices.
        jobs: Runs at a time; null: one a core.
        seeds: Values of run.seed, from 0; null: as the plan says.
        overrides: Further params of every run, each as key=value.
        root: Folder of the runs' workspaces; null: runs/ablations/<plan>.
    """
    wait_s = guard_own_process()
    restarts()
    look_after_others()
    configure_logging()
    ablation = open_ablation(plan, seeds=seeds, overrides=overrides, root=Path(root) if root is not None else None)
    budget = Budget(minutes, money)
    with ExitStack() as opened:
        opened.enter_context(exclusive(Workspace(ablation.place.root), wait_s=wait_s))
        processes = Processes(ablation.place, preset=ablation.plan.preset, options=tags_of(ablation), say=log.info)
        opened.enter_context(processes)

        def begin(run: Run) -> Callable[[], bool]:
            ended = Event()
            run_arm.submit(processes, ablation, run).add_done_callback(lambda _: ended.set())
            return ended.is_set

        outcome = do(ablation, budget, min(jobs or cores(), MOST_JOBS), begin, say=log.info)
        results = finish(ablation)
    rows = [_row(results, at) for at in range(len(results.found))]
    create_table_artifact(rows, key="papo-ablations", description=results.verdict)
    create_markdown_artifact(description(ablation, results), key="papo-ablation")
    return Completed(message=_message(results, outcome), data=rows)


def _message(results: Results, outcome: Outcome) -> str:
    text = f"{results.done} of {len(results.found)} runs done, {len(results.failed)} failed"
    return f"{text}; {outcome.stopped}" if outcome.stopped else text


def _row(results: Results, at: int) -> Row:
    one = results.found[at]
    row = {"run": one.run.name, "state": one.state, "seconds": f"{one.seconds:.0f}"}
    for arm in one.run.arms[:1]:
        for level in results.levels:
            if level.arm == arm.name and level.measure.startswith("accuracy/"):
                value = level.by_seed.get(one.run.seed)
                row[level.measure] = f"{100 * value:.1f}" if value is not None else ""
    return row | {"error": one.why}
