"""A small run whose steps can be repeated from a copy of the workspace, disturbed, started again, and compared with the undisturbed one."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from forks import Papo, papo_forks
from safetensors import safe_open
from servers.chat import ChatProcess, chat_process

from papo.store.files import digest

IMPORTS = """
import aiohttp, httpx2, openai, tenacity, datasets, matplotlib.figure, jinja2, scipy.stats
import torch, transformers, trl
from openai import AsyncOpenAI, DefaultAioHttpClient
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaConfig, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
import papo.ahead, papo.engines.chat, papo.engines.judges.model, papo.engines.recompute, papo.engines.samplers.transformers
import papo.engines.tokenizer, papo.engines.training.trainer, papo.engines.verifiers.math_verify, papo.engines.warmstart
import papo.engines.sources, papo.engines.reporting.page, papo.engines.verifiers.by_kind, papo.engines.second_opinion
from faults import child
"""
CONCURRENCY = 2
TIER = {"min_terms": 2, "max_terms": 2}
# A policy that has just learned to box a number: some answers are right, so that there is something to train on. Several shards a round,
# several saved steps, and a model as judge that is asked about every response.
PARAMS: dict[str, Any] = {
    "run": {"seed": 0, "rounds": 2, "overlap": False},
    "prepare": {
        "sums": {
            "train": {**TIER, "problems": 24},
            "eval": {"easy": {**TIER, "problems": 4}},
            "traces": 100,
            "bare_share": 0.8,
            "merged_share": 0.0,
            "verbose_share": 0.0,
        }
    },
    "warmstart": {
        "model": {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2},
        "steps": 8,
        "batch_size": 16,
        "learning_rate": 1e-2,
    },
    "rollout": {"prompts_per_round": 6, "group_size": 4, "max_new_tokens": 12, "prompts_per_shard": 2},
    "score_prm": {"judge": "model", "max_failed_share": 1.0},
    "advantage": {"variant": "prm"},
    "train": {"minibatch_prompts": 2, "learning_rate": 1e-3, "save_minutes": 0},
    "evaluate": {"benchmarks": ["easy"], "samples_per_problem": 2, "max_new_tokens": 12, "problems_per_shard": 2},
    "tracking": {"enabled": False},
}
STEPS = (
    "prepare",
    "warmstart",
    *(
        f"{stage} {round_}"
        for round_ in (0, 1)
        for stage in ("rollout", "score_orm", "score_prm", "advantage", "train")
    ),
    "evaluate",
    "report",
)
STAGES = tuple(dict.fromkeys(step.split()[0] for step in STEPS))
# What of a manifest says how the work went, not what it gave: a process that finds shards stored samples fewer batches.
COURSE = (
    "seconds",
    "tflops",
    "peak_memory_mb",
    "tokens_per_s",
    "tokens_per_second",
    "batches",
    "batch_rows",
    "batch_halvings",
    "digest",
)
ENGINES = ("fit", "sample", "verify", "judge", "train", "read source")


@dataclass(frozen=True)
class At:
    """A point: the step, the point, what it is about, and which of its occurrences; `victim`: a file beside that is damaged instead."""

    step: str
    point: str
    label: str
    number: int
    victim: str = ""

    @property
    def stage(self) -> str:
        return self.step.split()[0]

    def __str__(self) -> str:
        return f"{self.step}, {self.point} {self.label} ({self.number}) {self.victim}"


@dataclass
class Outcome:
    """What became of one case; `problems` is empty where all is as it should be."""

    step: str
    at: At
    fault: str
    result: str
    seconds: float
    problems: list[str] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0
    cpu_seconds: float = 0.0


@dataclass
class Lines:
    """What a process wrote down of the points that it reached."""

    lines: list[dict[str, str]]

    @property
    def struck(self) -> bool:
        return any(line["point"] == "struck" for line in self.lines)

    def paths(self, point: str) -> list[str]:
        return [line["path"] for line in self.lines if line["point"] == point]

    def count(self, *points: str) -> int:
        return sum(line["point"] in points for line in self.lines)

    def classes(self, step: str) -> dict[tuple[str, str], int]:
        """How often each point was reached, by its label."""
        return Counter((line["point"], line["label"]) for line in self.lines if line.get("step") == step)


class World:
    """The undisturbed run in `folder`, a copy of its workspace before each step, and the commands that disturb it."""

    def __init__(self, papo: Papo, server: ChatProcess, folder: Path) -> None:
        self.papo, self.server, self.folder = papo, server, folder
        self.case = folder / "case"
        self.traces: dict[str, Lines] = {}
        self._after: dict[str, dict[str, str]] = {}
        self._rows: dict[str, dict[str, Counter[tuple[Any, ...]]]] = {}
        self.seconds: dict[str, float] = {}
        self.outputs: dict[str, list[str]] = {}
        self.case.mkdir(parents=True)
        for step in STEPS:
            shutil.copytree(self.case, self._before(step))
            started = time.monotonic()
            code, lines = self.run(step)
            self.seconds[step] = time.monotonic() - started
            assert code == 0, self.said()
            self.traces[step] = lines
            self._after[step] = contents(self.case)
            self._rows[step] = rows(self.case)
            (finished,) = [line["label"] for line in lines.lines if line["point"] == "stage finished"]
            self.outputs[step] = list(json.loads((self.case / finished).read_text())["outputs"])

    def _before(self, step: str) -> Path:
        return (
            self.folder / "before" / step.replace(" ", "-")
            if (self.folder / "before").mkdir(exist_ok=True) is None
            else Path()
        )

    def said(self) -> str:
        return self.papo.log.read_text()[self._log_from :]

    def run(
        self, step: str, at: At | None = None, fault: str = "none", mutation: str = "none", *, keep: bool = False
    ) -> tuple[int, Lines]:
        """One step in a process of its own; its exit code, negative where it was killed, and the points it reached."""
        name, _, round_ = step.partition(" ")
        trace = self.folder / "trace"
        trace.unlink(missing_ok=True)
        where = at and {"place": [at.step, at.point, at.label, at.number], "victim": at.victim}
        arm = f"child.arm({str(self.case.absolute())!r}, {str(trace)!r}, at={where!r}, fault={fault!r}, mutation={mutation!r})"
        self._log_from = len(self.papo.log.read_text()) if self.papo.log.exists() else 0
        pid = self.papo.start(
            name.replace("_", "-"), *(["--round", round_] if round_ else []), "--workspace", str(self.case), before=arm
        )
        code = self.papo.wait(pid)
        return code, Lines([json.loads(line) for line in trace.read_text().splitlines()])

    def disturb(
        self, at: At, step: str, fault: str, mutation: str = "none", *, then: tuple[At, str] | None = None
    ) -> Outcome:
        """One case: the step from a copy of the workspace, with the fault; then the same command again.

        Args:
            then: what strikes a second start, before the last one.
        """
        started, cpu = time.monotonic(), self._cpu()
        shutil.rmtree(self.case)
        shutil.copytree(self._before(step), self.case)
        self.server.set()
        code, first = self.run(step, at, fault, mutation)
        said, problems = self.said(), []
        if not first.struck:
            problems.append("the point was not reached")
        if fault in ("kill", "torn", "lost", "emptied", "flipped", "clock"):
            result = "survived"
            if code != (0 if fault == "clock" else -9):
                problems.append(f"the disturbed command ended with {code}: {said[-500:]}")
        else:
            result = "survived" if code == 0 else "refused"
            if code not in (0, 2) or (code == 2 and not ("to do: " in said and str(self.case) in said)):
                problems.append(f"it ended with {code} and said: {said[-500:]}")
        if fault in ("kill", "torn") and at.point not in ("shard stored", "step saved", "stage finished"):
            problems += half_written(self.case)
        if then is not None and not self.run(step, *then, mutation)[1].struck:
            problems.append("the second point was not reached")
        code, second = self.run(step, mutation=mutation)
        if code != 0:
            problems.append(f"the second start ended with {code}: {self.said()[-500:]}")
        found = contents(self.case)
        wrong = sorted(
            name for name in found.keys() | self._after[step].keys() if found.get(name) != self._after[step].get(name)
        )
        if wrong:
            problems.append(f"differs from an undisturbed run: {', '.join(wrong[:5])}")
        problems += self._twice(fault, first, second)
        lost, repeated = self._counted(step)
        return Outcome(step, at, fault, result, time.monotonic() - started, problems, lost, repeated, self._cpu() - cpu)

    def _cpu(self) -> float:
        return time.process_time() + self.papo.cpu_seconds()

    def _twice(self, fault: str, first: Lines, second: Lines) -> list[str]:
        """Work that had been done for good, and was done again."""
        problems = []
        damaged = fault in ("torn", "flipped")
        kept = first.paths("shard stored")
        again = [path for path in second.paths("shard stored") if path in kept]
        if len(again) > damaged:
            problems.append(f"{len(again)} finished shards were made again")
        saved = [int(path[-6:]) for path in first.paths("step saved")]
        steps = [int(line["detail"]) for line in second.lines if line["point"] == "step"]
        if saved and steps and min(steps) < saved[-1] - damaged:
            problems.append(f"step {min(steps)} was trained again after step {saved[-1]} had been saved")
        if first.count("stage finished") and second.count(*ENGINES) and not damaged:
            problems.append("a finished stage ran again")
        paid = self.server.seen.billed
        # Of those under way no answer had been stored.
        if (more := paid.total() - len(paid)) > CONCURRENCY:
            problems.append(f"{more} calls of the judge were paid twice")
        return problems

    def _counted(self, step: str) -> tuple[int, int]:
        """Rows that an undisturbed run has and this one has not, and rows that are there too often."""
        found = rows(self.case)
        lost = repeated = 0
        for name, wanted in self._rows[step].items():
            have = found.get(name, Counter())
            lost += (wanted - have).total()
            repeated += (have - wanted).total()
        return lost, repeated


def contents(root: Path) -> dict[str, str]:
    """Digest of every output and every leftover beside one; a manifest without how the work went, no records of runs, which have times."""
    found = {}
    for path in sorted(
        path for folder in ("data", "artifacts") for path in (root / folder).rglob("*") if path.is_file()
    ):
        name = str(path.relative_to(root))
        if name.startswith("artifacts/runs/") and ".tmp" not in name:
            continue
        if name.endswith(".manifest.json"):
            found[name] = json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True)
        else:
            found[name] = digest(path)
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in COURSE}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def rows(root: Path) -> dict[str, Counter[tuple[Any, ...]]]:
    """Keys of the rows of every table."""
    found = {}
    for path in sorted((root / "artifacts").rglob("*.parquet")):
        frame = pq.read_table(path)
        names = [name for name in ("policy", "round", "problem_id", "sample_index") if name in frame.column_names]
        found[str(path.relative_to(root))] = Counter(tuple(row.values()) for row in frame.select(names).to_pylist())
    return found


def half_written(root: Path) -> list[str]:
    """Files that are not whole, under a name that is not temporary."""
    problems = []
    for path in (path for path in root.rglob("*") if path.is_file() and ".tmp" not in str(path.relative_to(root))):
        try:
            if path.suffix == ".parquet":
                pq.read_table(path)
            elif path.suffix == ".json" and path.name != "lock.json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except Exception as error:  # whatever a reader says of it, it could not read the file
            problems.append(f"{path.relative_to(root)} is not whole: {error}")
    return problems


@contextmanager
def world(folder: Path) -> Iterator[World]:
    with chat_process(reply="servers.replies:levels") as server, papo_forks(folder / "here", IMPORTS) as papo:
        model = {"model": "m", "base_url": server.url, "concurrency": CONCURRENCY}
        params = {
            **PARAMS,
            "score_prm": {**PARAMS["score_prm"], "model": model, "store": str(folder / "case/.papo/verdicts.sqlite")},
        }
        (papo.folder / "params.yaml").write_text(yaml.safe_dump(params))
        yield World(papo, server, folder)
