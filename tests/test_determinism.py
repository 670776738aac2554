"""The same params give the same bytes: in another folder, in other processes, after a kill; and log-probs can be recomputed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from papo.cli import quiet_environment
from papo.params import Params, validate_params
from papo.pipeline import Step, run_step, steps
from papo.schemas import ADVANTAGES, ROLLOUTS
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows

# Read by the Hugging Face libraries when they are imported.
quiet_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TIER = {"min_terms": 2, "max_terms": 2}
# A policy that has just learned to box a number: about one answer in ten is right, so that there is something to train on.
VALUES: dict[str, Any] = {
    "run": {"seed": 0, "rounds": 2},
    "prepare": {
        "sums": {
            "train": {**TIER, "problems": 40},
            "eval": {"easy": {**TIER, "problems": 6}},
            "traces": 200,
            "bare_share": 0.8,
            "merged_share": 0.0,
            "verbose_share": 0.0,
        }
    },
    "warmstart": {
        "model": {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2},
        "steps": 80,
        "batch_size": 16,
        "learning_rate": 1e-2,
    },
    "rollout": {"prompts_per_round": 8, "group_size": 8, "max_new_tokens": 16, "prompts_per_shard": 2},
    "train": {"minibatch_prompts": 4, "learning_rate": 1e-3},
    "evaluate": {"benchmarks": ["easy"], "samples_per_problem": 2, "max_new_tokens": 16},
    "tracking": {"enabled": False},
}


def params_of(**sections: dict[str, Any]) -> Params:
    values = {name: {**values, **sections.get(name, {})} for name, values in VALUES.items()}
    return validate_params(values, origin="test")


def in_this_process(root: Path, params: Params) -> Workspace:
    workspace = Workspace(root)
    for step in steps(params):
        run_step(step, params, workspace, Context(work=workspace.work))
    return workspace


def papo(root: Path, step: Step) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "papo", *step.command.split()[1:]]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_params(root: Path, params: Params) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))


def results(workspace: Workspace) -> dict[str, str]:
    """Digest of every Parquet file, and of every policy and optimizer state."""
    root = workspace.root
    files = [path for folder in ("data", "artifacts") for path in (root / folder).rglob("*.parquet")]
    folders = [workspace.warmstart, *root.glob("artifacts/rounds/*/policy"), *root.glob("artifacts/rounds/*/trainer")]
    return {str(path.relative_to(root)): digest(path) for path in [*files, *folders]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """An undisturbed run in this process."""
    return in_this_process(tmp_path_factory.mktemp("first"), params_of())


def test_the_run_of_these_tests_trains_on_something(first: Workspace) -> None:
    for round_ in (0, 1):
        advantages = [row["advantage"] for row in read_rows(first.table(round_, "advantages"), ADVANTAGES)]
        assert len(advantages) == 64
        assert any(advantage != 0.0 for advantage in advantages)
        assert Manifest.read(first.policy(round_)).metrics["grad_norm"] > 0
    # 1 training set, 1 set of traces, 1 of drops, 1 benchmark, 5 tables a round, 1 evaluation; warm start and 2 folders a round.
    assert len(results(first)) == 4 + 2 * 5 + 1 + 1 + 2 * 2


def test_another_folder_gives_the_same_bytes(first: Workspace, tmp_path: Path) -> None:
    assert results(in_this_process(tmp_path, params_of())) == results(first)


def test_another_seed_gives_other_samples_of_the_same_problems(first: Workspace, tmp_path: Path) -> None:
    params = params_of(run={"seed": 1, "rounds": 1})
    ours, theirs = results(in_this_process(tmp_path, params)), results(first)
    same = {name for name in ours if ours[name] == theirs[name]}
    problems = {f"data/problems/{name}.parquet" for name in ("train", "traces", "dropped", "eval/easy")}
    assert same == problems | {"artifacts/warmstart"}


def test_a_second_run_has_nothing_to_do(first: Workspace) -> None:
    before = results(first)
    params = params_of()
    manifests = [run_step(step, params, first, Context(work=first.work)) for step in steps(params)]
    assert all(manifest.skipped for manifest in manifests)
    assert results(first) == before


@pytest.mark.slow
def test_a_process_a_step_gives_the_same_bytes(first: Workspace, tmp_path: Path) -> None:
    write_params(tmp_path, params_of())
    for step in steps(params_of()):
        process = papo(tmp_path, step)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{step}: {errors}"
    assert results(Workspace(tmp_path)) == results(first)


@pytest.mark.parametrize("round_", [0, 1])
def test_stored_logprobs_are_those_of_the_policy_of_the_round(first: Workspace, round_: int) -> None:
    import torch
    from transformers import LlamaForCausalLM

    rows = read_rows(first.table(round_, "rollouts"), ROLLOUTS)
    policy = first.policy(round_ - 1)
    assert {row["policy_digest"] for row in rows} == {digest(policy)}
    model = LlamaForCausalLM.from_pretrained(policy).eval()
    worst = 0.0
    for row in rows:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        computed = (logits / row["temperature"]).log_softmax(-1)[range(len(completion)), completion]
        worst = max(worst, (computed - torch.tensor(row["logprobs"])).abs().max().item())
    assert worst < 1e-4


@contextmanager
def counting(counted: list[int]) -> Iterator[Callable[[int], None]]:
    yield counted.append


def test_a_killed_rollout_goes_on_from_its_shards_and_ends_with_the_same_bytes(
    first: Workspace, tmp_path: Path
) -> None:
    # 20 shards of a prompt each, long completions: seconds in which to kill.
    more = {"prompts_per_round": 20, "max_new_tokens": 200, "prompts_per_shard": 1, "temperature": 3.0}
    params = params_of(rollout=more)
    killed, undisturbed = (Workspace(tmp_path / name) for name in ("killed", "undisturbed"))
    for workspace in (killed, undisturbed):
        shutil.copytree(first.root / "data", workspace.root / "data")
        shutil.copytree(first.warmstart, workspace.warmstart)
    write_params(killed.root, params)
    step, out = Step("rollout", 0), killed.table(0, "rollouts")

    def shards() -> list[Path]:
        return sorted(killed.work.glob("work/rollout-0-*/rollouts-*.parquet"))

    process = papo(killed.root, step)
    deadline = time.monotonic() + 240
    while len(shards()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    done = len(shards())
    assert process.returncode == -signal.SIGKILL
    assert 3 <= done < 20
    assert not out.exists()

    told: list[int] = []
    run_step(step, params, killed, Context(work=killed.work, progress=lambda *_: counting(told)))
    assert told == [8] * done + [1] * ((20 - done) * 8)  # only what was missing was sampled
    run_step(step, params, undisturbed, Context(work=undisturbed.work))
    assert out.read_bytes() == undisturbed.table(0, "rollouts").read_bytes()
    assert shards() == []
