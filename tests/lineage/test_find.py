"""A person names a run by whatever id is at hand; what is not one run is answered with those that it may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from papo.errors import DamagedError, UserError
from papo.lineage.find import REPRODUCTION, find, known_runs
from papo.lineage.record import RunRecord, Start, StepRecord
from papo.store.files import digest, write_json

FIRST = "aaaaaaaaaaaa-20260101-000000-0001"
SECOND = "aaaaaaaaaaaa-20260102-000000-0002"
OTHER = "bbbbbbbbbbbb-20260103-000000-0003"

Put = Callable[..., RunRecord]


def test_a_run_is_found_by_the_first_digits_of_its_id_lineage_or_flow_run(
    put: Put, start: Callable[..., Start]
) -> None:
    put(".", FIRST)
    put("runs/one", OTHER, starts=[start(flow_run="0190-flow"), start(flow_run="0191-flow")])
    assert [find(name).record.id for name in ("aaaa", FIRST, "AAAAAAAAAAAA", "0190", "0191-flow", "bbbbbbbbbbbb-2026")] == [
        FIRST, FIRST, FIRST, OTHER, OTHER, OTHER
    ]  # fmt: skip
    assert find("0190").because == "its flow run"


def test_a_workspace_is_its_last_run(put: Put, start: Callable[..., Start]) -> None:
    put("runs/one", SECOND, starts=[start(at="2026-01-02T00:00:00Z")])
    put("runs/one", FIRST, starts=[start(at="2026-01-01T00:00:00Z")])
    one = find("runs/one")
    assert (one.record.id, one.because) == (SECOND, "the last of 2 runs in the workspace")
    Path("moved").mkdir()
    Path("runs/one/artifacts").rename("moved/artifacts")
    assert find("moved").workspace.root == Path("moved")


def test_a_workspace_elsewhere_is_found_by_its_path_only(put: Put) -> None:
    put("elsewhere/deep", FIRST)
    assert find("elsewhere/deep").record.id == FIRST
    with pytest.raises(UserError, match="none is known here"):
        find("aaaa")


def test_two_runs_of_one_lineage_are_both_named(put: Put) -> None:
    put(".", FIRST)
    put("runs/one", SECOND)
    with pytest.raises(UserError, match="aaaa may be 2 runs") as caught:
        find("aaaa")
    assert all(name in str(caught.value) for name in (FIRST, SECOND, "runs/one"))
    assert find(SECOND[:21]).record.id == SECOND


def test_what_was_made_again_gives_way_to_what_it_was_made_from(put: Put) -> None:
    put(".", FIRST)
    put("runs/again", SECOND)
    write_json(Path("runs/again") / REPRODUCTION, {"of": FIRST})
    assert find("aaaa").record.id == FIRST
    assert find(SECOND).record.id == SECOND


def test_a_policy_is_found_by_its_digest_and_by_its_folder(put: Put, step: Callable[..., StepRecord]) -> None:
    policy = Path("runs/one/artifacts/rounds/0/policy")
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    made = step("train", 0, outputs={"policy": digest(policy)})
    put(".", FIRST, steps=[made.model_copy(update={"made": False})])
    put("runs/one", OTHER, steps=[made])
    assert find(digest(policy)[:10]).record.id == OTHER  # that took it over did not make it
    assert find(digest(policy)).because == "policy of train 0"
    assert find(str(policy)).record.id == OTHER
    put("runs/two", SECOND, steps=[made])
    with pytest.raises(UserError, match="may be 3 runs"):
        find(digest(policy)[:10])
    assert find(str(policy)).record.id == OTHER  # of equal ones, the one in whose workspace it lies
    (policy / "weights").write_text("more")
    with pytest.raises(UserError, match="there is no run"):
        find(str(policy))


def test_an_mlflow_run_is_found_by_its_tag(put: Put) -> None:
    put(".", FIRST)
    asked: list[str] = []

    def tags(run: str) -> dict[str, str]:
        asked.append(run)
        return {"papo.run_id": FIRST} if run == "0" * 32 else {}

    assert find("0" * 32, mlflow=tags).because == "its MLflow run"
    with pytest.raises(UserError, match="there is no run"):
        find("1" * 32, mlflow=tags)
    with pytest.raises(UserError, match="there is no run"):
        find("no-such", mlflow=tags)
    assert asked == ["0" * 32, "1" * 32]  # what is no id of MLflow's is not asked about


@pytest.mark.parametrize("name", ["", "a", "aaa", "no-such", "runs", "../..", "a\x1b[2J"])
def test_what_names_no_run_is_answered_with_those_that_are_known(put: Put, name: str) -> None:
    put("runs/one", FIRST)
    with pytest.raises(UserError) as caught:
        find(name)
    assert FIRST in str(caught.value)


def test_a_damaged_record_is_named_and_hides_no_other(put: Put) -> None:
    put(".", FIRST)
    damaged = Path("runs/one/artifacts/runs") / f"{OTHER}.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text(Path(f"artifacts/runs/{FIRST}.json").read_text()[:-100])
    found = known_runs()
    assert [one.record.id for one in found.known] == [FIRST]
    assert found.damaged[0].startswith(f"{damaged}: not the record of a run")
    with pytest.raises(DamagedError, match="not the record of a run"):
        find("runs/one")
    with pytest.raises(UserError, match="cannot be read"):
        find("bbbb")
