"""Variants x seeds, each a run of `train_eval` in a workspace of its own; the result is one table."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.guarded import guard_own_process
from flows.pipeline import HOOKS, train_eval
from flows.restarts import look_after_others, restarts
from papo.console import accuracy_rows
from papo.errors import StageError
from papo.params import Variant
from papo.session import Summary

Row = dict[str, str]


def _run_name() -> str:
    return f"ablations {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


@flow(name="papo", flow_run_name=_run_name, persist_result=False, **HOOKS)
def nightly_ablations(
    variants: tuple[Variant, ...] = ("orm", "papo"),
    seeds: tuple[int, ...] = (0, 1),
    rounds: int | None = None,
    preset: str | None = None,
    overrides: tuple[str, ...] = (),
    root: str = "runs/nightly",
) -> State[list[Row]]:
    """Compares variants of the advantage over seeds, one run after the other; a run that fails is a row of the table.

    Args:
        variants: Values of advantage.variant.
        seeds: Values of run.seed.
        rounds: run.rounds.
        preset: A YAML file, or the name of one under infra/presets, laid over params.yaml.
        overrides: Further params, each as key=value.
        root: Folder of the runs' workspaces.
    """
    guard_own_process()
    restarts()
    look_after_others()
    rows: list[Row] = []
    for variant in variants:
        for seed in seeds:
            state = train_eval(
                preset=preset,
                variant=variant,
                seed=seed,
                rounds=rounds,
                overrides=overrides,
                workspace=str(Path(root) / f"{variant}-seed{seed}"),
                dvc=False,
                tags={"papo.ablation": str(flow_run.get_name())},
                return_state=True,
            )
            rows.append({"variant": variant, "seed": str(seed), "state": state.name or "", **_outcome(state)})
    rows = _aligned(rows)
    create_table_artifact(rows, key="papo-ablations", description="accuracy of the final policies")
    failed = sum(row["error"] != "" for row in rows)
    if failed == len(rows):
        raise StageError(
            f"all {failed} runs failed, the first with: {rows[0]['error']}", fix="see the pages of the runs"
        )
    return Completed(message=f"{len(rows)} runs, {failed} failed", data=rows)


def _outcome(state: State[Summary]) -> Row:
    result = state.result(raise_on_failure=False)
    if not isinstance(result, Summary):
        return {"error": str(result)}
    return {"error": ""} | {
        f"{row['benchmark']}, {name}": value
        for row in accuracy_rows(result)
        if row["tier"] == "all"
        for name, value in row.items()
        if name.startswith("final")
    }


def _aligned(rows: list[Row]) -> list[Row]:
    """The same columns in every row, the error last."""
    columns = sorted(dict.fromkeys(name for row in rows for name in row), key="error".__eq__)
    return [{name: row.get(name, "") for name in columns} for row in rows]
