"""rollout: rows in the order drawn, seeded one by one; an interrupted stage goes on and gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.engines.protocols import Sample
from papo.errors import DataError, MissingInputError
from papo.params import RolloutParams
from papo.schemas import ROLLOUTS, problem_id, row_seed
from papo.stages import rollout
from papo.store.files import digest
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows

PARAMS = RolloutParams(prompts_per_round=4, group_size=3, prompts_per_shard=1, temperature=0.8)


class Echo:
    """Computes the log-probs that FakeSampler gives, or others."""

    def __init__(self, value: float = -0.5) -> None:
        self.value, self.rows = value, 0

    def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        self.rows += len(samples)
        return [[self.value] * len(sample.completion_ids) for sample in samples]


@pytest.fixture
def inputs(small_round: Any) -> rollout.Inputs:
    small_round.answers = {f"{n}+1=?\n": str(n + 1) for n in range(6)}
    return rollout.Inputs(round=0, seed=3, problems=small_round.problems(), policy=small_round.policy)


def run(inputs: rollout.Inputs, out: Path, engine: Any, context: Context, params: RolloutParams = PARAMS) -> Manifest:
    return rollout.run(params, inputs, out, engine=rollout.Engine(engine, Echo()), context=context)


def test_the_rows(tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any) -> None:
    manifest = run(inputs, tmp_path / "rollouts.parquet", fake_sampler(), context)
    rows = read_rows(tmp_path / "rollouts.parquet", ROLLOUTS)
    assert len(rows) == manifest.rows == 12
    assert [row["sample_index"] for row in rows] == [0, 1, 2] * 4
    assert len({row["problem_id"] for row in rows}) == 4
    assert all(rows[at]["problem_id"] == rows[at + 2]["problem_id"] for at in (0, 3, 6, 9))
    for row in rows:
        assert row["round"] == 0
        assert row["problem_id"] == problem_id(row["prompt"], str(int(row["prompt"][0]) + 1))
        assert row["seed"] == row_seed(3, 0, row["problem_id"], row["sample_index"])
        assert len(row["completion_ids"]) == len(row["logprobs"]) > 0
        assert row["policy_digest"] == digest(inputs.policy)
        assert (row["temperature"], row["top_p"]) == (0.8, 1.0)
    assert manifest.counts == Counter(row["finish_reason"] for row in rows)
    assert manifest.metrics["length_mean"] == sum(len(row["completion_ids"]) for row in rows) / 12
    assert manifest.metrics["truncated_share"] == sum(row["finish_reason"] == "length" for row in rows) / 12
    assert manifest.versions == {"fake": "1"}


def test_a_second_run_asks_nothing(tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any) -> None:
    run(inputs, tmp_path / "rollouts.parquet", fake_sampler(), context)
    engine = fake_sampler()
    assert run(inputs, tmp_path / "rollouts.parquet", engine, context).skipped
    assert engine.batches == []


def test_an_interrupted_stage_asks_only_for_what_is_missing(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out" / "rollouts.parquet"
    first = fake_sampler(stop_at=3, stop=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, out, first, context)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    second = fake_sampler()
    run(inputs, out, second, context)
    assert (len(first.batches), len(second.batches)) == (2, 2)
    undisturbed = fake_sampler()
    run(inputs, tmp_path / "whole" / "rollouts.parquet", undisturbed, context)
    assert first.batches + second.batches == undisturbed.batches
    assert out.read_bytes() == (tmp_path / "whole" / "rollouts.parquet").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FakeSampler
from stages.test_rollout import Echo
from papo.params import RolloutParams
from papo.stages import rollout
from papo.store.manifest import Context
problems, policy, out, work = map(Path, sys.argv[2:])
engine = FakeSampler(stop_at=3, stop=lambda: os.kill(os.getpid(), signal.SIGKILL))
params = RolloutParams(prompts_per_round=4, group_size=3, prompts_per_shard=1, temperature=0.8)
rollout.run(params, rollout.Inputs(0, 3, problems, policy), out, engine=rollout.Engine(engine, Echo()), context=Context(work=work))
"""


def test_a_killed_stage_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    out = tmp_path / "out" / "rollouts.parquet"
    tests = str(Path(__file__).parents[1])
    arguments = [str(path) for path in (inputs.problems, inputs.policy, out, context.work)]
    assert subprocess.run([sys.executable, "-c", KILLED, tests, *arguments], check=False).returncode == -9
    engine = fake_sampler()
    run(inputs, out, engine, context)
    assert len(engine.batches) == 2
    run(inputs, tmp_path / "whole" / "rollouts.parquet", fake_sampler(), context)
    assert out.read_bytes() == (tmp_path / "whole" / "rollouts.parquet").read_bytes()


def test_a_truncated_shard_is_made_again(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, warned: list[str], fake_sampler: Any
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "rollouts.parquet"
    with pytest.raises(KeyboardInterrupt):
        run(inputs, out, fake_sampler(stop_at=4, stop=interrupt), context)
    damaged = sorted(context.work.rglob("rollouts-*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    engine = fake_sampler()
    run(inputs, out, engine, context)
    assert len(engine.batches) == 2
    assert "rollouts-00001.parquet is damaged" in warned[0]
    assert len(list((context.work / "quarantine").iterdir())) == 1
    run(inputs, tmp_path / "whole.parquet", fake_sampler(), context)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_neither_shards_nor_batches_change_a_row(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    run(inputs, tmp_path / "one.parquet", fake_sampler(), context)
    params = PARAMS.model_copy(update={"prompts_per_shard": 3})
    run(inputs, tmp_path / "three.parquet", fake_sampler(), context, params)
    assert read_rows(tmp_path / "one.parquet", ROLLOUTS) == read_rows(tmp_path / "three.parquet", ROLLOUTS)


def test_another_policy_is_sampled_anew(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    run(inputs, tmp_path / "rollouts.parquet", fake_sampler(), context)
    (inputs.policy / "weights").write_text("round 0")
    assert not run(inputs, tmp_path / "rollouts.parquet", fake_sampler(), context).skipped


def drawn(rounds: range, seed: int = 1) -> list[list[str]]:
    problems = [{"problem_id": str(n)} for n in range(10)]
    return [[row["problem_id"] for row in rollout.choose(problems, round_, 4, seed)] for round_ in rounds]


def test_no_problem_comes_twice_in_a_round_nor_in_an_epoch() -> None:
    rounds = drawn(range(40))
    for first, second in zip(rounds[::2], rounds[1::2], strict=True):  # 10 problems give two rounds of 4
        assert len({*first, *second}) == 8
    assert {problem for round_ in rounds for problem in round_} == set(map(str, range(10)))
    assert rounds[:2] != rounds[2:4]
    assert rounds != drawn(range(40), seed=2)
    assert drawn(range(7, 8)) == [rounds[7]]


def test_a_round_larger_than_the_problem_set_is_refused() -> None:
    with pytest.raises(DataError, match="a round takes 4 prompts, but there are only 3 training problems"):
        rollout.choose([{"problem_id": str(n)} for n in range(3)], 0, 4, seed=1)


def test_a_missing_policy_is_an_error_of_the_person(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    gone = rollout.Inputs(0, 3, inputs.problems, tmp_path / "none")
    with pytest.raises(MissingInputError):
        run(gone, tmp_path / "rollouts.parquet", fake_sampler(), context)
