"""Runs of an ablation whose truth is known: the files that a run leaves, made by rule instead of by training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from papo.ablations.plan import Plan, Run, expand
from papo.ablations.work import Place
from papo.lineage.record import RunRecord, environment, new_id, now, this_process
from papo.schemas import EVALUATION
from papo.store.files import write_json
from papo.store.tables import write_rows

PROBLEMS = 40
SAMPLES = 4

TINY_PLAN: dict[str, Any] = {
    "title": "Tiny",
    "base": {"run.rounds": 1},
    "seeds": 2,
    "axes": {"variant": {"orm": {"advantage.variant": "orm"}, "papo": {"advantage.variant": "papo"}}},
    "compare": [{"against": {"variant": "orm"}, "measures": ["accuracy/tiny"]}],
    "margins": {"accuracy": 0.02},
}
"""Two variants, for a checkout whose only benchmark is `tiny`."""

Accuracy = Callable[[Mapping[str, str], int, str, np.random.Generator], np.ndarray]
"""(labels of the arm, seed, policy, rng) -> (PROBLEMS,) chances of a right answer."""


def plan(**given: Any) -> Plan:
    """Two variants and two judges at four seeds, of one benchmark."""
    values: dict[str, Any] = {
        "title": "Made",
        "base": {"run.rounds": 8, "evaluate.every": 2},
        "seeds": 4,
        "axes": {
            "variant": {"orm": {"advantage.variant": "orm"}, "papo": {"advantage.variant": "papo"}},
            "judge": {"steps": {"score_prm.judge": "steps"}, "gullible": {"score_prm.judge": "steps-gullible"}},
        },
        "compare": [{"against": {"variant": "orm"}, "measures": ["accuracy/sums-hard", "length/sums-hard"]}],
        "margins": {"accuracy": 0.05, "length": 5.0, "change": 0.05},
    }
    return Plan.model_validate(values | given)


def make(
    plan: Plan, root: Path, accuracy: Accuracy, *, signals: Callable[..., dict[str, float]] | None = None
) -> list[Run]:
    """Writes a finished run for each of the plan's; the runs."""
    runs = expand(plan)
    for run in runs:
        make_run(run, Place(root), accuracy, signals=signals)
    return runs


def make_run(
    run: Run, place: Place, accuracy: Accuracy, *, signals: Any = None, how: str = "finished", why: str = ""
) -> None:
    """The record and the evaluation of one run."""
    labels, workspace = run.arms[0].labels, place.workspace(run)
    rng = np.random.default_rng([run.seed, *json.dumps(labels).encode()])
    rounds = run.params.run.rounds
    policies = ["warmstart", *(f"round-{k}" for k in run.params.evaluated_rounds[:-1]), "final"]
    rows = []
    for policy in policies:
        right = rng.random((PROBLEMS, SAMPLES)) < accuracy(labels, run.seed, policy, rng)[:, None]
        rows += [
            {
                "policy": policy, "policy_digest": "d", "problem_id": f"{problem:016x}", "sample_index": sample, "tier": None,
                "completion": "", "completion_tokens": 10 + run.seed, "finish_reason": "stop",
                "orm_score": float(right[problem, sample]), "extracted": None, "status": "ok", "seed": 0,
            }
            for problem in range(PROBLEMS)
            for sample in range(SAMPLES)
        ]  # fmt: skip
    workspace.evaluation.mkdir(parents=True, exist_ok=True)
    for benchmark in run.params.evaluate.benchmarks:
        write_rows(workspace.evaluation / f"{benchmark}.parquet", EVALUATION, rows)
    steps: list[dict[str, Any]] = []
    for number in range(rounds):
        metrics = {"accuracy": 0.5, "zero_advantage_share": 0.2, "length_mean": 20.0}
        metrics |= signals(labels, run.seed, number, rng) if signals is not None else {}
        steps.append(_step("score_prm", number, {"asked_share": 0.5}, rows=100))
        steps.append(_step("advantage", number, metrics, rows=100))
    record = RunRecord.model_validate(
        {
            "id": new_id(run.lineage), "lineage": run.lineage, "name": run.name, "workspace": str(workspace.root), "checkout": ".",
            "params": run.params.model_dump(mode="json"), "code": {}, "files": {}, "judge": {"name": "steps"}, "environment": environment(),
            "tracking": {"enabled": False, "uri": "", "experiment": "papo"}, "steps": steps,
            "starts": [{"at": now(), "ended": now(), "how": how, "why": why, **this_process()}],
        }
    )  # fmt: skip
    write_json(workspace.records / f"{record.id}.json", record.model_dump(mode="json"))


def _step(stage: str, number: int, metrics: dict[str, float], *, rows: int) -> dict[str, Any]:
    return {"stage": stage, "round": number, "identity": "i", "params": {}, "inputs": {}, "code": "c", "outputs": {"o": "d"},
            "rows": rows, "metrics": metrics, "seconds": 1.0, "made": True}  # fmt: skip


def even(*_: object) -> np.ndarray:
    """Every problem is as hard as a coin is fair."""
    return np.full(PROBLEMS, 0.5)


class Made:
    """Begins runs that end at the next look, and leave what a finished run leaves."""

    def __init__(self, place: Place, **how: str) -> None:
        self.place, self.how = place, how
        self.begun: list[str] = []
        self.at_once = 0
        self._open: list[Run] = []

    def begin(self, run: Run) -> Callable[[], bool]:
        self.begun.append(run.name)
        self._open.append(run)
        self.at_once = max(self.at_once, len(self._open))
        looked: list[int] = []

        def ended() -> bool:
            looked.append(1)
            if len(looked) < 2:
                return False
            self._open.remove(run)
            make_run(run, self.place, even, how=self.how.get(run.name, "finished"), why="as it was told")
            return True

        return ended
