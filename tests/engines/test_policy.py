"""Policies on disk: what is refused and how it is named; prompts with and without a chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from papo.engines.policy import LIBRARIES, encode_prompt, import_libraries, load_policy
from papo.engines.tokenizer import build_tokenizer
from papo.errors import CheckpointError

WEIGHTS = "model.safetensors"


def _rewrite(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])


def _lose_a_weight(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def _reshape_a_weight(folder: Path) -> None:
    import torch

    _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def _pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _forget_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"no \*.safetensors"),
    "pickled weights only": (_pickle, r"no \*.safetensors"),
    "corrupt weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"no safetensors" * 9), "cannot be loaded"),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be loaded"),
    "truncated weights": (_truncate, "cannot be loaded"),
    "a weight missing": (_lose_a_weight, "up_proj"),
    "a weight of another shape": (_reshape_a_weight, "model.norm.weight"),
    "corrupt config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    "unknown model": (lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'), "cannot be loaded"),
    "corrupt tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
    "no end of text": (_forget_eos, "no end-of-text token"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_policy_is_refused_by_name(policy: Path, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_policy(folder)
    assert caught.value.where == str(folder)
    assert caught.value.fix


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_policy(tmp_path / "nothing")


def test_a_policy_loads_in_float32_with_the_weights_that_were_saved(policy: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model, tokenizer = load_policy(policy)
    saved = load_file(policy / WEIGHTS)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name].cpu(), saved[name]) for name in saved)
    assert {parameter.dtype for parameter in loaded.values()} == {torch.float32}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    assert load_policy(folder)[1].pad_token_id == 1


def test_a_prompt_is_plain_text_without_a_chat_template() -> None:
    tokenizer = build_tokenizer()
    ids = encode_prompt(tokenizer, "3+5=?\n")
    assert tokenizer.decode(ids) == "3+5=?\n"
    assert all(type(token) is int for token in ids)


def test_a_prompt_is_a_user_turn_with_a_chat_template() -> None:
    tokenizer = build_tokenizer()
    # Only symbols of the vocabulary: a user turn is between ? and =, the answer begins after a 0.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}?{{ m['content'] }}={% endif %}{% endfor %}"
        "{% if add_generation_prompt %}0{% endif %}"
    )
    ids = encode_prompt(tokenizer, "3+5")
    assert tokenizer.decode(ids) == "?3+5=0"
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize("stage", [*LIBRARIES, "prepare"])
def test_the_libraries_named_for_a_stage_can_be_imported(stage: str) -> None:
    import_libraries(stage)
