"""Stages that sample from servers: nothing of another policy than the checkpoint is kept, whether it is foreign or the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from servers.chat import ChatProcess
from servers.completions import completions_process, save_policy

from papo.cli import main
from papo.schemas import PROBLEMS, ROLLOUTS, TRIED
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.manifest import Manifest
from papo.store.tables import read_rows

pytestmark = pytest.mark.usefixtures("keyless")
NOISE = 0.03
"""Of a log-prob of a server that computes in bfloat16; its policies are 0.12 from one round to the next."""


@pytest.fixture
def start() -> Iterator[Callable[..., ChatProcess]]:
    with ExitStack() as stack:
        yield lambda **plan: stack.enter_context(completions_process(**plan))


@pytest.fixture
def here(started_checkout: Path) -> Workspace:
    """Before its first rollout."""
    shutil.rmtree("artifacts/rounds")
    shutil.rmtree(".papo")
    return Workspace(Path())


def put(folder: Path, *, size: float = 1.0) -> None:
    """A policy of the stand-in's kind in the place of one of papo's."""
    shutil.rmtree(folder, ignore_errors=True)
    save_policy(folder, 0, size=size)


def command(*words: str, server: ChatProcess, **change: Any) -> list[str]:
    params = {"base_urls": [server.url], "tries": 1, "timeout_s": 20.0} | change
    set_ = {"rollout.engine": "vllm-server", "rollout.server": json.dumps(params), "run.rounds": 2}
    return [*words, *(part for key, value in set_.items() for part in ("--set", f"{key}={value}"))]


def kept(here: Workspace) -> list[str]:
    """Tables and shards of what was sampled, wherever they are."""
    folders = (here.artifacts, here.work)
    return sorted(str(path) for folder in folders for path in folder.rglob("*.parquet"))


def refused(arguments: list[str], here: Workspace, server: ChatProcess, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said as it stops with exit code 2 and nothing is kept."""
    assert main(arguments) == 2
    assert kept(here) == []
    assert [asked for asked in server.asked if "prompt_logprobs" not in asked["body"]] == []
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_kept_of_a_server_with_a_foreign_policy(
    here: Workspace, start: Callable[..., ChatProcess], capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    server = start()
    said = refused(command("rollout", "--round", "0", server=server, dtype=dtype), here, server, capsys)
    assert "the server serves another policy than the checkpoint: their log-probs differ by up to" in said
    assert f"{server.url}, {here.warmstart}" in said
    assert "have the server load that folder" in said


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 0.0), ("bfloat16", NOISE)])
def test_nothing_is_kept_of_a_server_that_was_not_handed_the_policy_of_the_round(
    here: Workspace, start: Callable[..., ChatProcess], capsys: pytest.CaptureFixture[str], dtype: str, noise: float
) -> None:
    server = start(noise=noise)
    put(here.warmstart)
    assert main(command("rollout", "--round", "0", server=server, dtype=dtype)) == 0
    assert len(kept(here)) == 2
    shutil.rmtree("artifacts/rounds/0")
    put(here.policy(0), size=1.05)
    server.set()  # what it was asked is forgotten
    before = len(server.asked)
    assert main(command("rollout", "--round", "1", server=server, dtype=dtype)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the server still serves the policy in {here.warmstart}: " in said
    assert f"{server.url}, {here.policy(0)}" in said
    assert kept(here) == []
    assert all("prompt_logprobs" in asked["body"] for asked in server.asked[before:])


def test_what_is_sampled_after_the_hand_over_is_kept_with_how_sure_it_is(
    here: Workspace, start: Callable[..., ChatProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    put(here.warmstart, size=1.05)
    put(here.policy(0))
    assert main(command("rollout", "--round", "1", server=start(noise=NOISE), dtype="bfloat16")) == 0
    rows = read_rows(here.table(1, "rollouts"), ROLLOUTS)
    assert {row["policy_digest"] for row in rows} == {digest(here.policy(0))}
    metrics = Manifest.read(here.table(1, "rollouts")).metrics
    assert metrics["proof_margin"] > 5
    assert 0 < metrics["proof_difference"] < 1
    assert "still serve" not in capsys.readouterr().err


def test_nothing_is_kept_where_an_evaluation_asks_for_another_policy_than_the_server_has(
    here: Workspace, start: Callable[..., ChatProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(noise=NOISE)
    put(here.warmstart)
    put(here.policy(1), size=1.05)
    asked = command("evaluate", "--policy", "round-1", "--against", "warmstart", server=server, dtype="bfloat16")
    assert main(asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the server still serves the policy in {here.warmstart}: " in said
    assert f"{server.url}, {here.policy(1)}" in said
    assert list(here.comparisons.rglob("*")) == []
    sampled = {one["body"]["cache_salt"] for one in server.asked if "prompt_logprobs" not in one["body"]}
    assert sampled == {digest(here.warmstart)}
    assert len(list((here.work / "samples").glob("*.parquet"))) == 2  # a benchmark each of the warm start


# ---- bad input ----


@pytest.mark.parametrize(
    ("plan", "change", "code", "message", "fix"),
    [
        ({}, {"model": "other"}, 2, "the server has no model other: it has policy", "name one of them as model"),
        ({"context": 12}, {}, 2, "do not fit into the context of 12 tokens", "start the server with --max-model-len"),
        ({"fault": "fewer"}, {}, 2, "fewer than the 8 that it was asked for", "see whether the server serves"),
        ({"fault": "nan"}, {}, 2, "the log-prob nan, which no token that was sampled can have", "and its log"),
        ({"fault": "401"}, {}, 2, "the server refuses the key: HTTP 401", "export its key as VLLM_API_KEY"),
        ({"fault": "500", "proofs": True}, {}, 1, "no server is left: HTTP 500", "shards that are stored stay"),
        ({"mode": "raw_logprobs"}, {}, 2, "", "start it with --logprobs-mode processed_logprobs"),
    ],
)
def test_a_server_that_cannot_be_sampled_from(
    here: Workspace, start: Callable[..., ChatProcess], capsys: pytest.CaptureFixture[str],
    plan: dict[str, Any], change: dict[str, Any], code: int, message: str, fix: str,
) -> None:  # fmt: skip
    put(here.warmstart)
    # At temperature 1 raw log-probs are those of what is sampled.
    sampling = ("--set", "rollout.temperature=0.7")
    assert main(command("rollout", "--round", "0", *sampling, server=start(**plan), **change)) == code
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert fix in said
    assert "Traceback" not in said
    assert kept(here) == []


def test_nobody_answers_at_the_address(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    put(here.warmstart)
    with completions_process() as gone:
        asked = command("rollout", "--round", "0", server=gone)
    assert main(asked) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "no server is left: no connection" in said
    assert gone.url in said
    assert "start the servers" in said
    assert kept(here) == []


def test_prompts_above_the_limit_are_left_out_and_counted(
    here: Workspace, start: Callable[..., ChatProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    put(here.warmstart)
    rows = read_rows(here.train_problems, PROBLEMS)
    limit = min(len(row["prompt"]) for row in rows)  # a token a character
    long = {row["problem_id"] for row in rows if len(row["prompt"]) > limit}
    asked = command("rollout", "--round", "0", "--set", f"rollout.max_prompt_tokens={limit}", server=start())
    assert main(asked) == 0
    manifest = Manifest.read(here.table(0, "rollouts"))
    assert manifest.counts["dropped_too_long"] == len(long) > 0
    tried = [row for row in read_rows(here.table(0, "tried"), TRIED) if row["status"] == "too_long"]
    assert {row["problem_id"] for row in tried} == long
    assert all(f"allowed are 1 to {limit}" in row["reason"] for row in tried)
    assert max(len(row["prompt_ids"]) for row in read_rows(here.table(0, "rollouts"), ROLLOUTS)) <= limit


@pytest.mark.parametrize(
    ("given", "where"),
    [
        (["rollout.engine=vllm", "rollout.vllm.python=nowhere/python"], "rollout.vllm.python"),
        (["rollout.engine=vllm-server", "rollout.server.command=nowhere/vllm serve"], "rollout.server.command"),
    ],
)
def test_a_run_says_at_its_start_that_there_is_no_vllm(
    checkout: Path, capsys: pytest.CaptureFixture[str], given: list[str], where: str
) -> None:
    assert main(["run", "--no-dvc", *(word for one in given for word in ("--set", one))]) == 2
    said = capsys.readouterr().err
    assert f"where: {where}" in said
    assert "nowhere/" in said
    assert not (checkout / "data").exists()
