"""The cost model against sums done by hand, and what it says where nothing was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from papo.cli import main
from papo.core.cost_model import Line, Plan, Rates, cost
from papo.costing import measured_rates, plan_of, read_rates
from papo.errors import DataError, MissingInputError
from papo.params import load_params
from papo.store.layout import Workspace

ROOT = Path(__file__).parents[2]
RATES = Rates(
    parameters=1e6, prompt_tokens=20.0, completion_tokens=100.0, sampling_tokens_per_s=1000.0, start_s=3.0,
    training_tokens_per_s=500.0, verifications_per_s=50.0, judgements_per_s=10.0, advantages_per_s=400.0,
    evaluations_per_s=8.0, once_s=60.0, asked_share=0.5, judge_calls=0.8, judge_prompt_tokens=300.0,
    judge_completion_tokens=200.0, token_bytes=6.0, score_bytes=50.0,
)  # fmt: skip
PLAN = Plan(rounds=10, prompts_per_round=20, group_size=8, minibatch_prompts=8, evaluated=400, prices=(1.0, 10.0))


def lines(plan: Plan = PLAN, rates: Rates = RATES) -> dict[tuple[str, str], Line]:
    return {(line.what, line.unit): line for line in cost(plan, rates)}


def amounts(plan: Plan = PLAN, rates: Rates = RATES, unit: str = "s") -> dict[str, float | None]:
    return {what: line.round for (what, of), line in lines(plan, rates).items() if of == unit}


def test_the_seconds_of_a_round_are_its_work_over_the_rates() -> None:
    """160 responses of 100 tokens."""
    assert amounts() == pytest.approx(
        {
            "rollout": 16.0 + 3.0, "score_orm": 3.2, "score_prm": 8.0, "advantage": 0.4, "train": 32.0,
            "evaluate": None, "prepare, warmstart, report": None, "wall time": 62.6,
        }
    )  # fmt: skip
    assert lines()["evaluate", "s"].run == 50.0
    assert lines()["wall time", "s"].run == pytest.approx(626.0 + 50.0 + 60.0)


def test_the_judge_is_asked_about_a_share_and_paid_by_its_tokens() -> None:
    """80 responses asked about, 64 calls of 300 and 200 tokens."""
    found = lines()
    assert found["judge", "calls"].round == 64.0
    assert (found["judge reads", "tokens"].round, found["judge writes", "tokens"].run) == (19_200.0, 128_000.0)
    assert found["judge", "money"].run == pytest.approx(0.192 + 1.28)
    nobody = lines(dataclasses.replace(PLAN, asks_judge=False))
    assert nobody["score_prm", "s"].round == 0.0
    assert ("judge", "money") not in nobody
    assert ("judge", "money") not in lines(dataclasses.replace(PLAN, prices=None))


def test_bytes_are_of_tokens_responses_and_parameters() -> None:
    found = amounts(unit="bytes")
    assert found == {
        "rollouts": 160 * 120 * 6, "scores and advantages": 8000, "policy": 4e6, "optimizer state": 8e6,
        "policy to servers": 0, "between training devices": 0, "on disk": 115_200 + 8000 + 12e6,
    }  # fmt: skip
    many = dataclasses.replace(PLAN, remote_servers=3, training_devices=4, optimizer="adamw_8bit")
    found = amounts(many, unit="bytes")
    assert found["policy to servers"] == 12e6
    assert found["optimizer state"] == 2e6
    assert found["between training devices"] == 2 * 3 * 3 * 4e6  # 2 copies, 3 of 4 devices' share of all 4, 3 steps
    assert amounts(dataclasses.replace(many, training_kind="fsdp"), unit="bytes")["between training devices"] == 108e6


def test_more_devices_are_faster_and_more_parameters_slower_in_proportion() -> None:
    many = dataclasses.replace(PLAN, sampling_devices=4, training_devices=2, parameters=2e6)
    found = amounts(many)
    assert (found["rollout"], found["train"]) == (8.0 + 3.0, 32.0)
    assert lines(many)["devices", "device-s"].round == 11.0 * 4 + 32.0 * 2
    measured_on_four = dataclasses.replace(RATES, sampling_devices=4)
    assert amounts(dataclasses.replace(PLAN, sampling_devices=4), measured_on_four)["rollout"] == 19.0
    assert lines(many)["evaluate", "s"].run == 50.0 / 4 * 2
    longer = dataclasses.replace(PLAN, completion_tokens=200.0)
    assert lines(longer)["evaluate", "s"].run == 100.0


def test_what_was_not_measured_is_not_guessed() -> None:
    found = lines(PLAN, Rates())
    times = [line for (_, unit), line in found.items() if unit in ("s", "device-s")]
    assert all(line.round is None and line.run is None for line in times)
    assert {line.by for line in times[:7]} == {"no measured rate"}
    assert found["rollouts", "bytes"].by == "no measured rate"
    partly = lines(PLAN, dataclasses.replace(RATES, training_tokens_per_s=None))
    assert partly["rollout", "s"].round == 19.0
    assert partly["train", "s"].round is partly["wall time", "s"].round is partly["wall time", "s"].run is None
    without = dataclasses.replace(RATES, parameters=None)
    assert amounts(dataclasses.replace(PLAN, parameters=2e6), without)["train"] is None  # measured on what?


def test_a_share_of_the_peak_stands_in_for_a_rate_and_for_no_other() -> None:
    """160 x 120 tokens, 6 x 1e9 operations each, at 0.4 of 2 x 1e12."""
    plan = dataclasses.replace(PLAN, parameters=1e9, training_devices=2, training_share=0.4, peak_tflops=1.0)
    unmeasured = dataclasses.replace(RATES, training_tokens_per_s=None)
    assert amounts(plan, unmeasured)["train"] == pytest.approx(160 * 120 * 6e9 / 0.8e12)
    assert "40% of 2 devices' peak" in lines(plan, unmeasured)["train", "s"].by
    assert amounts(plan)["train"] == pytest.approx(32.0 * 1000 / 2)  # measured: the share is not asked


# ---- from a run ----


def test_the_rates_of_a_run_give_back_the_run(tiny_run: Path) -> None:
    workspace, params = Workspace(tiny_run), load_params(tiny_run / "params.yaml")
    rates = measured_rates(workspace)
    rounds = params.run.rounds
    found = {line.what: line for line in cost(plan_of(params), rates) if line.unit in ("s", "bytes")}
    disk = sum(
        path.stat().st_size
        for k in range(rounds)
        for name in ("policy", "trainer")
        for path in (workspace.round(k) / name).glob("*.safetensors")
    )
    assert (found["policy"].run or 0) + (found["optimizer state"].run or 0) == pytest.approx(disk, rel=0.05)
    tables = [workspace.table(k, "rollouts").stat().st_size for k in range(rounds)]
    assert found["rollouts"].run == pytest.approx(sum(tables), rel=1e-6)
    assert rates.judge_calls is None  # no model was asked
    assert (found["wall time"].run or 0) > 0


def test_a_workspace_without_a_round_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no round to measure"):
        measured_rates(Workspace(tmp_path))


@pytest.mark.parametrize("content", ['{"speed": 3}', '{"start_s": "3"}', '{"start_s": -1}', '{"start_s": true}'])
def test_what_is_no_rate_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(content)
    with pytest.raises(DataError, match="no rate, or no number"):
        read_rates(tmp_path / "rates.json")


def test_the_command_writes_and_reads_rates_and_says_what_it_does_not_know(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "rates.json"
    assert main(["cost", "--from-run", str(tiny_run), "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert main(["cost", "--rates", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert json.loads(out.read_text())["sampling_devices"] == 1
    assert "wall time" in first
    assert main(["cost", "--preset", "eight-gpus"]) == 0
    assert "no measured rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--rates", "a", "--from-run", "b"], "two sources of rates"),
        (["--mfu", "0.4"], "needs the peak"),
        (["--mfu", "1.4", "--peak-tflops", "1"], "--mfu is 1.4"),
        (["--parameters", "0"], "--parameters is 0"),
        (["--out", "rates.json"], "no rates to write"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["cost", *options]) == 2
    assert what in capsys.readouterr().err
