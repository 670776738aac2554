"""The judge that is a model, from the command and the stage to a real vLLM server and back: what it says is paid for once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from servers.vllm import free_port

from papo.cli import main
from papo.engines.judges import make_judge
from papo.engines.judges.model import Purpose
from papo.params import ScorePrmParams
from papo.schemas import CALIBRATION, PRM
from papo.stages import score_prm
from papo.store.manifest import Context
from papo.store.tables import read_rows

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("keyless"), pytest.mark.timeout(1800)]


def model_at(url: str) -> dict[str, Any]:
    """At temperature 0 it goes round in circles within its reason, and most replies are cut off."""
    asked = {"model": "smollm2-135m", "temperature": 1.0, "max_tokens": 96}
    return asked | {"base_url": url, "timeout_s": 900.0, "tries": 1}


def test_a_judge_is_calibrated_by_the_command(
    vllm_url: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = json.dumps(model_at(vllm_url))
    chosen = ["--set", "score_prm.judge=model", "--set", f"score_prm.model={model}"]
    assert main(["calibrate-judge", "--data", "sums", "--max", "40", "--out", "found", *chosen]) == 0
    found = json.loads((checkout / "found/calibration.json").read_text())
    assert (found["judge"], found["rubric"], found["responses"]) == ("smollm2-135m", "levels/1", 40)
    assert set(found["statuses"]) <= {"ok", "unparsable"}
    assert found["scored"] == round(40 * found["statuses"]["ok"]) >= 20
    assert found["tokens"]["prompt"] > 500 * found["scored"]
    rows = read_rows(checkout / "found/rows.parquet", CALIBRATION)
    assert {row["prm_score"] for row in rows} <= {0.0, 0.5, 1.0, None}
    assert sum(row["prm_score"] is None for row in rows) == 40 - found["scored"]
    assert "smollm2-135m" in capsys.readouterr().out


def test_the_stage_asks_for_no_verdict_twice(vllm_url: str, tmp_path: Path, small_round: Any, context: Context) -> None:
    texts = ["1+2=3\n\n\\boxed{3}", "\\boxed{3}", "2+1=3\n\n\\boxed{3}", "1+2=4\n\n4-1=3\n\n\\boxed{3}"]
    texts += ["4+5=9\n\n\\boxed{9}", "\\boxed{9}", "5+4=9\n\n\\boxed{9}", "4+5=8\n\n\\boxed{8}"]
    rollouts = small_round.rollouts(completion=texts)
    orm, problems = small_round.orm([1.0] * 7 + [0.0]), small_round.problems()

    def run(name: str, url: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
        given = {"judge": "model", "model": model_at(url), "max_failed_share": 1.0}
        params = ScorePrmParams.model_validate(given)
        judge = make_judge(params, Purpose(tmp_path / "verdicts.sqlite", run=name, variant="papo"))
        inputs = score_prm.Inputs(0, "papo", rollouts, orm, problems, rubric=judge.digest)
        out = tmp_path / name / "prm.parquet"
        manifest = score_prm.run(params, inputs, out, engine=judge, context=context)
        return read_rows(out, PRM), manifest.metrics

    rows, metrics = run("first", vllm_url)
    assert 7 <= metrics["calls"] <= 14
    assert metrics["prompt_tokens"] > 500 * 7
    assert {row["status"] for row in rows} <= {"ok", "unparsable", "not_asked"}
    asked = 1
    while any(row["status"] == "unparsable" for row in rows):  # such a reply is no verdict, and none is stored
        asked += 1
        assert asked < 10
        rows, _ = run(f"again-{asked}", vllm_url)
    assert [row["prm_score"] is None for row in rows] == [False] * 7 + [True]

    again, metrics = run("last", f"http://127.0.0.1:{free_port()}/v1")  # where nobody listens
    assert metrics["calls"] == metrics["prompt_tokens"] == 0
    assert metrics["cached_share"] == 1.0
    assert all(row["cached"] == (row["status"] == "ok") for row in again)
    assert [(row["prm_score"], row["reason"]) for row in again] == [(row["prm_score"], row["reason"]) for row in rows]
