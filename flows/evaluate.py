"""Any two policies on any benchmarks, as `papo evaluate --policy P --against Q` compares them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from flows.guarded import guard_own_process, no_longer_than
from flows.pipeline import HOOKS, STAGE
from flows.restarts import look_after_others, restarts
from flows.show import log_of_run
from papo.commands import compare_policies, further_sources, stay_offline
from papo.console import comparison_rows
from papo.params import Params, load_params
from papo.store.layout import Workspace


def _run_name() -> str:
    given = flow_run.get_parameters()
    against = f" against {given['against']}" if given["against"] else ""
    return f"evaluate {given['policy']}{against}"


@task(name="evaluate", **STAGE)
def compare(params: Params, workspace: Workspace, options: Namespace, limit_s: float | None) -> dict[str, Any]:
    """The metrics of both; samples that are stored are kept."""
    with no_longer_than(limit_s, "evaluate"):
        return compare_policies(params, workspace, options)[1]


@flow(name="papo", flow_run_name=_run_name, persist_result=False, **HOOKS)
def evaluate(
    policy: str = "final",
    against: str | None = "warmstart",
    benchmarks: tuple[str, ...] = (),
    samples: int | None = None,
    preset: str | None = None,
    overrides: tuple[str, ...] = (),
    workspace: str = ".",
) -> list[dict[str, str]]:
    """Evaluates a policy, and its paired difference from another.

    Args:
        policy: warmstart, final, round-<k> or a folder.
        against: The same; nothing for no difference.
        benchmarks: Names of the run's or of papo/benchmarks, or NAME=SOURCE; none for those of the run.
        samples: Samples a problem; evaluate.samples_per_problem if nothing is given.
        preset: A YAML file, or the name of one under infra/presets, laid over params.yaml.
        overrides: Further params, each as key=value.
        workspace: The folder where data/ and artifacts/ lie.
    """
    wait_s = guard_own_process()
    restarts()
    look_after_others()
    params = load_params(preset=preset, overrides=overrides)
    options = Namespace(policy=policy, against=against, benchmark=list(benchmarks), k=samples, wait=wait_s)
    stay_offline(params, further_sources(params, options))
    minutes = params.flow.timeouts.get("evaluate")
    limit_s = None if minutes is None else 60.0 * minutes
    timed = compare if limit_s is None else compare.with_options(timeout_seconds=limit_s)
    with log_of_run():
        rows = comparison_rows(timed(params, Workspace(Path(workspace)), options, limit_s))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    create_table_artifact(rows, key="papo-comparison", description="accuracy in percent, with its interval")
    return rows
