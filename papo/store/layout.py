"""Where everything lies under a workspace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """A folder that holds one run: a checkout, or a folder under runs/ for a run beside it."""

    root: Path

    @property
    def problems(self) -> Path:
        return self.root / "data/problems"

    @property
    def train_problems(self) -> Path:
        return self.problems / "train.parquet"

    @property
    def traces(self) -> Path:
        return self.problems / "traces.parquet"

    def benchmark(self, name: str) -> Path:
        return self.problems / "eval" / f"{name}.parquet"

    def benchmark_beside(self, name: str) -> Path:
        """A benchmark that an evaluation by hand asked for and `prepare` does not make."""
        return self.root / "data/benchmarks" / f"{name}.parquet"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def warmstart(self) -> Path:
        return self.artifacts / "warmstart"

    def round(self, round_: int) -> Path:
        return self.artifacts / "rounds" / str(round_)

    def table(self, round_: int, name: str) -> Path:
        """`rollouts`, `orm`, `prm` or `advantages` of a round."""
        return self.round(round_) / f"{name}.parquet"

    def policy(self, round_: int) -> Path:
        """The policy that round `round_` ends with; that of round -1 is the warm start."""
        return self.warmstart if round_ < 0 else self.round(round_) / "policy"

    def trainer(self, round_: int) -> Path:
        """Optimizer state at the end of a round."""
        return self.round(round_) / "trainer"

    @property
    def evaluation(self) -> Path:
        return self.artifacts / "evaluation"

    @property
    def comparisons(self) -> Path:
        """Evaluations of policies that were named by hand; beside the pipeline, under DVC by no stage."""
        return self.artifacts / "comparisons"

    @property
    def calibrations(self) -> Path:
        """What `papo calibrate-judge` measured, a folder a judge and data set; beside the pipeline, under DVC by no stage."""
        return self.artifacts / "calibration"

    @property
    def records(self) -> Path:
        """What `papo lineage` reads, a file a run; beside the pipeline, under DVC by no stage."""
        return self.artifacts / "runs"

    @property
    def report(self) -> Path:
        return self.artifacts / "report"

    @property
    def last_good(self) -> Path:
        """Which policy was the last good one when an alarm asked."""
        return self.artifacts / "last_good.json"

    @property
    def decisions(self) -> Path:
        """What was decided about alarms, by run."""
        return self.work / "alarms.json"

    @property
    def work(self) -> Path:
        """What is not a result: shards under way, the lock, quarantined files. Never under DVC."""
        return self.root / ".papo"


def manifest_path(output: Path) -> Path:
    """`<name>.manifest.json` beside an output: `orm.parquet` -> `orm.manifest.json`, `policy/` -> `policy.manifest.json`."""
    return output.with_name(f"{output.name.removesuffix('.parquet').removesuffix('.json')}.manifest.json")
