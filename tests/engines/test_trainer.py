"""The policy update against an independent implementation of its loss in plain torch, and against stock TRL."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from papo.engines.protocols import TrainRow
from papo.engines.trainer import STATE_FILE, GrpoTrainer
from papo.errors import CheckpointError, StageError
from papo.params import ModelParams, TrainParams, WarmstartParams
from papo.schemas import ADVANTAGES, ROLLOUTS
from papo.stages import train as stage
from papo.store.files import digest
from papo.store.manifest import Context
from papo.store.tables import write_rows

Groups = Sequence[Sequence[TrainRow]]
Tensors = dict[str, Any]

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
# One optimizer step whose gradient is that of the loss: nothing is clipped by norm, weights hardly move.
ONE_STEP = TrainParams(minibatch_prompts=4, max_grad_norm=1e9, learning_rate=1e-6)
LOSSES = pytest.mark.parametrize("loss", ["token_mean", "sequence_mean"])
MICROBATCHES = pytest.mark.parametrize("microbatch", [1, 3, 128])


class Update:
    """What one call of the trainer gave."""

    def __init__(
        self,
        params: TrainParams,
        policy: Path,
        groups: Groups,
        folder: Path,
        *,
        state: Path | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        from safetensors.torch import load_file

        self.policy, self.state = folder / "policy", folder / "trainer"
        self.told: list[int] = []
        self.metrics = GrpoTrainer(params, temperature=temperature, seed=seed).train(
            policy, state, groups, self.policy, self.state, self.told.append
        )
        self.weights: Tensors = load_file(self.policy / "model.safetensors")
        self.moments: Tensors = load_file(self.state / STATE_FILE)

    def gradient(self) -> Tensors:
        """After a first step AdamW's first moment is (1 - beta_1) times the gradient."""
        return {key.removesuffix("/exp_avg"): m / 0.1 for key, m in self.moments.items() if key.endswith("/exp_avg")}


class PlainTorch:
    """The update as the module's docstring states it: row by row, no padding, nothing left out."""

    def __init__(self, params: TrainParams, policy: Path, temperature: float = 1.0) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.params, self.temperature = params, temperature
        self.model = LlamaForCausalLM.from_pretrained(policy)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=params.learning_rate, betas=params.betas, weight_decay=params.weight_decay
        )
        self.gradients: list[Tensors] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def train(self, groups: Groups) -> PlainTorch:
        import torch

        size = self.params.minibatch_prompts
        for at in range(0, len(groups), size):
            loss = self.loss([row for group in groups[at : at + size] for row in group])
            self.optimizer.zero_grad()
            loss.backward()
            self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params.max_grad_norm).item())
            self.optimizer.step()
            self.losses.append(loss.item())
        return self

    def loss(self, rows: Sequence[TrainRow]) -> Any:
        import torch

        p = self.params
        tokens = sum(len(row.completion_ids) for row in rows)
        total: Any = 0.0
        for row in rows:
            length = len(row.completion_ids)
            logits = self.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
            logprobs = (logits[len(row.prompt_ids) - 1 : -1] / self.temperature).log_softmax(-1)
            ratio = (logprobs[range(length), row.completion_ids] - torch.tensor(row.logprobs)).exp()
            advantage = torch.tensor(row.token_advantages or [row.advantage] * length)
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - p.clip_low, 1 + p.clip_high) * advantage)
            total = total - surrogate.sum() / (tokens if p.loss == "token_mean" else length * len(rows))
        return total

    def weights(self) -> Tensors:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def difference(one: Tensors, other: Tensors) -> float:
    """Norm of the difference of two sets of tensors, relative to the norm of the second."""
    assert one.keys() == other.keys()
    apart = math.sqrt(sum((one[name] - other[name]).double().pow(2).sum().item() for name in other))
    return apart / math.sqrt(sum(tensor.double().pow(2).sum().item() for tensor in other.values()))


def furthest(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in other)


