"""advantage: scores in, decoupled advantages and signals out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.errors import DataError, ParamsError
from papo.params import AdvantageParams
from papo.schemas import ADVANTAGES, ROLLOUTS
from papo.stages import advantage
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows, write_rows

OUTCOMES = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
PROCESS = [1.0, 0.5, None, None, 1.0, 1.0, 0.0, 0.0]


def inputs(
    world: Any, outcomes: list[float | None] = OUTCOMES, process: list[float | None] = PROCESS
) -> advantage.Inputs:
    return advantage.Inputs(0, world.rollouts(), world.orm(outcomes), world.prm(process))


def run(given: advantage.Inputs, out: Path, context: Context, **params: Any) -> Manifest:
    return advantage.run(AdvantageParams(**params), given, out, context=context)


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_rows(out, ADVANTAGES)]


def test_the_rows(tmp_path: Path, small_round: Any, context: Context) -> None:
    """By hand: outcomes 1 1 0 0 have mean 1/2 and sample deviation 1/sqrt 3; scores 1 and 1/2 of the right ones +-1/sqrt 2."""
    out = tmp_path / "advantages.parquet"
    manifest = run(inputs(small_round), out, context)
    rows = read_rows(out, ADVANTAGES)
    assert [(row["round"], row["problem_id"], row["sample_index"]) for row in rows] == [
        (0, *key[1:]) for key in small_round.keys
    ]
    assert all(row["token_advantages"] is None for row in rows)
    outcome, process = column(out, "outcome_advantage"), column(out, "process_advantage")
    assert outcome[2] == outcome[3] == -outcome[0] == -outcome[1] < 0
    assert outcome[4:] == [0.0] * 4
    assert process[:4] == pytest.approx([process[0], -process[0], 0.0, 0.0])
    assert process[4] == process[5] == -process[6] == -process[7] > 0
    assert column(out, "advantage") == pytest.approx([a + b for a, b in zip(outcome, process, strict=True)])
    assert manifest.metrics["accuracy"] == 0.75
    assert manifest.rows == 8


def test_lam_weighs_the_process_advantage(tmp_path: Path, small_round: Any, context: Context) -> None:
    totals = {}
    for lam in (0.0, 0.5, 1.0):
        run(inputs(small_round), tmp_path / f"{lam}.parquet", context, lam=lam)
        totals[lam] = column(tmp_path / f"{lam}.parquet", "advantage")
    assert totals[0.0] == column(tmp_path / "0.0.parquet", "outcome_advantage")
    assert totals[0.5] == pytest.approx([(a + b) / 2 for a, b in zip(totals[0.0], totals[1.0], strict=True)])


def test_a_response_without_an_outcome_has_no_advantage_and_moves_no_other(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    run(inputs(small_round, [1.0, None, 0.0, None, *OUTCOMES[4:]], [None] * 8), tmp_path / "a.parquet", context)
    first = column(tmp_path / "a.parquet", "advantage")[:4]
    assert first[1] == first[3] == 0.0
    assert first[0] == -first[2] > 0


def test_a_second_run_does_nothing_and_other_params_do(tmp_path: Path, small_round: Any, context: Context) -> None:
    given, out = inputs(small_round), tmp_path / "advantages.parquet"
    assert [run(given, out, context).skipped for _ in range(2)] == [False, True]
    assert not run(given, out, context, lam=0.5).skipped


@pytest.mark.parametrize("table", ["orm", "prm"])
def test_rows_of_another_round_are_refused(tmp_path: Path, small_round: Any, context: Context, table: str) -> None:
    given = inputs(small_round)
    small_round.answers = dict(reversed(small_round.answers.items()))
    path = small_round.orm(OUTCOMES) if table == "orm" else small_round.prm(PROCESS)
    with pytest.raises(DataError, match="are not the 8 rows of the rollouts") as caught:
        run(given, tmp_path / "advantages.parquet", context)
    assert caught.value.where == str(path)
    assert not (tmp_path / "advantages.parquet").exists()


def test_fewer_rows_are_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    given = inputs(small_round)
    small_round.answers = {"1+2=?\n": "3"}
    small_round.orm(OUTCOMES[:4])
    with pytest.raises(DataError, match="its 4 rows are not the 8 rows"):
        run(given, tmp_path / "advantages.parquet", context)


# ---- a penalty for length ----

# 6, 7, 6 and 8 tokens of 8, the last two of which are a buffer: penalties 0, 1/4, 0, 1/2; and 8 each.
LENGTHS = [6, 7, 6, 8, 8, 8, 8, 8]
OVERLONG = {"buffer": 2, "factor": 0.5}


def long_inputs(world: Any) -> advantage.Inputs:
    ids = [[5] * length for length in LENGTHS]
    rollouts = world.rollouts(completion_ids=ids, logprobs=[[-0.1] * length for length in LENGTHS])
    return advantage.Inputs(0, rollouts, world.orm(OUTCOMES), world.prm(PROCESS))


def test_long_responses_lose_reward_and_stay_correct(tmp_path: Path, small_round: Any, context: Context) -> None:
    """By hand: rewards 1, 3/4, 0, -1/2 have mean 5/16 and deviations 11, 7, -5, -13 sixteenths, whose squares sum to 364/256."""
    given, out = long_inputs(small_round), tmp_path / "advantages.parquet"
    manifest = run(given, out, context, overlong=OVERLONG)
    run(given, tmp_path / "free.parquet", context)
    std = math.sqrt(364 / 256 / 3)
    expected = [deviation / 16 / std for deviation in (11, 7, -5, -13)]
    assert column(out, "outcome_advantage") == pytest.approx(expected + [0.0] * 4, rel=1e-5)
    assert column(out, "outcome_advantage")[4:] == [0.0] * 4
    assert column(out, "process_advantage") == column(tmp_path / "free.parquet", "process_advantage")
    found = manifest.metrics
    assert found["accuracy"] == 0.75
    assert (found["overlong_share"], found["overlong_penalty_mean"]) == (6 / 8, -(0.25 + 5 * 0.5) / 8)
    # Right is 7/8 + 1/4 above wrong; by the outcome alone it is 1.
    assert found["outcome_alignment"] == pytest.approx((9 / 8 / std) / math.sqrt(3), rel=1e-5)


def test_the_limit_is_that_which_the_responses_were_sampled_under(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    long_inputs(small_round)
    path = small_round.folder / "rollouts.parquet"
    rows = [row | {"max_new_tokens": 10} for row in read_rows(path, ROLLOUTS)]
    write_rows(path, ROLLOUTS, rows)
    given = advantage.Inputs(0, path, small_round.orm(OUTCOMES), small_round.prm(PROCESS))
    manifest = run(given, tmp_path / "advantages.parquet", context, overlong=OVERLONG)
    assert manifest.metrics["overlong_share"] == 0.0
    with pytest.raises(ParamsError, match="buffer is 10 and must be from 1 to below the limit of 10 tokens"):
        run(given, tmp_path / "advantages.parquet", context, overlong={"buffer": 10})


def test_without_the_param_there_is_no_penalty_and_no_signal(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    given, out = long_inputs(small_round), tmp_path / "advantages.parquet"
    manifest = run(given, out, context)
    assert not any(name.startswith("overlong") for name in manifest.metrics)
    assert column(out, "outcome_advantage")[0] == column(out, "outcome_advantage")[1]
    assert not run(given, out, context, overlong=OVERLONG).skipped
    assert run(given, out, context, overlong=OVERLONG).skipped
    assert not run(given, out, context, overlong=OVERLONG | {"factor": 0.4}).skipped


# ---- capo: one advantage a token ----

# Two groups of four: right, right, wrong and unknown; three right and one wrong. Tokens of one character each, and the end of text.
TEXTS = ["ab\ncd", "ab\n\ncd", "x", "x", "a\nb", "ab", "", "x"]
KNOWN: list[float | None] = [1.0, 1.0, 0.0, None, 1.0, 1.0, 1.0, 0.0]
WRONG: list[list[float] | None] = [[0.0, 1.0], [0.0, 0.0], None, None, [0.5, 0.0], None, [], None]


class FakeAligner:
    """A token a character."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def starts(self, completion_ids: Sequence[int], completion: str) -> list[int]:
        self.asked.append(completion)
        return list(range(len(completion_ids)))

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


