"""rollout: rows in the order drawn, seeded one by one; an interrupted stage goes on and gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.errors import CheckpointError, DataError, MissingInputError, ServerDownError
from papo.params import RolloutParams
from papo.schemas import PROBLEMS, ROLLOUTS, TRIED, problem_id, row_seed
from papo.stages import rollout
from papo.store.files import digest
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows

PARAMS = RolloutParams(prompts_per_round=4, group_size=3, prompts_per_shard=1, temperature=0.8)


class Echo:
    """Computes the log-probs that FakeSampler gives, or others."""

    def __init__(self, value: float = -0.5) -> None:
        self.value, self.rows = value, 0

    def logprobs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        self.rows += len(pairs)
        return [[self.value] * len(completion) for _, completion in pairs]


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


def test_a_stage_that_finds_all_shards_stored_needs_no_server(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    class Gone(fake_sampler):  # type: ignore[misc]  # a fixture that is a class
        def versions(self) -> dict[str, str]:
            raise ServerDownError("no server is left")

    def interrupt(rows: Any) -> None:
        told.append(rows)
        if len(told) == 4:
            raise KeyboardInterrupt

    told: list[Any] = []
    out = tmp_path / "rollouts.parquet"
    engine = rollout.Engine(fake_sampler(), Echo())
    with pytest.raises(KeyboardInterrupt):
        rollout.run(PARAMS, inputs, out, engine=engine, finished=interrupt, context=context)
    assert not out.exists()
    manifest = run(inputs, out, Gone(), context)
    assert (manifest.rows, manifest.versions) == (12, {"fake": "1"})


def test_the_manifest_names_all_versions_that_rows_are_from(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "rollouts.parquet"
    first, second = fake_sampler(stop_at=3, stop=interrupt), fake_sampler()
    first.versions = lambda: {"vllm": "0.32.0", "transformers": "5.23"}
    second.versions = lambda: {"vllm": "0.32.0 and 0.33.0", "transformers": "5.23"}
    with pytest.raises(KeyboardInterrupt):
        run(inputs, out, first, context)
    assert run(inputs, out, second, context).versions == {"vllm": "0.32.0 and 0.33.0", "transformers": "5.23"}


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


# ---- prompts that do not fit, log-probs computed anew ----


def test_a_prompt_that_does_not_fit_is_left_out_with_its_reason(
    tmp_path: Path, small_round: Any, context: Context, fake_sampler: Any
) -> None:
    small_round.answers = {f"{n}+1=?\n": str(n + 1) for n in range(4)} | {"1 + 1": "2", "2 + 2": "4"}
    inputs = rollout.Inputs(round=0, seed=3, problems=small_round.problems(), policy=small_round.policy)
    manifest = run(inputs, tmp_path / "rollouts.parquet", fake_sampler(), context)
    tried = read_rows(tmp_path / "tried.parquet", TRIED)
    assert Counter(row["status"] for row in tried) == {"kept": 4, "too_long": 2}
    for row in tried:
        if row["status"] == "too_long":
            assert row["problem_id"] in (problem_id("1 + 1", "2"), problem_id("2 + 2", "4"))
            assert (row["reason"], row["place"]) == ("it has a blank", None)
    assert manifest.counts["dropped_too_long"] == 2
    assert not [row for row in read_rows(tmp_path / "rollouts.parquet", ROLLOUTS) if " " in row["prompt"]]


def test_a_round_of_prompts_that_all_do_not_fit_is_refused(
    tmp_path: Path, small_round: Any, context: Context, fake_sampler: Any
) -> None:
    small_round.answers = {f"{n} + 1": str(n + 1) for n in range(6)}
    inputs = rollout.Inputs(round=0, seed=3, problems=small_round.problems(), policy=small_round.policy)
    with pytest.raises(DataError, match="there are only 0 training problems that fit the policy"):
        run(inputs, tmp_path / "rollouts.parquet", fake_sampler(), context)


@pytest.mark.parametrize("rows", [0, 5, 12, 99])
def test_so_many_rows_are_checked_whatever_the_shards(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any, rows: int
) -> None:
    params = PARAMS.model_copy(update={"checked_rows": rows})
    found = []
    for size in (1, 3):
        out, echo = tmp_path / str(size) / "rollouts.parquet", Echo(-0.75)
        engine = rollout.Engine(fake_sampler(), echo)
        sized = params.model_copy(update={"prompts_per_shard": size})
        manifest = rollout.run(sized, inputs, out, engine=engine, context=context)
        assert echo.rows == min(rows, 12)
        assert manifest.metrics.get("logprob_difference_mean") == (0.25 if rows else None)
        checked = [row for row in read_rows(out, ROLLOUTS) if row["logprob_difference_max"] is not None]
        assert {row["logprob_difference_mean"] for row in checked} <= {0.25}
        found.append([row["seed"] for row in checked])
    assert found[0] == found[1]
    assert len(found[0]) == min(rows, 12)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_policy_whose_log_probs_are_no_numbers_is_refused(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any, value: float
) -> None:
    engine = rollout.Engine(fake_sampler(), Echo(value))
    with pytest.raises(CheckpointError, match="no finite numbers"):
        rollout.run(PARAMS, inputs, tmp_path / "rollouts.parquet", engine=engine, context=context)
    assert not (tmp_path / "rollouts.parquet").exists()


def test_the_manifest_says_whether_a_restart_repeats_the_rows(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    sampler = fake_sampler()
    sampler.repeatable = False
    assert run(inputs, tmp_path / "a" / "rollouts.parquet", sampler, context).metrics["repeatable"] == 0.0
    assert run(inputs, tmp_path / "b" / "rollouts.parquet", fake_sampler(), context).metrics["repeatable"] == 1.0


def test_shards_are_told_of_as_they_are_stored_and_again_after_a_restart(
    tmp_path: Path, inputs: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out, told = tmp_path / "rollouts.parquet", list[list[Any]]()
    with pytest.raises(KeyboardInterrupt):
        run_telling(inputs, out, fake_sampler(stop_at=3, stop=interrupt), context, told)
    assert [len(rows) for rows in told] == [3, 3]
    told.clear()
    run_telling(inputs, out, fake_sampler(), context, told)
    keys = ("problem_id", "sample_index", "completion_ids")
    assert [[row[key] for key in keys] for rows in told for row in rows] == [
        [row[key] for key in keys] for row in read_rows(out, ROLLOUTS)
    ]


def run_telling(inputs: rollout.Inputs, out: Path, engine: Any, context: Context, told: list[list[Any]]) -> None:
    rollout.run(
        PARAMS, inputs, out,
        engine=rollout.Engine(engine, Echo()), finished=lambda rows: told.append(list(rows)), context=context,
    )  # fmt: skip


# ---- dynamic sampling ----


class Scores:
    """The groups of these problems have an advantage, no others."""

    def __init__(self, *prompts: str) -> None:
        self.prompts, self.asked = prompts, list[str]()

    def score(self, rows: Sequence[Any]) -> list[tuple[float | None, float]]:
        self.asked += [row["prompt"] for row in rows]
        return [(1.0, 0.5 if row["prompt"] in self.prompts and row["sample_index"] == 1 else 0.0) for row in rows]


@pytest.fixture
def many(small_round: Any) -> rollout.Inputs:
    small_round.answers = {f"{n}+1=?\n": str(n + 1) for n in range(20)}
    return rollout.Inputs(round=0, seed=3, problems=small_round.problems(), policy=small_round.policy)


def drawn_of(inputs: rollout.Inputs, count: int) -> list[str]:
    return [row["prompt"] for row in rollout.choose(read_rows(inputs.problems, PROBLEMS), 0, count, 3)]


def dynamic(
    inputs: rollout.Inputs, out: Path, sampler: Any, scores: Scores, context: Context, **change: Any
) -> tuple[Manifest, list[str], list[dict[str, Any]]]:
    """The manifest, the prompts of the groups that were kept, and what was tried."""
    params = PARAMS.model_copy(update={"max_prompts": 20, "prompts_per_shard": 2} | change)
    manifest = rollout.run(params, inputs, out, engine=rollout.Engine(sampler, Echo(), scores), context=context)
    rows = read_rows(out, ROLLOUTS)
    return manifest, [row["prompt"] for row in rows[::3]], read_rows(out.with_name("tried.parquet"), TRIED)


def test_further_prompts_are_sampled_until_enough_groups_have_an_advantage(
    tmp_path: Path, many: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    drawn = drawn_of(many, 20)
    scores, sampler = Scores(*drawn[1::3]), fake_sampler()
    manifest, kept, tried = dynamic(many, tmp_path / "rollouts.parquet", sampler, scores, context)
    assert kept == [drawn[1], drawn[4], drawn[7], drawn[10]]
    statuses = [row["status"] for row in tried]
    assert [place for place, status in enumerate(statuses) if status == "kept"] == [1, 4, 7, 10]
    assert set(statuses[:11]) == {"kept", "no_advantage"}
    assert set(statuses[11:]) <= {"no_advantage", "surplus"}
    assert [row["place"] for row in tried] == list(range(len(tried)))
    assert len(tried) == manifest.metrics["tried"] < 20
    assert manifest.counts["dropped_no_advantage"] == statuses.count("no_advantage")
    assert all(row["accuracy"] == 1.0 for row in tried)
    # Each group is sampled and scored once.
    assert sum(map(len, sampler.batches)) == len(scores.asked) == 3 * len(tried)
    for name in ("prompt_tokens", "length_mean", "accuracy"):
        assert {f"tried_{name}", f"kept_{name}"} <= manifest.metrics.keys()
    lengths = [row["length_mean"] for row in tried]
    assert manifest.metrics["tried_length_mean"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_is_kept_does_not_depend_on_the_shards(
    tmp_path: Path, many: rollout.Inputs, context: Context, fake_sampler: Any, size: int
) -> None:
    drawn = drawn_of(many, 20)
    scores = Scores(*drawn[2::4])
    out = tmp_path / "rollouts.parquet"
    _, kept, _ = dynamic(many, out, fake_sampler(), scores, context, prompts_per_shard=size)
    assert kept == [drawn[2], drawn[6], drawn[10], drawn[14]]


def test_no_more_prompts_are_tried_than_allowed(
    tmp_path: Path, many: rollout.Inputs, context: Context, warned: list[str], fake_sampler: Any
) -> None:
    drawn = drawn_of(many, 7)
    manifest, kept, tried = dynamic(
        many, tmp_path / "rollouts.parquet", fake_sampler(), Scores(drawn[5]), context, max_prompts=7
    )
    assert (kept, len(tried), manifest.rows) == ([drawn[5]], 7, 3)
    assert "1 groups instead of 4, as the others of 7 prompts have no advantage" in warned[0]


def test_a_round_without_any_advantage_is_not_empty(
    tmp_path: Path, many: rollout.Inputs, context: Context, warned: list[str], fake_sampler: Any
) -> None:
    out = tmp_path / "rollouts.parquet"
    manifest, kept, tried = dynamic(many, out, fake_sampler(), Scores(), context, max_prompts=6)
    assert (kept, len(tried), manifest.rows) == (drawn_of(many, 6)[:1], 6, 3)
    assert len(warned) == 1


def test_an_interrupted_search_goes_on_where_it_was(
    tmp_path: Path, many: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    scores = Scores(*drawn_of(many, 20)[1::3])
    out = tmp_path / "rollouts.parquet"
    with pytest.raises(KeyboardInterrupt):
        dynamic(many, out, fake_sampler(stop_at=4, stop=interrupt), scores, context)
    again = fake_sampler()
    dynamic(many, out, again, scores, context)
    whole = fake_sampler()
    dynamic(many, tmp_path / "whole" / "rollouts.parquet", whole, scores, context)
    assert again.batches == whole.batches[3:]
    for name in ("rollouts.parquet", "tried.parquet"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_more_prompts_than_there_are_cannot_be_tried(
    tmp_path: Path, many: rollout.Inputs, context: Context, fake_sampler: Any
) -> None:
    with pytest.raises(DataError, match="a round takes 21 prompts, but there are only 20"):
        dynamic(many, tmp_path / "rollouts.parquet", fake_sampler(), Scores(), context, max_prompts=21)