def off_policy(groups: Groups) -> list[list[TrainRow]]:
    """The same rows as if another policy had sampled them, so that ratios lie on both sides of the clip range."""
    stream = np.random.default_rng(0)
    return [
        [replace(row, logprobs=[min(0.0, x + d) for x, d in zip(row.logprobs, stream.normal(0, 0.4, 99), strict=False)]) for row in group]
        for group in groups
    ]  # fmt: skip


def by_token(groups: Groups) -> list[list[TrainRow]]:
    """Token-level advantages that differ within a row; rows without advantage have zeros, one row has some."""
    stream = np.random.default_rng(1)
    return [
        [
            replace(
                row,
                token_advantages=[0.0 if row.advantage == 0 else float(a) for a in stream.normal(0, 1, len(row.logprobs))],
                advantage=-7.0,  # must not be read
            )
            for row in group
        ]
        for group in groups
    ]  # fmt: skip


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
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch": microbatch})
    rows = off_policy(groups)
    ours = Update(params, policy, rows, tmp_path, temperature=temperature)
    plain = PlainTorch(params, policy, temperature).train(rows)
    apart = difference(ours.gradient(), plain.gradients[0])
    assert apart < 1e-5
    assert ours.metrics[0]["loss"] == pytest.approx(plain.losses[0], rel=1e-4, abs=1e-6)
    assert ours.metrics[0]["grad_norm"] == pytest.approx(plain.norms[0], rel=1e-5)
    assert ours.metrics[0]["clipped_low_share"] > 0
    assert ours.metrics[0]["clipped_high_share"] > 0


@LOSSES
@MICROBATCHES
def test_token_level_advantages_are_each_tokens_own(
    policy: Path, groups: Groups, tmp_path: Path, loss: str, microbatch: int
) -> None:
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch": microbatch})
    rows = by_token(off_policy(groups))
    ours = Update(params, policy, rows, tmp_path)
    assert difference(ours.gradient(), PlainTorch(params, policy).train(rows).gradients[0]) < 1e-5


@LOSSES
def test_rows_without_advantage_count_but_give_no_gradient(
    policy: Path, groups: Groups, tmp_path: Path, loss: str
) -> None:
    # A negligible advantage keeps a row in the forward pass.
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch": 3})
    kept = [[replace(row, advantage=row.advantage or 1e-12) for row in group] for group in groups]
    without = [[row for row in group if row.advantage] for group in groups]
    gradients = [
        Update(params, policy, rows, tmp_path / name).gradient()
        for name, rows in {"left out": groups, "kept": kept, "not there": without}.items()
    ]
    assert difference(gradients[0], gradients[1]) < 1e-5
    assert difference(gradients[0], gradients[2]) > 0.1


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
            loss_type="dapo" if loss == "token_mean" else "grpo",
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
    params = ONE_STEP.model_copy(update={"loss": loss, "microbatch": 3})
    ours = Update(params, policy, off_policy(groups), tmp_path, temperature=0.7)
    assert difference(ours.gradient(), stock) < 1e-5


# ---- several steps, several rounds ----


def test_the_first_ratio_is_one_and_a_large_step_is_clipped(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = TrainParams(minibatch_prompts=1, learning_rate=0.02)
    first, *later = Update(params, policy, groups, tmp_path).metrics
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
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3, loss=loss, microbatch=3, max_grad_norm=0.1)
    ours, plain = Update(params, policy, groups, tmp_path), PlainTorch(params, policy).train(groups)
    assert furthest(ours.weights, plain.weights()) < 1e-5
    assert [row["loss"] for row in ours.metrics] == pytest.approx(plain.losses, rel=1e-3, abs=1e-5)
    assert [row["grad_norm"] for row in ours.metrics] == pytest.approx(plain.norms, rel=1e-3)
    assert min(plain.norms) > 0.1  # so that the clipping by norm was at work
    assert furthest(ours.weights, PlainTorch(params, policy).weights()) > 1e-3


