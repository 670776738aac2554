"""The list of steps, and what is said where a step cannot run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sandboxes import sandboxed

from papo.core.steps import operations, parse_problem
from papo.engines.tokenizer import build_tokenizer, token_starts
from papo.errors import MissingInputError, ParamsError
from papo.inspection import rederive
from papo.params import load_params
from papo.pipeline import CODE, ROUND_STAGES, STAGES, Step, evaluate_policies, run_step, steps
from papo.schemas import ADVANTAGES, EVALUATION, ORM, PRM, PROBLEMS, ROLLOUTS
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.manifest import Context
from papo.store.tables import read_rows, write_rows

ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared/data/gsm8k_test.jsonl"


def test_the_steps_of_a_run_in_order() -> None:
    params = load_params(ROOT / "params.yaml", overrides=["run.rounds=2"])
    assert [str(step) for step in steps(params)] == [
        "prepare", "warmstart",
        "rollout 0", "score_orm 0", "score_prm 0", "advantage 0", "train 0",
        "rollout 1", "score_orm 1", "score_prm 1", "advantage 1", "train 1",
        "evaluate", "report",
    ]  # fmt: skip


def test_a_step_knows_its_command() -> None:
    assert Step("score_orm", 3).command == "papo score-orm --round 3"
    assert Step("prepare").command == "papo prepare"


def test_every_stage_has_its_code() -> None:
    assert set(CODE) == set(STAGES)
    assert all(f"stages/{stage}.py" in code for stage, code in CODE.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_round_is_needed_exactly_where_there_are_rounds(stage: str, checkout: Path) -> None:
    wrong = Step(stage) if stage in ROUND_STAGES else Step(stage, 0)
    message = "needs --round" if stage in ROUND_STAGES else "takes no --round"
    with pytest.raises(ParamsError, match=f"{stage} {message}"):
        run_step(wrong, load_params(), Workspace(checkout), Context())


@pytest.mark.parametrize("round_", [-1, 1, 100])
def test_only_rounds_of_the_run(round_: int, checkout: Path) -> None:
    with pytest.raises(ParamsError, match=f"there is no round {round_}: run.rounds is 1") as caught:
        run_step(Step("rollout", round_), load_params(), Workspace(checkout), Context())
    assert "use 0 to 0" in caught.value.fix


LOST: dict[str, tuple[Step, str]] = {
    "data/problems/traces.parquet": (Step("warmstart"), "papo prepare"),
    "data/problems/train.parquet": (Step("rollout", 0), "papo prepare"),
    "artifacts/warmstart": (Step("rollout", 0), "papo warmstart"),
    "artifacts/rounds/0/rollouts.parquet": (Step("score_orm", 0), "papo rollout --round 0"),
    "artifacts/rounds/0/orm.parquet": (Step("score_prm", 0), "papo score-orm --round 0"),
    "artifacts/rounds/0/prm.parquet": (Step("advantage", 0), "papo score-prm --round 0"),
    "artifacts/rounds/0/advantages.parquet": (Step("train", 0), "papo advantage --round 0"),
    "artifacts/rounds/0/policy": (Step("evaluate"), "papo train --round 0"),
    "data/problems/eval/sums-hard.parquet": (Step("evaluate"), "papo prepare"),
    "artifacts/rounds/0/advantages.manifest.json": (Step("report"), "papo advantage --round 0"),
    "artifacts/rounds/0/policy.manifest.json": (Step("report"), "papo train --round 0"),
    "artifacts/evaluation/metrics.json": (Step("report"), "papo evaluate"),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_missing_input_names_the_command_that_makes_it(
    lost: str, tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_copy()
    monkeypatch.chdir(folder)
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    step, command = LOST[lost]
    with pytest.raises(MissingInputError) as caught:
        run_step(step, load_params(), Workspace(Path()), Context())
    assert caught.value.where == lost
    assert f"run `{command}` first" in caught.value.fix


@pytest.mark.parametrize("round_", [1, 2])
def test_the_next_round_needs_the_policy_of_the_one_before(
    round_: int, tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_copy())
    params = load_params(overrides=["run.rounds=3"])
    if round_ == 1:
        shutil.rmtree("artifacts/rounds/0/policy")
    with pytest.raises(MissingInputError) as caught:
        run_step(Step("rollout", round_), params, Workspace(Path()), Context())
    assert f"`papo train --round {round_ - 1}`" in caught.value.fix


# ---- capo: the judge names steps, tokens are debited, the policy learns from them ----

PADDING = "99+1=100\n"
"""True, and no operation of a problem with one-digit terms."""


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """The rollout with a text of ours: sample 0 is good, sample 1 padded, the others are wrong."""
    tokenizer = build_tokenizer()
    chain = operations(parse_problem(row["prompt"]) or [])
    lines = "".join(f"{left}{sign}{term}={result}\n" for left, sign, term, result in chain)
    box = f"\\boxed{{{chain[-1][3]}}}"
    text = {0: lines + box, 1: PADDING + lines + box}.get(row["sample_index"], "\\boxed{77}")
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return row | {"completion": text, "completion_ids": ids, "logprobs": [-1.0] * len(ids), "finish_reason": "stop"}


def test_capo_from_the_judge_to_the_policy(started_checkout: Path) -> None:
    here = Workspace(Path())
    rollouts = here.table(0, "rollouts")
    write_rows(rollouts, ROLLOUTS, [answered(row) for row in read_rows(rollouts, ROLLOUTS)])
    params = load_params(overrides=["advantage={variant: capo, scale: mean_only}"])
    for stage in ("score_orm", "score_prm", "advantage", "train"):
        manifest = run_step(Step(stage, 0), params, here, Context(work=here.work))
    assert manifest.metrics["grad_norm"] > 0
    assert digest(here.policy(0)) != digest(here.warmstart)

    groups = read_rows(here.table(0, "prm"), PRM), read_rows(here.table(0, "advantages"), ADVANTAGES)
    for judged, found in zip(*groups, strict=True):
        tokens = found["token_advantages"]
        if found["sample_index"] == 1:
            good, poor = tokens[-1], tokens[0]
            assert judged["wrong_steps"] == [1.0] + [0.0] * (len(judged["wrong_steps"]) - 1)
            assert good == pytest.approx(poor + params.advantage.w_proc)
            assert tokens == [poor] * len(PADDING) + [good] * (len(tokens) - len(PADDING))
        else:
            assert judged["wrong_steps"] == (None if found["sample_index"] else [0.0] * len(judged["wrong_steps"]))
            assert len(set(tokens)) == 1
            assert (tokens[0] > 0) == (found["sample_index"] == 0)

    (again,) = rederive(params.advantage, here, variant="capo", round_=0).rows
    assert (again.stored, again.changes.sign_changed, again.changes.rank_changed) == ("capo", 0, 0)
    assert rederive(params.advantage, here, variant="orm", round_=0).rows[0].changes.rank_changed > 0


# ---- the second world: programs, their tests and a judge of readability, through the same stages ----

IDLE = "    spare = 3\n"
SMALL_TIER = {"min_operations": 2, "max_operations": 2, "problems": 4}
PROGRAMS = [
    f"prepare={{source: programs, near_match: null, programs: {{train: {SMALL_TIER}, eval: {{few: {SMALL_TIER}}}, traces: 300}}}}",
    "evaluate={benchmarks: [few], samples_per_problem: 1}",
    "score_prm.judge=readability",
    "run.rounds=1",
]


def programmed(row: dict[str, Any], solution: str, tokenizer: Any) -> dict[str, Any]:
    """The rollout with a program of ours: sample 0 is the reference, sample 1 has an idle line, the others are wrong."""
    head, rest = solution.split("\n", 1)
    text = {0: solution, 1: f"{head}\n{IDLE}{rest}"}.get(row["sample_index"], f"{head}\n    return 77")
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return row | {"completion": text, "completion_ids": ids, "logprobs": [-1.0] * len(ids), "finish_reason": "stop"}


@sandboxed
@pytest.mark.parametrize("variant", ["papo", "capo"])
def test_programs_go_through_the_same_stages(variant: str, checkout: Path) -> None:
    from transformers import AutoTokenizer

    here = Workspace(Path())
    params = load_params(overrides=[*PROGRAMS, f"advantage={{variant: {variant}, scale: mean_only}}"])
    for step in (Step("prepare"), Step("warmstart"), Step("rollout", 0)):
        run_step(step, params, here, Context(work=here.work))
    solutions = {row["problem_id"]: row["reference_solution"] for row in read_rows(here.train_problems, PROBLEMS)}
    tokenizer = AutoTokenizer.from_pretrained(here.warmstart)
    rows = read_rows(here.table(0, "rollouts"), ROLLOUTS)
    texts = [programmed(row, solutions[row["problem_id"]], tokenizer) for row in rows]
    write_rows(here.table(0, "rollouts"), ROLLOUTS, texts)
    for stage in ("score_orm", "score_prm", "advantage", "train"):
        run_step(Step(stage, 0), params, here, Context(work=here.work))
    assert digest(here.policy(0)) != digest(here.warmstart)
    outcomes, judged, advantages = (read_rows(here.table(0, table.name), table) for table in (ORM, PRM, ADVANTAGES))
    for row, outcome, judgement, found in zip(texts, outcomes, judged, advantages, strict=True):
        sample = row["sample_index"]
        assert (outcome["orm_score"], judgement["prm_score"]) == {0: (1.0, 1.0), 1: (1.0, 0.5)}.get(sample, (0.0, None))
        assert judgement["status"] == ("ok" if sample < 2 else "not_asked")
        if variant == "papo":
            assert found["process_advantage"] == pytest.approx({0: 0.25, 1: -0.25}.get(sample, 0.0))
        elif sample == 1:
            text, tokens = row["completion"], found["token_advantages"]
            line = range(text.index(IDLE), text.index(IDLE) + len(IDLE))
            starts = token_starts(tokenizer.backend_tokenizer, row["completion_ids"], text)
            idle = [value for value, start in zip(tokens, starts, strict=True) if start in line]
            others = {value for value, start in zip(tokens, starts, strict=True) if start not in line}
            assert (len(idle), len(others)) == (4, 1)  # spare, =, 3 and the line break
            assert idle == pytest.approx([others.pop() - params.advantage.w_proc] * 4, abs=1e-6)


def test_capo_needs_the_tokenizer_of_the_policy(tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_copy())
    path = Path("artifacts/warmstart/tokenizer.json")
    path.unlink()
    with pytest.raises(MissingInputError) as caught:
        run_step(Step("advantage", 0), load_params(overrides=["advantage.variant=capo"]), Workspace(Path()), Context())
    assert caught.value.where == str(path)
    assert "run `papo warmstart` first" in caught.value.fix
    assert run_step(Step("advantage", 0), load_params(), Workspace(Path()), Context()).skipped


@pytest.mark.skipif(not GSM8K.is_file(), reason="the real data are not beside this checkout")
def test_the_embedded_policy_is_evaluated_on_its_tiers_and_on_real_problems(checkout: Path) -> None:
    params = load_params(
        overrides=[
            f"prepare.eval_sources={{gsm8k: {{source: {GSM8K}, max_problems: 40}}}}",
            "evaluate.benchmarks=[sums-hard, gsm8k]",
            "evaluate.samples_per_problem=1",
        ]
    )
    workspace = Workspace(checkout)
    for stage in ("prepare", "warmstart"):
        run_step(Step(stage), params, workspace, Context())
    card = json.loads((workspace.problems / "card.json").read_text())
    assert card["read_as"]["gsm8k"] == {"gsm8k": 40}
    assert card["sets"].keys() == {"train", "sums-in-range", "sums-hard", "gsm8k"}
    assert list(card["files"]) == [str(GSM8K)]
    problems = read_rows(workspace.benchmark("gsm8k"), PROBLEMS)
    questions = {json.loads(row)["question"] for row in GSM8K.read_text(encoding="utf-8").splitlines()}
    assert {row["prompt"].split("\n\nThink step by step")[0] for row in problems} <= questions
    out, manifest = evaluate_policies(params, workspace, Context(), policy="warmstart")
    found = read_rows(out / "gsm8k.parquet", EVALUATION)
    assert [row["problem_id"] for row in found] == [row["problem_id"] for row in problems]
    assert {row["status"] for row in found} <= {"ok", "no_answer"}  # each sample has a verdict
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["gsm8k"]["warmstart"]["avg_at_k"]["samples"] == 40
    assert metrics["gsm8k"]["warmstart"]["avg_at_k"]["value"] <= 1 / 40  # by chance at most
    assert metrics["sums-hard"]["warmstart"]["avg_at_k"]["problems"] == card["sets"]["sums-hard"]["problems"]
    assert manifest.rows == 40 + card["sets"]["sums-hard"]["problems"]