def by_token(
    world: Any, out: Path, context: Context, wrong: Sequence[list[float] | None] = WRONG, **params: Any
) -> tuple[Manifest, FakeAligner]:
    statuses = ["not_asked" if one is None else "ok" for one in wrong]
    statuses[5] = "timeout"
    ids = [[1] * (len(text) + 1) for text in TEXTS]
    logprobs = [[-0.1] * len(one) for one in ids]
    given = advantage.Inputs(
        round=0,
        rollouts=world.rollouts(completion=TEXTS, completion_ids=ids, logprobs=logprobs),
        orm=world.orm(KNOWN),
        prm=world.prm([None if status != "ok" else 0.5 for status in statuses], status=statuses, wrong_steps=wrong),
    )
    engine = FakeAligner()
    settings = AdvantageParams(**{"variant": "capo", "scale": "mean_only"} | params)
    return advantage.run(settings, given, out, engine=engine, context=context), engine


def test_tokens_of_wrong_steps_are_debited(tmp_path: Path, small_round: Any, context: Context) -> None:
    """By hand: rewards 2 2 2 1 1 2 | 2 seven times | 0 0 with mean 24/15, and 1.5 1.5 2 2 | 1.8 1.8 1.8 | 2 | 0 0.

    The response whose judge timed out takes the mean debit of its group's judged tokens, (1/2 + 1/2) / 5.
    """
    out = tmp_path / "advantages.parquet"
    manifest, engine = by_token(small_round, out, context)
    rows = read_rows(out, ADVANTAGES)
    mean = 24 / 15
    first = [2 - mean] * 3 + [1 - mean] * 2 + [2 - mean]
    assert rows[0]["token_advantages"] == pytest.approx(first)
    assert rows[1]["token_advantages"] == pytest.approx([2 - mean] * 7)
    assert rows[2]["token_advantages"] == pytest.approx([-mean] * 2)
    assert rows[3]["token_advantages"] == [0.0, 0.0]
    rewards = [1.5, 1.5, 2, 2, *[1.8] * 3, 2, 0, 0]
    mean = sum(rewards) / 10
    found = [value for row in rows[4:] for value in row["token_advantages"]]
    assert found == pytest.approx([reward - mean for reward in rewards])
    assert rows[0]["advantage"] == pytest.approx(sum(first) / 6)
    assert rows[0]["outcome_advantage"] == pytest.approx(2 - 26 / 15)
    for row in rows:
        assert row["outcome_advantage"] + row["process_advantage"] == pytest.approx(row["advantage"], abs=1e-6)
    assert engine.asked == [TEXTS[n] for n in (0, 1, 4, 6)]
    assert manifest.metrics["advantage_mean_correct"] == pytest.approx(
        sum(rows[n]["advantage"] for n in (0, 1, 4, 5, 6)) / 5
    )
    assert manifest.metrics["accuracy"] == pytest.approx(5 / 7)
    assert manifest.versions == {"fake": "1"}


