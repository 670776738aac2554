"""evaluate: every policy on every benchmark with the same seeds; a restart asks only for what is missing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.engines.protocols import Progress, Sample, Sampler, SampleRequest, Verdict, VerifyItem
from papo.errors import FailedRowsError, ParamsError
from papo.params import EvaluateParams, load_params
from papo.schemas import EVALUATION, row_seed
from papo.stages import evaluate
from papo.store.files import digest
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows

PARAMS = EvaluateParams(benchmarks=("a", "b"), samples_per_problem=2, problems_per_shard=1, max_failed_share=0.9)


class FakeVerifier:
    """Right where the answers are equal; `failed` instead of a verdict on a completion of \\boxed{2}."""

    def __init__(self, failed: str | None = None) -> None:
        self._failed = failed

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        return [self._verdict(gold, completion) for gold, completion, _ in items]

    def versions(self) -> dict[str, str]:
        return {"verifier": "1"}

    def _verdict(self, gold: str, completion: str) -> Verdict:
        answer = completion.removeprefix("\\boxed{").removesuffix("}")
        if self._failed and answer == "2":
            return Verdict(None, None, self._failed)
        return Verdict(float(answer == gold), answer, "ok")


@pytest.fixture
def inputs(small_round: Any, tmp_path: Path) -> evaluate.Inputs:
    small_round.answers = {f"{n}=?\n": str(n % 3) for n in range(3)}
    first = small_round.problems().rename(tmp_path / "a.parquet")
    small_round.answers = {f"{n}=?\n": str(n % 3) for n in range(3, 5)}
    second = small_round.problems().rename(tmp_path / "b.parquet")
    policies = {"warmstart": tmp_path / "warmstart", "final": tmp_path / "final"}
    for name, path in policies.items():
        path.mkdir()
        (path / "weights").write_text(name)
    return evaluate.Inputs(seed=5, sampler="transformers", policies=policies, benchmarks={"a": first, "b": second})


def run(
    inputs: evaluate.Inputs, out: Path, samplers: dict[str, Any], context: Context, failed: str | None = None
) -> Manifest:
    def sampler(policy: Path) -> Sampler:
        found: Sampler = samplers[policy.name]
        return found

    engine = evaluate.Engine(sampler=sampler, verifier=FakeVerifier(failed))
    return evaluate.run(PARAMS, inputs, out, engine=engine, context=context)


def test_the_rows(tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any) -> None:
    manifest = run(inputs, tmp_path / "out", {"warmstart": fake_sampler(), "final": fake_sampler()}, context)
    rows = read_rows(tmp_path / "out/a.parquet", EVALUATION)
    assert [row["policy"] for row in rows] == ["warmstart"] * 6 + ["final"] * 6
    assert [row["sample_index"] for row in rows] == [0, 1] * 6
    assert [row["problem_id"] for row in rows[:6]] == [row["problem_id"] for row in rows[6:]]
    for row in rows:
        assert row["seed"] == row_seed(5, -1, row["problem_id"], row["sample_index"])
        assert row["policy_digest"] == digest(inputs.policies[row["policy"]])
    assert len(read_rows(tmp_path / "out/b.parquet", EVALUATION)) == 8
    assert (manifest.rows, manifest.counts) == (20, {"ok": 20})
    assert manifest.versions == {"fake": "1", "verifier": "1"}


def test_the_metrics(tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any) -> None:
    manifest = run(inputs, tmp_path / "out", {"warmstart": fake_sampler(), "final": fake_sampler()}, context)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    rows = read_rows(tmp_path / "out/a.parquet", EVALUATION)[:6]
    mean = sum(row["orm_score"] for row in rows) / 6
    assert set(metrics) == {"a", "b"}
    assert set(metrics["a"]) == {"warmstart", "final", "gain"}
    assert metrics["a"]["warmstart"]["avg_at_k"]["value"] == pytest.approx(mean)
    assert metrics["a"]["warmstart"]["k"] == 2
    assert metrics["a"]["gain"]["value"] == 0.0  # the fake has no policy, so both give the same
    assert manifest.metrics["a/final/avg_at_k"] == pytest.approx(mean)


def test_a_sample_without_a_verdict_is_missing_and_is_named(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any
) -> None:
    manifest = run(inputs, tmp_path / "out", {"warmstart": fake_sampler(), "final": fake_sampler()}, context, "timeout")
    rows = [row for name in "ab" for row in read_rows(tmp_path / f"out/{name}.parquet", EVALUATION)]
    failed = [row for row in rows if row["status"] == "timeout"]
    assert failed
    assert all(row["orm_score"] is None for row in failed)
    assert manifest.counts["timeout"] == len(failed)
    scored = [row for row in read_rows(tmp_path / "out/a.parquet", EVALUATION)[:6] if row["orm_score"] is not None]
    by_problem = [
        [row["orm_score"] for row in scored if row["problem_id"] == one] for one in {r["problem_id"] for r in scored}
    ]
    expected = sum(sum(scores) / len(scores) for scores in by_problem) / len(by_problem)
    assert manifest.metrics["a/warmstart/avg_at_k"] == pytest.approx(expected)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["a"]["warmstart"]
    assert metrics["avg_at_k"]["missing"] == 6 - len(scored) > 0


def test_too_many_samples_without_a_verdict_stop_the_stage(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any
) -> None:
    engine = evaluate.Engine(sampler=lambda policy: fake_sampler(), verifier=FakeVerifier("timeout"))
    strict = PARAMS.model_copy(update={"max_failed_share": 0.01})
    with pytest.raises(FailedRowsError, match="timeout"):
        evaluate.run(strict, inputs, tmp_path / "out", engine=engine, context=context)
    assert not (tmp_path / "out").exists()


def test_a_second_run_asks_nothing(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any
) -> None:
    run(inputs, tmp_path / "out", {"warmstart": fake_sampler(), "final": fake_sampler()}, context)
    assert run(inputs, tmp_path / "out", {}, context).skipped


def test_samples_are_kept_and_only_what_is_made_of_them_is_made_again(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any
) -> None:
    first = {"warmstart": fake_sampler(), "final": fake_sampler()}
    run(inputs, tmp_path / "out", first, context)
    before = read_rows(tmp_path / "out/a.parquet", EVALUATION)
    engines = {"warmstart": fake_sampler(), "final": fake_sampler()}
    engine = evaluate.Engine(sampler=lambda policy: engines[policy.name], verifier=FakeVerifier())
    evaluate.run(
        PARAMS.model_copy(update={"confidence": 0.5}), inputs, tmp_path / "out", engine=engine, context=context
    )
    assert [sampler.batches for sampler in engines.values()] == [[], []]
    assert read_rows(tmp_path / "out/a.parquet", EVALUATION) == before
    hotter = PARAMS.model_copy(update={"temperature": 0.9})
    evaluate.run(hotter, inputs, tmp_path / "out", engine=engine, context=context)
    assert all(sampler.batches for sampler in engines.values())


def same_as_undisturbed(folder: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any) -> bool:
    whole, fresh = folder.with_name("whole"), Context(work=folder.with_name("fresh"))
    run(inputs, whole, {"warmstart": fake_sampler(), "final": fake_sampler()}, fresh)
    names = ("a.parquet", "b.parquet", "metrics.json")
    return all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_an_interrupted_stage_asks_only_for_what_is_missing(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any, at: int
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    before = {"warmstart": fake_sampler(), "final": fake_sampler(stop_at=at, stop=interrupt)}
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "out", before, context)
    assert not (tmp_path / "out/metrics.json").exists()
    after = {"warmstart": fake_sampler(), "final": fake_sampler()}
    run(inputs, tmp_path / "out", after, context)
    for name in before:
        assert len(before[name].batches) + len(after[name].batches) == 5
    assert same_as_undisturbed(tmp_path / "out", inputs, context, fake_sampler)


KILLED = """
import os, signal, sys
from pathlib import Path
tests, folder, work = map(Path, sys.argv[1:])
sys.path[:0] = [str(tests), str(tests / "stages")]
from conftest import FakeSampler
from test_evaluate import FakeVerifier, PARAMS
from papo.stages import evaluate
from papo.store.manifest import Context
policies = {name: folder / name for name in ("warmstart", "final")}
benchmarks = {name: folder / f"{name}.parquet" for name in "ab"}
engines = {"warmstart": FakeSampler(), "final": FakeSampler(stop_at=2, stop=lambda: os.kill(os.getpid(), signal.SIGKILL))}
engine = evaluate.Engine(sampler=lambda policy: engines[policy.name], verifier=FakeVerifier())
inputs = evaluate.Inputs(5, "transformers", policies, benchmarks)
evaluate.run(PARAMS, inputs, folder / "out", engine=engine, context=Context(work=work))
"""


def test_a_killed_stage_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any
) -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(tests), str(tmp_path), str(context.work)]
    assert subprocess.run(command, check=False).returncode == -9
    samplers = {"warmstart": fake_sampler(), "final": fake_sampler()}
    run(inputs, tmp_path / "out", samplers, context)
    assert {name: len(sampler.batches) for name, sampler in samplers.items()} == {"warmstart": 0, "final": 4}
    assert same_as_undisturbed(tmp_path / "out", inputs, context, fake_sampler)


def test_policies_in_between_are_evaluated_too(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any
) -> None:
    policies = {
        "warmstart": inputs.policies["warmstart"],
        "round-1": inputs.policies["final"],
        "final": inputs.policies["final"],
    }
    given = evaluate.Inputs(5, "transformers", policies, inputs.benchmarks)
    run(given, tmp_path / "out", {"warmstart": fake_sampler(), "final": fake_sampler()}, context)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["b"]) == {"warmstart", "round-1", "final", "gain"}


class Knows:
    """A sampler whose policy knows the answers to the first `right` problems of each benchmark."""

    def __init__(self, right: int) -> None:
        self._right = right

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        return [self._sample(int(request.prompt.removesuffix("=?\n"))) for request in requests]

    def versions(self) -> dict[str, str]:
        return {"right": str(self._right)}

    def _sample(self, number: int) -> Sample:
        answer = str(number % 3) if number < self._right else "9"
        return Sample([1], [2], f"\\boxed{{{answer}}}", [0.0], "stop")


def rounds_of(inputs: evaluate.Inputs, **right: int) -> tuple[evaluate.Inputs, evaluate.Engine]:
    """Policies by name that know so many answers, and the engine that has them."""
    folder = inputs.policies["final"].parent
    policies = {}
    for name in right:
        policies[name.replace("_", "-")] = path = folder / name
        path.mkdir(exist_ok=True)
        (path / "weights").write_text(name)
    engine = evaluate.Engine(sampler=lambda path: Knows(right[path.name]), verifier=FakeVerifier())
    return dataclasses.replace(inputs, policies=policies), engine


def test_the_best_policy_on_one_benchmark_is_the_final_one_on_all(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context
) -> None:
    changed, engine = rounds_of(inputs, warmstart=0, round_1=2, round_3=3, round_5=3, round_7=5)
    params = PARAMS.model_copy(update={"checkpoint": "best", "choose_on": "a", "every": 2})
    evaluate.run(params, changed, tmp_path / "out", engine=engine, context=context)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    for name in ("a", "b"):  # on b, the problems 3 and 4, round 7 would have been better
        assert set(metrics[name]) == {"warmstart", "round-1", "round-5", "round-7", "final", "gain"}
        assert metrics[name]["gain"]["of"] == "round-3"
    assert metrics["a"]["final"]["avg_at_k"]["value"] == 1.0
    assert metrics["b"]["final"]["avg_at_k"]["value"] == 0.0
    assert metrics["b"]["round-7"]["avg_at_k"]["value"] == 1.0
    rows = read_rows(tmp_path / "out/a.parquet", EVALUATION)
    assert Counter(row["policy"] for row in rows)["final"] == 6
    assert {row["policy_digest"] for row in rows if row["policy"] == "final"} == {digest(changed.policies["round-3"])}


@pytest.mark.parametrize("metric", ["avg_at_k", "pass_at_k", "maj_at_k"])
def test_the_gain_is_a_difference_of_the_metric_of_the_benchmark(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context, fake_sampler: Any, metric: Any
) -> None:
    _, engine = rounds_of(inputs, warmstart=0, final=2)
    fake = fake_sampler()
    mixed = evaluate.Engine(lambda path: fake if path.name == "final" else engine.sampler(path), FakeVerifier())
    changed = dataclasses.replace(inputs, metrics={"a": metric})
    evaluate.run(PARAMS, changed, tmp_path / "out", engine=mixed, context=context)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    for name, wanted in (("a", metric), ("b", "avg_at_k")):
        gain, last, first = (metrics[name][part] for part in ("gain", "final", "warmstart"))
        assert (gain["metric"], gain["of"]) == (wanted, "final")
        assert gain["value"] == pytest.approx(last[wanted]["value"] - first[wanted]["value"])
        assert gain["low"] <= gain["value"] <= gain["high"]


def test_a_sample_without_a_verdict_is_no_failure_in_a_difference_of_pass_at_k(
    tmp_path: Path, inputs: evaluate.Inputs, context: Context
) -> None:
    changed, engine = rounds_of(inputs, warmstart=3, final=3)
    # The answer to the third problem, 2, has no verdict: both policies know the other two.
    failing = evaluate.Engine(engine.sampler, FakeVerifier("timeout"))
    changed = dataclasses.replace(changed, metrics={"a": "pass_at_k"}, benchmarks={"a": changed.benchmarks["a"]})
    evaluate.run(PARAMS, changed, tmp_path / "out", engine=failing, context=context)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["a"]
    assert metrics["final"]["pass_at_k"]["value"] == pytest.approx(2 / 3)  # a lower bound
    assert (metrics["gain"]["value"], metrics["gain"]["problems"], metrics["gain"]["missing"]) == (0.0, 2, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.checkpoint=best"], "checkpoint best and choose_on belong together"),
        (["evaluate.choose_on=sums-hard"], "checkpoint best and choose_on belong together"),
        (["evaluate={checkpoint: best, choose_on: sums-hard}"], "set every"),
        (["evaluate={checkpoint: best, choose_on: other, every: 2}"], "choose_on other is none of benchmarks"),
        (["evaluate.checkpoint=16"], "there is no round 16, run.rounds is 16"),
        (["evaluate.checkpoint=first"], "evaluate.checkpoint"),
        (["evaluate.checkpoint=-1"], "evaluate.checkpoint"),
    ],
)
def test_a_choice_of_checkpoint_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(None, overrides=overrides)
    assert message in caught.value.what


def test_a_named_round_is_evaluated_as_the_final_one() -> None:
    params = load_params(None, overrides=["evaluate={checkpoint: 5, every: 6}"])
    assert params.evaluated_rounds == [5, 11]
    assert load_params(None, overrides=["evaluate={checkpoint: 6, every: 6}"]).evaluated_rounds == [5, 6, 11]
    assert load_params(None).evaluated_rounds == [15]
