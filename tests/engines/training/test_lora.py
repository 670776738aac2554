"""Adapters against low-rank products written out in plain torch, from round to round, and what is said where they cannot be laid."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from updates import Groups, StoppedError, Tensors, Trained, apart, off_policy, same, tensors, train_round

from papo.cli import main
from papo.engines.policy import load_policy
from papo.engines.protocols import TrainRow
from papo.engines.training.batches import Item, MicroBatch
from papo.engines.training.devices import OneDevice
from papo.engines.training.forward import PolicyLoss, tokens_of
from papo.engines.training.lora import Base, lay
from papo.engines.training.projection import Projection
from papo.engines.training.state import ADAPTERS, RECORD
from papo.engines.training.trainer import GrpoTrainer
from papo.errors import CheckpointError, ParamsError, SetupError, StageError
from papo.params import DevicesParams, KlParams, LoraParams, TrainParams
from papo.store.files import digest

LORA = LoraParams(rank=4, alpha=6.0)
SCALE = LORA.alpha / LORA.rank
# One optimizer step whose gradient is that of the loss: nothing is clipped by norm.
ONE_STEP = TrainParams(minibatch_prompts=4, max_grad_norm=1e9, learning_rate=0.02, lora=LORA)
FOUR_STEPS = TrainParams(minibatch_prompts=1, learning_rate=0.01, lora=LORA, save_minutes=0.0)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def changed(params: TrainParams, **update: Any) -> TrainParams:
    return TrainParams.model_validate(params.model_dump() | update)


def targets(*names: str) -> TrainParams:
    return changed(ONE_STEP, lora=LORA.model_copy(update={"targets": list(names)}))


def first_round(params: TrainParams, policy: Path, groups: Groups, folder: Path) -> Trained:
    return train_round(params, policy, groups, folder, reference=policy)


def by_layer(adapters: Tensors) -> dict[str, tuple[Any, Any]]:
    """Layer -> its A and B."""
    names = sorted({name.rpartition(".lora_")[0] for name in adapters})
    return {
        name: (adapters[f"{name}.lora_A.default.weight"], adapters[f"{name}.lora_B.default.weight"]) for name in names
    }


class ByHand:
    """The base with W + (alpha / rank) B A in place of each W that has adapters, in plain torch, row by row."""

    def __init__(self, base: Path, adapters: Tensors) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(base)
        self.leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapters.items()}

    def logprobs(self, row: TrainRow) -> Any:
        replaced = {
            f"{layer}.weight": self.model.get_parameter(f"{layer}.weight").detach() + SCALE * b @ a
            for layer, (a, b) in by_layer(self.leaves).items()
        }
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        logits = torch.func.functional_call(self.model, replaced, (ids,)).logits[0, len(row.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)[range(len(row.completion_ids)), row.completion_ids]

    def gradient(self, params: TrainParams, groups: Groups) -> Tensors:
        rows = [row for group in groups for row in group]
        tokens = sum(len(row.completion_ids) for row in rows)
        base = ByHand(Path(self.model.name_or_path), {})
        total: Any = 0.0
        for row in rows:
            logprobs, advantage = self.logprobs(row), row.advantage
            ratio = (logprobs - torch.tensor(row.logprobs)).exp()
            bounded = ratio.clamp(1 - params.clip_low, 1 + params.clip_high)
            behind = base.logprobs(row).detach() - logprobs
            penalty = params.kl.coefficient * (behind.exp() - behind - 1)
            total = total + (penalty - torch.minimum(ratio * advantage, bounded * advantage)).sum() / tokens
        found = torch.autograd.grad(total, list(self.leaves.values()))
        return dict(zip(self.leaves, found, strict=True))


# ---- the gradient ----


@pytest.mark.parametrize("coefficient", [0.0, 0.3], ids=["alone", "with a KL penalty"])
@pytest.mark.parametrize(
    "layout",
    [
        {"share_prompts": False, "packing": "off"},
        {"share_prompts": True, "microbatch_tokens": 60},
        {"packing": "on"},
        {"share_prompts": False, "gradient_checkpointing": True},
        {"lora": LORA.model_copy(update={"targets": ["v_proj", "mlp.down_proj"]})},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_low_rank_products_in_plain_torch(
    policy: Path, groups: Groups, tmp_path: Path, layout: dict[str, Any], coefficient: float
) -> None:
    params, rows = changed(ONE_STEP, kl=KlParams(coefficient=coefficient), **layout), off_policy(groups)
    first = first_round(params, policy, rows, tmp_path / "0")
    # Only now both A and B have a gradient, as B was zero.
    second = train_round(params, first.policy, rows, tmp_path / "1", state=first.state, reference=policy)
    by_hand = ByHand(policy, first.adapters)
    # AdamW's first moment is 0.9 of what it was, and 0.1 of the gradient.
    ours = {
        name: (second.moments[f"{name}/exp_avg"] - 0.9 * first.moments[f"{name}/exp_avg"]) / 0.1
        for name in by_hand.leaves
    }
    assert apart(ours, by_hand.gradient(params, rows)) < 1e-5
    assert all(tensor.abs().max() > 0 for tensor in ours.values())
    if coefficient:
        assert first.metrics[0]["kl_reference"] == 0.0
        assert second.metrics[0]["kl_reference"] > 1e-3


def test_the_reference_is_the_base_without_a_second_copy(policy: Path, groups: Groups, tmp_path: Path) -> None:
    params = changed(ONE_STEP, kl=KlParams(coefficient=0.3))
    first = first_round(params, policy, groups, tmp_path / "0")
    second = train_round(params, first.policy, groups, tmp_path / "1", state=first.state, reference=policy)
    by_hand, base = ByHand(policy, first.adapters), ByHand(policy, {})
    rows = [row for group in groups for row in group]
    with torch.no_grad():
        apart_by = torch.cat([base.logprobs(row) - by_hand.logprobs(row) for row in rows])
    expected = (apart_by.exp() - apart_by - 1).mean().item()
    assert second.metrics[0]["kl_reference"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_look_at_the_base_leaves_the_policy_as_it_was(policy: Path, groups: Groups, training: bool) -> None:
    model, _ = load_policy(policy, device="cpu")
    lay(model, LORA, seed=0)
    model.train(training)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    batch = MicroBatch(tuple(Item(place, row, 1.0) for place, row in enumerate(groups[0])), False, 0, 0)
    module = PolicyLoss(model, temperature=1.0, logits_mb=None, packed=False)
    tokens = tokens_of(batch, torch.device("cpu"))
    found = Base(module)(batch, tokens, None).logprobs
    assert not found.requires_grad
    assert all(part.training == training for part in model.modules())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert torch.equal(Base(module)(batch, tokens, None).logprobs, found)
        assert (module(batch, tokens, None).logprobs - found).abs().max() > 1e-3


def test_adapters_alone_are_trained(policy: Path, groups: Groups, tmp_path: Path) -> None:
    class Looking(OneDevice):
        def clip(self, max_norm: float) -> float:
            named = self._module.model.named_parameters()
            self.with_gradient = {name for name, parameter in named if parameter.grad is not None}
            return super().clip(max_norm)

    devices = Looking(torch.device("cpu"), bfloat16=False)
    update = train_round(ONE_STEP, policy, groups, tmp_path, reference=policy, devices=devices)
    assert devices.with_gradient == set(update.adapters)
    assert {name.rpartition("/")[0] for name in update.moments} == set(update.adapters)
    assert {name.split(".")[-4] for name in update.adapters} == LINEAR


@pytest.mark.parametrize("trained", [False, True])
def test_the_product_for_a_frozen_head_is_not_computed(trained: bool) -> None:
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if "mm" in func.__name__:
                shapes.add(tuple(found.shape))
            return found

    shapes: set[tuple[int, ...]] = set()
    hidden = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(7, 3, requires_grad=trained)
    with Products():
        projection = Projection(weight, None, 1.0, None)
        projection.loss(hidden, torch.arange(5), lambda logprobs, entropies, part: -logprobs).loss.backward()
    assert shapes == {(5, 7), (5, 3), *([(7, 3)] if trained else [])}
    assert hidden.grad is not None
    assert (weight.grad is not None) == trained


def test_fresh_adapters_change_nothing_yet(policy: Path, groups: Groups, tmp_path: Path) -> None:
    first = first_round(FOUR_STEPS, policy, groups, tmp_path / "with").metrics[0]
    plain = train_round(changed(FOUR_STEPS, lora=None), policy, groups, tmp_path / "without").metrics[0]
    assert first["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert first["ratio_min"] == pytest.approx(1.0, abs=1e-4)
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-4)


def test_operations_that_a_frozen_weight_does_not_cost_are_not_counted(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    def operations(update: Trained) -> float:
        return update.metrics[0]["tflops"] * update.metrics[0]["seconds"]

    with_lora = first_round(targets("q_proj"), policy, groups, tmp_path / "with")
    plain = train_round(changed(ONE_STEP, lora=None), policy, groups, tmp_path / "without")
    # 2 x 4 x 32 trained weights beside some ten thousand.
    assert operations(with_lora) / operations(plain) == pytest.approx(2 / 3, rel=0.05)


# ---- the policy that is written ----


@pytest.fixture(scope="session")
def untied(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose head is not its embedding."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("untied")
    config = LlamaConfig.from_pretrained(policy)
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["policy", "untied"])
def test_the_policy_that_is_written_is_one_as_any_other(
    request: pytest.FixtureRequest, groups: Groups, tmp_path: Path, kind: str
) -> None:
    start: Path = request.getfixturevalue(kind)
    ours = first_round(FOUR_STEPS, start, groups, tmp_path / "with")
    plain = train_round(changed(FOUR_STEPS, lora=None), start, groups, tmp_path / "without")
    files = sorted(path.name for path in ours.policy.iterdir())
    assert files == sorted(path.name for path in plain.policy.iterdir())
    for name in set(files) - {"model.safetensors"}:
        assert (ours.policy / name).read_bytes() == (plain.policy / name).read_bytes(), name
    found, wanted = ours.weights, plain.weights
    assert {name: (w.shape, w.dtype) for name, w in found.items()} == {
        name: (w.shape, w.dtype) for name, w in wanted.items()
    }
    before = tensors(start / "model.safetensors")
    merged = {
        f"{layer}.weight": before[f"{layer}.weight"] + SCALE * b @ a
        for layer, (a, b) in by_layer(ours.adapters).items()
    }
    assert {name.split(".")[-2] for name in merged} == LINEAR
    for name in found:
        torch.testing.assert_close(
            found[name], merged.get(name, before[name]), rtol=0.0, atol=1e-6 if name in merged else 0.0
        )
    assert all(not torch.equal(found[name], before[name]) for name in merged)
    assert sorted(path.name for path in ours.state.iterdir()) == [ADAPTERS, "optimizer.safetensors", RECORD]


def test_the_merged_policy_gives_the_log_probs_of_base_and_adapters(
    policy: Path, groups: Groups, tmp_path: Path, forward_logprobs: Any
) -> None:
    update = first_round(FOUR_STEPS, policy, groups, tmp_path)
    by_hand, furthest, moved = ByHand(policy, update.adapters), 0.0, 0.0
    for row in itertools.chain.from_iterable(groups):
        with torch.no_grad():
            expected = by_hand.logprobs(row).numpy()
        at = np.arange(len(row.completion_ids)), row.completion_ids
        found, before = (
            forward_logprobs(folder, row.prompt_ids, row.completion_ids)[at] for folder in (update.policy, policy)
        )
        furthest = max(furthest, np.abs(found - expected).max())
        moved = max(moved, np.abs(found - before).max())
    assert furthest < 1e-5
    assert moved > 0.1


def test_in_bfloat16_adapters_and_policy_are_kept_in_float32(policy: Path, groups: Groups, tmp_path: Path) -> None:
    update = first_round(
        changed(FOUR_STEPS, dtype="bfloat16", devices=DevicesParams(device="cpu")), policy, groups, tmp_path
    )
    assert {tensor.dtype for tensor in [*update.weights.values(), *update.adapters.values()]} == {torch.float32}


def test_layers_in_the_form_of_gpt2_are_merged_as_they_are_stored(policy: Path, groups: Groups, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    shape = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 128,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    }
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **shape)
    start = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    update = first_round(FOUR_STEPS, start, groups, tmp_path / "0")
    before = tensors(start / "model.safetensors")
    a, b = by_layer(update.adapters)["transformer.h.0.attn.c_attn"]
    assert b.shape == (96, 4)
    torch.testing.assert_close(
        update.weights["transformer.h.0.attn.c_attn.weight"],
        before["transformer.h.0.attn.c_attn.weight"] + SCALE * (b @ a).T,
        rtol=0.0, atol=1e-6,
    )  # fmt: skip
    assert update.weights.keys() == before.keys()


# ---- from round to round, and within one ----


def test_two_rounds_with_stored_state_are_one_continuous_run(policy: Path, groups: Groups, tmp_path: Path) -> None:
    first = first_round(FOUR_STEPS, policy, groups[:2], tmp_path / "0")
    second = train_round(FOUR_STEPS, first.policy, groups[2:], tmp_path / "1", state=first.state, reference=policy)
    whole = first_round(FOUR_STEPS, policy, groups, tmp_path / "whole")
    assert same(second.adapters, whole.adapters)
    assert same(second.moments, whole.moments)
    assert digest(second.policy) == digest(whole.policy)
    assert not same(first.adapters, second.adapters)


def test_the_last_good_policy_of_a_round_that_breaks_is_merged_too(
    policy: Path, groups: Groups, tmp_path: Path
) -> None:
    # No token is that unlikely: its ratio is beyond all numbers.
    rows = [*groups[:3], [replace(groups[3][0], logprobs=[-200.0] * len(groups[3][0].logprobs), advantage=-1.0)]]
    with pytest.raises(StageError, match="not finite"):
        first_round(changed(FOUR_STEPS, max_broken_steps=1), policy, rows, tmp_path / "0")
    good = first_round(FOUR_STEPS, policy, groups[:3], tmp_path / "1")
    assert same(tensors(tmp_path / "0/work/last_good/model.safetensors"), good.weights)


@pytest.mark.parametrize("after", [1, 3])
def test_a_round_that_was_ended_goes_on_as_if_it_had_not_been(
    policy: Path, groups: Groups, tmp_path: Path, after: int
) -> None:
    whole = first_round(FOUR_STEPS, policy, groups, tmp_path / "whole")
    # Its last step is done and told before it is saved.
    with pytest.raises(StoppedError):
        train_round(FOUR_STEPS, policy, groups, tmp_path / "ended", reference=policy, stop_after=after)
    again = first_round(FOUR_STEPS, policy, groups, tmp_path / "ended")
    assert again.told == [after, *[1] * (4 - after)]
    assert digest(again.policy) == digest(whole.policy)
    assert digest(again.state) == digest(whole.state)
    assert again.without_clock[after:] == whole.without_clock[after:]


def test_the_seed_of_the_run_draws_the_first_adapters(policy: Path, groups: Groups, tmp_path: Path) -> None:
    one, again, other = (
        train_round(ONE_STEP, policy, groups, tmp_path / str(number), reference=policy, seed=seed)
        for number, seed in enumerate([0, 0, 1])
    )
    assert same(one.adapters, again.adapters)
    name = next(iter(by_layer(one.adapters)))
    assert apart({"A": by_layer(one.adapters)[name][0]}, {"A": by_layer(other.adapters)[name][0]}) > 0.5


def test_fresh_adapters_are_as_the_method_starts_them(policy: Path) -> None:
    model, _ = load_policy(policy, device="cpu")
    lay(model, LORA, seed=3)
    made = by_layer({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert len(made) == len(LINEAR)
    for name, (a, b) in made.items():
        assert a.shape[0] == b.shape[1] == LORA.rank
        assert torch.count_nonzero(b) == 0
        # Uniform between -1 and 1 over the root of the width.
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound, name
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert len({tuple(a[0, :4].tolist()) for a, _ in made.values()}) == len(made)


# ---- what is refused ----


def test_fresh_adapters_over_another_base_are_refused(
    policy: Path, untied: Path, groups: Groups, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is not the base") as caught:
        train_round(ONE_STEP, policy, groups, tmp_path / "0", reference=untied)
    assert caught.value.where == str(policy)
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, LORA, "is of all weights, and train.lora asks for adapters of rank 4 and alpha 6 over all-linear"),
        (LORA, None, "is of adapters of rank 4 and alpha 6 over all-linear, and train.lora asks for all weights"),
        (LORA, LoraParams(rank=8, alpha=6.0), "asks for adapters of rank 8"),
        (LORA, LoraParams(rank=4, alpha=8.0), "asks for adapters of rank 4 and alpha 8"),
        (LORA, LoraParams(rank=4, alpha=6.0, targets=["q_proj", "o_proj"]), "over q_proj, o_proj"),
    ],
    ids=["none, then some", "some, then none", "rank", "alpha", "targets"],
)
def test_a_state_of_other_adapters_or_of_none_is_refused(
    policy: Path, groups: Groups, tmp_path: Path, before: LoraParams | None, after: LoraParams | None, said: str
) -> None:
    first = first_round(changed(ONE_STEP, lora=before), policy, groups, tmp_path / "0")
    with pytest.raises(CheckpointError, match=said) as caught:
        train_round(
            changed(ONE_STEP, lora=after), first.policy, groups, tmp_path / "1", state=first.state, reference=policy
        )
    assert caught.value.where == str(first.state)
    assert caught.value.fix == "keep train.lora within a run"
    assert not (tmp_path / "1").exists()


def test_a_state_whose_base_is_another_is_refused(policy: Path, untied: Path, groups: Groups, tmp_path: Path) -> None:
    first = first_round(ONE_STEP, policy, groups, tmp_path / "0")
    with pytest.raises(CheckpointError, match="the adapters were laid over") as caught:
        train_round(ONE_STEP, first.policy, groups, tmp_path / "1", state=first.state, reference=untied)
    assert caught.value.where == str(untied)


def test_a_state_beside_another_policy_is_refused(policy: Path, groups: Groups, tmp_path: Path) -> None:
    first = first_round(ONE_STEP, policy, groups, tmp_path / "0")
    with pytest.raises(CheckpointError, match="was written beside policy"):
        train_round(ONE_STEP, policy, groups, tmp_path / "1", state=first.state, reference=policy)


@pytest.mark.parametrize("harm", ["gone", "empty", "one missing"])
def test_damaged_adapters_are_a_checkpoint_error(policy: Path, groups: Groups, tmp_path: Path, harm: str) -> None:
    from safetensors.torch import save_file

    first = first_round(ONE_STEP, policy, groups, tmp_path / "0")
    kept = first.adapters
    kept.popitem()
    (first.state / ADAPTERS).unlink()
    if harm == "empty":
        (first.state / ADAPTERS).write_bytes(b"")
    elif harm == "one missing":
        save_file(kept, first.state / ADAPTERS)
    said = "does not fit the policy" if harm == "one missing" else "cannot be loaded"
    with pytest.raises(CheckpointError, match=said):
        train_round(ONE_STEP, first.policy, groups, tmp_path / "1", state=first.state, reference=policy)


@pytest.mark.parametrize(
    ("names", "culprit"),
    [
        (["nothing"], "'nothing' is no linear layer"),
        (["q_proj", "nothing"], "'nothing' is no linear layer"),
        (["proj"], "'proj' is no linear layer"),  # only whole parts of a name end it
        ([""], "'' is no linear layer"),
        (["lm_head"], "'lm_head' is no linear layer"),
        (["embed_tokens"], "'embed_tokens' is no linear layer"),
        (["self_attn"], "'self_attn' is no linear layer"),
        (["input_layernorm"], "'input_layernorm' is no linear layer"),
        ([], "no module is named"),
    ],
)
@pytest.mark.parametrize("kind", ["policy", "untied"])
def test_targets_that_are_no_layers_of_the_model_are_refused(
    request: pytest.FixtureRequest, groups: Groups, tmp_path: Path, names: list[str], culprit: str, kind: str
) -> None:
    start = request.getfixturevalue(kind)
    with pytest.raises(ParamsError, match=culprit) as caught:
        first_round(targets(*names), start, groups, tmp_path / "0")
    assert caught.value.where == "train.lora.targets"
    assert "down_proj, gate_proj, k_proj" in caught.value.fix
    assert not (tmp_path / "0").exists()


def test_a_model_without_linear_layers_is_refused() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(2, 2)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    with pytest.raises(ParamsError, match="Bare has no linear layers"):
        lay(Bare(), LORA, seed=0)  # type: ignore[arg-type]  # no model of transformers


def test_without_peft_a_person_is_told_what_to_install(
    policy: Path, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_policy(policy, device="cpu")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SetupError, match="training asks for: peft") as caught:
        first_round(ONE_STEP, policy, groups, tmp_path / "0")
    assert "papo[lora]" in caught.value.fix
    with pytest.raises(SetupError, match="peft is not installed"):
        lay(model, LORA, seed=0)


def test_versions_name_peft_where_it_took_part() -> None:
    def of(params: TrainParams) -> set[str]:
        return set(GrpoTrainer(params, temperature=1.0, max_new_tokens=24, seed=0).versions())

    assert of(ONE_STEP) - of(changed(ONE_STEP, lora=None)) == {"peft"}


# ---- in the pipeline ----


def test_a_run_with_adapters(started_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for one in ("train.lora.rank=4", "run.rounds=2") for word in ("--set", one)]
    assert main(["run", "--no-dvc", *given]) == 0, capsys.readouterr().err
    warmstart = tensors(Path("artifacts/warmstart/model.safetensors"))
    for number in (0, 1):
        folder = Path(f"artifacts/rounds/{number}")
        assert {path.name for path in (folder / "trainer").iterdir()} == {ADAPTERS, "optimizer.safetensors", RECORD}
        adapters = tensors(folder / "trainer" / ADAPTERS)
        assert {a.shape[0] for a, _ in by_layer(adapters).values()} == {4}
        assert tensors(folder / "policy/model.safetensors").keys() == warmstart.keys()
        record = json.loads((folder / "trainer" / RECORD).read_text())
        assert record["lora"] == {"rank": 4, "alpha": 32.0, "targets": "all-linear"}
        assert record["base"] == digest(Path("artifacts/warmstart"))
        assert record["policy"] == digest(folder / "policy")
        manifest = json.loads((folder / "policy.manifest.json").read_text())
        assert "peft" in json.dumps(manifest)
    assert not main(["run", "--no-dvc", *given])  # nothing is left to do
    # A round that is lost is made again, from base and adapters of the round before, the same.
    before = digest(Path("artifacts/rounds/1/policy"))
    for name in ("policy", "trainer"):
        shutil.rmtree(f"artifacts/rounds/1/{name}")
    assert main(["train", "--round", "1", *given]) == 0
    assert digest(Path("artifacts/rounds/1/policy")) == before
