"""Other variants from stored scores, and one problem in detail, on tables small enough to count."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from papo.core.advantages import VARIANTS, compute_advantages
from papo.core.compare import Comparison
from papo.core.explain import Settings
from papo.core.peers import trl_gdpo, verl_gdpo
from papo.errors import DataError, MissingInputError, ParamsError, UserError
from papo.inspection import check_variant, explain_problem, read_round, rederive, stored_rounds
from papo.params import AdvantageParams, OverlongParams
from papo.schemas import ADVANTAGES, problem_id
from papo.stages import advantage
from papo.store.files import read_sealed, write_sealed
from papo.store.layout import Workspace, manifest_path
from papo.store.tables import read_rows, write_rows

NAN = math.nan
ANSWERS = {"1+2=?\n": "3", "4+5=?\n": "9"}
FIRST, SECOND = (problem_id(prompt, answer) for prompt, answer in ANSWERS.items())
# The first problem: three right, one of them weak; the second: one right whom nobody was asked about.
ORM = [1, 1, 1, 0, 1, 0, 0, 0]
PRM = [1, 1, 0, None, None, None, None, None]
DEFAULT = AdvantageParams()
FAILED = [1, 1, None, None, None, None, None, None]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def make_round(workspace: Workspace, small_round: Any) -> Any:
    """(number, orm, prm, params, ...) -> the tables of a round, its advantages by the stage itself."""

    def make(
        number: int = 0,
        orm: Sequence[float | None] = ORM,
        prm: Sequence[float | None] = PRM,
        params: AdvantageParams = DEFAULT,
        answers: dict[str, str] = ANSWERS,
        opinions: Sequence[float | None] = (None,) * 8,
        **columns: Any,
    ) -> None:
        tables = dataclasses.replace(small_round, folder=workspace.round(number), answers=answers)
        completions = [[5] * (index + 2) for index in range(len(orm))]
        inputs = advantage.Inputs(
            round=number,
            rollouts=tables.rollouts(completion_ids=completions, logprobs=[[-0.1] * len(ids) for ids in completions]),
            orm=tables.orm(orm, second_opinion=opinions[: len(orm)]),
            prm=tables.prm(prm, **columns),
        )
        advantage.run(params, inputs, workspace.table(number, "advantages"))
        workspace.problems.mkdir(parents=True, exist_ok=True)
        shutil.copy(tables.problems(), workspace.train_problems)

    return make


# ---- other variants from the same scores ----


def test_the_stored_variant_anew_changes_nothing(workspace: Workspace, make_round: Any) -> None:
    make_round()
    (row,) = rederive(AdvantageParams(), workspace, variant="papo").rows
    assert row.changes == Comparison(8, 0, 0, 0, 0, 0)
    assert (row.round, row.stored, row.variant, row.zero_share, row.missing) == (0, "papo", "papo", 0.0, 0)


def test_a_variant_by_hand(workspace: Workspace, make_round: Any) -> None:
    make_round()
    found = rederive(AdvantageParams(), workspace, variant="mult")
    (row,) = found.rows
    # papo: (0.5 + 0.58) twice, 0.5 - 1.15, -1.5 | 1.5, -0.5 three times.
    # mult: products 1 1 0 0, so the third and fourth tie | the correct one is missing, the others are alike: all 0.
    assert row.changes == Comparison(responses=8, flipped=0, silenced=4, woken=0, sign_changed=4, rank_changed=4)
    assert row.zero_share == 0.5
    assert row.inversions == 2  # the third does not outrank the fourth, the fifth none of its group
    assert (row.missing, row.not_asked) == (1, 1)
    assert found.notes[0] == "computed with lam=1 scale=std eps=1e-06 guard=none"
    assert found.notes[1].startswith("responses without a process score that a variant above asks for: 1 (1 because")


def test_every_variant_of_every_round(workspace: Workspace, make_round: Any) -> None:
    make_round(0)
    make_round(2, params=AdvantageParams(variant="orm", lam=0.5))
    found = rederive(AdvantageParams(), workspace)
    assert [(row.round, row.variant) for row in found.rows] == [(k, name) for k in (0, 2) for name in VARIANTS]
    assert {row.stored for row in found.rows if row.round == 2} == {"orm lam=0.5"}
    missing = {row.variant: row.missing for row in found.rows if row.round == 0}
    assert missing == {"orm": 0, "prm": 5, "mult": 1, "fullnorm": 1, "papo": 0, "gdpo": 5, "convex": 0}
    assert "asks for: 10 (10 because" in found.notes[-1]  # five a round, however many variants miss them


def test_a_failed_judge_is_told_from_one_that_was_not_asked(workspace: Workspace, make_round: Any) -> None:
    make_round(prm=FAILED, status=["ok", "ok", "timeout", *["not_asked"] * 5])
    found = rederive(AdvantageParams(), workspace, variant="mult", round_=0)
    assert (found.rows[0].missing, found.rows[0].not_asked) == (2, 1)
    assert "(1 because the judge was not asked, 1 because it failed)" in found.notes[-1]


def test_the_guard_where_a_variant_takes_it(workspace: Workspace, make_round: Any) -> None:
    make_round()
    found = rederive(AdvantageParams(lam=2.0, guard="rank"), workspace)
    inversions = {row.variant: row.inversions for row in found.rows}
    assert inversions["papo"] == inversions["fullnorm"] == 0
    assert inversions["mult"] == 2
    assert "prm and mult: without the guard, as there is no outcome advantage to rank by" in found.notes
    assert "convex is left out: it needs lam between 0 and 1, and lam is 2" in found.notes
    assert "convex" not in inversions
    assert {row.stored for row in found.rows} == {"papo lam=1 guard=none"}


OVERLONG = AdvantageParams(overlong=OverlongParams(buffer=4, factor=0.5))
# Of 2 to 9 tokens under a limit of 8.
PENALTIES = [0.0, 0.0, 0.0, -0.125, -0.25, -0.375, -0.5, -0.5]


def test_variants_are_compared_under_one_penalty_for_length(workspace: Workspace, make_round: Any) -> None:
    make_round(0, params=OVERLONG)
    make_round(1)
    found = rederive(OVERLONG, workspace)
    assert found.notes[0] == (
        "computed with lam=1 scale=std eps=1e-06 guard=none overlong.buffer=4 overlong.factor=0.5"
    )
    assert {row.round: row.stored for row in found.rows} == {0: "papo", 1: "papo overlong=null"}
    (same,) = [row for row in found.rows if row.round == 0 and row.variant == "papo"]
    assert same.changes == Comparison(8, 0, 0, 0, 0, 0)
    (other,) = [row for row in found.rows if row.round == 1 and row.variant == "papo"]
    assert other.changes.sign_changed + other.changes.rank_changed > 0
    without = rederive(AdvantageParams(), workspace, variant="papo", round_=0)
    assert [row.stored for row in without.rows] == ["papo overlong.buffer=4 overlong.factor=0.5"]


def test_a_round_that_was_stored_before_there_was_a_penalty_is_read(workspace: Workspace, make_round: Any) -> None:
    make_round()
    path = manifest_path(workspace.table(0, "advantages"))
    manifest = read_sealed(path)
    del manifest["params"]["overlong"]
    write_sealed(path, manifest)
    assert read_round(workspace, 0).settings.overlong is None
    assert rederive(AdvantageParams(), workspace, variant="papo").rows[0].stored == "papo"


def test_nothing_is_written(workspace: Workspace, make_round: Any) -> None:
    make_round()
    before = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")}
    rederive(AdvantageParams(lam=0.5), workspace)
    explain_problem(workspace, FIRST)
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")} == before


@pytest.mark.parametrize(
    ("variant", "comparing", "message"),
    [
        ("ppo", True, "unknown variant 'ppo'"),
        ("ppo", False, "unknown variant 'ppo'"),
        ("all", False, "unknown variant 'all'; all needs --compare"),
    ],
)
def test_a_variant_that_is_none(workspace: Workspace, variant: str, comparing: bool, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        check_variant(variant, comparing=comparing)
    assert message in caught.value.what
    assert caught.value.fix
    if comparing:
        with pytest.raises(ParamsError):
            rederive(AdvantageParams(), workspace, variant=variant)


def test_capo_needs_a_judge_that_names_wrong_steps(workspace: Workspace, make_round: Any) -> None:
    make_round()
    with pytest.raises(DataError, match="the judge names no wrong steps") as caught:
        rederive(AdvantageParams(), workspace, variant="capo")
    assert str(workspace.table(0, "prm")) in str(caught.value)


def test_convex_with_lam_above_1_is_refused(workspace: Workspace, make_round: Any) -> None:
    make_round()
    with pytest.raises(ParamsError, match="convex needs 0 <= lam <= 1"):
        rederive(AdvantageParams(lam=2.0), workspace, variant="convex")


def test_rounds_that_are_not_there(workspace: Workspace, make_round: Any) -> None:
    with pytest.raises(MissingInputError, match="no round has advantages yet"):
        rederive(AdvantageParams(), workspace)
    make_round(3)
    (workspace.round(3).parent / "notes").mkdir()
    assert stored_rounds(workspace) == [3]
    with pytest.raises(MissingInputError, match="round 4 has no advantages"):
        rederive(AdvantageParams(), workspace, round_=4)


@pytest.mark.parametrize("name", ["prm", "advantages"])
def test_a_table_with_other_rows_is_named(workspace: Workspace, make_round: Any, small_round: Any, name: str) -> None:
    make_round()
    other = dataclasses.replace(small_round, folder=workspace.round(0), group=3)
    other.prm(PRM[:6]) if name == "prm" else other.advantages([0.0] * 6)
    with pytest.raises(DataError, match="its 6 rows are not the 8 rows") as caught:
        read_round(workspace, 0)
    assert caught.value.where.endswith(f"{name}.parquet")


# ---- one problem ----


def test_everything_about_a_problem(workspace: Workspace, make_round: Any) -> None:
    make_round(reason=["all shown", "all shown", "a gap", *[""] * 5])
    found = explain_problem(workspace, FIRST)
    assert (found.problem_id, found.round, found.other_rounds) == (FIRST, 0, [])
    assert (found.prompt, found.answer, found.judge) == ("1+2=?\n", "3", "fake, r")
    assert found.settings == Settings("papo", 1.0, "std", 1e-6, "none")
    assert [response.sample_index for response in found.responses] == [0, 1, 2, 3]
    weak, wrong = found.responses[2:]
    assert (weak.orm, weak.prm, weak.reason, weak.tokens, weak.text) == (1.0, 0.0, "a gap", 4, "\\boxed{3}")
    assert weak.advantage == pytest.approx(0.5 - 2 / math.sqrt(3), abs=1e-4)
    assert weak.advantage == pytest.approx(weak.outcome + weak.process)
    assert math.isnan(wrong.prm)
    assert (wrong.prm_status, wrong.orm_status) == ("not_asked", "ok")
    assert found.why.responses[2].endswith("= -0.65 < 0: a correct response is pushed down")
    assert found.why.group[0] == "4 responses: 3 correct, 1 wrong"
    assert not found.token_level


def test_a_second_opinion_disputes_only_what_the_verifier_calls_wrong(workspace: Workspace, make_round: Any) -> None:
    """A table that says so of a correct response, or of one without a verdict, is not what the stage writes."""
    make_round(orm=[1, 0, 0, 0, None, 0, 0, 1], opinions=[1.0, 1.0, 0.0, None, 1.0, None, 1.0, None])
    for problem, disputed in ((FIRST, [False, True, False, False]), (SECOND, [False, False, True, False])):
        found = explain_problem(workspace, problem)
        assert [response.disputed for response in found.responses] == disputed
    make_round(number=1)
    assert not any(response.disputed for response in explain_problem(workspace, FIRST).responses)


def test_the_peers_see_the_whole_round(workspace: Workspace, make_round: Any) -> None:
    make_round(params=AdvantageParams(lam=0.5))
    orm, prm = np.array(ORM, dtype=float), np.array(PRM, dtype=float)
    ids = [FIRST] * 4 + [SECOND] * 4
    expected = {
        **{
            name: compute_advantages(orm, prm, ids, variant=name, lam=0.5).total for name in ("orm", "mult", "fullnorm")
        },
        "GDPO, TRL": trl_gdpo(orm, prm, ids, lam=0.5),
        "GDPO, verl": verl_gdpo(orm, prm, ids, range(2, 10), lam=0.5),
    }
    for at, response in enumerate(explain_problem(workspace, SECOND).responses, start=4):
        assert response.peers == pytest.approx({name: values[at] for name, values in expected.items()})


def test_a_penalty_for_length_is_explained(workspace: Workspace, make_round: Any) -> None:
    make_round(params=OVERLONG)
    found = explain_problem(workspace, SECOND)
    assert found.settings.overlong == (4, 0.5)
    assert [sentence.split("; ")[1] for sentence in found.why.responses] == [
        f"its length costs {cost} of its reward" for cost in ("0.25", "0.375", "0.5", "0.5")
    ]
    assert "4 of 4 lose some of their reward for their length; their verdicts stay" in found.why.group
    assert not any("length" in sentence for sentence in explain_problem(workspace, FIRST).why.responses[:3])
    ids = [FIRST] * 4 + [SECOND] * 4
    orm, prm = np.array(ORM, dtype=float), np.array(PRM, dtype=float)
    expected = compute_advantages(orm, prm, ids, variant="orm", penalties=PENALTIES).total
    assert [response.peers["orm"] for response in found.responses] == pytest.approx(expected[4:].tolist())
    assert [response.peers["GDPO, TRL"] for response in found.responses] == pytest.approx(
        trl_gdpo(orm, prm, ids, lam=1.0)[4:].tolist()
    )


def test_the_last_round_that_has_it(workspace: Workspace, make_round: Any) -> None:
    make_round(12, ORM[:4], PRM[:4], answers={"4+5=?\n": "9"})
    make_round(0)
    make_round(1)
    found = explain_problem(workspace, FIRST[:4].upper())
    assert (found.problem_id, found.round, found.other_rounds) == (FIRST, 1, [0])
    assert explain_problem(workspace, SECOND).round == 12
    assert explain_problem(workspace, SECOND, round_=0).other_rounds == [1, 12]
    with pytest.raises(DataError) as caught:
        explain_problem(workspace, FIRST, round_=12)
    assert caught.value.what == f"no problem of round 12 begins with {FIRST}"
    assert caught.value.fix == f"{FIRST} is in round 0, 1"


def test_advantages_by_token_show_as_their_mean(workspace: Workspace, make_round: Any) -> None:
    make_round()
    path = workspace.table(0, "advantages")
    rows = read_rows(path, ADVANTAGES)
    rows[0] |= {"token_advantages": [0.5, 1.5], "advantage": 0.0}
    write_rows(path, ADVANTAGES, rows)
    found = explain_problem(workspace, FIRST)
    assert found.token_level
    assert found.responses[0].advantage == 1.0
    assert not explain_problem(workspace, SECOND).token_level


@pytest.mark.parametrize("prefix", ["", "abc", "xyzw", "1234 ", FIRST + "0"])
def test_no_prefix_of_an_id(workspace: Workspace, make_round: Any, prefix: str) -> None:
    make_round()
    with pytest.raises(UserError, match="is no problem_id"):
        explain_problem(workspace, prefix)


def test_an_unknown_problem_names_some_that_are_there(workspace: Workspace, make_round: Any) -> None:
    make_round(0)
    make_round(1)
    with pytest.raises(DataError, match="no problem begins with 0000") as caught:
        explain_problem(workspace, "0000")
    ids = ", ".join(sorted([FIRST, SECOND]))
    assert caught.value.fix == f"round 0 has {ids}; round 1 has {ids}"
    with pytest.raises(DataError, match="no problem of round 1 begins with 0000") as caught:
        explain_problem(workspace, "0000", round_=1)
    assert caught.value.fix == f"round 1 has {ids}"
    with pytest.raises(MissingInputError, match="round 7 has no advantages"):
        explain_problem(workspace, FIRST, round_=7)


def test_an_ambiguous_prefix_lists_the_problems(workspace: Workspace, make_round: Any) -> None:
    """A prefix of four digits that two of many problems share."""
    answers = {f"{n}=?\n": str(n) for n in range(2000)}
    by_prefix: dict[str, list[str]] = {}
    for prompt, answer in answers.items():
        by_prefix.setdefault(problem_id(prompt, answer)[:4], []).append(prompt)
    prefix, prompts = next((key, value) for key, value in by_prefix.items() if len(value) == 2)
    make_round(0, ORM, PRM, answers={prompt: answers[prompt] for prompt in prompts})
    with pytest.raises(DataError, match=f"2 problems begin with {prefix}") as caught:
        explain_problem(workspace, prefix)
    assert all(f"{problem_id(prompt, answers[prompt])} (round 0)" in caught.value.fix for prompt in prompts)


def test_a_problem_that_the_problem_set_has_lost(workspace: Workspace, make_round: Any) -> None:
    make_round(0)
    make_round(1, ORM[:4], PRM[:4], answers={"4+5=?\n": "9"})  # writes the problem set anew
    with pytest.raises(DataError, match="not in the problem set"):
        explain_problem(workspace, FIRST)
