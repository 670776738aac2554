"""What tests share: the environment of the commands, a context that keeps its warnings, small tables, a sampler, a tiny run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import TINY as SMALL
from sampling import SAMPLING

from papo.cli import main, quiet_environment
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.schemas import ADVANTAGES, ORM, PRM, PROBLEMS, ROLLOUTS, problem_id, row_seed
from papo.store.files import digest
from papo.store.manifest import Context
from papo.store.tables import write_rows

ROOT = Path(__file__).parents[1]

quiet_environment()
# A shell that runs the tests in the background has them, and all that they start, ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A pipeline of seconds: the engines are the real ones, the policy learns nothing.
TINY = {
    "warmstart.steps": 2,
    "run.rounds": 1,
    "rollout.prompts_per_round": 2,
    "train.minibatch_prompts": 2,
    "rollout.max_new_tokens": 8,
    "evaluate.max_new_tokens": 8,
    "prepare.sums": SMALL["prepare"]["sums"],
    "tracking.enabled": False,
}


@pytest.fixture
def warned() -> list[str]:
    """Warnings that went to `context`."""
    return []


@pytest.fixture
def context(tmp_path: Path, warned: list[str]) -> Context:
    return Context(work=tmp_path / ".papo", warn=warned.append)


@pytest.fixture
def keyless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of whoever runs the tests, and no proxy between a test and its server."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class FakeSampler:
    """Answers by the seed of the request alone; `stop` is called before the batch with that number, from 1.

    A prompt with a blank does not fit.
    """

    name = "fake"
    repeatable = True

    def __init__(self, *, stop_at: int = 0, stop: Callable[[], None] = lambda: None) -> None:
        self.batches: list[list[SampleRequest]] = []
        self._stop_at, self._stop = stop_at, stop

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        if len(self.batches) + 1 == self._stop_at:
            self._stop()
        self.batches.append(list(requests))
        progress(len(requests))
        return [self._one(request) for request in requests]

    def sample_shards(
        self, shards: Sequence[Sequence[SampleRequest]], progress: Progress
    ) -> Iterator[tuple[int, list[Sample]]]:
        for number, shard in enumerate(shards):
            yield number, self.sample(shard, progress)

    def check(self) -> None: ...

    def close(self) -> None: ...

    def fits(self, prompt: str) -> str | None:
        return "it has a blank" if " " in prompt else None

    def metrics(self) -> dict[str, float]:
        return {"batches": float(len(self.batches))}

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}

    def _one(self, request: SampleRequest) -> Sample:
        ids = [request.seed % 7 + 1] * (request.seed % 5 + 1)
        finish = "length" if request.seed % 11 == 0 else "stop"
        return Sample([1, 2], ids, f"\\boxed{{{request.seed % 3}}}", [-0.5] * len(ids), finish)


@pytest.fixture
def fake_sampler() -> type[FakeSampler]:
    return FakeSampler


@dataclass
class SmallRound:
    """Tables of one round in a folder: two problems, four responses each, unless told otherwise."""

    folder: Path
    answers: dict[str, str] = field(default_factory=lambda: {"1+2=?\n": "3", "4+5=?\n": "9"})
    group: int = 4

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """(prompt, problem_id, sample_index) of each response."""
        ids = {prompt: problem_id(prompt, answer) for prompt, answer in self.answers.items()}
        return [(prompt, ids[prompt], index) for prompt in self.answers for index in range(self.group)]

    @property
    def policy(self) -> Path:
        path = self.folder / "policy-before"
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights").write_text("round -1")
        return path

    def problems(self) -> Path:
        rows = [
            {"problem_id": problem_id(prompt, answer), "prompt": prompt, "answer": answer, "grading": "{}", "source": "test",
             "reference_solution": f"{prompt} is {answer}", "split": "train"}
            for prompt, answer in self.answers.items()
        ]  # fmt: skip
        return self._write("problems", PROBLEMS, rows)

    def rollouts(self, **columns: Any) -> Path:
        given = {"completion": "\\boxed{3}", "completion_ids": [5, 6], "logprobs": [-0.1, -0.2], "finish_reason": "stop",
                 "policy_digest": digest(self.policy), **SAMPLING, "prompt_ids": [1]}  # fmt: skip
        rows = [
            {"prompt": prompt, "seed": row_seed(0, 0, problem, index)} | given
            for prompt, problem, index in self.keys
        ]  # fmt: skip
        return self._keyed("rollouts", ROLLOUTS, rows, columns)

    def orm(self, scores: Sequence[float | None], **columns: Any) -> Path:
        given = {"second_opinion_status": "not_asked"}
        rows = [{"orm_score": score, "status": "timeout" if score is None else "ok"} | given for score in scores]
        return self._keyed("orm", ORM, rows, columns)

    def prm(self, scores: Sequence[float | None], **columns: Any) -> Path:
        given = {"reason": "", "votes": [], "judge": "fake", "rubric": "r", "prompt_tokens": 0, "completion_tokens": 0,
                 "cached": False}  # fmt: skip
        rows = [{"prm_score": score, "status": "not_asked" if score is None else "ok"} | given for score in scores]
        return self._keyed("prm", PRM, rows, columns)

    def advantages(self, values: Sequence[float], **columns: Any) -> Path:
        rows = [{"outcome_advantage": value, "process_advantage": 0.0, "advantage": value} for value in values]
        return self._keyed("advantages", ADVANTAGES, rows, columns)

    def _keyed(self, name: str, table: Any, rows: list[dict[str, Any]], columns: dict[str, Any]) -> Path:
        keyed = [
            {"round": 0, "problem_id": problem, "sample_index": index} | row
            for (_, problem, index), row in zip(self.keys, rows, strict=True)
        ]
        for column, values in columns.items():
            for row, value in zip(keyed, values, strict=True):
                row[column] = value
        return self._write(name, table, keyed)

    def _write(self, name: str, table: Any, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / f"{name}.parquet"
        write_rows(path, table, rows)
        return path


@pytest.fixture
def small_round(tmp_path: Path) -> SmallRound:
    return SmallRound(tmp_path / "round")


@pytest.fixture(scope="session")
def round_in() -> type[SmallRound]:
    """Makes a small round in a folder that the test names."""
    return SmallRound


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill_disk(disk: Path) -> Path:
    """Leaves nothing of the disk; the file to delete."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    return filler


