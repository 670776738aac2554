"""warmstart: traces in, a policy folder out, whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from papo.engines.protocols import Progress
from papo.engines.warmstart import make_warm_starter
from papo.errors import CheckpointError, DataError
from papo.params import WarmstartParams
from papo.schemas import TRACES
from papo.stages import warmstart
from papo.store.manifest import Context, Manifest
from papo.store.tables import write_rows


class FakeWarmStarter:
    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.seen: list[tuple[str, str]] = []
        self._stop = stop

    def steps(self) -> int:
        return 2

    def fit(self, traces: Sequence[tuple[str, str]], out: Path, progress: Progress) -> list[dict[str, float]]:
        self.seen += traces
        out.mkdir()
        (out / "config.json").write_text("{}")
        self._stop()
        (out / "weights").write_text("w")
        return [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.0}]

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


@pytest.fixture
def inputs(tmp_path: Path) -> warmstart.Inputs:
    write_rows(
        tmp_path / "traces.parquet", TRACES, [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    )
    return warmstart.Inputs(traces=tmp_path / "traces.parquet")


def run(tmp_path: Path, inputs: warmstart.Inputs, engine: FakeWarmStarter, context: Context) -> Manifest:
    return warmstart.run(WarmstartParams(), inputs, tmp_path / "out" / "warmstart", engine=engine, context=context)


def test_a_policy_and_its_record(tmp_path: Path, inputs: warmstart.Inputs, context: Context) -> None:
    engine = FakeWarmStarter()
    manifest = run(tmp_path, inputs, engine, context)
    assert engine.seen == [("a", "b"), ("c", "d")]
    assert sorted(path.name for path in (tmp_path / "out/warmstart").iterdir()) == ["config.json", "weights"]
    assert manifest.metrics == {"final_loss": 1.0}
    assert [row["loss"] for row in manifest.history] == [2.0, 1.0]
    assert (manifest.rows, manifest.versions, manifest.round) == (2, {"fake": "1"}, None)


def test_a_second_run_does_nothing(tmp_path: Path, inputs: warmstart.Inputs, context: Context) -> None:
    run(tmp_path, inputs, FakeWarmStarter(), context)
    engine = FakeWarmStarter()
    assert run(tmp_path, inputs, engine, context).skipped
    assert engine.seen == []


def test_an_interruption_leaves_nothing_and_the_next_run_makes_it(
    tmp_path: Path, inputs: warmstart.Inputs, context: Context
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, inputs, FakeWarmStarter(interrupt), context)
    assert list((tmp_path / "out").iterdir()) == []
    assert not run(tmp_path, inputs, FakeWarmStarter(), context).skipped


def test_no_traces_and_no_checkpoint(tmp_path: Path, context: Context) -> None:
    write_rows(tmp_path / "traces.parquet", TRACES, [])
    params = WarmstartParams()
    with pytest.raises(DataError, match="there are no traces") as caught:
        warmstart.run(
            params, warmstart.Inputs(traces=tmp_path / "traces.parquet"), tmp_path / "out" / "warmstart",
            engine=make_warm_starter(params), context=context,
        )  # fmt: skip
    assert "warmstart.checkpoint" in caught.value.fix


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": "no json"}])
def test_a_folder_that_is_no_checkpoint(
    tmp_path: Path, inputs: warmstart.Inputs, context: Context, content: dict[str, str]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    params = WarmstartParams(checkpoint=str(folder))
    with pytest.raises(CheckpointError) as caught:
        warmstart.run(params, inputs, tmp_path / "out" / "warmstart", engine=make_warm_starter(params), context=context)
    assert str(folder) in caught.value.where
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_whose_content_changes_is_another_one(
    tmp_path: Path, inputs: warmstart.Inputs, context: Context
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_text("1")
    params = WarmstartParams(checkpoint=str(folder))

    def start() -> Manifest:
        given = warmstart.Inputs(inputs.traces, warmstart.local_checkpoint(params))
        return warmstart.run(params, given, tmp_path / "out" / "w", engine=FakeWarmStarter(), context=context)

    assert (start().skipped, start().skipped) == (False, True)
    (folder / "weights").write_text("2")
    assert not start().skipped
    assert warmstart.local_checkpoint(WarmstartParams(checkpoint="some/model-id")) is None
