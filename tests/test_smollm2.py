"""The presets of a real small model, and where the model is in place (`make demo-smollm2`), one round with it."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from papo.core.advantages import process_needed
from papo.core.steps import parse_problem
from papo.engines.sources import make_source
from papo.params import Params, load_params
from papo.pipeline import Step, run_step, steps
from papo.schemas import ADVANTAGES, ORM, PRM, PROBLEMS, ROLLOUTS
from papo.store.layout import Workspace
from papo.store.manifest import Context
from papo.store.tables import read_rows

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/smollm2-135m"
IM_END = "<|im_end|>"


def params_of(preset: str, *overrides: str) -> Params:
    path = ROOT / "infra/presets" / f"{preset}.yaml"
    return load_params(ROOT / "params.yaml", preset=path, overrides=overrides)


def test_the_judge_reads_every_problem_of_the_preset_among_its_worked_examples() -> None:
    params = params_of("smollm2-135m")
    source = make_source(params.prepare)
    for problems in (source.train(), *source.benchmarks().values()):
        for problem in problems:
            terms = parse_problem(problem.prompt)
            assert terms is not None
            assert str(sum(terms)) == problem.answer


def test_on_problems_of_a_file_no_judge_is_asked() -> None:
    variant = params_of("smollm2-135m-data").advantage.variant
    assert not process_needed(variant, [1.0, 1.0, 0.0], ["a", "a", "a"]).any()


@pytest.mark.parametrize("data", ["", "my data/problems.jsonl"])
def test_make_demo_smollm2_asks_for_params_that_are_valid(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = subprocess.run(
        ["make", "-n", "demo-smollm2", f"DATA={data}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    [line] = [line for line in told.stdout.replace("\\\n", " ").splitlines() if " papo run " in line]
    words = shlex.split(line)
    given = {
        option: [value for name, value in itertools.pairwise(words) if name == option]
        for option in ("--preset", "--set")
    }
    params = params_of(given["--preset"][0], *given["--set"])
    assert params.run.rounds == 1
    assert params.prepare.source == (data or "sums")
    assert params.warmstart.checkpoint == str(MODEL.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="models/smollm2-135m is not there; `make demo-smollm2` puts it in place")
def test_a_round_with_a_real_model_from_its_chat_template_to_a_training_step(tmp_path: Path) -> None:
    small = ("run.rounds=1", "rollout.prompts_per_round=4", "train.minibatch_prompts=4", "train.microbatch_tokens=512")
    params = params_of("smollm2-135m", f"warmstart.checkpoint={MODEL}", *small)
    workspace = Workspace(tmp_path)
    before = [step for step in steps(params) if step.stage not in ("evaluate", "report")]
    for step in before:
        run_step(step, params, workspace, Context())
    assert before[-1] == Step("train", 0)

    rollouts = read_rows(workspace.table(0, "rollouts"), ROLLOUTS)
    problems = {row["problem_id"]: row for row in read_rows(workspace.train_problems, PROBLEMS)}
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert len(rollouts) == 4 * 8
    for row in rollouts:
        system, user, answer = tokenizer.decode(row["prompt_ids"]).split("<|im_start|>")[1:]
        assert system.startswith("system\n")
        assert user == f"user\n{problems[row['problem_id']]['prompt']}{IM_END}\n"
        assert answer == "assistant\n"
        ended = row["finish_reason"] == "stop"
        assert tokenizer.decode(row["completion_ids"]) == row["completion"] + (IM_END if ended else "")

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for row in rollouts[::8]:
        told = logprobs(model, row["prompt_ids"], row["completion_ids"], params.rollout.temperature)
        np.testing.assert_allclose(row["logprobs"], told, atol=1e-3)

    scored = read_rows(workspace.table(0, "orm"), ORM)
    assert {row["status"] for row in scored} <= {"ok", "no_answer"}
    assert sum(row["status"] == "ok" for row in scored) > len(scored) / 4  # it boxes an answer, right or wrong
    assert {row["status"] for row in read_rows(workspace.table(0, "prm"), PRM)} <= {"ok", "not_asked"}
    advantages = [row["advantage"] for row in read_rows(workspace.table(0, "advantages"), ADVANTAGES)]
    mixed = any(0 < sum(row["orm_score"] for row in scored[at : at + 8]) < 8 for at in range(0, 32, 8))
    assert any(advantages) >= mixed
    before_it, after_it = (
        load_file(policy / "model.safetensors") for policy in (workspace.warmstart, workspace.policy(0))
    )
    assert any(not before_it[name].equal(after_it[name]) for name in before_it) == any(advantages)


def logprobs(model: object, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> np.ndarray:
    """Of the tokens of a completion, by one plain forward pass."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]  # type: ignore[operator]  # from_pretrained is untyped
    everyone = (logits.double() / temperature).log_softmax(-1)
    chosen: np.ndarray = everyone[range(len(completion)), list(completion)].numpy()
    return chosen
