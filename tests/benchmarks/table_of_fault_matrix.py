"""Writes docs/faults.md: every fault at every point, and what became of the run.

    python tests/benchmarks/table_of_fault_matrix.py             # minutes on a core
    python tests/benchmarks/table_of_fault_matrix.py --check     # nothing is run: does the page know the stages and points of the code?
    python tests/benchmarks/table_of_fault_matrix.py --stored    # nothing is run: the page of the outcomes of this or of `make test-ops`

A run of it that was ended goes on from build/fault-outcomes.jsonl, as long as the code is the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.cases import FAULTS, cases
from faults.matrix import STORED, by_point, by_stage, line_of, points_of_code, read_line, shown_points, summed_up
from faults.world import STAGES, Outcome, world

from papo.cli import quiet_environment
from papo.store.manifest import code_digest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/faults.md"

# By hand, for what the last page was made on; what a case took of CPU is stored with it from now on.
TEXT = """\
# Killed anywhere

A run may be ended at any moment, by a person, the machine or the power; the disk may fill up or turn read-only; a file may come back with
another bit. The same command again goes on, and ends with the same bytes. This page is how that is known. It is written by

    python tests/benchmarks/table_of_fault_matrix.py     # CI runs the same cases with `make test-ops`, and writes build/fault-matrix.md

The package tells of its points (`papo.store.faults.reached`): around each write, fsync, rename, removal and transaction, each call of an
engine, and each step. Nobody listens but tests: no param, option or variable of the environment switches it on, only Python in the
same process; a run that is listened to warns that it is a test. A test walks the code and fails where something writes or calls an
engine without a point.

A case starts one stage from a copy of its workspace, in a process of its own; the fault strikes when the point is reached; the same
command is started again, undisturbed. The case is *survived* if tables, policies, optimizer state, evaluation, report and manifests are
those of a run that nobody disturbed, no row is missing or there twice, nothing temporary is left, no stored shard, saved step or finished
stage was made again, no file under its own name was ever half there, and no judge's call was paid twice but those under way. It is
*refused* if the command said which file, why and what to do, and all of that holds once the cause is gone. Anything else is a failure.

| fault | what it is |
|---|---|
{faults}

{summary}{missing}

## By stage

{stages}
A number is how many cases were survived. Not everything is run everywhere, which would be some 500 cases: each stage is killed at each of
its points, at the first or, by turns, the last file that the point is about; what repeats (shards, saved steps, transactions, batches of
samples) at the first and the last time; and each other fault strikes at each point that it is about in every third stage that has it.

## By point

{points}
A point without a number is one of a run as a whole (`tests/faults/test_runs.py`: its record with MLflow and on disk, what it scores
ahead, the start that it shares with another workspace, `dvc commit`, an alarm that stops it), of what is damaged (`set aside`, a test of
its own), or of the second opinion (`ask`).

## That it bites

`tests/faults/mutations.py` breaks what keeps a run whole, and a test asserts that the cases notice each: no fsync, no fsync of folders,
files written under their own name, the manifest written before its tables, digests of outputs, of saved steps or of records not checked.

## What it found

Each has a test of its own now:

- The name of a new folder was not synced: after a loss of power the shards in it were gone, though each of them had been.
- A bit that flipped in a stored shard or sample was used: Parquet has no checksum unless asked. Pages have one now, and what no
  manifest tells of has a digest beside it. A flipped name in a footer ended in a traceback.
- A digit that flipped in a manifest or in the record of a saved step was believed. Both are sealed with a digest now.
- A disk that turned read-only while a file was written, or while the lock was let go, ended in a traceback that hid the cause.
- The verdicts that `papo reproduce` copies were written in place: a copy that was ended half-way was taken for whole.
- A start that was killed while it wrote the first record of its run left a temporary file for good.
- Two runs into one workspace beside: a copy of the start that was ended half-way, and a full disk there, had no error with a name.

## Limits

Power loss is modelled, not caused: content as of the last fsync, names as of the last fsync of their folder, which is stricter than most
file systems. SQLite syncs by itself and is trusted to. Round 1 of two stands for the rounds. A full or read-only disk is an error raised
at the point; `tests/store/test_disk.py` fills a real one. Training by several processes and servers of vLLM have their own tests for kills
(`tests/engines/training`, `tests/test_rollout_servers.py`).
"""


def page(outcomes: list[Outcome]) -> str:
    faults = "\n".join(f"| {name} | {text} |" for name, text in FAULTS.items())
    return TEXT.format(
        faults=faults,
        summary=summed_up(outcomes),
        missing=missing(outcomes),
        stages=by_stage(outcomes),
        points=by_point(outcomes),
    )


def missing(outcomes: list[Outcome]) -> str:
    """Says which stages the outcomes are not of."""
    none = [stage for stage in STAGES if stage not in {one.step.split()[0] for one in outcomes}]
    return f" **Not all cases have been run: there is none of {', '.join(none)}.**" if none else ""


def check() -> int:
    """1, and the difference, if the page does not have the stages and points of the code."""
    stages, points = shown_points(PAGE.read_text())
    if stages == set(STAGES) and points == points_of_code():
        return 0
    print(
        f"{PAGE} is of other stages or points: {sorted(stages ^ set(STAGES))} {sorted(points ^ points_of_code())}; run this again"
    )
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--stored", action="store_true")
    options = parser.parse_args()
    if options.check:
        return check()
    quiet_environment()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None), os.environ.pop(name.lower(), None)
    STORED.parent.mkdir(exist_ok=True)
    code = code_digest(["."])
    outcomes = (
        [one for of, one in map(read_line, STORED.read_text().splitlines()) if of == code] if STORED.exists() else []
    )
    if options.stored:
        PAGE.write_text(page(outcomes))
        print(summed_up(outcomes))
        return 0
    done = {(one.step, one.at, one.fault) for one in outcomes}
    with tempfile.TemporaryDirectory() as folder, world(Path(folder)) as small, STORED.open("a") as stored:
        for step, at, fault in cases(small):
            if (step, at, fault) in done:
                continue
            outcomes.append(small.disturb(at, step, fault))
            print(line_of(code, outcomes[-1]), file=stored, flush=True)
            for problem in outcomes[-1].problems:
                print(f"{step}: {fault} at {at}: {problem}", flush=True)
    PAGE.write_text(page(outcomes))
    print(summed_up(outcomes))
    return any(one.problems for one in outcomes)


if __name__ == "__main__":
    sys.exit(main())
