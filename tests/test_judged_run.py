"""A run whose judge is a model, by the commands that a person types; a real server answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers.chat import ChatProcess, chat_process

from papo.cli import main
from papo.params import load_params
from papo.pipeline import lineage
from papo.schemas import PRM
from papo.store.layout import Workspace
from papo.store.manifest import Manifest
from papo.store.tables import read_rows

pytestmark = pytest.mark.usefixtures("keyless")


@pytest.fixture
def server() -> Iterator[ChatProcess]:
    with chat_process(reply="servers.replies:levels") as server:
        yield server


def use_model(server_url: str | None, **further: Any) -> None:
    """Writes a judge into params.yaml; the policy of a tiny run is never right, so that a variant is taken that asks about all."""
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["score_prm"] |= {"judge": "model", "model": {"model": "m", "base_url": server_url}} | further
    content["advantage"]["variant"] = "prm"
    Path("params.yaml").write_text(yaml.safe_dump(content))


def test_a_judged_run_pays_once_for_all_workspaces(
    started_checkout: Path, server: ChatProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(server.url, prices={"m": {"prompt": 1.0, "completion": 2.0}})
    assert main(["run", "--no-dvc"]) == 0
    assert "judge" in capsys.readouterr().out.lower()
    here = Workspace(Path())
    rows, manifest = read_rows(here.table(0, "prm"), PRM), Manifest.read(here.table(0, "prm"))
    calls = server.seen.requests.total()
    assert manifest.metrics["calls"] == calls == len({row["reason"] for row in rows}) * calls > 0
    assert manifest.metrics["cost"] > 0
    assert {row["judge"] for row in rows} == {"m"}
    assert {row["rubric"] for row in rows} == {"levels/1"}
    assert {row["status"] for row in rows} == {"ok"}
    page = (here.report / "index.html").read_text()
    assert "What judging cost, by round" in page
    assert "judge m · seed 0" in page
    # A run beside it, by the same params: another account, and not a call.
    assert main(["run", "--no-dvc", "--workspace", "runs/other"]) == 0
    assert server.seen.requests.total() == calls
    other = Workspace(Path("runs/other"))
    metrics = Manifest.read(other.table(0, "prm")).metrics
    assert (metrics["calls"], metrics["cost"], metrics["cached_share"]) == (0.0, 0.0, 1.0)
    assert metrics["cache_saved"] >= manifest.metrics["cost"]
    scores = [[row["prm_score"] for row in read_rows(one.table(0, "prm"), PRM)] for one in (here, other)]
    assert scores[0] == scores[1]
    capsys.readouterr()
    assert main(["judge-cache", "stats"]) == 0
    assert "levels/1" in capsys.readouterr().out
    assert main(["judge-cache", "verify"]) == 0


def test_a_stage_that_a_budget_stopped_goes_on_with_a_larger_one(
    started_checkout: Path, server: ChatProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"m": {"prompt": 0.0, "completion": 1e6}}
    use_model(server.url, prices=prices, budget=30.0, model={"model": "m", "base_url": server.url, "max_tokens": 20})
    assert main(["score-orm", "--round", "0"]) == 0
    assert main(["score-prm", "--round", "0"]) == 1
    said = capsys.readouterr().err
    assert "score_prm.budget, 30" in said
    assert "raise score_prm.budget" in said
    bought = server.seen.requests.total()
    assert bought > 0
    budget = "score_prm.budget=10000"
    assert main(["score-prm", "--round", "0", "--set", budget]) == 0
    manifest = Manifest.read(Workspace(Path()).table(0, "prm"))
    assert manifest.metrics["calls"] == server.seen.requests.total() > bought
    assert "budget" not in manifest.params
    # What the judge may cost, and how it is reached, makes no other stage and no other run of it.
    assert (
        main(["score-prm", "--round", "0", "--set", "score_prm.budget=20000", "--set", "score_prm.model.tries=9"]) == 0
    )
    assert "had been done before" in capsys.readouterr().err
    assert lineage(load_params(overrides=[budget])) == lineage(load_params())
    assert lineage(load_params(overrides=["score_prm.rubric=points"])) != lineage(load_params())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "judge model needs to know which"),
        ({"votes": 3}, "votes 3 at temperature 0 would repeat one vote"),
        ({"budget": 1.0}, "budget needs to know what a call costs: set prices.m"),
        ({"budget": 0.0}, "score_prm.budget"),
        ({"rubric": "none-such"}, "there is no rubric 'none-such'"),
        ({"rubric": "params.yaml"}, "kind is missing"),
        ({"prices": {"m": {"prompt": -1.0, "completion": 0.0}}}, "score_prm.prices.m.prompt"),
        ({"model": {"model": "m"}}, "OPENAI_API_KEY holds no key"),
        ({"store": "verdicts.txt"}, "ends in .sqlite"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_asked_is_said_before_the_run_begins(
    started_checkout: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    use_model("http://127.0.0.1:9/v1", **change)
    assert main(["run", "--no-dvc", "--workspace", "runs/one"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs/one/artifacts/rounds").exists()


def test_capo_takes_a_rubric_that_names_steps(
    started_checkout: Path, server: ChatProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    server.set(reply="servers.replies:wrong_steps")
    use_model(server.url)
    capo = ["--set", "advantage.variant=capo"]
    assert main(["run", "--no-dvc", "--workspace", "runs/one", *capo]) == 2
    assert "names none" in capsys.readouterr().err
    assert main(["run", "--no-dvc", "--workspace", "runs/one", *capo, "--set", "score_prm.rubric=wrong-steps"]) == 0


def test_a_variant_that_asks_no_judge_needs_none(started_checkout: Path) -> None:
    use_model("http://127.0.0.1:9/v1", model={"model": "m"})
    assert main(["score-orm", "--round", "0", "--set", "advantage.variant=orm"]) == 0
    assert main(["score-prm", "--round", "0", "--set", "advantage.variant=orm"]) == 0
    assert Manifest.read(Workspace(Path()).table(0, "prm")).counts == {"not_asked": 16}


def test_a_server_that_is_down_ends_the_stage_with_1(
    started_checkout: Path, server: ChatProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"model": "m", "base_url": server.url, "breaker": 2, "tries": 1}
    use_model(server.url, model=model)
    assert main(["score-orm", "--round", "0"]) == 0
    server.set(fault="503")
    assert main(["score-prm", "--round", "0"]) == 1
    assert "start the stage again" in capsys.readouterr().err
    server.set(fault="none")
    assert main(["score-prm", "--round", "0"]) == 0
    assert set(Manifest.read(Workspace(Path()).table(0, "prm")).counts) == {"ok"}


def test_a_model_is_calibrated_as_other_judges_are(
    started_checkout: Path, server: ChatProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(server.url, votes=3, model={"model": "m", "base_url": server.url, "temperature": 1.0})
    assert main(["calibrate-judge", "--max", "40"]) == 0
    (path,) = Workspace(Path()).calibrations.glob("*/calibration.json")
    found = json.loads(path.read_text())
    assert (found["judge"], found["rubric"], found["scored"]) == ("m", "levels/1", 40)
    assert 0 < found["votes"]["agreement"] < 1
    calls = server.seen.requests.total()
    assert main(["calibrate-judge", "--max", "40"]) == 0
    assert server.seen.requests.total() == calls == 120
    assert "m" in capsys.readouterr().out
