"""A round that is worked on in parts has the tables, metrics and counts of one that is worked on as a whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from papo.params import Params, load_params
from papo.pipeline import Step, run_step
from papo.stages import advantage, train
from papo.store import tables
from papo.store.layout import Workspace
from papo.store.manifest import Context, Manifest

SCORED = ("score_orm", "score_prm", "advantage")


def scored(root: Path, params: Params) -> dict[str, object]:
    workspace = Workspace(root)
    manifests: list[Manifest] = [
        run_step(Step(stage, 0), params, workspace, Context(work=workspace.work)) for stage in SCORED
    ]
    tables = {name: workspace.table(0, name).read_bytes() for name in ("orm", "prm", "advantages")}
    told = [manifest.model_dump(include={"rows", "counts", "metrics", "outputs"}) for manifest in manifests]
    return {"tables": tables, "told": told}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("advantage.variant=prm",),
        ("advantage.variant=capo",),
        ("advantage.overlong={buffer: 4, factor: 0.5}",),
    ],
    ids=lambda overrides: overrides[0] if overrides else "default",
)
def test_parts_of_three_rows_give_the_same_bytes(
    started_checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    params = load_params(started_checkout / "params.yaml", overrides=overrides)
    in_parts = tmp_path / "parts"
    shutil.copytree(started_checkout, in_parts)
    whole = scored(started_checkout, params)
    for module in (tables, advantage):
        monkeypatch.setattr(module, "PART_ROWS", 3)
    assert scored(in_parts, params) == whole

    def groups() -> list[list[object]]:
        workspace = Workspace(in_parts)
        return train._groups(
            train.Inputs(
                round=0, seed=0, rollouts=workspace.table(0, "rollouts"), advantages=workspace.table(0, "advantages"),
                policy=workspace.warmstart, state=None, reference=None, temperature=1.0, max_new_tokens=8,
            )
        )  # fmt: skip

    by_three = groups()
    monkeypatch.setattr(tables, "PART_ROWS", 10**6)
    assert by_three == groups()
    assert sum(map(len, by_three)) > 3