@pytest.fixture
def fill() -> Callable[[Path], Path]:
    return fill_disk


def tiny_params(folder: Path) -> None:
    """Writes the params.yaml of this repository with the tiny values into `folder`."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in TINY.items():
        section, name = key.split(".")
        content[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty but for a tiny params.yaml."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    tiny_params(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny params where prepare, warmstart and rollout 0 have run; copy it, never change it."""
    folder = tmp_path_factory.mktemp("started")
    tiny_params(folder)
    with contextlib.chdir(folder):
        for command in (["prepare"], ["warmstart"], ["rollout", "--round", "0"]):
            assert main(command) == 0
    return folder


@pytest.fixture
def started_checkout(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of `started`."""
    folder = Path(shutil.copytree(started, tmp_path / "checkout"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(started: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with git and DVC after a whole `papo run`; copy it, never change it."""
    folder = tmp_path_factory.mktemp("run") / "checkout"
    shutil.copytree(started, folder)
    shutil.copytree(ROOT / "papo", folder / "papo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    with contextlib.chdir(folder):
        assert main(["dvc"]) == 0
        assert main(["run"]) == 0
    return folder


@pytest.fixture
def tiny_copy(tiny_run: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of `tiny_run`, without DVC's cache."""

    def copy() -> Path:
        return Path(shutil.copytree(tiny_run, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "__pycache__")))

    return copy


def papo(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """`python -m papo ...` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "papo", *arguments], cwd=cwd, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def start_papo() -> Callable[..., subprocess.Popen[str]]:
    return papo
