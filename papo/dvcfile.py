"""dvc.yaml, written from params.yaml: DVC can loop over a list but not count, and cannot take a stage's outputs from params."""

from __future__ import annotations

from pathlib import Path

import yaml

from papo.params import UNDECIDING, Params
from papo.pipeline import CODE, ROUND_STAGES, STAGES, Step
from papo.stages.prepare import local_files
from papo.stages.warmstart import local_checkpoint

DVC_FILE = Path("dvc.yaml")
HEADER = """\
# Written by `papo dvc` from params.yaml: run it after changing run.rounds, evaluate.benchmarks,
# or a source, a checkpoint or a rubric on this machine.
"""
PLOTS = {
    "accuracy and judge's score": ["accuracy", "prm_mean_correct"],
    "zero-advantage share": ["zero_advantage_share"],
    "length": ["length_mean", "length_p95"],
}

# What of the params each stage depends on; a change of any other leaves it alone.
PARAMS = {
    "prepare": ["prepare"],
    "warmstart": ["warmstart"],
    "rollout": ["rollout", "run.seed"],
    "score_orm": ["score_orm"],
    "score_prm": ["score_prm", "advantage.variant"],
    "advantage": ["advantage"],
    "train": ["train", "rollout.temperature", "rollout.max_new_tokens", "run.seed"],
    "evaluate": ["evaluate", "run.seed", "run.rounds", "rollout.engine"],
    "report": ["run.seed", "run.rounds", *(name for name in Params.model_fields if name not in ("run", *UNDECIDING))],
}  # fmt: skip


def render(params: Params) -> str:
    """The text of dvc.yaml."""
    last = params.run.rounds - 1
    evaluated = ["artifacts/warmstart", *(f"artifacts/rounds/{k}/policy" for k in params.evaluated_rounds)]
    tables = [f"artifacts/evaluation/{name}.parquet" for name in params.evaluate.benchmarks]
    round_ = "artifacts/rounds/${item.k}"
    problems = "data/problems/train.parquet"
    rollouts, orm, prm, advantages = (f"{round_}/{name}.parquet" for name in ("rollouts", "orm", "prm", "advantages"))
    checkpoint = [str(path)] if (path := local_checkpoint(params.warmstart)) else []
    judge = params.score_prm
    rubric = [judge.rubric] if judge.judge == "model" and Path(judge.rubric).is_file() else []
    reference = ["artifacts/warmstart"] if params.train.needs_reference else []
    files = {
        "prepare": (sorted(local_files(params.prepare)), ["data/problems", "data/problems.manifest.json"]),
        "warmstart": (
            ["data/problems/traces.parquet", *checkpoint],
            ["artifacts/warmstart", "artifacts/warmstart.manifest.json"],
        ),
        "rollout": ([problems, "${item.policy}"], [*_with_manifest(rollouts), f"{round_}/tried.parquet"]),
        "score_orm": ([problems, rollouts], _with_manifest(orm)),
        "score_prm": ([problems, rollouts, orm, *rubric], _with_manifest(prm)),
        # CAPO finds the tokens of a step with the policy's tokenizer, which is that of the warm start.
        "advantage": ([rollouts, orm, prm, "artifacts/warmstart"], _with_manifest(advantages)),
        "train": (
            [rollouts, advantages, "${item.policy}", "${item.state}", *reference],
            [f"{round_}/policy", f"{round_}/trainer", f"{round_}/policy.manifest.json"],
        ),
        "evaluate": (
            [*evaluated, *(f"data/problems/eval/{name}.parquet" for name in params.evaluate.benchmarks)],
            ["artifacts/evaluation/metrics.json", *tables, "artifacts/evaluation/metrics.manifest.json"],
        ),
        "report": (
            ["artifacts/evaluation/metrics.json", "artifacts/rounds"],
            ["artifacts/report", "artifacts/report.manifest.json"],
        ),
    }
    stages = {stage: _stage(stage, *files[stage], also=_also(stage, params)) for stage in STAGES}
    rounds = [{"k": k, "policy": _policy(k - 1), "state": _state(k - 1)} for k in range(last + 1)]
    content = {
        "vars": [{"rounds": rounds}],
        "stages": {
            name: {"foreach": "${rounds}", "do": stage} if name in ROUND_STAGES else stage
            for name, stage in stages.items()
        },
        "metrics": ["artifacts/report/summary.json"],
        "plots": [
            {title: {"x": "round", "y": {"artifacts/report/rounds.csv": columns}}} for title, columns in PLOTS.items()
        ],
    }
    return HEADER + yaml.safe_dump(content, sort_keys=False, width=120, default_flow_style=None)


def _policy(round_: int) -> str:
    return "artifacts/warmstart" if round_ < 0 else f"artifacts/rounds/{round_}/policy"


def _state(round_: int) -> str:
    # Round 0 has no optimizer state to go on from, but every item of the loop needs the key.
    return "artifacts/warmstart.manifest.json" if round_ < 0 else f"artifacts/rounds/{round_}/trainer"


def _with_manifest(table: str) -> list[str]:
    return [table, f"{table.removesuffix('.parquet')}.manifest.json"]


def _also(stage: str, params: Params) -> tuple[str, ...]:
    """Stages whose params and code decide the result of this one, beside its own."""
    by_advantage = stage == "rollout" and params.rollout.max_prompts is not None
    return ("score_orm", "score_prm", "advantage") if by_advantage else ()


def _code(stage: str, also: tuple[str, ...]) -> list[str]:
    """Files and folders of code; the report names the lineage, which is of the code of every stage."""
    stages = tuple(CODE) if stage == "report" else (stage, *also)
    return list(dict.fromkeys(path for one in stages for path in CODE[one]))


def _stage(stage: str, deps: list[str], outs: list[str], *, also: tuple[str, ...]) -> dict[str, object]:
    step = Step(stage, round=None).command
    depends = dict.fromkeys(name for one in (stage, *also) for name in PARAMS[one])
    return {
        "cmd": f"{step} --round ${{item.k}}" if stage in ROUND_STAGES else step,
        "deps": [*(f"papo/{path}" for path in _code(stage, also)), *deps],
        "params": list(depends),
        "outs": outs,
    }
