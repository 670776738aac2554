"""The flow `papo`: one run of the pipeline, each of its steps a task.

`python -m flows.pipeline` runs it in this process, and needs no server.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.task_engine import TaskRunTimeoutError

from flows import notify
from flows.guarded import guard_own_process, no_longer_than
from flows.local import main
from flows.pause import ask_on_page, ended
from flows.restarts import look_after_others, restarts
from flows.show import log_of_run, show_progress, show_result
from flows.spread import open_spread
from papo.commands import open_session, stay_offline
from papo.errors import AlarmError, PapoError
from papo.params import Params, Variant, load_params
from papo.paths import check_paths
from papo.pipeline import STAGES, Step, steps
from papo.session import Session, Summary
from papo.store.layout import Workspace

RETRIES_S = (60.0, 300.0, 900.0)
"""Waits before a stage is started again that may end better then; what it had paid for is kept, and it goes on from there."""
HOOKS: Any = {kind: [notify.on_end] for kind in ("on_failure", "on_crashed", "on_cancellation")}


def retry_may_help(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a stage failed for a reason that time may mend, or was not done in its time; starting it again mends no other."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TaskRunTimeoutError) or (isinstance(error, PapoError) and error.retry)


STAGE: Any = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": len(RETRIES_S),
    "retry_delay_seconds": list(RETRIES_S),
    "retry_condition_fn": retry_may_help,
}
"""Of a task that runs a stage. What has been done before is known by the manifests, not by Prefect: its cache stays off."""


@task(task_run_name="{step}", **STAGE)
def run_stage(session: Session, step: Step) -> dict[str, Any]:
    """One step."""
    with no_longer_than(_limit_s(session.params, step), str(step)):
        manifest = session.step(step)
    return manifest.model_dump(include={"rows", "seconds", "skipped"})


# A task a stage, so that runs can be filtered by it. Not by tags: each tag costs a task up to 2 s of asking for concurrency limits.
STAGE_TASKS = {stage: run_stage.with_options(name=stage) for stage in STAGES}


def _limit_s(params: Params, step: Step) -> float | None:
    minutes = params.flow.timeouts.get(step.stage)  # type: ignore[call-overload]  # a stage is a string in papo/pipeline.py
    return None if minutes is None else 60.0 * minutes


def _task(params: Params, step: Step) -> Task[..., dict[str, Any]]:
    """The task of a stage; Prefect raises an error in it when its time is up."""
    task, seconds = STAGE_TASKS[step.stage], _limit_s(params, step)
    return task if seconds is None else task.with_options(timeout_seconds=seconds)


def _params(
    preset: str | None, variant: Variant | None, seed: int | None, rounds: int | None, overrides: tuple[str, ...]
) -> Params:
    named = {"advantage.variant": variant, "run.seed": seed, "run.rounds": rounds}
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    return load_params(preset=preset, overrides=[*overrides, *given])


def _run_name() -> str:
    given = flow_run.get_parameters()
    try:
        params = _params(*(given[name] for name in ("preset", "variant", "seed", "rounds", "overrides")))
    except PapoError:
        return "params that are not valid"  # the flow says what is wrong with them
    return f"{params.advantage.variant} seed{params.run.seed} {params.run.rounds} rounds"


@flow(name="papo", flow_run_name=_run_name, persist_result=False, validate_parameters=True, **HOOKS)
def train_eval(
    preset: str | None = None,
    variant: Variant | None = None,
    seed: int | None = None,
    rounds: int | None = None,
    overrides: tuple[str, ...] = (),
    workspace: str = ".",
    dvc: bool = True,
    go_on: bool = False,
    tags: dict[str, str] | None = None,
) -> Summary:
    """Trains a policy with decoupled advantages and evaluates it against its warm start.

    Args:
        preset: A YAML file, or the name of one under infra/presets, laid over params.yaml.
        variant: advantage.variant.
        seed: run.seed.
        rounds: run.rounds.
        overrides: Further params, each as key=value, such as advantage.lam=0.5.
        workspace: The folder where data/ and artifacts/ lie.
        dvc: Record the outputs with DVC at the end, where they are those of dvc.yaml.
        go_on: Accept the alarm that stopped this run before.
        tags: Further tags of the run in MLflow.
    """
    wait_s = guard_own_process()
    again = restarts()
    look_after_others()
    params = _params(preset, variant, seed, rounds, overrides)
    check_paths(params, Path(workspace), overrides=overrides)
    stay_offline(params)
    tags = {"papo.flow_run": str(flow_run.get_id()), **(tags or {})}
    ask = ask_on_page(params.on_alarm.wait_hours)
    place = Workspace(Path(workspace))
    try:
        with (
            log_of_run(),
            open_spread(params.run.ray) as spread,
            open_session(
                params, place, dvc=dvc, tags=tags, wait_s=wait_s, ask=ask, go_on=go_on, spread=spread
            ) as session,
        ):

            def attempt(step: Step) -> None:
                _task(params, step)(session, step)
                notify.on_alarms(session.rung)  # before a person is waited for

            notify.on_restart(again)
            show_round = show_progress(params.run.rounds)
            for step in steps(params):
                session.run(step, attempt)
                show_round(step)
            summary = session.finish()
    except AlarmError as error:
        state: Summary = ended(error)  # a state in place of a result is how Prefect lets a flow say how it ended
        return state
    show_result(summary)
    return summary


if __name__ == "__main__":
    sys.exit(main(train_eval))
