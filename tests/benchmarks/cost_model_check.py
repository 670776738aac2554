"""What the cost model says of a run of the embedded default, by the rates of a smaller one, and what the run then takes.

    python tests/benchmarks/cost_model_check.py

Real are all stages. Verifier and judge are asked once the sampling is over (run.overlap=false), so that the seconds of each stage are its
own. Both runs start from one warm start. The seconds are wall time of this machine: where others work on it, look at the median of several.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from papo.cli import main as papo
from papo.cli import quiet_environment
from papo.core.cost_model import STAGES, cost
from papo.costing import measured_rates, plan_of
from papo.params import Params, load_params
from papo.session import share_start
from papo.store.layout import Workspace
from papo.store.manifest import Manifest


def run(workspace: Workspace, given: list[str]) -> Params:
    options = [word for override in given for word in ("--set", override)]
    assert papo(["run", "--no-dvc", "--workspace", str(workspace.root), *options]) == 0
    return load_params(overrides=given)


def took(workspace: Workspace, rounds: int) -> dict[str, float]:
    """Seconds of each stage over all rounds, of the evaluation, and bytes of what is stored of the rounds."""
    outputs = {
        "rollout": "rollouts.parquet", "score_orm": "orm.parquet", "score_prm": "prm.parquet",
        "advantage": "advantages.parquet", "train": "policy",
    }  # fmt: skip
    found = {
        stage: sum(Manifest.read(workspace.round(k) / name).seconds for k in range(rounds))
        for stage, name in outputs.items()
    }
    found["evaluate"] = Manifest.read(workspace.evaluation / "metrics.json").seconds
    found["on disk"] = sum(
        path.stat().st_size
        for k in range(rounds)
        for path in workspace.round(k).rglob("*")
        if path.suffix in (".parquet", ".safetensors") and path.name != "tried.parquet"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs=2, default=(16, 48), help="a round, measured and predicted")
    parser.add_argument("--rounds", type=int, nargs=2, default=(2, 4), help="measured and predicted")
    parser.add_argument("--warmstart", type=int, default=1000, help="steps (default: 1000)")
    parser.add_argument("--runs", type=int, default=3, help="of both (default: 3)")
    given = parser.parse_args()
    quiet_environment()
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        start: Workspace | None = None
        for number in range(given.runs):
            spaces = [Workspace(Path(folder) / f"{name}{number}") for name in ("small", "large")]
            params = []
            for workspace, prompts, rounds in zip(spaces, given.prompts, given.rounds, strict=True):
                if start is not None:
                    share_start(start, workspace)
                common = [f"warmstart.steps={given.warmstart}", "run.overlap=false", "tracking.enabled=false"]
                params.append(run(workspace, [*common, f"rollout.prompts_per_round={prompts}", f"run.rounds={rounds}"]))
                start = start or workspace
            small, large = spaces
            lines = {
                line.what: line
                for line in cost(plan_of(params[1]), measured_rates(small))
                if line.unit in ("s", "bytes")
            }
            real = took(large, given.rounds[1])
            said = {name: lines[name].run or 0.0 for name in real}
            real["stages"], said["stages"] = (sum(of[name] for name in (*STAGES, "evaluate")) for of in (real, said))
            for name in real:
                ratios.setdefault(name, []).append(said[name] / real[name])
            print(
                f"run {number}: " + ", ".join(f"{name} {said[name]:.4g} said, {real[name]:.4g} taken" for name in real)
            )
    print("said / taken, medians:")
    for name, found in ratios.items():
        print(f"  {name:<10} {statistics.median(found):.2f}  ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
