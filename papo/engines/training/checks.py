"""What training needs of the machine and of what it is given; what can be seen without loading anything is seen before a run starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from papo.engines.protocols import TrainRow
from papo.errors import CheckpointError, DataError, ParamsError, SetupError
from papo.params import TrainParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
"""Names of `train.attention` that run on a GPU alone: the module and the package of each."""
ATTENTIONS = ("eager", "sdpa", "flex_attention", *FLASH)


def check_trainer(params: TrainParams) -> None:
    """For the start of a run, hours before it trains.

    Raises:
        ParamsError: there is no such attention.
        SetupError: naming all that the params ask for and this machine lacks.
    """
    name = params.attention
    if name is not None and name not in ATTENTIONS and "/" not in name:
        close = difflib.get_close_matches(name, ATTENTIONS, n=1)
        raise ParamsError(
            f"there is no attention {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
            where="train.attention",
            fix=f"take one of {', '.join(ATTENTIONS)}, a kernel of the hub as org/name, or null",
        )
    if lacking := list(_lacking(params)):
        raise SetupError(
            "this machine lacks what training asks for: " + "; ".join(what for _, what, _ in lacking),
            where=", ".join(dict.fromkeys(key for keys, _, _ in lacking for key in keys.split(", "))),
            fix="; ".join(dict.fromkeys(fix for _, _, fix in lacking)),
        )


def _lacking(params: TrainParams) -> Iterator[tuple[str, str, str]]:
    """Keys with their values, what they lack, what to do."""
    name, wanted = params.attention, params.devices.device
    flash = name in FLASH
    asking = {}
    if wanted == "cuda":
        asking["train.devices.device = cuda"] = "train.devices.device to auto"
    if flash:
        asking[f"train.attention = {name}"] = "train.attention to null"
    if params.dtype == "bfloat16" and wanted == "auto":
        # On a CPU it is slower than float32 and saves nothing, as the weights are float32; it is there for whoever wants it.
        asking["train.dtype = bfloat16"] = "train.dtype to float32 (or train.devices.device to cpu, to compute so here)"
    if asking and not _gpu():
        fix = "run it on a machine with one (python -m torch.utils.collect_env says what torch sees), or set "
        yield ", ".join(asking), "a GPU that torch can use", fix + " and ".join(asking.values())
    if name is not None and flash and not _found(FLASH[name][0]) and not _found("kernels"):
        package = FLASH[name][1]
        yield (
            f"train.attention = {name}",
            f"the package {package}",
            f"pip install {package}, or set train.attention to null",
        )
    if name is not None and "/" in name and not _found("kernels"):
        yield (
            f"train.attention = {name}",
            "the package kernels",
            "pip install kernels, or set train.attention to null",
        )
    if params.optimizer == "adamw_8bit" and not _found("bitsandbytes"):
        yield (
            "train.optimizer = adamw_8bit",
            "bitsandbytes",
            'pip install "papo[optimizer-8bit]", or set train.optimizer to adamw',
        )
    if params.lora is not None and not _found("peft"):
        yield "train.lora", "peft", 'pip install "papo[lora]", or set train.lora to null'
    processes = params.devices.processes
    if processes > 1 and wanted != "cpu" and _gpu() and (there := _gpus()) < processes:
        yield (
            f"train.devices.processes = {processes}",
            f"{processes} GPUs, of which torch sees {there}",
            f"set train.devices.processes to {there}, look at CUDA_VISIBLE_DEVICES, or set train.devices.device to cpu",
        )
    if processes > 1 and params.devices.kind == "deepspeed" and not _found("deepspeed"):
        yield (
            "train.devices.kind = deepspeed",
            "the package deepspeed",
            'pip install "papo[deepspeed]", or set train.devices.kind to fsdp, which shards what zero_stage 3 does',
        )


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _found(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name here is no package


def check_rows(groups: Sequence[Sequence[TrainRow]], vocabulary: int) -> None:
    """Refuses tokens that the model does not have; it would read beyond its table, or stop a GPU without saying where.

    Raises:
        DataError: naming the row.
    """
    for row in (row for group in groups for row in group):
        for column, ids in (("prompt_ids", row.prompt_ids), ("completion_ids", row.completion_ids)):
            if bad := [token for token in ids if not 0 <= token < vocabulary]:
                raise DataError(
                    f"token {bad[0]} in {column} is none of the {vocabulary} of the policy",
                    where=f"rollouts, row {row.problem_id}/{row.sample_index}",
                    fix="run rollout of this round again, with the policy that is to be trained",
                )


def check_same_tokens(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, where: Path) -> None:
    """Refuses a reference that reads the same ids as other text.

    Raises:
        CheckpointError: naming a token that is not the same.
    """
    mine, its = policy.get_vocab(), reference.get_vocab()
    if wrong := sorted(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token)):
        raise CheckpointError(
            f"the reference has another tokenizer than the policy: {wrong[0]!r} is {its.get(wrong[0], 'no token')} there and "
            f"{mine.get(wrong[0], 'no token')} here",
            where=str(where),
            fix="the reference is the warm start that the run began with; run warmstart and all rounds again",
        )
