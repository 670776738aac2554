"""What training cannot be done with: told by what is wrong, where and what to do, before a weight is changed, most of it before a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from failures import failure
from train_tables import inputs_of, run_stage

from papo.engines.policy import load_policy
from papo.engines.protocols import TrainRow
from papo.engines.training import check_trainer, checks
from papo.errors import CheckpointError, DataError, PapoError, ParamsError, SetupError
from papo.params import ModelParams, TrainParams, WarmstartParams
from papo.stages.train import Inputs
from papo.store.files import read_json, write_json

Groups = Sequence[Sequence[TrainRow]]
Bare = Callable[..., None]

PLAIN = TrainParams(minibatch_prompts=2)
WITH_KL = TrainParams(minibatch_prompts=2, kl={"coefficient": 0.1})


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Bare:
    """Makes the machine one with so many GPUs and packages; none, unless told otherwise."""

    def make(*packages: str, gpu: bool = False) -> None:
        monkeypatch.setattr(checks, "_gpu", lambda: gpu)
        monkeypatch.setattr(checks, "_found", lambda module: module in packages)

    make()
    return make


def params(**change: Any) -> TrainParams:
    return TrainParams.model_validate(change)


# ---- before a run ----


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        ({"devices": {"device": "cuda"}}, "a GPU that torch can use", "train.devices.device = cuda"),
        ({"attention": "flash_attention_2"}, "a GPU that torch can use", "train.attention = flash_attention_2"),
        ({"attention": "flash_attention_2"}, "the package flash-attn", "train.attention = flash_attention_2"),
        ({"attention": "flash_attention_3"}, "the package flash-attn-3", "train.attention = flash_attention_3"),
        ({"attention": "kernels-community/flash-attn3"}, "the package kernels", "train.attention = kernels-community/"),
        ({"dtype": "bfloat16"}, "a GPU that torch can use", "train.dtype = bfloat16"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes", "train.optimizer = adamw_8bit"),
        ({"lora": {"rank": 4}}, "peft", "train.lora"),
    ],
)
def test_what_the_machine_lacks_is_named_by_the_key_that_asks_for_it(
    bare: Bare, change: Mapping[str, Any], what: str, where: str
) -> None:
    lacking = failure(SetupError, lambda: check_trainer(params(**change)))
    assert lacking.what.startswith("this machine lacks what training asks for: ")
    assert what in lacking.what
    assert where in lacking.where
    bare("flash_attn", "flash_attn_interface", "kernels", "bitsandbytes", "peft", gpu=True)
    check_trainer(params(**change))


def test_all_that_is_lacking_is_told_at_once(bare: Bare) -> None:
    asked = params(devices={"device": "cuda"}, attention="flash_attention_2", dtype="bfloat16", optimizer="adamw_8bit")
    lacking = failure(SetupError, lambda: check_trainer(asked))
    assert lacking.where == (
        "train.devices.device = cuda, train.attention = flash_attention_2, train.optimizer = adamw_8bit"
    )
    assert lacking.what == (
        "this machine lacks what training asks for: a GPU that torch can use; the package flash-attn; bitsandbytes"
    )
    for fix in ("run it on a machine with one", "pip install flash-attn", "optimizer-8bit"):
        assert fix in lacking.fix


def test_what_needs_nothing_is_not_refused(bare: Bare) -> None:
    check_trainer(TrainParams())
    check_trainer(params(dtype="bfloat16", devices={"device": "cpu"}))
    for name in ("eager", "sdpa", "flex_attention"):
        check_trainer(params(attention=name))
    bare("kernels", gpu=True)
    check_trainer(params(attention="flash_attention_2"))  # transformers takes it from the hub


def test_an_unknown_attention_is_refused_with_the_nearest_that_there_is(bare: Bare) -> None:
    unknown = failure(ParamsError, lambda: check_trainer(params(attention="flash_attn_2")))
    assert unknown.what == "there is no attention 'flash_attn_2'; did you mean flash_attention_2?"
    assert unknown.where == "train.attention"
    assert "sdpa" in unknown.fix
    assert failure(ParamsError, lambda: check_trainer(params(attention="xx"))).what == "there is no attention 'xx'"


def test_the_attentions_are_those_of_transformers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    assert set(checks.ATTENTIONS) == {name for name in known if "|" not in name}


def test_the_default_is_checked_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_gpu", lambda: pytest.fail("torch was imported"))
    check_trainer(TrainParams())


# ---- through the stage ----


@pytest.fixture
def refused(policy: Path, groups: Groups, tmp_path: Path) -> Callable[..., PapoError]:
    """The error of a stage, which has written nothing."""

    def run(kind: type[PapoError], params: TrainParams, rows: Groups = groups, **change: Any) -> PapoError:
        inputs = inputs_of(tmp_path / "tables", **{"policy": policy, "groups": rows} | change)
        return refusal(kind, params, inputs, tmp_path / "out")

    return run


def refusal(kind: type[PapoError], params: TrainParams, inputs: Inputs, folder: Path) -> PapoError:
    error = failure(kind, lambda: run_stage(params, inputs, folder))
    assert not folder.exists() or [path for path in folder.rglob("*") if path.is_file()] == []
    return error


def test_a_gpu_that_is_not_there(bare: Bare, refused: Callable[..., PapoError]) -> None:
    error = refused(SetupError, params(devices={"device": "cuda"}))
    assert "a GPU that torch can use" in error.what
    assert "devices.device to auto" in error.fix


def test_an_attention_that_the_model_does_not_go_with(policy: Path) -> None:
    error = failure(SetupError, lambda: load_policy(policy, device="cpu", attention="flash_attention_2"))
    assert "does not go with this attention" in error.what
    assert error.where == f"train.attention = flash_attention_2, {policy}"
    assert failure(CheckpointError, lambda: load_policy(policy / "none", attention="sdpa")).where == str(
        policy / "none"
    )


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("token", [20, -1, 2**31 - 1])
def test_a_token_that_the_policy_does_not_have(
    refused: Callable[..., PapoError], groups: Groups, column: str, token: int
) -> None:
    rows = [list(group) for group in groups]
    rows[2][1] = replace(rows[2][1], **{column: [*getattr(rows[2][1], column)[:-1], token]})
    error = refused(DataError, PLAIN, rows)
    assert error.what == f"token {token} in {column} is none of the 20 of the policy"
    assert error.where == "rollouts, row p2/1"
    assert "run rollout of this round again" in error.fix


def model(folder: Path, vocabulary: int | None = None, **shape: int) -> Path:
    """A policy of another shape or vocabulary."""
    from papo.engines.tokenizer import build_tokenizer
    from papo.engines.warmstart import _build_model

    sizes = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2} | shape
    tokenizer = build_tokenizer()
    if vocabulary is not None:
        tokenizer.add_tokens([f"<{number}>" for number in range(vocabulary - len(tokenizer))])
    _build_model(WarmstartParams(model=ModelParams(**sizes)), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def other_tokens(policy: Path, folder: Path) -> Path:
    """The same weights, with two tokens that have changed places."""
    shutil.copytree(policy, folder)
    content = read_json(folder / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    write_json(folder / "tokenizer.json", content)
    return folder


@pytest.mark.parametrize("shape", [{"layers": 2}, {"intermediate_size": 32}], ids=str)
def test_a_reference_of_another_architecture(
    refused: Callable[..., PapoError], tmp_path: Path, shape: dict[str, int]
) -> None:
    other = model(tmp_path / "other", **shape)
    error = refused(CheckpointError, WITH_KL, reference=other)
    assert error.what.startswith("the reference is of another architecture than the policy: model.layers.")
    assert error.where == str(other)


def test_a_reference_with_another_tokenizer(refused: Callable[..., PapoError], policy: Path, tmp_path: Path) -> None:
    other = other_tokens(policy, tmp_path / "other")
    error = refused(CheckpointError, WITH_KL, reference=other)
    assert "the reference has another tokenizer than the policy: '3' is " in error.what
    assert error.where == str(other)
    larger = model(tmp_path / "larger", vocabulary=24)
    error = refused(CheckpointError, WITH_KL, reference=larger)
    assert error.what.endswith("'<0>' is 20 there and no token here")


def test_a_policy_with_another_tokenizer_than_the_one_that_sampled(
    groups: Groups, policy: Path, tmp_path: Path
) -> None:
    inputs = inputs_of(tmp_path / "tables", policy, groups)
    other = other_tokens(policy, tmp_path / "other")
    error = refusal(CheckpointError, PLAIN, replace(inputs, policy=other), tmp_path / "out")
    assert "the rollouts were sampled from policy" in error.what
    assert error.where == str(other)
    assert error.fix == "run rollout of this round again"


def test_the_state_of_another_policy_model_or_optimizer(
    refused: Callable[..., PapoError], policy: Path, groups: Groups, tmp_path: Path, bare: Bare
) -> None:
    run_stage(PLAIN, inputs_of(tmp_path / "0", policy, groups), tmp_path / "0")
    state = tmp_path / "0" / "trainer"
    # It belongs to the policy that came out, not to the one that went in.
    error = refused(CheckpointError, PLAIN, state=state)
    assert error.what.startswith("the optimizer state was written beside policy ")
    assert error.where == str(state)
    assert "delete that round and run it again" in error.fix
    other = model(tmp_path / "other", layers=2)
    error = refused(CheckpointError, PLAIN, state=state, policy=other)
    assert "the optimizer state does not fit the policy: model.layers.1." in error.what
    assert error.where == str(state / "optimizer.safetensors")
    record = read_json(state / "trainer.json") | {"optimizer": "adamw_8bit"}
    write_json(state / "trainer.json", record)
    error = refused(CheckpointError, PLAIN, state=state)
    assert error.what == "the optimizer state is of adamw_8bit, and train.optimizer is adamw"
