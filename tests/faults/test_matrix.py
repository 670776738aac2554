"""Every fault at every point: the same command again ends with the bytes of an undisturbed run, and nothing is lost or done twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.cases import AT, DISTURBED, cases, every_case
from faults.matrix import STORED, by_stage, in_full, line_of, points_of_code, summed_up
from faults.world import At, World, world

from papo.store.manifest import code_digest

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build/fault-matrix.md"
# Of a run as a whole, not of a stage: tests/faults/test_runs.py; and the second opinion, whose answers no outcome depends on.
OF_A_RUN = {"session begins", "session ends", "track", "dvc commit", "dvc committed", "link"}
NOT_ASKED = {"ask", "asked"}
# Reached by a start that finds something damaged.
AFTER_DAMAGE = {"set aside"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OPENAI_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        with world(tmp_path_factory.mktemp("faults")) as small:
            yield small


@pytest.mark.ops
@pytest.mark.timeout(3000)
def test_every_fault_at_every_point_is_survived_or_refused(small: World) -> None:
    REPORT.parent.mkdir(exist_ok=True)
    outcomes, code = [], code_digest(["."])
    with STORED.open("w") as stored:
        for step, at, fault in cases(small):
            outcomes.append(small.disturb(at, step, fault))
            print(line_of(code, outcomes[-1]), file=stored, flush=True)
    REPORT.write_text(f"# Faults\n\n{summed_up(outcomes)}\n\n{by_stage(outcomes)}\n{in_full(outcomes)}")
    bad = [f"{one.step}: {one.fault} at {one.at}: {'; '.join(one.problems)}" for one in outcomes if one.problems]
    assert not bad, "\n".join(bad)
    assert sum(one.lost for one in outcomes) == sum(one.repeated for one in outcomes) == 0
    assert {one.step for one in outcomes} == set(DISTURBED)
    killed = {(one.step, one.at.point) for one in outcomes if one.fault == "kill"}
    assert killed >= {(step, line["point"]) for step in DISTURBED for line in small.traces[step].lines}
    assert {point for _, point in killed} == points_of_code() - OF_A_RUN - NOT_ASKED - AFTER_DAMAGE
    reached = {point for _, point in killed}
    struck = {(one.fault, one.at.point) for one in outcomes}
    assert struck >= {(fault, point) for fault, points in AT.items() for point in points if point in reached}
    assert any(one.result == "refused" for one in outcomes if one.fault == "full")


@pytest.mark.ops
def test_a_kill_while_something_damaged_is_set_aside_is_survived(small: World) -> None:
    for step, label in (("rollout 1", "rollouts-#.parquet"), ("train 1", "step-#")):
        folder = f".papo/work/{step.replace(' ', '-')}"
        point = "shard stored" if step == "rollout 1" else "step saved"
        flipped = At(step, point, f"{folder}/{label}", 2)
        again = At(step, "set aside", f"{folder}/{label}", 1)
        outcome = small.disturb(flipped, step, "flipped", then=(again, "kill"))
        assert outcome.problems == []


# Mutation, and the cases that notice it.
NOTICED: dict[str, list[tuple[str, str, str]]] = {
    "no fsync": [("rollout 1", "shard stored", "emptied"), ("train 1", "step saved", "lost")],
    "no fsync of folders": [("rollout 1", "shard stored", "lost"), ("train 1", "stage finished", "lost")],
    "written in place": [("rollout 1", "written", "torn"), ("advantage 1", "written", "torn")],
    "manifest first": [("rollout 1", "write", "kill")],
    "digests not checked": [("rollout 1", "stage finished", "flipped"), ("train 1", "stage finished", "flipped")],
    "seals not checked": [("advantage 1", "stage finished", "flipped")],
    "steps not checked": [("train 1", "step saved", "flipped")],
}


@pytest.mark.ops
@pytest.mark.parametrize("mutation", NOTICED)
def test_the_harness_notices(small: World, mutation: str) -> None:
    tried = []
    for noticing in NOTICED[mutation]:
        if mutation == "manifest first":
            chosen = [("rollout 1", At("rollout 1", "write", "artifacts/rounds/1/rollouts.parquet", 1), "kill")]
        else:
            chosen = [case for case in every_case(small) if (case[0], case[1].point, case[2]) == noticing]
        for step, at, fault in chosen:
            if small.disturb(at, step, fault, mutation).problems:
                assert small.disturb(at, step, fault).problems == []
                break
            tried.append(str(at))
        else:
            pytest.fail(f"{noticing} is not noticed by {tried}")
