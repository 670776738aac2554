"""A policy on disk: a folder in Hugging Face form, loaded from safetensors only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from papo.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LIBRARIES = {
    "warmstart": ("torch", "transformers", "trl.trainer.sft_trainer"),
    "rollout": ("torch", "transformers"),
    "train": ("torch", "transformers", "trl.trainer.grpo_trainer"),
    "evaluate": ("torch", "transformers"),
}


def import_libraries(stage: str) -> None:
    """Imports what a stage will need, so that the time of its first run is not that of its imports."""
    for name in LIBRARIES.get(stage, ()):
        importlib.import_module(name)
    if stage in LIBRARIES:
        # The stages show progress of their own.
        importlib.import_module("transformers.utils.logging").disable_progress_bar()


def load_policy(policy: Path, *, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of the folder `policy`, on the GPU where there is one.

    Raises:
        CheckpointError: the folder is none, or holds no model, no safetensors or no tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("config.json", "tokenizer.json"):
        if not (policy / name).is_file():
            raise CheckpointError(
                f"not a policy: {name} is missing", where=str(policy), fix="name a folder in Hugging Face form"
            )
    if not any(policy.glob("*.safetensors")):
        raise CheckpointError(
            "not a policy: there are no *.safetensors", where=str(policy), fix="save the model with save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            policy, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the policy cannot be loaded: {error}", where=str(policy), fix="save it anew with save_pretrained"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt: as one user turn where the tokenizer has a chat template, else as plain text."""
    if tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in ids]
    return [int(token) for token in tokenizer(prompt, add_special_tokens=False)["input_ids"]]