def test_two_rounds_with_stored_state_are_one_continuous_run(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3)
    first = Update(params, policy, groups[:2], tmp_path / "0")
    second = Update(params, first.policy, groups[2:], tmp_path / "1", state=first.state)
    plain = PlainTorch(params, policy).train(groups[:2]).train(groups[2:])
    apart = furthest(second.weights, plain.weights())
    assert apart < 1e-6
    forgotten = Update(params, first.policy, groups[2:], tmp_path / "2")
    assert furthest(forgotten.weights, plain.weights()) > 1e-4
    assert {path.name for path in second.state.iterdir()} == {"optimizer.safetensors"}
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
    state = Update(ONE_STEP, tmp_path / "other", groups, tmp_path / "0").state
    with pytest.raises(CheckpointError, match="does not fit the policy") as caught:
        Update(ONE_STEP, policy, groups, tmp_path / "1", state=state)
    assert culprit in caught.value.what
    assert caught.value.where == str(state / STATE_FILE)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all, but long enough to be read as a header"])
def test_a_damaged_state_is_a_checkpoint_error(
    policy: Path, groups: Groups, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        Update(ONE_STEP, policy, groups, tmp_path / "1", state=tmp_path)
    assert caught.value.where == str(tmp_path / STATE_FILE)


def test_the_same_seed_gives_the_same_bits(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, microbatch=3)
    one, other = (Update(params, policy, groups, tmp_path / name) for name in ("one", "other"))
    assert digest(one.policy) == digest(other.policy)
    assert digest(one.state) == digest(other.state)
    assert one.metrics == other.metrics


# ---- steps with little in them ----


def test_a_step_without_any_advantage_leaves_the_weights_as_they_are(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    params = TrainParams(minibatch_prompts=2, learning_rate=0.1, weight_decay=0.0)
    nothing = [[replace(row, advantage=0.0) for row in group] for group in groups]
    update = Update(params, policy, nothing, tmp_path)
    assert furthest(update.weights, load_file(policy / "model.safetensors")) == 0.0
    assert [row["loss"] for row in update.metrics] == [0.0, 0.0]
    assert [row["grad_norm"] for row in update.metrics] == [0.0, 0.0]


@LOSSES
def test_steps_with_one_row_and_with_none_beside_a_full_one(
    policy: Path, groups: Groups, tmp_path: Path, loss: str
) -> None:
    # Every step has as many micro-batches as the fullest: three of three rows here, so that the others are filled up.
    params = TrainParams(minibatch_prompts=1, learning_rate=1e-3, loss=loss, microbatch=1)
    rows = [
        [replace(row, advantage=0.0) for row in groups[0]],
        [replace(row, advantage=1.0 if index == 2 else 0.0) for index, row in enumerate(groups[1])],
        groups[2],
        [replace(row, advantage=0.0) for row in groups[3]],
    ]
    ours, plain = Update(params, policy, rows, tmp_path), PlainTorch(params, policy).train(rows)
    assert furthest(ours.weights, plain.weights()) < 1e-5
    assert [row["loss"] for row in ours.metrics] == pytest.approx(plain.losses, rel=1e-3, abs=1e-5)


def test_a_last_step_may_have_fewer_groups_and_groups_may_be_ragged(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    params = TrainParams(minibatch_prompts=2, learning_rate=1e-3, microbatch=3)
    rows = [groups[0][:2], groups[1], groups[2][:3]]
    ours, plain = Update(params, policy, rows, tmp_path), PlainTorch(params, policy).train(rows)
    assert len(ours.metrics) == 2
    assert furthest(ours.weights, plain.weights()) < 1e-5


# ---- what is told ----


def test_every_step_has_all_metrics_and_all_are_finite(policy: Path, groups: Groups, tmp_path: Path) -> None:
    update = Update(TrainParams(minibatch_prompts=1, learning_rate=1e-3, microbatch=3), policy, groups, tmp_path)
    assert [set(row) for row in update.metrics] == [METRICS] * 4
    assert [row["step"] for row in update.metrics] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in update.metrics for value in row.values())
    assert all(0.0 < row["entropy"] <= math.log(20) for row in update.metrics)
    assert update.told == [1, 1, 1, 1]


def test_the_new_policy_has_the_tokenizer_and_settings_of_the_old(policy: Path, groups: Groups, tmp_path: Path) -> None:
    update = Update(ONE_STEP, policy, groups, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (update.policy / name).read_bytes() == (policy / name).read_bytes(), name


def test_versions_name_the_libraries() -> None:
    versions = GrpoTrainer(TrainParams(), temperature=1.0, seed=0).versions()
    assert set(versions) == {"torch", "transformers", "trl", "accelerate"}


# ---- failures, through the stage ----


def staged(
    policy: Path, groups: Groups, folder: Path, params: TrainParams, change: Callable[[int, TrainRow], TrainRow]
) -> Path:
    """Runs the stage on tables of the groups; returns where the new policy is to be."""
    rows = [
        ({"round": 0, "problem_id": f"p{number}", "sample_index": index}, change(4 * number + index, row))
        for number, group in enumerate(groups)
        for index, row in enumerate(group)
    ]
    sampling = {
        "finish_reason": "stop",
        "policy_digest": digest(policy),
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 8,
        "engine": "fake",
        "engine_version": "1",
        "seed": 0,
    }
    rollouts, advantages = folder / "rollouts.parquet", folder / "advantages.parquet"
    write_rows(
        rollouts,
        ROLLOUTS,
        [
            {
                **key,
                **sampling,
                "prompt": "",
                "completion": "",
                "prompt_ids": row.prompt_ids,
                "completion_ids": row.completion_ids,
                "logprobs": row.logprobs,
            }
            for key, row in rows
        ],
    )
    write_rows(
        advantages,
        ADVANTAGES,
        [
            {
                **key,
                "outcome_advantage": row.advantage,
                "process_advantage": 0.0,
                "advantage": row.advantage,
                "token_advantages": row.token_advantages,
            }
            for key, row in rows
        ],
    )
    inputs = stage.Inputs(
        round=0, seed=0, rollouts=rollouts, advantages=advantages, policy=policy, state=None, temperature=1.0
    )
    out = folder / "policy"
    engine = GrpoTrainer(params, temperature=1.0, seed=0)
    stage.run(params, inputs, out, engine=engine, context=Context(work=folder / "work"))
    return out


def _nan_advantage(number: int, row: TrainRow) -> TrainRow:
    return replace(row, advantage=math.nan) if number == 9 else row


def _nan_token_advantage(number: int, row: TrainRow) -> TrainRow:
    return replace(row, token_advantages=[math.nan] * len(row.logprobs)) if number == 9 else row


def _impossible_token(number: int, row: TrainRow) -> TrainRow:
    return replace(row, logprobs=[-200.0] * len(row.logprobs), advantage=-1.0) if number == 9 else row


@pytest.mark.parametrize("change", [_nan_advantage, _nan_token_advantage, _impossible_token])
def test_what_is_not_finite_stops_the_stage_and_writes_nothing(
    policy: Path, groups: Groups, tmp_path: Path, change: Callable[[int, TrainRow], TrainRow]
) -> None:
    params = TrainParams(minibatch_prompts=1)
    with pytest.raises(StageError, match="not finite in step 3 of 4; no policy was written") as caught:
        staged(policy, groups, tmp_path, params, change)
    assert "learning_rate" in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["advantages.parquet", "rollouts.parquet"]


def test_a_learning_rate_that_explodes_stops_the_stage_and_keeps_the_policy_there_was(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    staged(policy, groups, tmp_path, TrainParams(minibatch_prompts=1), lambda number, row: row)
    names = ("policy", "trainer")
    before = [digest(tmp_path / name) for name in names]
    manifest = (tmp_path / "policy.manifest.json").read_bytes()
    with pytest.raises(StageError, match="not finite in step"):
        staged(policy, groups, tmp_path, TrainParams(minibatch_prompts=1, learning_rate=1.0), lambda number, row: row)
    assert [digest(tmp_path / name) for name in names] == before
    assert (tmp_path / "policy.manifest.json").read_bytes() == manifest


def test_a_policy_that_is_none_is_refused_before_anything_is_written(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(policy, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Update(ONE_STEP, broken, groups, tmp_path / "new")
    assert not (tmp_path / "new").exists()
