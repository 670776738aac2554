"""The policy update against an independent implementation of its loss in plain torch, and against stock TRL."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_tables import inputs_of, run_stage
from updates import (
    CLOCK,
    LIMIT,
    ONE_STEP,
    Groups,
    PlainTorch,
    apart,
    by_token,
    furthest,
    off_policy,
    train_round,
)  # fmt: skip

from papo.engines.protocols import TrainRow
from papo.engines.training.state import STATE_FILE
from papo.engines.training.trainer import GrpoTrainer
from papo.errors import CheckpointError, DataError
from papo.params import ModelParams, TrainParams, WarmstartParams
from papo.store.files import digest

METRICS = {
    "step",
    "loss",
    "grad_norm",
    "entropy",
    "clipped_low_share",
    "clipped_high_share",
    "ratio_min",
    "ratio_max",
    "approx_kl",
}
METRICS |= {
    "ratio_mean",
    "learning_rate",
    "skipped_responses",
    "skipped_share",
    "padding_share",
    "effective_sample_size",
    "staleness",
}
LOSSES = pytest.mark.parametrize("loss", ["token_mean", "sequence_mean", "dr_grpo"])
MICROBATCHES = pytest.mark.parametrize("microbatch", [1, 60, 8192])
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        {"share_prompts": False, "packing": "off"},
        {"share_prompts": True, "packing": "off"},
        {"packing": "on"},
        {"share_prompts": True, "logits_mb": None},
        {"share_prompts": False, "gradient_checkpointing": True},
    ],
    ids=str,
)

# ---- the gradient ----


def test_the_groups_of_these_tests_hold_what_they_are_to_test(groups: Groups) -> None:
    rows = [row for group in groups for row in group]
    assert len({len(row.completion_ids) for row in rows}) > 3
    assert len({len(row.prompt_ids) for row in rows}) > 2
    assert sum(row.advantage == 0.0 for row in rows) == 4
    assert sum(row.advantage < 0.0 for row in rows) == 8


@LOSSES
@MICROBATCHES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_the_loss_in_plain_torch(
    policy: Path, groups: Groups, tmp_path: Path, loss: str, microbatch: int, temperature: float,
) -> None:  # fmt: skip
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch_tokens": microbatch})
    rows = off_policy(groups)
    ours = train_round(params, policy, rows, tmp_path, temperature=temperature)
    plain = PlainTorch(params, policy, temperature).train(rows)
    assert apart(ours.gradient(), plain.gradients[0]) < 1e-5
    assert ours.metrics[0]["loss"] == pytest.approx(plain.losses[0], rel=1e-4, abs=1e-6)
    assert ours.metrics[0]["grad_norm"] == pytest.approx(plain.norms[0], rel=1e-5)
    assert ours.metrics[0]["clipped_low_share"] > 0
    assert ours.metrics[0]["clipped_high_share"] > 0


@LAYOUTS
@MICROBATCHES
def test_no_saving_changes_the_gradient(
    policy: Path, groups: Groups, tmp_path: Path, layout: dict[str, Any], microbatch: int
) -> None:
    params = ONE_STEP.model_copy(update={"microbatch_tokens": microbatch, **layout})
    rows = by_token(off_policy(groups))
    ours = train_round(params, policy, rows, tmp_path, temperature=0.7)
    assert apart(ours.gradient(), PlainTorch(params, policy, 0.7).train(rows).gradients[0]) < 1e-5


@LOSSES
@MICROBATCHES
def test_token_level_advantages_are_each_tokens_own(
    policy: Path, groups: Groups, tmp_path: Path, loss: str, microbatch: int
) -> None:
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch_tokens": microbatch})
    rows = by_token(off_policy(groups))
    ours = train_round(params, policy, rows, tmp_path)
    assert apart(ours.gradient(), PlainTorch(params, policy).train(rows).gradients[0]) < 1e-5


@LOSSES
def test_rows_without_advantage_count_but_give_no_gradient(
    policy: Path, groups: Groups, tmp_path: Path, loss: str
) -> None:
    # A negligible advantage keeps a row in the forward pass.
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch_tokens": 60})
    kept = [[replace(row, advantage=row.advantage or 1e-12) for row in group] for group in groups]
    without = [[row for row in group if row.advantage] for group in groups]
    gradients = [
        train_round(params, policy, rows, tmp_path / name).gradient()
        for name, rows in {"left out": groups, "kept": kept, "not there": without}.items()
    ]
    assert apart(gradients[0], gradients[1]) < 1e-5
    assert apart(gradients[0], gradients[2]) > 0.1


@LOSSES
def test_the_gradient_is_that_of_stock_trl(policy: Path, groups: Groups, tmp_path: Path, loss: str) -> None:
    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    rows = [row for group in off_policy(groups) for row in group]
    model = LlamaForCausalLM.from_pretrained(policy)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda **_: [0.0],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1"]}),
        processing_class=AutoTokenizer.from_pretrained(policy),
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type={"token_mean": "dapo", "sequence_mean": "grpo", "dr_grpo": "dr_grpo"}[loss],
            max_completion_length=LIMIT,
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            temperature=0.7,
            per_device_train_batch_size=2,
            num_generations=2,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
    )
    trainer.current_gradient_accumulation_steps = 1

    def padded(values: list[Sequence[float]], kind: torch.dtype, side: str) -> torch.Tensor:
        tensors = [torch.tensor(value, dtype=kind) for value in values]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side).to(model.device)

    prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
    batch = {
        "prompt_ids": padded(prompts, torch.long, "left"),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], torch.long, "left"),
        "completion_ids": padded(completions, torch.long, "right"),
        "completion_mask": padded([[1] * len(ids) for ids in completions], torch.long, "right"),
        "old_per_token_logps": padded([row.logprobs for row in rows], torch.float32, "right"),
        "advantages": torch.tensor([row.advantage for row in rows], device=model.device),
        "num_items_in_batch": torch.tensor(sum(map(len, completions)), device=model.device),
    }
    model.train()
    trainer._compute_loss(model, batch).backward()
    stock = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch_tokens": 60})
    ours = train_round(params, policy, off_policy(groups), tmp_path, temperature=0.7)
    assert apart(ours.gradient(), stock) < 1e-5


# ---- several steps, several rounds ----


def test_the_first_ratio_is_one_and_a_large_step_is_clipped(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = TrainParams(minibatch_prompts=1, learning_rate=0.02)
    first, *later = train_round(params, policy, groups, tmp_path).metrics
    assert first["ratio_min"] == pytest.approx(1.0, abs=1e-4)
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert first["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["clipped_low_share"] == first["clipped_high_share"] == 0.0
    # TRL compares with its own log-probs where none are given; then every ratio would be 1 and nothing clipped.
    assert all(row["ratio_max"] > 1.28 or row["ratio_min"] < 0.8 for row in later)
    assert max(row["clipped_low_share"] + row["clipped_high_share"] for row in later) > 0
    assert all(row["approx_kl"] > 0 for row in later)


@LOSSES
def test_several_steps_give_the_weights_of_plain_torch(policy: Path, groups: Groups, tmp_path: Path, loss: str) -> None:
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3, loss=loss, microbatch_tokens=60, max_grad_norm=0.1)
    ours, plain = train_round(params, policy, groups, tmp_path), PlainTorch(params, policy).train(groups)
    assert furthest(ours.weights, plain.weights()) < 1e-5
    assert [row["loss"] for row in ours.metrics] == pytest.approx(plain.losses, rel=1e-3, abs=1e-5)
    assert [row["grad_norm"] for row in ours.metrics] == pytest.approx(plain.norms, rel=1e-3)
    assert min(plain.norms) > 0.1  # so that the clipping by norm was at work
    assert furthest(ours.weights, PlainTorch(params, policy).weights()) > 1e-3


def test_two_rounds_with_stored_state_are_one_continuous_run(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3)
    first = train_round(params, policy, groups[:2], tmp_path / "0")
    second = train_round(params, first.policy, groups[2:], tmp_path / "1", state=first.state)
    plain = PlainTorch(params, policy).train(groups[:2]).train(groups[2:])
    apart = furthest(second.weights, plain.weights())
    assert apart < 1e-6
    forgotten = train_round(params, first.policy, groups[2:], tmp_path / "2")
    assert furthest(forgotten.weights, plain.weights()) > 1e-4
    assert {path.name for path in second.state.iterdir()} == {"optimizer.safetensors", "trainer.json"}
    names = {key.split("/")[0] for key in second.moments}
    assert names == set(plain.weights())
    assert {key.split("/")[1] for key in second.moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert {second.moments[f"{name}/step"].item() for name in names} == {4.0}


@pytest.mark.parametrize(
    ("shape", "culprit"),
    [
        (ModelParams(hidden_size=16, intermediate_size=64, layers=1, heads=2), "model.embed_tokens.weight"),
        (ModelParams(hidden_size=32, intermediate_size=64, layers=2, heads=2), "model.layers.1"),
    ],
)
def test_the_state_of_another_model_is_refused(
    policy: Path, groups: Groups, tmp_path: Path, shape: ModelParams, culprit: str
) -> None:
    from papo.engines.tokenizer import build_tokenizer
    from papo.engines.warmstart import _build_model

    tokenizer = build_tokenizer()
    _build_model(WarmstartParams(model=shape), tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    state = train_round(ONE_STEP, tmp_path / "other", groups, tmp_path / "0").state
    with pytest.raises(CheckpointError, match="does not fit the policy") as caught:
        train_round(ONE_STEP, policy, groups, tmp_path / "1", state=state)
    assert culprit in caught.value.what
    assert caught.value.where == str(state / STATE_FILE)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all, but long enough to be read as a header"])
def test_a_damaged_state_is_a_checkpoint_error(
    policy: Path, groups: Groups, tmp_path: Path, content: bytes | None
) -> None:
    state = train_round(ONE_STEP, policy, groups, tmp_path / "0").state
    (tmp_path / "0" / "trainer" / STATE_FILE).unlink()
    if content is not None:
        (state / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        train_round(ONE_STEP, policy, groups, tmp_path / "1", state=state)
    assert caught.value.where == str(state)


def test_the_same_seed_gives_the_same_bits(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, microbatch_tokens=60)
    one, other = (train_round(params, policy, groups, tmp_path / name) for name in ("one", "other"))
    assert digest(one.policy) == digest(other.policy)
    assert digest(one.state) == digest(other.state)
    assert one.without_clock == other.without_clock


def test_dropout_is_that_of_the_step_whatever_was_drawn_before(policy: Path, groups: Groups, tmp_path: Path) -> None:
    import torch

    dropping = Path(shutil.copytree(policy, tmp_path / "dropping"))
    config = json.loads((dropping / "config.json").read_text()) | {"attention_dropout": 0.3}
    (dropping / "config.json").write_text(json.dumps(config))
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, importance="token")
    updates = {}
    for name, seed in {"one": 0, "other": 0, "another": 1}.items():
        torch.rand(len(name))
        updates[name] = train_round(params, dropping, groups, tmp_path / name, seed=seed)
    assert digest(updates["one"].policy) == digest(updates["other"].policy)
    assert digest(updates["one"].policy) != digest(updates["another"].policy)
    # Importance weights compare two passes without dropout.
    assert updates["one"].metrics[0]["importance_mean"] == pytest.approx(1.0, abs=1e-5)


# ---- steps with little in them ----


def test_a_step_without_any_advantage_leaves_the_weights_as_they_are(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    params = TrainParams(minibatch_prompts=2, learning_rate=0.1, weight_decay=0.0)
    nothing = [[replace(row, advantage=0.0) for row in group] for group in groups]
    update = train_round(params, policy, nothing, tmp_path)
    assert furthest(update.weights, load_file(policy / "model.safetensors")) == 0.0
    assert [row["loss"] for row in update.metrics] == [0.0, 0.0]
    assert [row["grad_norm"] for row in update.metrics] == [0.0, 0.0]


@LOSSES
def test_steps_with_one_row_and_with_none_beside_a_full_one(
    policy: Path, groups: Groups, tmp_path: Path, loss: str
) -> None:
    # Every step has as many micro-batches as the fullest: three of three rows here, so that the others are filled up.
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3, loss=loss, microbatch_tokens=1)
    rows = [
        [replace(row, advantage=0.0) for row in groups[0]],
        [replace(row, advantage=1.0 if index == 2 else 0.0) for index, row in enumerate(groups[1])],
        groups[2],
        [replace(row, advantage=0.0) for row in groups[3]],
    ]
    ours, plain = train_round(params, policy, rows, tmp_path), PlainTorch(params, policy).train(rows)
    assert furthest(ours.weights, plain.weights()) < 1e-5
    assert [row["loss"] for row in ours.metrics] == pytest.approx(plain.losses, rel=1e-3, abs=1e-5)


def test_a_last_step_may_have_fewer_groups_and_groups_may_be_ragged(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, microbatch_tokens=60)
    rows = [groups[0][:2], groups[1], groups[2][:3]]
    ours, plain = train_round(params, policy, rows, tmp_path), PlainTorch(params, policy).train(rows)
    assert len(ours.metrics) == 2
    assert furthest(ours.weights, plain.weights()) < 1e-5


# ---- what is told ----


def test_every_step_has_all_metrics_and_all_are_finite(policy: Path, groups: Groups, tmp_path: Path) -> None:
    update = train_round(
        TrainParams(minibatch_prompts=1, learning_rate=1e-3, microbatch_tokens=60), policy, groups, tmp_path
    )
    assert [set(row) for row in update.metrics] == [METRICS | CLOCK] * 4
    assert [row["step"] for row in update.metrics] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in update.metrics for value in row.values())
    assert all(0.0 < row["entropy"] <= math.log(20) for row in update.metrics)
    assert update.told == [1, 1, 1, 1]


def test_the_new_policy_has_the_tokenizer_and_settings_of_the_old(policy: Path, groups: Groups, tmp_path: Path) -> None:
    update = train_round(ONE_STEP, policy, groups, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (update.policy / name).read_bytes() == (policy / name).read_bytes(), name


def test_versions_name_the_libraries() -> None:
    versions = GrpoTrainer(TrainParams(), temperature=1.0, max_new_tokens=LIMIT, seed=0).versions()
    assert set(versions) == {"torch", "transformers"}


# ---- failures, through the stage ----


def staged(
    policy: Path, groups: Groups, folder: Path, params: TrainParams, change: Callable[[int, TrainRow], TrainRow]
) -> None:
    """Runs the stage on tables of the groups."""
    rows = [[change(4 * number + index, row) for index, row in enumerate(group)] for number, group in enumerate(groups)]
    run_stage(params, inputs_of(folder, policy, rows), folder)


def _nan_advantage(number: int, row: TrainRow) -> TrainRow:
    return replace(row, advantage=math.nan) if number == 9 else row


def _nan_token_advantage(number: int, row: TrainRow) -> TrainRow:
    return replace(row, token_advantages=[math.nan] * len(row.logprobs)) if number == 9 else row


@pytest.mark.parametrize("change", [_nan_advantage, _nan_token_advantage])
def test_an_advantage_that_is_not_finite_is_refused_and_nothing_is_written(
    policy: Path, groups: Groups, tmp_path: Path, change: Callable[[int, TrainRow], TrainRow]
) -> None:
    with pytest.raises(DataError, match=r"row p2/1: (token_advantages|advantage) holds nan") as caught:
        staged(policy, groups, tmp_path, TrainParams(minibatch_prompts=1), change)
    assert caught.value.where == str(tmp_path / "advantages.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["advantages.parquet", "rollouts.parquet"]


def test_a_policy_that_is_none_is_refused_before_anything_is_written(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(policy, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        train_round(ONE_STEP, broken, groups, tmp_path / "new")
    assert not (tmp_path / "new").exists()