def test_the_weights_of_capo(tmp_path: Path, small_round: Any, context: Context) -> None:
    by_token(small_round, tmp_path / "a.parquet", context, w_proc=0.0)
    assert not any(column(tmp_path / "a.parquet", "process_advantage"))
    by_token(small_round, tmp_path / "b.parquet", context, w_whole=4.0, w_proc=2.0)
    by_token(small_round, tmp_path / "c.parquet", context)
    for double, single in zip(
        read_rows(tmp_path / "b.parquet", ADVANTAGES), read_rows(tmp_path / "c.parquet", ADVANTAGES), strict=True
    ):
        assert double["token_advantages"] == pytest.approx([2 * value for value in single["token_advantages"]])


def test_a_penalty_counts_in_every_token_of_capo(tmp_path: Path, small_round: Any, context: Context) -> None:
    """As above, but the second response has all of its 7 tokens at 2 x (1 - 1/4): rewards of 2 x 6 - 2, 1.5 x 7, 0 x 2."""
    out = tmp_path / "advantages.parquet"
    manifest, _ = by_token(small_round, out, context, overlong={"buffer": 2, "factor": 0.5})
    rows = read_rows(out, ADVANTAGES)
    mean = (10 + 10.5) / 15
    assert rows[0]["token_advantages"] == pytest.approx([2 - mean] * 3 + [1 - mean] * 2 + [2 - mean])
    assert rows[1]["token_advantages"] == pytest.approx([1.5 - mean] * 7)
    assert rows[2]["token_advantages"] == pytest.approx([-mean] * 2)
    assert rows[1]["outcome_advantage"] == pytest.approx(1.5 - (2 * 6 + 1.5 * 7) / 15)
    for row in rows:
        assert row["outcome_advantage"] + row["process_advantage"] == pytest.approx(row["advantage"], abs=1e-6)
    assert manifest.metrics["overlong_share"] == 1 / 8
    # By the outcome alone, right is 2 above wrong in both groups; the process part is what `advantage` has beside it.
    means = [row["advantage"] for row in rows]
    lead = (means[0] + means[1]) / 2 - means[2] + sum(means[4:7]) / 3 - means[7]
    assert manifest.metrics["outcome_alignment"] == pytest.approx(lead / 4, rel=1e-5)


