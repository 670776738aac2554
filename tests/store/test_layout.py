"""Where everything lies."""

from pathlib import Path

from papo.store.layout import Workspace, manifest_path


def test_the_names_that_others_build_on() -> None:
    here = Workspace(Path())
    assert {
        str(path)
        for path in (here.train_problems, here.benchmark("b"), here.warmstart, here.policy(3), here.trainer(3),
                     here.table(3, "orm"), here.evaluation, here.report, here.work)
    } == {
        "data/problems/train.parquet", "data/problems/eval/b.parquet", "artifacts/warmstart", "artifacts/rounds/3/policy",
        "artifacts/rounds/3/trainer", "artifacts/rounds/3/orm.parquet", "artifacts/evaluation", "artifacts/report", ".papo",
    }  # fmt: skip


def test_the_policy_before_round_0_is_the_warm_start() -> None:
    assert Workspace(Path("w")).policy(-1) == Path("w/artifacts/warmstart")


def test_a_manifest_lies_beside_its_output() -> None:
    for output, manifest in {"a/orm.parquet": "a/orm", "a/policy": "a/policy", "a/metrics.json": "a/metrics"}.items():
        assert manifest_path(Path(output)) == Path(f"{manifest}.manifest.json")
