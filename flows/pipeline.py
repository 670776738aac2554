"""The flow `papo`: one run of the pipeline, each of its steps a task.

`python -m flows.pipeline` runs it in this process, and needs no server.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows.local import main
from flows.show import log_of_run, show_progress, show_result
from papo.commands import open_session, stay_offline
from papo.errors import PapoError, ServerDownError
from papo.params import Params, Variant, load_params
from papo.pipeline import STAGES, Step, steps
from papo.session import Session, Summary
from papo.store.layout import Workspace

RETRIES_S = (60.0, 300.0, 900.0)
"""Waits before a stage is started again whose server was down; what it had paid for is kept, and it goes on from there."""


def server_is_down(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a stage failed for a reason that time may mend; starting it again mends no other."""
    return isinstance(state.result(raise_on_failure=False), ServerDownError)


@task(
    task_run_name="{step}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(RETRIES_S),
    retry_delay_seconds=list(RETRIES_S),
    retry_condition_fn=server_is_down,
)
def run_stage(session: Session, step: Step) -> dict[str, Any]:
    """One step. What has been done before is known by the manifests, not by Prefect: its cache stays off."""
    manifest = session.step(step)
    return manifest.model_dump(include={"rows", "seconds", "skipped"})


# A task a stage, so that runs can be filtered by it. Not by tags: each tag costs a task up to 2 s of asking for concurrency limits.
STAGE_TASKS = {stage: run_stage.with_options(name=stage) for stage in STAGES}


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


@flow(name="papo", flow_run_name=_run_name, persist_result=False, validate_parameters=True)
def train_eval(
    preset: str | None = None,
    variant: Variant | None = None,
    seed: int | None = None,
    rounds: int | None = None,
    overrides: tuple[str, ...] = (),
    workspace: str = ".",
    dvc: bool = True,
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
        tags: Further tags of the run in MLflow.
    """
    params = _params(preset, variant, seed, rounds, overrides)
    stay_offline(params)
    tags = {"papo.flow_run": str(flow_run.get_id()), **(tags or {})}
    with log_of_run(), open_session(params, Workspace(Path(workspace)), dvc=dvc, tags=tags) as session:
        show_round = show_progress(params.run.rounds)
        for step in steps(params):
            STAGE_TASKS[step.stage](session, step)
            show_round(step)
        summary = session.finish()
    show_result(summary)
    return summary


if __name__ == "__main__":
    sys.exit(main(train_eval))
