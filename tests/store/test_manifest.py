"""A stage is done while its params, inputs, code and outputs are what its manifest says; shards outlive an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from papo.errors import DataError, MissingInputError
from papo.params import AdvantageParams, ScorePrmParams
from papo.pipeline import CODE
from papo.schemas import TRACES
from papo.store.layout import manifest_path
from papo.store.manifest import PACKAGE, Context, Manifest, Task, code_digest
from papo.store.tables import read_rows


@dataclass(frozen=True)
class Inputs:
    round: int
    file: Path
    more: dict[str, Path] = field(default_factory=dict)
    none: Path | None = None


class Stage:
    """A task of which any part can be changed; `start` makes it anew, as the next process would."""

    def __init__(self, folder: Path, context: Context) -> None:
        self.folder, self.context = folder, context
        self.params: Any = AdvantageParams()
        self.code: Sequence[str] = ("stages/advantage.py",)
        self.round = 0
        self.name = "advantage"
        self.file, self.other = folder / "in" / "table", folder / "in" / "folder"
        self.other.mkdir(parents=True)
        self.file.write_text("rows")
        (self.other / "weights").write_text("weights")
        self.outputs = [folder / "out" / "first.parquet", folder / "out" / "second"]

    def start(self) -> Task:
        inputs = Inputs(self.round, self.file, {"policy": self.other})
        return Task(self.name, self.params, inputs, self.outputs, code=self.code, context=self.context)

    def run(self, **facts: Any) -> Manifest:
        task = self.start()
        first, second = self.outputs
        second.mkdir(parents=True, exist_ok=True)
        first.write_text("first")
        (second / "file").write_text("second")
        return task.finish(rows=3, **facts)


@pytest.fixture
def stage(tmp_path: Path, context: Context) -> Stage:
    return Stage(tmp_path, context)


def test_a_stage_that_has_not_run_is_not_done(stage: Stage) -> None:
    assert stage.start().done() is None


def test_a_stage_that_has_run_is_done(stage: Stage) -> None:
    made = stage.run(counts={"ok": 3}, metrics={"a": 1}, history=[{"step": 1.0}], versions={"papo": "0"})
    found = stage.start().done()
    assert found == made.model_copy(update={"skipped": True})
    assert (made.skipped, made.rows, made.round, made.counts) == (False, 3, 0, {"ok": 3})
    assert made.params == AdvantageParams().model_dump(mode="json")
    assert set(made.outputs) == {"first.parquet", "second"}


def test_the_manifest_lies_beside_the_first_output(stage: Stage) -> None:
    stage.run()
    assert manifest_path(stage.outputs[0]) == stage.folder / "out" / "first.manifest.json"
    assert "skipped" not in json.loads((stage.folder / "out" / "first.manifest.json").read_text())


def touch(stage: Stage) -> None:
    text = stage.file.read_text()
    stage.file.unlink()
    stage.file.write_text(text)


CHANGES: dict[str, Callable[[Stage], Any]] = {
    "params": lambda stage: setattr(stage, "params", AdvantageParams(lam=0.5)),
    "another section": lambda stage: setattr(stage, "params", {"a": AdvantageParams(), "b": ScorePrmParams()}),
    "round": lambda stage: setattr(stage, "round", 1),
    "stage": lambda stage: setattr(stage, "name", "other"),
    "content of an input file": lambda stage: stage.file.write_text("other rows"),
    "content of an input folder": lambda stage: (stage.other / "weights").write_text("others"),
    "a file more in an input folder": lambda stage: (stage.other / "more").write_text(""),
    "code": lambda stage: setattr(stage, "code", ("stages/advantage.py", "stages/rows.py")),
    "content of an output": lambda stage: stage.outputs[0].write_text("by hand"),
    "content of an output folder": lambda stage: (stage.outputs[1] / "file").write_text("by hand"),
    "an output gone": lambda stage: stage.outputs[0].unlink(),
    "manifest gone": lambda stage: manifest_path(stage.outputs[0]).unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_makes_it_run_again(stage: Stage, change: Callable[[Stage], None]) -> None:
    stage.run()
    change(stage)
    assert stage.start().done() is None


def test_the_time_of_a_file_is_no_change(stage: Stage) -> None:
    stage.run()
    touch(stage)
    assert stage.start().done() is not None


def test_an_output_changed_by_hand_is_warned_about(stage: Stage, warned: list[str]) -> None:
    stage.run()
    stage.outputs[0].write_text("by hand")
    stage.start().done()
    assert warned == ["first.parquet changed after advantage wrote it; the stage runs again"]


@pytest.mark.parametrize("text", ["", '{"stage": "advan', "[1]", '{"stage": "advantage"}', '{"unknown": 1}'])
def test_a_damaged_manifest_is_warned_about_and_the_stage_runs_again(
    stage: Stage, warned: list[str], text: str
) -> None:
    stage.run()
    manifest_path(stage.outputs[0]).write_text(text)
    assert stage.start().done() is None
    assert len(warned) == 1
    assert "runs again" in warned[0]
    with pytest.raises(DataError) as caught:
        Manifest.read(stage.outputs[0])
    assert caught.value.where == str(manifest_path(stage.outputs[0]))


def test_a_missing_input_stops_the_task(stage: Stage) -> None:
    stage.file.unlink()
    with pytest.raises(MissingInputError):
        stage.start()


def test_begin_is_told_only_of_stages_with_something_to_do(tmp_path: Path) -> None:
    begun: list[str] = []
    stage = Stage(tmp_path, Context(work=tmp_path / ".papo", begin=begun.append))
    stage.start().done()
    stage.run()
    stage.start().done()
    assert begun == ["advantage"]


def test_the_digest_of_code_covers_every_file_that_is_named() -> None:
    assert code_digest(["stages/rows.py", "core"]) == code_digest(["core", "stages/rows.py"])
    assert len({code_digest([name]) for name in ("core", "core/steps.py", "stages/rows.py")}) == 3
    assert len({code_digest(code) for code in CODE.values()}) == len(CODE)
    assert PACKAGE.name == "papo"


class Maker:
    def __init__(self, text: str = "x") -> None:
        self.calls, self._text = 0, text

    def __call__(self) -> list[dict[str, str]]:
        self.calls += 1
        return [{"prompt": self._text, "completion": "y"}]


def test_a_shard_is_made_once(stage: Stage) -> None:
    make = Maker()
    for _ in range(2):
        assert stage.start().shard(0, TRACES, make).to_pylist() == [{"prompt": "x", "completion": "y"}]
    stage.start().shard(1, TRACES, make)
    assert make.calls == 2


def test_shards_of_other_params_are_never_taken(stage: Stage) -> None:
    stage.start().shard(0, TRACES, Maker("old"))
    stage.params = AdvantageParams(lam=0.5)
    assert stage.start().shard(0, TRACES, Maker("new")).to_pylist()[0]["prompt"] == "new"


@pytest.mark.parametrize("damage", [lambda old: old[:50], lambda old: b"", lambda old: old[:-1]])
def test_a_damaged_shard_is_set_aside_named_and_made_again(
    stage: Stage, warned: list[str], damage: Callable[[bytes], bytes]
) -> None:
    stage.start().shard(7, TRACES, Maker())
    (path,) = stage.start().work.glob("*.parquet")
    path.write_bytes(damage(path.read_bytes()))
    make = Maker()
    assert stage.start().shard(7, TRACES, make).to_pylist() == [{"prompt": "x", "completion": "y"}]
    assert make.calls == 1
    (aside,) = (stage.context.work / "quarantine").iterdir()
    assert len(warned) == 1
    assert "traces-00007.parquet is damaged" in warned[0]
    assert str(aside) in warned[0]
    assert read_rows(path, TRACES)


def test_a_shard_without_its_digest_is_made_again(stage: Stage, warned: list[str]) -> None:
    stage.start().shard(7, TRACES, Maker())
    (path,) = stage.start().work.glob("*.parquet")
    path.with_suffix(".sha256.json").unlink()
    make = Maker()
    stage.start().shard(7, TRACES, make)
    assert make.calls == 1
    assert "its digest cannot be read" in warned[0]


def test_a_manifest_with_another_number_is_not_believed(stage: Stage, warned: list[str]) -> None:
    stage.run()
    path = manifest_path(stage.start().outputs[0])
    text = path.read_text()
    path.write_text(text.replace('"rows": ', '"rows": 1', 1))
    assert stage.start().done() is None
    assert "its digest is not that of what was written" in warned[0]
    path.write_text(text)
    assert stage.start().done() is not None


def test_the_end_of_a_stage_clears_its_shards(stage: Stage) -> None:
    task = stage.start()
    task.shard(0, TRACES, Maker())
    stage.run()
    assert not task.work.exists()
