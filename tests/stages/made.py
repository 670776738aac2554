"""What the report of a run is made from: signals, an evaluation, a calibration, the cost of judging, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from papo.params import Params
from papo.stages import report
from papo.store.files import write_json
from papo.store.manifest import Manifest

JUDGED = {"prm_mean": 0.7, "prm_mean_correct": 0.7, "judge_failure_share": 0.0}


def signals(round_: int, **change: float) -> dict[str, float]:
    return {
        "responses": 384.0, "accuracy": 0.3 + 0.05 * round_, "zero_advantage_share": 0.3,
        "zero_advantage_share_all_correct": 0.1, "zero_advantage_share_all_wrong": 0.15,
        "zero_advantage_share_other": 0.05, "groups_two_correct_share": 0.6, "groups_process_active_share": 0.4,
        "outcome_advantage_share": 0.8, "process_advantage_share": 0.2, "length_mean": 20.0 + round_,
        "length_p95": 40.0 + round_, "inversions": 2.0, **JUDGED, **change,
    }  # fmt: skip


def step(number: int) -> dict[str, float]:
    return {"step": float(number), "grad_norm": 0.5, "approx_kl": 0.01, "clipped_low_share": 0.0,
            "clipped_high_share": 0.02}  # fmt: skip


def manifest(path: Path, **change: Any) -> Path:
    fields: dict[str, Any] = {"stage": "advantage", "round": 0, "identity": "i", "params": {}, "inputs": {}, "code": "c",
                              "outputs": {}, "rows": 1, "seconds": 1.0}  # fmt: skip
    write_json(path, Manifest(**fields | change).model_dump(mode="json", exclude={"skipped"}))
    return path


def estimate(value: float, low: float, high: float, missing: int = 0) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "standard_error": None, "problems": 50, "samples": 200,
            "missing": missing}  # fmt: skip


def policy(value: float) -> dict[str, Any]:
    accuracy = estimate(value, value - 0.05, value + 0.05)
    tiers = {"10 terms": estimate(0.111, 0.0, 0.2), "9 terms": estimate(0.222, 0.1, 0.3)}
    return {"avg_at_k": accuracy, "pass_at_k": accuracy, "k": 4, "length_mean": 33.25, "truncated_share": 0.01,
            "no_answer_share": 0.02, "timeout_share": 0.04, "tiers": tiers}  # fmt: skip


def benchmark(first: float, last: float, *, reach: float = 0.02, missing: int = 0) -> dict[str, Any]:
    gain = estimate(last - first, last - first - reach, last - first + reach, missing)
    return {"warmstart": policy(first), "final": policy(last), "gain": gain}


def inputs(
    folder: Path,
    rounds: list[dict[str, float]],
    evaluation: Any = None,
    *,
    steps: int = 2,
    params: dict[str, Any] | None = None,
    judging: list[dict[str, float]] | None = None,
) -> report.Inputs:
    advantages, training, judged = {}, {}, {}
    for k, row in enumerate(judging or []):
        judged[str(k)] = manifest(
            folder / str(k) / "prm.manifest.json", stage="score_prm", round=k, metrics=row, rows=100
        )
    for k, row in enumerate(rounds):
        advantages[str(k)] = manifest(folder / str(k) / "advantages.manifest.json", round=k, metrics=row)
        history = [step(number) for number in range(1, steps + 1)]
        training[str(k)] = manifest(folder / str(k) / "policy.manifest.json", stage="train", round=k, history=history)
    write_json(folder / "metrics.json", evaluation or {"sums": benchmark(0.4, 0.55)})
    given = Params()
    shown, limits = given.flat() | (params or {}), given.alarms.model_dump()
    return report.Inputs(shown, limits, judged, advantages, training, folder / "metrics.json")


def interval(*values: float | None) -> dict[str, Any]:
    return dict(zip(("value", "low", "high"), values, strict=True))


def calibration(**change: Any) -> dict[str, Any]:
    measures = {name: interval(0.5, 0.4, 0.6) for name in ("agreement", "kappa", "kappa_linear", "auc", "answer_bias")}
    return {"judge": "steps-gullible", "rubric": "steps-gullible/1", "data": "sums", "responses": 500, "scored": 490,
            "length_bias": interval(0.757, 0.72, 0.79), "notes": ["a <note>"], **measures, **change}  # fmt: skip


ASKED = {
    "asked_share": 0.4, "calls": 1234.0, "calls_failed": 3.0, "prompt_tokens": 1_234_567.0, "completion_tokens": 89_012.0,
    "cached_share": 0.125, "cache_tokens": 50_000.0, "not_asked_calls": 1800.0, "not_asked_tokens": 1_900_000.0,
}  # fmt: skip
PRICED = ASKED | {"cost": 0.0012345, "cache_saved": 12.0, "not_asked_saved": 3456.78}
