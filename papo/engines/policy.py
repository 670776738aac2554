"""A policy on disk: a folder in Hugging Face form, loaded from safetensors only."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.errors import CheckpointError, SetupError
from papo.store.files import digest, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TRUSTED = "PAPO_TRUSTED_CODE"
"""The environment variable by which `allow_code` reaches the processes that papo starts: names, a line each."""

ORIGIN = "papo_code.json"
"""In a policy that runs Python code of its own: where the code is from, and the digest of each of its files."""

LIBRARIES = {
    "warmstart": ("torch", "transformers", "trl.trainer.sft_trainer"),
    "rollout": ("torch", "transformers"),
    "train": ("torch", "transformers"),
    "evaluate": ("torch", "transformers"),
}


def import_libraries(stage: str) -> None:
    """Imports what a stage will need, so that the time of its first run is not that of its imports."""
    for name in LIBRARIES.get(stage, ()):
        importlib.import_module(name)
    if stage in LIBRARIES:
        # The stages show progress of their own.
        importlib.import_module("transformers.utils.logging").disable_progress_bar()


def load_policy(
    policy: Path, *, dtype: str = "float32", device: str | None = None, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of the folder `policy`.

    Args:
        device: None: the GPU where there is one.
        attention: as `train.attention`.

    Raises:
        CheckpointError: the folder is none, or holds no model, no safetensors or no tokenizer, or they cannot be loaded.
        SetupError: this model does not go with the attention here.
    """
    import torch

    _check_files(policy)
    model, tokenizer = load_checkpoint(
        str(policy), dtype=dtype, where=str(policy), fix="save it anew with save_pretrained", local_files_only=True,
        attention=attention,
    )  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def load_settings(policy: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of the folder `policy`, whose weights are not read.

    Raises:
        CheckpointError: as `load_policy`, of what can be seen without the weights.
    """
    from transformers import AutoConfig, AutoTokenizer

    _check_files(policy)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": _runs_code(str(policy), None)}
    try:
        config = AutoConfig.from_pretrained(str(policy), **source)
        tokenizer = AutoTokenizer.from_pretrained(str(policy), **source)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"config or tokenizer cannot be loaded: {_first_line(error)}",
            where=str(policy),
            fix="save them anew with save_pretrained",
        ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError("the tokenizer names no end-of-text token", where=str(policy), fix="set eos_token in it")
    return config, tokenizer


def _check_files(policy: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (policy / name).is_file():
            raise CheckpointError(
                f"not a policy: {name} is missing", where=str(policy), fix="name a folder in Hugging Face form"
            )
    if not any(policy.glob("*.safetensors")):
        raise CheckpointError(
            "not a policy: there are no *.safetensors", where=str(policy), fix="save the model with save_pretrained"
        )


def load_checkpoint(
    name: str,
    *,
    dtype: str,
    where: str,
    fix: str,
    revision: str | None = None,
    local_files_only: bool = False,
    attention: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or a model id of the hub: safetensors only, every weight there, and no code of its own unless
    `allow_code` names it.

    Raises:
        CheckpointError: with `where` and `fix`, whatever the reason; but for the attention:
        SetupError: this model does not go with it here.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = _runs_code(name, revision)
    source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": trusted}
    _refuse_pickle(name, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            attn_implementation=attention, **source,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if attention is not None and isinstance(error, ValueError | ImportError) and "attention" in str(error).lower():
            raise SetupError(
                f"the model does not go with this attention here: {_first_line(error)}",
                where=f"train.attention = {attention}, {where}",
                fix="set train.attention to null, or install what is missing",
            ) from error
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                "the checkpoint needs Python code of its own, which papo does not run unless it is allowed by name",
                where=where,
                fix=f"read that code first; then name it: warmstart.trust_code: [{_exact(name, revision or 'REVISION')}]",
            ) from error
        raise CheckpointError(f"the model cannot be loaded: {_first_line(error)}", where=where, fix=fix) from error
    # transformers fills what is missing with random numbers and goes on.
    mismatched = {str(key[0]) for key in loading["mismatched_keys"]}
    if absent := sorted(set(loading["missing_keys"]) | mismatched):
        raise CheckpointError(
            f"{len(absent)} weights are missing or of another shape than config.json says, the first is {absent[0]}",
            where=where,
            fix=fix,
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError("the tokenizer names no end-of-text token", where=where, fix="set eos_token in it")
    for key in ("is_local", "local_files_only"):
        # How it was loaded is no part of it: saved with it, the digest of a policy would depend on HF_HUB_OFFLINE.
        tokenizer.init_kwargs.pop(key, None)
    return model, tokenizer


def allow_code(names: Sequence[str]) -> None:
    """Lets the checkpoints named, `name@revision` or a folder, run Python code of their own, here and in processes started from here."""
    os.environ[TRUSTED] = "\n".join(names)


def keep_origin(before: Path, after: Path, *, name: str | None = None, revision: str | None = None) -> None:
    """Says in the policy `after`, if it has code of its own, that this is the code of `before`, or of the checkpoint named."""
    files = {path.name: digest(path) for path in sorted(after.glob("*.py"))}
    if files:
        origin = _exact(name, revision) if name is not None else read_json(before / ORIGIN)["checkpoint"]
        write_json(after / ORIGIN, {"checkpoint": origin, "files": files})


def _exact(name: str, revision: str | None) -> str:
    """What names a checkpoint so that it cannot become another: a folder, or a model id with its revision."""
    return name if Path(name).is_dir() or revision is None else f"{name}@{revision}"


def _runs_code(name: str, revision: str | None) -> bool:
    """Whether `allow_code` names this checkpoint, or the one that the code of this policy is from, unchanged."""
    names = os.environ.get(TRUSTED, "").split("\n")
    folder = Path(name)
    if folder.is_dir() and (folder / ORIGIN).is_file():
        origin = read_json(folder / ORIGIN)
        files = {path.name: digest(path) for path in sorted(folder.glob("*.py"))}
        return bool(origin["checkpoint"] in names and origin["files"] == files)
    return (folder.is_dir() or revision is not None) and _exact(name, revision) in names


def _refuse_pickle(name: str, where: str) -> None:
    """A folder whose weights are no safetensors; a pickled file can run anything as it is read."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(
        path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(kind)
    ):
        raise CheckpointError(
            f"the weights are pickled ({pickled[0]}), which papo never reads: a pickled file can run any code",
            where=where,
            fix="where you trust it, load it and save it anew with save_pretrained, which writes *.safetensors",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt: as one user turn where the tokenizer has a chat template, else as plain text,
    with the special tokens (such as BOS) that the tokenizer puts in front of it."""
    if tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in ids]
    return [int(token) for token in tokenizer(prompt)["input_ids"]]