@pytest.mark.parametrize("steps", [[], [0.0], [0.0, 1.0, 0.0]])
def test_a_critique_of_other_steps_is_refused(
    tmp_path: Path, small_round: Any, context: Context, steps: list[float]
) -> None:
    wrong = [*WRONG[:4], steps, *WRONG[5:]]
    with pytest.raises(DataError, match=f"wrong_steps has {len(steps)} values for a completion of 2 steps") as caught:
        by_token(small_round, tmp_path / "advantages.parquet", context, wrong)
    assert caught.value.where == f"{small_round.folder / 'prm.parquet'}, row 4"
    assert not (tmp_path / "advantages.parquet").exists()


def test_a_judge_that_names_no_steps_is_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    rollouts, orm = small_round.rollouts(), small_round.orm(OUTCOMES)
    given = advantage.Inputs(0, rollouts, orm, small_round.prm(PROCESS))
    with pytest.raises(DataError, match="the judge names no wrong steps") as caught:
        advantage.run(
            AdvantageParams(variant="capo"), given, tmp_path / "a.parquet", engine=FakeAligner(), context=context
        )
    assert caught.value.where == str(given.prm)


def test_a_judge_that_was_not_asked_is_no_reason_to_refuse(tmp_path: Path, small_round: Any, context: Context) -> None:
    given = advantage.Inputs(0, small_round.rollouts(), small_round.orm(OUTCOMES), small_round.prm([None] * 8))
    out = tmp_path / "a.parquet"
    advantage.run(AdvantageParams(variant="capo"), given, out, engine=FakeAligner(), context=context)
    first = read_rows(out, ADVANTAGES)[0]
    assert first["token_advantages"] == pytest.approx([first["outcome_advantage"]] * 2)
    assert first["outcome_advantage"] > 0


def test_capo_without_an_aligner_is_refused(tmp_path: Path, small_round: Any, context: Context) -> None:
    with pytest.raises(ParamsError, match="where tokens stand"):
        run(inputs(small_round), tmp_path / "a.parquet", context, variant="capo")


def test_what_a_missing_score_and_length_count_as_is_a_matter_of_params(
    tmp_path: Path, small_round: Any, context: Context
) -> None:
    given = inputs(small_round, process=[1.0, None, None, None, 1.0, 1.0, 0.0, None])
    run(given, tmp_path / "missing.parquet", context)
    run(given, tmp_path / "zero.parquet", context, missing="zero")
    assert column(tmp_path / "missing.parquet", "process_advantage")[1] == 0.0
    assert column(tmp_path / "zero.parquet", "process_advantage")[1] < 0.0
    run(given, tmp_path / "cost.parquet", context, length_cost=0.5)
    run(given, tmp_path / "neutral.parquet", context, length_neutral=True)
    totals = {
        name: column(tmp_path / f"{name}.parquet", "outcome_advantage") for name in ("missing", "cost", "neutral")
    }
    assert totals["missing"] == totals["cost"] == totals["neutral"]


@pytest.mark.parametrize("variant", ["orm", "capo"])
@pytest.mark.parametrize("given", [{"missing": "zero"}, {"length_neutral": True}, {"length_cost": 0.1}])
def test_a_variant_without_process_scores_takes_no_rule_for_them(variant: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are about process scores"):
        AdvantageParams.model_validate({"variant": variant, **given})
