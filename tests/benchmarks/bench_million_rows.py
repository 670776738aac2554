"""A round of a million rows: time by stage, and the most memory that each takes.

    python tests/benchmarks/bench_million_rows.py [--rows 10000 100000 1000000] [--folder FOLDER]

The rows are those of round 0 of the embedded default, sampled for real (384 of them), again and again under new problem ids, as a million
cannot be sampled here; the set of problems is repeated likewise. Each command runs as people run it, in a process of its own. `plan` is the
stage train as far as its first step: all rows are read, checked and dealt to micro-batches; its steps take as much memory as those of a
small round.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from papo.engines.protocols import Progress, TrainJob
from papo.params import load_params
from papo.pipeline import Step, run_step
from papo.schemas import PROBLEMS, ROLLOUTS, Table
from papo.store.layout import Workspace
from papo.store.manifest import Context

ALLOWED = 8 * 2**30
"""Bytes of address space that a command may have."""

SETTINGS = ("--set", "run.rounds=1", "--set", "tracking.enabled=false")
COMMANDS = {
    "score-orm": ("score-orm", "--round", "0"),
    "score-prm": ("score-prm", "--round", "0"),
    "advantage": ("advantage", "--round", "0"),
    "plan": (),
    "explain": ("explain", "{problem}"),
    "compare": ("advantage", "--compare"),
    "alarms": ("alarms",),
    "report": ("report",),
}


@contextlib.contextmanager
def writing(path: Path, table: Table) -> Iterator[pq.ParquetWriter]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        yield writer


def renamed(frame: pa.Table, copy: int) -> pa.Table:
    """The rows of copy `copy`, whose problems are others."""
    ids = frame["problem_id"].to_pylist()
    names = {name: hashlib.sha256(f"{copy} {name}".encode()).hexdigest()[:16] for name in set(ids)}
    place = frame.column_names.index("problem_id")
    return frame.set_column(place, frame.schema.field(place), pa.array([names[name] for name in ids]))


def repeated(seed: Workspace, target: Workspace, rows: int) -> None:
    """Writes problems and rollouts of at least `rows` rows, and the id of one problem."""
    rollouts, problems = pq.read_table(seed.table(0, "rollouts")), pq.read_table(seed.train_problems)
    asked = set(rollouts["problem_id"].to_pylist())
    problems = problems.filter(pa.array([name in asked for name in problems["problem_id"].to_pylist()]))
    copies = -(-rows // len(rollouts))
    parts = ((target.train_problems, PROBLEMS, problems), (target.table(0, "rollouts"), ROLLOUTS, rollouts))
    for path, table, frame in parts:
        with writing(path, table) as writer:
            held = []
            for copy in range(copies):
                held.append(renamed(frame, copy).cast(table.schema))
                if len(held) * len(frame) >= 65_536 or copy + 1 == copies:
                    writer.write_table(pa.concat_tables(held).combine_chunks())
                    held = []
    shutil.copytree(seed.warmstart, target.warmstart, dirs_exist_ok=True)
    shutil.copytree(seed.evaluation, target.evaluation, dirs_exist_ok=True)
    shutil.copy(seed.round(0) / "policy.manifest.json", target.round(0))
    (target.root / "problem").write_text(str(renamed(rollouts.slice(0, 1), 0)["problem_id"][0]))


class Planner:
    """A trainer that stops where the first step would begin."""

    def train(self, job: TrainJob, progress: Progress) -> list[dict[str, float]]:
        from papo.engines.training.batches import Layout, plan
        from papo.engines.training.checks import check_rows
        from papo.engines.training.losses import token_weights

        p = load_params().train
        check_rows(job.groups, 10**6)
        steps = plan(
            job.groups, size=p.minibatch_prompts, weigh=lambda lengths: token_weights(lengths, p.loss, 96),
            skip_zero=True, mask_truncated=False, layout=Layout(p.microbatch_tokens, shared=True),
        )  # fmt: skip
        for folder in (job.out, job.out_state):
            folder.mkdir()
        (job.out / "planned").write_text(str(len(steps)))
        return [{"steps": float(len(steps))}]

    def versions(self) -> dict[str, str]:
        return {}


def plan_only(folder: Path) -> None:
    from papo.engines import training

    training.make_trainer = lambda *_, **__: Planner()
    workspace = Workspace(folder)
    kept = (workspace.round(0) / "policy.manifest.json").read_bytes()
    run_step(Step("train", 0), load_params(overrides=["run.rounds=1"]), workspace, Context(work=workspace.work))
    (workspace.round(0) / "policy.manifest.json").write_bytes(kept)


def measured(command: Sequence[str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds, and the largest resident set of one of its processes in MiB.

    Raises:
        SystemExit: it failed; the log says why.
    """
    started = time.monotonic()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (ALLOWED, ALLOWED))
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.execv(command[0], command)
    _, status, used = os.wait4(child, 0)
    failed = os.waitstatus_to_exitcode(status) != 0
    return {
        "wall": time.monotonic() - started,
        "cpu": used.ru_utime + used.ru_stime,
        "mib": used.ru_maxrss / 1024,
        "failed": float(failed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("runs/million"))
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan is not None:
        plan_only(given.plan)
        return
    papo = [sys.executable, "-m", "papo"]
    seed = given.folder / "seed"
    if not (seed / "artifacts/report/index.html").is_file():
        seed.mkdir(parents=True, exist_ok=True)
        if measured([*papo, "run", "--no-dvc", *SETTINGS, "--workspace", str(seed)], given.folder / "seed.log")[
            "failed"
        ]:
            raise SystemExit(f"the small round failed: {given.folder}/seed.log")
    for rows in given.rows:
        target = Workspace(given.folder / str(rows))
        if not (target.root / "problem").is_file():
            # In a process of its own: what this one takes would count as what its children take.
            made = multiprocessing.get_context("fork").Process(target=repeated, args=(Workspace(seed), target, rows))
            made.start()
            made.join()
        problem = (target.root / "problem").read_text()
        there = pq.read_metadata(target.table(0, "rollouts")).num_rows
        print(f"\n| {there:,} rows | wall, s | CPU, s | peak memory, MiB |\n|---|---|---|---|", flush=True)
        for name in given.only:
            words = [word.format(problem=problem) for word in COMMANDS[name]]
            command = [*papo, *words, *SETTINGS, "--workspace", str(target.root)]
            if name == "plan":
                command = [sys.executable, __file__, "--plan", str(target.root)]
            found = measured(command, target.root / f"{name}.log")
            failed = f" failed: {target.root}/{name}.log" if found["failed"] else ""
            print(f"| {name} | {found['wall']:.1f} | {found['cpu']:.1f} | {found['mib']:,.0f} |{failed}", flush=True)
            with (given.folder / "measured.jsonl").open("a") as stream:
                stream.write(json.dumps({"rows": there, "command": name} | found) + "\n")


if __name__ == "__main__":
    main()
